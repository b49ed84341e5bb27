//! Tensors of GGUF files as quantized matrices with the same values, in about the same memory.

use super::Entry;
use super::dequantize::{GgmlType, Layout, Packed};
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::Result;
use crate::quant::{FORMATS, Format, Pair, QuantConfig, Quantized, READ_ONLY, Scales};
use crate::tensor::Tensor;
use rayon::prelude::*;

/// How a type's blocks are kept.
struct Own {
    packed: Packed,
    config: QuantConfig,
    /// Blocks that share a factor, where constants are whole numbers times factors; else they are f32.
    per_factor: Option<usize>,
}

fn own(kind: &GgmlType) -> Option<Own> {
    let Layout::Codes(packed) = kind.layout else { return None };
    let (name, per_factor) = match kind.name {
        "Q4_0" => ("int4", None),
        "Q4_1" => ("int4-minimum", None),
        "Q8_0" => ("int8-block", None),
        "Q4_K" => ("int4-minimum", Some(kind.block / packed.run)),
        "Q6_K" => ("int6", Some(kind.block / packed.run)),
        _ => return None,
    };
    let mut formats = FORMATS.iter().chain(&READ_ONLY);
    let format: &'static Format = formats.find(|f| f.name == name)?;
    Some(Own {
        packed,
        config: QuantConfig { blocksize: packed.run, ..QuantConfig::new(format) },
        per_factor,
    })
}

/// The parts of some rows.
#[derive(Default)]
struct Parts {
    codes: Vec<u8>, // bytes; of six bits the low four
    high: Vec<u8>,  // four codes' high two bits in a byte
    scales: Vec<f32>,
    minimums: Vec<f32>,
    scale_codes: Vec<u8>,
    minimum_codes: Vec<u8>,
}

impl Parts {
    fn push(&mut self, own: &Own, kind: &GgmlType, block: &[u8], codes: &mut [u8]) {
        (own.packed.codes)(block, codes);
        match own.config.format.bits() {
            8 => self.codes.extend_from_slice(codes),
            bits => {
                self.codes.extend(codes.chunks_exact(2).map(|q| Pair::new(q[0] & 15, q[1] & 15).0));
                if bits == 6 {
                    let high = |q: &[u8]| q[0] >> 4 | q[1] >> 4 << 2 | q[2] >> 4 << 4 | q[3] >> 4 << 6;
                    self.high.extend(codes.chunks_exact(4).map(high));
                }
            }
        }
        for run in 0..kind.block / own.packed.run {
            let c = (own.packed.constants)(block, run);
            if own.per_factor.is_some() {
                self.scale_codes.push(c.scale as u8);
                self.minimum_codes.push(c.minimum as u8);
            }
            if own.per_factor.is_none() || run == 0 {
                self.scales.push(c.factor);
                self.minimums.push(c.minimum_factor);
            }
        }
    }

    fn append(&mut self, mut other: Parts) {
        self.codes.append(&mut other.codes);
        self.high.append(&mut other.high);
        self.scales.append(&mut other.scales);
        self.minimums.append(&mut other.minimums);
        self.scale_codes.append(&mut other.scale_codes);
        self.minimum_codes.append(&mut other.minimum_codes);
    }
}

/// Rows that are unpacked at a time.
const ROWS: usize = 256;

/// A tensor that is filled from its start on.
struct Sink {
    tensor: Tensor,
    filled: usize, // elements
}

impl Sink {
    fn push(&mut self, backend: &Backend, bytes: &[u8]) -> Result<()> {
        let end = self.filled + bytes.len() / self.tensor.dtype().size();
        backend.upload(&mut self.tensor.slice(self.filled..end)?, bytes)?;
        self.filled = end;
        Ok(())
    }
}

/// A matrix of a file's `bytes` in the format that has its values; `order` says where each row is in the file. `dtype` is
/// the type that it stands for. On a backend that only counts, nothing is read.
pub(super) fn matrix(
    entry: &Entry,
    bytes: &[u8],
    order: impl Fn(usize) -> usize + Sync,
    backend: &Backend,
    dtype: DType,
) -> Result<Option<Quantized>> {
    let (Some(own), &[rows, cols]) = (own(&entry.kind), entry.shape.as_slice()) else { return Ok(None) };
    let kind = &entry.kind;
    let row_bytes = cols / kind.block * kind.bytes;
    let (elements, runs) = (rows * cols, rows * cols / own.packed.run);
    let factors = own.per_factor.map_or(runs, |n| runs / n);
    let coded = if own.per_factor.is_some() { runs } else { 0 };
    let minimums = |n: usize| if own.config.format.minimums() { n } else { 0 };
    let bits = own.config.format.bits();
    let (low, high) =
        (elements * if bits == 6 { 4 } else { bits } / 8, if bits == 6 { elements / 4 } else { 0 });
    let codes = backend.empty(&[low + high], DType::U8)?;
    let sink = |tensor: Tensor| Sink { tensor, filled: 0 };
    let empty = |n: usize, dtype: DType| backend.empty(&[n], dtype).map(sink);
    let mut code_sinks = [sink(codes.slice(0..low)?), sink(codes.slice(low..low + high)?)];
    let mut factor_sinks = [empty(factors, DType::F32)?, empty(minimums(factors), DType::F32)?];
    let mut number_sinks = [empty(coded, DType::U8)?, empty(minimums(coded), DType::U8)?];
    let counting = backend.arena().is_counting();
    for start in (0..rows).step_by(ROWS).filter(|_| !counting) {
        let end = (start + ROWS).min(rows);
        let one = |row: usize| {
            let (mut parts, mut codes) = (Parts::default(), vec![0; kind.block]);
            let from = order(row) * row_bytes;
            for block in bytes[from..from + row_bytes].chunks_exact(kind.bytes) {
                parts.push(&own, kind, block, &mut codes);
            }
            parts
        };
        let all: Vec<Parts> = (start..end).into_par_iter().map(one).collect();
        let mut parts = Parts::default();
        all.into_iter().for_each(|row| parts.append(row));
        code_sinks[0].push(backend, &parts.codes)?;
        code_sinks[1].push(backend, &parts.high)?;
        factor_sinks[0].push(backend, bytemuck::cast_slice(&parts.scales))?;
        number_sinks[0].push(backend, &parts.scale_codes)?;
        if own.config.format.minimums() {
            factor_sinks[1].push(backend, bytemuck::cast_slice(&parts.minimums))?;
            number_sinks[1].push(backend, &parts.minimum_codes)?;
        }
    }
    let constants = |codes: Tensor, factors: Tensor| match own.per_factor {
        Some(per_factor) => Scales::Products { codes, factors, per_factor },
        None => Scales::Plain(factors),
    };
    let [scales, minimums] = factor_sinks.map(|sink| sink.tensor);
    let [scale_codes, minimum_codes] = number_sinks.map(|sink| sink.tensor);
    let minimums = own.config.format.minimums().then(|| constants(minimum_codes, minimums));
    let scales = constants(scale_codes, scales);
    Quantized::with_minimums(own.config, [rows, cols], codes, scales, None, minimums, dtype).map(Some)
}
