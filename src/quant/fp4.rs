//! Float 4: a sign, and eight magnitudes of bitsandbytes' own choice.
//!
//! Bits: as [`super::nf4`]; a code's highest bit is its sign. Both zeros decode to +0. Source: the levels are
//! bitsandbytes' (twelfths of the magnitudes 0, 0.0625, 8, 12, 4, 6, 2, 3).

const A: f32 = 0.0625 / 12.0;
const B: f32 = 2.0 / 12.0;
const C: f32 = 4.0 / 12.0;
const D: f32 = 8.0 / 12.0;

/// Values of the codes 0 to 15.
pub const LEVELS: [f32; 16] = [0.0, A, D, 1.0, C, 0.5, B, 0.25, 0.0, -A, -D, -1.0, -C, -0.5, -B, -0.25];

/// Codes by the rank of their level; of the zeros, code 8 is the one above 0.
pub const RANKS: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];
