//! Integers of six bits with a scale for each block, as GGUF's Q6_K has them.
//!
//! Bits: first the low four bits of all codes, as [`super::nf4`]; then the high two of all, four in a byte, the first
//! element's lowest. A code `q` of 0 to 63 means `(q - 32) * scale`.

/// The value of a code.
pub fn decode(code: u8) -> f32 {
    f32::from(code & 63) - 32.0
}

/// The code of an element of a matrix of `elements` ones.
pub fn code(codes: &[u8], elements: usize, i: usize) -> u8 {
    let pair = super::Pair(codes[i / 2]);
    let low = if i.is_multiple_of(2) { pair.even() } else { pair.odd() };
    low | (codes[elements / 2 + i / 4] >> (2 * (i % 4)) & 3) << 4
}
