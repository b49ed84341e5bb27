//! Quantizing the constants of quantized blocks: less their mean, in eight bits of a dynamic map, with a
//! constant for each 256 of them.
//!
//! Source: Dettmers et al., "QLoRA" (arXiv 2305.14314); the map is that of "8-bit optimizers via block-wise
//! quantization" (arXiv 2110.02861), as bitsandbytes makes it.

use super::dynamic_map::DynamicMap;

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

impl NestedScales {
    /// Quantizes scales. The mean is their sum in f64, ascending, divided and rounded once.
    pub fn quantize(scales: &[f32]) -> Self {
        let sum: f64 = scales.iter().map(|s| f64::from(*s)).sum();
        let offset = (sum / scales.len().max(1) as f64) as f32;
        let map = DynamicMap::signed();
        let mut nested = NestedScales { codes: Vec::with_capacity(scales.len()), absmax: Vec::new(), offset };
        for block in scales.chunks(NESTED_BLOCKSIZE) {
            let absmax = block.iter().fold(0f32, |most, s| most.max((s - offset).abs()));
            let inverse = 1.0 / absmax.max(LEAST_ABSMAX);
            nested.codes.extend(block.iter().map(|s| map.nearest((s - offset) * inverse)));
            nested.absmax.push(absmax);
        }
        nested
    }

    /// Constants of so many blocks, all zero.
    pub fn zeros(count: usize) -> Self {
        NestedScales {
            codes: vec![0; count],
            absmax: vec![0.0; count.div_ceil(NESTED_BLOCKSIZE)],
            offset: 0.0,
        }
    }

    /// The scale of block `i`.
    pub fn scale(&self, i: usize) -> f32 {
        DynamicMap::signed().levels[usize::from(self.codes[i])] * self.absmax[i / NESTED_BLOCKSIZE]
            + self.offset
    }
}
