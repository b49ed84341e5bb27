//! NormalFloat 4: sixteen levels at the quantiles of a normal distribution.
//!
//! Bits: a byte holds two elements of the flat matrix, the even one in the high half; an odd number of
//! elements leaves the last low half as a zero's code. Source: Dettmers et al., "QLoRA" (arXiv 2305.14314);
//! the levels are bitsandbytes'.

/// Values of the codes 0 to 15, ascending.
pub const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Codes by rank: they ascend as their levels do.
pub const RANKS: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
