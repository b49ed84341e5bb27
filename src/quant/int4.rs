//! Integers of four bits with a scale, and for the asymmetric form a zero point, for each group.
//!
//! Bits: as [`super::nf4`]. A code `q` of 0 to 15 means `(q - z) * scale`; in the symmetric form `z` is 8, in
//! the asymmetric form a byte beside the scale, such that 0 is represented exactly.

/// Values of the codes of the symmetric form.
pub const SYMMETRIC: [f32; 16] =
    [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];

/// Values of the codes of the asymmetric form, before the zero point is taken off.
pub const ASYMMETRIC: [f32; 16] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];
