//! Quantizing the constants of quantized blocks: less their mean, in eight bits of a dynamic map, with a
//! constant for each 256 of them.
//!
//! Source: Dettmers et al., "QLoRA" (arXiv 2305.14314); the map is that of "8-bit optimizers via block-wise
//! quantization" (arXiv 2110.02861), as bitsandbytes makes it.

use std::sync::OnceLock;

/// Constants per block of constants.
pub const NESTED_BLOCKSIZE: usize = 256;

/// Smaller maxima count as this one when constants get codes.
const LEAST_ABSMAX: f32 = 1e-38;

/// Scales in eight bits: `map[codes[i]] * absmax[i / 256] + offset`.
#[derive(Clone, Debug, PartialEq)]
pub struct NestedScales {
    /// One per block of the matrix.
    pub codes: Vec<u8>,
    /// One per 256 blocks.
    pub absmax: Vec<f32>,
    /// The scales' mean.
    pub offset: f32,
}

/// The signed dynamic map, ascending: seven decades below 1, the finer the larger, and zero.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: OnceLock<[f32; 256]> = OnceLock::new();
    MAP.get_or_init(|| {
        let mut map = vec![0.0, 1.0];
        for decade in 0..7 {
            let items = 1usize << decade;
            let factor = 10f64.powi(decade - 6) as f32;
            for pair in linspace(0.1, 1.0, items + 1).windows(2) {
                let value = factor * ((pair[0] + pair[1]) / 2.0);
                map.extend([value, -value]);
            }
        }
        map.sort_by(f32::total_cmp);
        let mut all = [0.0; 256];
        all.copy_from_slice(&map);
        all
    })
}

/// PyTorch's linspace in f32: from both ends towards the middle, by fused multiply-adds.
fn linspace(start: f32, end: f32, count: usize) -> Vec<f32> {
    let step = (end - start) / (count - 1) as f32;
    let value = |i: usize| {
        if i < count / 2 {
            step.mul_add(i as f32, start)
        } else {
            (-step).mul_add((count - 1 - i) as f32, end)
        }
    };
    (0..count).map(value).collect()
}

/// The nearest entry of an ascending map; of two equally near ones the lower.
pub fn nearest(map: &[f32; 256], x: f32) -> u8 {
    let above = map.partition_point(|level| *level < x);
    match above {
        0 => 0,
        256 => 255,
        _ => {
            let (low, high) = (f64::from(map[above - 1]), f64::from(map[above]));
            let x = f64::from(x);
            (if x - low <= high - x { above - 1 } else { above }) as u8
        }
    }
}

impl NestedScales {
    /// Quantizes scales. The mean is their sum in f64, ascending, divided and rounded once.
    pub fn quantize(scales: &[f32]) -> Self {
        let sum: f64 = scales.iter().map(|s| f64::from(*s)).sum();
        let offset = (sum / scales.len().max(1) as f64) as f32;
        let map = dynamic_map();
        let mut nested = NestedScales { codes: Vec::with_capacity(scales.len()), absmax: Vec::new(), offset };
        for block in scales.chunks(NESTED_BLOCKSIZE) {
            let absmax = block.iter().fold(0f32, |most, s| most.max((s - offset).abs()));
            let inverse = 1.0 / absmax.max(LEAST_ABSMAX);
            nested.codes.extend(block.iter().map(|s| nearest(map, (s - offset) * inverse)));
            nested.absmax.push(absmax);
        }
        nested
    }

    /// The scale of block `i`.
    pub fn scale(&self, i: usize) -> f32 {
        dynamic_map()[usize::from(self.codes[i])] * self.absmax[i / NESTED_BLOCKSIZE] + self.offset
    }
}
