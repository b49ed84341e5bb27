//! The bit layouts of GGUF's types, and their values in f32.
//!
//! All numbers are little-endian. `d`, `m` and `dmin` are f16. Source: ggml's `ggml-common.h` and `ggml-quants.c`.
//!
//! - Q8_0, 34 bytes of 32 elements: `d`; 32 signed bytes `q`. `d q`.
//! - Q4_0, 18 bytes of 32: `d`; 16 bytes, in the low four bits elements 0 to 15, in the high ones 16 to 31. `d (q - 8)`.
//! - Q4_1, 20 bytes of 32: `d`, `m`; codes as in Q4_0. `d q + m`.
//! - Q4_K, 144 bytes of 256: `d`, `dmin`; 12 bytes with a scale `s` and a minimum `m` of six bits for each of eight parts
//!   of 32; 128 bytes of codes: of each 32 bytes the low four bits are a part, the high ones the next. `d s q - dmin m`.
//! - Q6_K, 210 bytes of 256: 128 bytes with four low bits of each code, 64 with two high ones, 16 signed scales `s` of 16
//!   elements each; `d`. `d s (q - 32)`.

use half::{bf16, f16};

/// A type of GGUF's tensors.
#[derive(Clone, Copy, Debug)]
pub struct GgmlType {
    /// Its number in the file.
    pub id: u32,
    /// ggml's name.
    pub name: &'static str,
    /// Elements of a block.
    pub block: usize,
    /// Bytes of a block.
    pub bytes: usize,
    decode: fn(&[u8], &mut [f32]),
}

/// The types that are read.
pub const TYPES: [GgmlType; 8] = [
    GgmlType { id: 0, name: "F32", block: 1, bytes: 4, decode: f32_ },
    GgmlType { id: 1, name: "F16", block: 1, bytes: 2, decode: f16_ },
    GgmlType { id: 30, name: "BF16", block: 1, bytes: 2, decode: bf16_ },
    GgmlType { id: 2, name: "Q4_0", block: 32, bytes: 18, decode: q4_0 },
    GgmlType { id: 3, name: "Q4_1", block: 32, bytes: 20, decode: q4_1 },
    GgmlType { id: 8, name: "Q8_0", block: 32, bytes: 34, decode: q8_0 },
    GgmlType { id: 12, name: "Q4_K", block: 256, bytes: 144, decode: q4_k },
    GgmlType { id: 14, name: "Q6_K", block: 256, bytes: 210, decode: q6_k },
];

impl GgmlType {
    /// The values of whole blocks.
    pub fn dequantize(&self, bytes: &[u8], out: &mut [f32]) {
        debug_assert_eq!(bytes.len() / self.bytes, out.len() / self.block);
        for (block, out) in bytes.chunks_exact(self.bytes).zip(out.chunks_exact_mut(self.block)) {
            (self.decode)(block, out);
        }
    }
}

fn half_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

fn f32_(b: &[u8], out: &mut [f32]) {
    out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
}

fn f16_(b: &[u8], out: &mut [f32]) {
    out[0] = half_at(b, 0);
}

fn bf16_(b: &[u8], out: &mut [f32]) {
    out[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32();
}

fn q8_0(b: &[u8], out: &mut [f32]) {
    let d = half_at(b, 0);
    for (x, q) in out.iter_mut().zip(&b[2..]) {
        *x = d * f32::from(*q as i8);
    }
}

fn q4_0(b: &[u8], out: &mut [f32]) {
    let d = half_at(b, 0);
    for (i, q) in b[2..].iter().enumerate() {
        out[i] = d * f32::from(i16::from(q & 15) - 8);
        out[i + 16] = d * f32::from(i16::from(q >> 4) - 8);
    }
}

fn q4_1(b: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    for (i, q) in b[4..].iter().enumerate() {
        out[i] = d * f32::from(q & 15) + m;
        out[i + 16] = d * f32::from(q >> 4) + m;
    }
}

/// Scale and minimum of part `j`.
fn scale_and_min(s: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4)
    };
    (f32::from(scale), f32::from(min))
}

fn q4_k(b: &[u8], out: &mut [f32]) {
    let (d, dmin, scales) = (half_at(b, 0), half_at(b, 2), &b[4..16]);
    for (i, (codes, out)) in b[16..].chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
        for (half, out) in out.chunks_exact_mut(32).enumerate() {
            let (scale, min) = scale_and_min(scales, 2 * i + half);
            let (scale, min) = (d * scale, dmin * min);
            for (x, q) in out.iter_mut().zip(codes) {
                *x = scale * f32::from(q >> (4 * half) & 15) - min;
            }
        }
    }
}

fn q6_k(b: &[u8], out: &mut [f32]) {
    let (low, high, scales, d) = (&b[..128], &b[128..192], &b[192..208], half_at(b, 208));
    for (i, x) in out.iter_mut().enumerate() {
        // Four parts of 32 share 64 bytes of low bits and 32 of high ones.
        let (group, part, l) = (i / 128, i / 32 % 4, i % 32);
        let four = low[64 * group + 32 * (part % 2) + l] >> (4 * (part / 2)) & 15;
        let two = high[32 * group + l] >> (2 * part) & 3;
        let q = i16::from(four | two << 4) - 32;
        *x = d * f32::from(scales[i / 16] as i8) * f32::from(q);
    }
}
