//! Launches of `cuda/quant.cu`, and quantized matrices as kernels see them.

use super::bindings::*;
use super::{Cuda, PACK, THREADS, read, written};
use crate::backend::Kernels;
use crate::backend::check::ensure;
use crate::backend::quantized::{format_code, upload_nested};
use crate::dtype::DType;
use crate::error::Result;
use crate::quant::double_quant::{NESTED_BLOCKSIZE, NestedScales};
use crate::quant::{Blocks, Codes, Geometry, QuantConfig, Quantized, Scales};
use crate::tensor::Tensor;
use std::ptr::{null, null_mut};

/// Threads of a block that quantizes, a warp for each block of the matrix.
const QUANTIZE_THREADS: usize = 128;

/// log2 of a power of two.
fn shift(n: usize) -> i32 {
    if n == 0 { 0 } else { n.trailing_zeros() as i32 }
}

fn layout(config: &QuantConfig, shape: [usize; 2], geometry: Geometry) -> quantized_matrix {
    quantized_matrix {
        codes: null_mut(),
        scales: null_mut(),
        zeros: null_mut(),
        nested: null(),
        nested_absmax: null(),
        nested_map: null(),
        nested_offset: 0.0,
        nested_shift: NESTED_BLOCKSIZE.trailing_zeros() as i32,
        levels: config.format.levels().copied().unwrap_or_default(),
        rows: shape[0] as u64,
        cols: shape[1] as u64,
        block_rows: geometry.block_rows as u64,
        block_cols: geometry.block_cols as u64,
        blocks_per_row: geometry.blocks_per_row as u64,
        format: format_code(config.format.codes),
        block_rows_shift: shift(geometry.block_rows),
        block_cols_shift: if config.format.blocks == Blocks::Row { 63 } else { shift(geometry.block_cols) },
        minimums: null(),
        minimum_codes: null(),
        minimum_factors: null(),
    }
}

/// The matrix as kernels see it, for reading; it lives no longer than `x`.
pub(super) fn view(x: &Quantized) -> Result<quantized_matrix> {
    let mut view = layout(&x.config(), *x.shape(), x.geometry());
    view.codes = read::<u8>(x.codes())?.cast_mut();
    match x.scales() {
        Scales::Plain(scales) => view.scales = read::<f32>(scales)?.cast_mut(),
        Scales::Nested { codes, absmax, map, offset } => {
            view.nested = read(codes)?;
            view.nested_absmax = read(absmax)?;
            view.nested_map = read(map)?;
            view.nested_offset = *offset;
        }
        Scales::Products { codes, factors, per_factor } => {
            view.nested = read(codes)?;
            view.nested_absmax = read(factors)?;
            view.nested_shift = per_factor.trailing_zeros() as i32;
        }
    }
    match x.minimums() {
        Some(Scales::Plain(minimums)) => view.minimums = read(minimums)?,
        Some(Scales::Products { codes, factors, .. } | Scales::Nested { codes, absmax: factors, .. }) => {
            (view.minimum_codes, view.minimum_factors) = (read(codes)?, read(factors)?);
        }
        None => {}
    }
    view.zeros = x.zeros().map_or(Ok(null()), read::<u8>)?.cast_mut();
    Ok(view)
}

/// Whether kernels decode the matrix in runs of so many neighbours: those have one block, or, in six bits, two whose scales
/// share a factor.
pub(super) fn is_decoded_in_runs(x: &Quantized, run: usize) -> bool {
    let QuantConfig { format, blocksize, .. } = x.config();
    match format.codes {
        Codes::Int6 => {
            2 * blocksize == run
                && matches!(x.scales(), Scales::Products { per_factor, .. } if per_factor.is_multiple_of(2))
        }
        Codes::Int4Minimum => blocksize.is_multiple_of(run),
        _ => true,
    }
}

pub(super) fn quantize(cuda: &Cuda, x: &Tensor, config: &QuantConfig) -> Result<Quantized> {
    config.check()?;
    ensure(x.dtype().is_float(), "quantize", || format!("expected floats, found {}", x.dtype()))?;
    let shape = [x.rows(), x.cols()];
    let (format, geometry) = (config.format, config.geometry(shape[0], shape[1]));
    let count = geometry.count;
    let mut codes = cuda.empty(&[(x.elements() * format.bits()).div_ceil(8)], DType::U8)?;
    let mut scales = cuda.empty(&[count], DType::F32)?;
    let mut zeros = format.zero_points().then(|| cuda.empty(&[count], DType::U8)).transpose()?;
    let mut q = layout(config, shape, geometry);
    q.codes = written(&mut codes)?;
    q.scales = written(&mut scales)?;
    if let Some(zeros) = &mut zeros {
        q.zeros = written(zeros)?;
    }
    let ranks = match format.codes {
        Codes::Levels { ranks, .. } => *ranks,
        _ => [0; 16],
    };
    let thresholds = format.thresholds();
    let params = quantize_params {
        q,
        x: read(x)?,
        faults: cuda.faults.device_bytes()?.cast(),
        blocks: count as u64,
        thresholds: thresholds.unwrap_or_default(),
        ranks,
        has_thresholds: i32::from(thresholds.is_some()),
        max_level: format.max_level,
    };
    let grid = [count.div_ceil(QUANTIZE_THREADS / 32), 1, 1];
    // SAFETY: the operands are as the structure says.
    unsafe { cuda.launch(&format!("quantize_{}", x.dtype()), grid, QUANTIZE_THREADS, 0, &params)? };
    let scales = if config.double_quant {
        let mut plain = vec![0f32; count];
        cuda.download(&scales, bytemuck::cast_slice_mut(&mut plain))?;
        let nested = if cuda.plans { NestedScales::zeros(count) } else { NestedScales::quantize(&plain) };
        upload_nested(cuda, &nested)?
    } else {
        cuda.to_host(&mut [])?; // of elements that are not finite
        Scales::Plain(scales)
    };
    Quantized::new(*config, shape, codes, scales, zeros, x.dtype())
}

pub(super) fn dequantize(cuda: &Cuda, out: &mut Tensor, x: &Quantized) -> Result<()> {
    let [rows, cols] = *x.shape();
    let dtype = out.dtype();
    ensure(dtype.is_float() && out.elements() == rows * cols, "dequantize", || {
        format!("[{rows}, {cols}] into {:?} {dtype}", out.shape())
    })?;
    let params = dequantize_params { q: view(x)?, out: written(out)? };
    let grid = [(rows * cols).div_ceil(THREADS * PACK), 1, 1];
    // SAFETY: the operands are as the structure says.
    unsafe { cuda.launch(&format!("dequantize_{dtype}"), grid, THREADS, 0, &params) }
}
