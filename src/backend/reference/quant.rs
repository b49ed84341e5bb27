//! Quantizing and decoding, element by element.

use super::{Real, Reference};
use crate::backend::Kernels;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::double_quant::{NESTED_BLOCKSIZE, NestedScales};
use crate::quant::{Pair, QuantConfig, Quantized, Scales, int6};
use crate::tensor::Tensor;

/// Smaller scales count as this one when elements get codes.
const LEAST_SCALE: f32 = 1e-38;

fn bytes<R: Real>(backend: &Reference<R>, data: &[u8]) -> Result<Tensor> {
    let mut out = backend.empty(&[data.len()], DType::U8)?;
    backend.upload(&mut out, data)?;
    Ok(out)
}

fn floats<R: Real>(backend: &Reference<R>, data: &[f32]) -> Result<Tensor> {
    let mut out = backend.empty(&[data.len()], DType::F32)?;
    backend.upload(&mut out, bytemuck::cast_slice(data))?;
    Ok(out)
}

/// See [`Kernels::quantize`].
pub fn quantize<R: Real>(backend: &Reference<R>, x: &Tensor, config: &QuantConfig) -> Result<Quantized> {
    config.check()?;
    let (rows, cols) = (x.rows(), x.cols());
    let values: Vec<f32> = backend.load(x)?.iter().map(|x| x.value() as f32).collect();
    if values.iter().any(|x| !x.is_finite()) {
        return Err(Error::shape("quantize", "expected finite elements, found one that is not"));
    }
    let (format, geometry) = (config.format, config.geometry(rows, cols));
    let block_of = |i: usize| geometry.block(i / cols, i % cols, cols);
    let mut range = vec![(0f32, 0f32); geometry.count];
    for (i, x) in values.iter().enumerate() {
        let (low, high) = &mut range[block_of(i)];
        (*low, *high) = (low.min(*x), high.max(*x));
    }
    let span = |(low, high): &(f32, f32)| if format.zero_points() { high - low } else { high.max(-low) };
    let scales: Vec<f32> = range.iter().map(|r| span(r) / format.max_level).collect();
    let inverse: Vec<f32> = scales.iter().map(|s| 1.0 / s.max(LEAST_SCALE)).collect();
    let zero = |block: usize| match format.zero_points() {
        true => (-range[block].0 * inverse[block]).round_ties_even(),
        false => 8.0,
    };
    let code = |i: usize| format.encode(values[i] * inverse[block_of(i)], zero(block_of(i)));
    let codes: Vec<u8> = match format.bits() {
        4 => (0..values.len().div_ceil(2))
            .map(|pair| {
                let odd = 2 * pair + 1;
                let low =
                    if odd < values.len() { code(odd) } else { format.encode(0.0, zero(block_of(2 * pair))) };
                Pair::new(code(2 * pair), low).0
            })
            .collect(),
        _ => (0..values.len()).map(code).collect(),
    };
    let zeros: Option<Vec<u8>> =
        format.zero_points().then(|| (0..geometry.count).map(|b| zero(b) as u8).collect());
    let zeros = zeros.map(|z| bytes(backend, &z)).transpose()?;
    let scales = if config.double_quant {
        let nested = NestedScales::quantize(&scales);
        Scales::Nested {
            codes: bytes(backend, &nested.codes)?,
            absmax: floats(backend, &nested.absmax)?,
            map: floats(backend, &crate::quant::dynamic_map::DynamicMap::signed().levels)?,
            offset: nested.offset,
        }
    } else {
        Scales::Plain(floats(backend, &scales)?)
    };
    Quantized::new(*config, [rows, cols], bytes(backend, &codes)?, scales, zeros, x.dtype())
}

/// The matrix's elements, row-major.
pub fn values<R: Real>(backend: &Reference<R>, x: &Quantized) -> Result<Vec<R>> {
    let bytes = |tensor: &Tensor| {
        let mut data = vec![0; tensor.bytes()];
        backend.download(tensor, &mut data).map(|()| data)
    };
    let floats = |tensor: &Tensor| {
        bytes(tensor)
            .map(|data| data.chunks_exact(4).map(bytemuck::pod_read_unaligned::<f32>).collect::<Vec<_>>())
    };
    x.expect_rows()?;
    let constants = |scales: &Scales| {
        Ok::<_, Error>(match scales {
            Scales::Plain(scales) => floats(scales)?,
            Scales::Nested { codes, absmax, map, offset } => {
                let (codes, absmax, map) = (bytes(codes)?, floats(absmax)?, floats(map)?);
                let nested = codes.iter().enumerate();
                nested.map(|(i, c)| map[usize::from(*c)] * absmax[i / NESTED_BLOCKSIZE] + offset).collect()
            }
            Scales::Products { codes, factors, per_factor } => {
                let (codes, factors) = (bytes(codes)?, floats(factors)?);
                codes.iter().enumerate().map(|(i, c)| f32::from(*c as i8) * factors[i / per_factor]).collect()
            }
        })
    };
    let scales = constants(x.scales())?;
    let minimums = x.minimums().map(constants).transpose()?;
    let zeros = x.zeros().map(bytes).transpose()?;
    let (codes, format, geometry) = (bytes(x.codes())?, x.config().format, x.geometry());
    let [rows, cols] = *x.shape();
    let value = |i: usize| {
        let code = match format.bits() {
            4 if i.is_multiple_of(2) => Pair(codes[i / 2]).even(),
            4 => Pair(codes[i / 2]).odd(),
            6 => int6::code(&codes, rows * cols, i),
            _ => codes[i],
        };
        let block = geometry.block(i / cols, i % cols, cols);
        let zero = zeros.as_ref().map_or(0.0, |z| f32::from(z[block]));
        let scaled = (format.decode(code) - zero) * scales[block];
        R::from_f64(f64::from(minimums.as_ref().map_or(scaled, |m| scaled + m[block])))
    };
    Ok((0..rows * cols).map(value).collect())
}
