//! Integers of eight bits with a scale for each row.
//!
//! Bits: a byte is a two's complement number of -127 to 127; -128 is never made. The scale is absmax / 127.

/// The value of a code.
pub fn decode(code: u8) -> f32 {
    f32::from(code as i8)
}

/// The nearest code of a scaled element, ties to even.
pub fn encode(x: f32) -> u8 {
    (x.round_ties_even().clamp(-127.0, 127.0) as i8) as u8
}
