//! The bit layouts of GGUF's types: codes and constants of their blocks, and the values in f32.
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
    pub(super) layout: Layout,
}

/// What the bytes of a block are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Layout {
    /// A float.
    Float(fn(&[u8]) -> f32),
    /// Codes with constants.
    Codes(Packed),
}

/// Blocks of codes: an element is `level of its code * scale + minimum`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packed {
    /// Elements that share constants.
    pub run: usize,
    /// The code of every element.
    pub codes: fn(&[u8], &mut [u8]),
    /// What a code stands for.
    pub level: fn(u8) -> f32,
    /// The constants of the run of this number.
    pub constants: fn(&[u8], usize) -> Constants,
}

/// The scale is `factor * scale`, the minimum `minimum_factor * minimum`; both products are exact.
#[derive(Clone, Copy, Debug)]
pub(super) struct Constants {
    pub factor: f32,
    pub scale: i8,
    pub minimum_factor: f32,
    pub minimum: i8,
}

const fn float(id: u32, name: &'static str, bytes: usize, read: fn(&[u8]) -> f32) -> GgmlType {
    GgmlType { id, name, block: 1, bytes, layout: Layout::Float(read) }
}

const fn packed(id: u32, name: &'static str, block: usize, bytes: usize, layout: Packed) -> GgmlType {
    GgmlType { id, name, block, bytes, layout: Layout::Codes(layout) }
}

/// The types that are read.
pub const TYPES: [GgmlType; 8] = [
    float(0, "F32", 4, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
    float(1, "F16", 2, |b| half_at(b, 0)),
    float(30, "BF16", 2, |b| bf16::from_le_bytes([b[0], b[1]]).to_f32()),
    packed(
        2,
        "Q4_0",
        32,
        18,
        Packed {
            run: 32,
            codes: |b, out| halves(&b[2..], out),
            level: |q| f32::from(q) - 8.0,
            constants: |b, _| plain(half_at(b, 0), 0.0),
        },
    ),
    packed(
        3,
        "Q4_1",
        32,
        20,
        Packed {
            run: 32,
            codes: |b, out| halves(&b[4..], out),
            level: f32::from,
            constants: |b, _| plain(half_at(b, 0), half_at(b, 2)),
        },
    ),
    packed(
        8,
        "Q8_0",
        32,
        34,
        Packed {
            run: 32,
            codes: |b, out| out.copy_from_slice(&b[2..]),
            level: |q| f32::from(q as i8),
            constants: |b, _| plain(half_at(b, 0), 0.0),
        },
    ),
    packed(
        12,
        "Q4_K",
        256,
        144,
        Packed {
            run: 32,
            codes: |b, out| {
                let parts = b[16..].chunks_exact(32).zip(out.chunks_exact_mut(64));
                parts.for_each(|(bytes, out)| halves(bytes, out));
            },
            level: f32::from,
            constants: q4_k_constants,
        },
    ),
    packed(
        14,
        "Q6_K",
        256,
        210,
        Packed {
            run: 16,
            codes: q6_k_codes,
            level: |q| f32::from(q) - 32.0,
            constants: |b, run| Constants { scale: b[192 + run] as i8, ..plain(half_at(b, 208), 0.0) },
        },
    ),
];

impl GgmlType {
    /// The values of whole blocks.
    pub fn dequantize(&self, bytes: &[u8], out: &mut [f32]) {
        debug_assert_eq!(bytes.len() / self.bytes, out.len() / self.block);
        let mut codes = vec![0; self.block];
        for (block, out) in bytes.chunks_exact(self.bytes).zip(out.chunks_exact_mut(self.block)) {
            let packed = match self.layout {
                Layout::Float(read) => {
                    out[0] = read(block);
                    continue;
                }
                Layout::Codes(packed) => packed,
            };
            (packed.codes)(block, &mut codes);
            let runs = out.chunks_exact_mut(packed.run).zip(codes.chunks_exact(packed.run));
            for (run, (out, codes)) in runs.enumerate() {
                let c = (packed.constants)(block, run);
                let (scale, minimum) =
                    (c.factor * f32::from(c.scale), c.minimum_factor * f32::from(c.minimum));
                for (x, q) in out.iter_mut().zip(codes) {
                    *x = scale * (packed.level)(*q) + minimum;
                }
            }
        }
    }
}

fn half_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

fn plain(factor: f32, minimum_factor: f32) -> Constants {
    Constants { factor, scale: 1, minimum_factor, minimum: 1 }
}

/// The low four bits of all bytes, then the high ones.
fn halves(bytes: &[u8], out: &mut [u8]) {
    let (low, high) = out.split_at_mut(bytes.len());
    for ((low, high), q) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (q & 15, q >> 4);
    }
}

fn q4_k_constants(b: &[u8], run: usize) -> Constants {
    let s = &b[4..16];
    let (scale, minimum) = if run < 4 {
        (s[run] & 63, s[run + 4] & 63)
    } else {
        ((s[run + 4] & 15) | (s[run - 4] >> 6) << 4, (s[run + 4] >> 4) | (s[run] >> 6) << 4)
    };
    Constants {
        factor: half_at(b, 0),
        scale: scale as i8,
        minimum_factor: -half_at(b, 2),
        minimum: minimum as i8,
    }
}

fn q6_k_codes(b: &[u8], out: &mut [u8]) {
    for (i, q) in out.iter_mut().enumerate() {
        // Four parts of 32 share 64 bytes of low bits and 32 of high ones.
        let (group, part, l) = (i / 128, i / 32 % 4, i % 32);
        let four = b[64 * group + 32 * (part % 2) + l] >> (4 * (part / 2)) & 15;
        let two = b[128 + 32 * group + l] >> (2 * part) & 3;
        *q = four | two << 4;
    }
}
