//! The dynamic map: 256 numbers of at most 1, in seven decades, the finer the larger.
//!
//! Source: Dettmers et al., "8-bit optimizers via block-wise quantization" (arXiv 2110.02861), as bitsandbytes
//! makes it.

use std::sync::OnceLock;

/// Elements per block of moments in eight bits.
pub const MOMENTS_BLOCKSIZE: usize = 256;

/// The code of zero in the signed map.
pub const SIGNED_ZERO: u8 = 127;

/// A map from codes to numbers, ascending.
#[derive(Clone, Debug, PartialEq)]
pub struct DynamicMap {
    /// The numbers.
    pub levels: [f32; 256],
    /// Between neighbours, rounded down: `x` is nearer to the upper one iff it is larger.
    pub midpoints: [f32; 255],
}

impl DynamicMap {
    /// From -1 to 1, for quantization constants and first moments.
    pub fn signed() -> &'static DynamicMap {
        static MAP: OnceLock<DynamicMap> = OnceLock::new();
        MAP.get_or_init(|| DynamicMap::new(true))
    }

    /// From 0 to 1, for second moments.
    pub fn unsigned() -> &'static DynamicMap {
        static MAP: OnceLock<DynamicMap> = OnceLock::new();
        MAP.get_or_init(|| DynamicMap::new(false))
    }

    fn new(signed: bool) -> Self {
        let mut map = vec![0.0, 1.0];
        for decade in 0..7 {
            let items = if signed { 1usize << decade } else { 2 << decade };
            let factor = 10f64.powi(decade - 6) as f32;
            for pair in linspace(0.1, 1.0, items + 1).windows(2) {
                let value = factor * ((pair[0] + pair[1]) / 2.0);
                map.push(value);
                if signed {
                    map.push(-value);
                }
            }
        }
        map.sort_by(f32::total_cmp);
        let mut levels = [0.0; 256];
        levels.copy_from_slice(&map);
        let midpoints = std::array::from_fn(|i| {
            let exact = (f64::from(levels[i]) + f64::from(levels[i + 1])) / 2.0;
            let nearest = exact as f32;
            if f64::from(nearest) > exact { nearest.next_down() } else { nearest }
        });
        DynamicMap { levels, midpoints }
    }

    /// The code of the nearest number; of two equally near ones the lower.
    pub fn nearest(&self, x: f32) -> u8 {
        self.midpoints.partition_point(|midpoint| *midpoint < x) as u8
    }
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
