//! Launches of `cuda/norm.cu`.

use super::bindings::*;
use super::{Cuda, PACK, THREADS, elementwise, read, type_code, written};
use crate::backend::Kernels;
use crate::backend::check::{self, ensure_alike, ensure_f32};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

/// Threads of a block, and rows that it has, where half a warp has a row.
const ROW_THREADS: usize = 128;
const ROWS_PER_BLOCK: usize = 8;

/// Threads of a block where each has a column.
const COLUMN_THREADS: usize = 64;

/// Threads of a block that has one long row, and columns up to which rows are short.
const LONG_THREADS: usize = 128;
const SHORT: usize = 256;

/// Bytes of shared memory before the dynamic, which begins at a multiple of 1024.
const STATIC_SHARED: usize = 1024;

fn kernel(layer_norm: bool, part: &str, dtype: DType) -> String {
    format!("{}_norm{part}_{dtype}", if layer_norm { "layer" } else { "rms" })
}

/// Of so many rows in f32.
fn shared_bytes(cols: usize, copies: usize) -> usize {
    copies * cols.next_multiple_of(PACK) * size_of::<f32>()
}

/// Whether a row has a block, which has so many copies of it in shared memory.
fn is_long(cuda: &Cuda, cols: usize, copies: usize) -> bool {
    cols > SHORT && shared_bytes(cols, copies) + STATIC_SHARED <= cuda.executor.properties().shared_memory
}

/// Starts the kernel for short or for long rows, of which a block has `copies` in shared memory.
///
/// # Safety
/// As [`Cuda::launch`].
unsafe fn launch_rows<P: Copy>(
    cuda: &Cuda,
    layer_norm: bool,
    part: &str,
    dtype: DType,
    [rows, cols]: [usize; 2],
    copies: usize,
    params: &P,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe {
        if is_long(cuda, cols, copies) {
            let name = kernel(layer_norm, &format!("{part}_long"), dtype);
            let shared = shared_bytes(cols, copies);
            return cuda.launch(&name, [rows, 1, 1], LONG_THREADS, shared, params);
        }
        cuda.launch(&kernel(layer_norm, part, dtype), row_grid(rows), ROW_THREADS, 0, params)
    }
}

pub(super) fn row_grid(rows: usize) -> [usize; 3] {
    [rows.div_ceil(ROWS_PER_BLOCK), 1, 1]
}

/// The norm of `x`, or of `x + b` with `added = (b, sum)`, which long rows may have.
pub(super) fn norm(
    cuda: &Cuda,
    y: &mut Tensor,
    stats: &mut Tensor,
    x: &Tensor,
    added: Option<(&Tensor, &mut Tensor)>,
    weight: &Tensor,
    bias: Option<&Tensor>,
    eps: f32,
    layer_norm: bool,
) -> Result<()> {
    let dtype = check::norm(y, stats, x, weight, bias, layer_norm)?;
    let (rows, cols) = (x.rows(), x.cols());
    let (added, sum) = match added {
        Some((b, sum)) => {
            ensure_alike("add_rms_norm", &[sum, x, b])?;
            (read(b)?, written(sum)?)
        }
        None => (std::ptr::null(), std::ptr::null_mut()),
    };
    let params = norm_params {
        added,
        sum,
        y: written(y)?,
        stats: written(stats)?,
        x: read(x)?,
        weight: read(weight)?,
        bias: bias.map_or(Ok(std::ptr::null()), read)?,
        rows: rows as u64,
        cols: cols as u32,
        eps,
        weight_type: type_code(weight.dtype()),
    };
    // SAFETY: the operands are as the structure says.
    unsafe { launch_rows(cuda, layer_norm, "", dtype, [rows, cols], 1, &params) }
}

/// A short row's sum has a launch of its own.
pub(super) fn add_rms_norm(
    cuda: &Cuda,
    [sum, y, rstd]: [&mut Tensor; 3],
    [a, b]: [&Tensor; 2],
    weight: &Tensor,
    eps: f32,
) -> Result<()> {
    if !is_long(cuda, a.cols(), 1) {
        elementwise::add(cuda, sum, a, b)?;
        return norm(cuda, y, rstd, sum, None, weight, None, eps, false);
    }
    norm(cuda, y, rstd, a, Some((b, sum)), weight, None, eps, false)
}

pub(super) fn norm_backward(
    cuda: &Cuda,
    dx: Option<&mut Tensor>,
    accumulate: bool,
    dweight: Option<&mut Tensor>,
    dy: &Tensor,
    x: &Tensor,
    stats: &Tensor,
    weight: &Tensor,
    layer_norm: bool,
) -> Result<()> {
    let operands = (dx.as_deref(), dweight.as_deref());
    let dtype = check::norm_backward(operands.0, operands.1, dy, x, stats, weight, layer_norm)?;
    let (rows, cols) = (x.rows(), x.cols());
    if let Some(dweight) = dweight {
        let params = norm_dweight_params {
            dweight: written(dweight)?,
            dy: read(dy)?,
            x: read(x)?,
            stats: read(stats)?,
            rows: rows as u64,
            cols: cols as u32,
        };
        let grid = [cols.div_ceil(COLUMN_THREADS), 1, 1];
        // SAFETY: the operands are as the structure says.
        unsafe { cuda.launch(&kernel(layer_norm, "_dweight", dtype), grid, COLUMN_THREADS, 0, &params)? };
    }
    let Some(dx) = dx else { return Ok(()) };
    let params = norm_dx_params {
        dx: written(dx)?,
        dy: read(dy)?,
        x: read(x)?,
        weight: read(weight)?,
        stats: read(stats)?,
        rows: rows as u64,
        cols: cols as u32,
        weight_type: type_code(weight.dtype()),
        accumulate: i32::from(accumulate),
    };
    // SAFETY: the operands are as the structure says.
    unsafe { launch_rows(cuda, layer_norm, "_dx", dtype, [rows, cols], 2, &params) }
}

/// Column sums of `a`, or of `a` times `b`.
pub(super) fn column_sums(cuda: &Cuda, out: &mut Tensor, a: &Tensor, b: Option<&Tensor>) -> Result<()> {
    let dtype = ensure_alike("column_sums", &[a, b.unwrap_or(a)])?;
    let (rows, cols) = (a.rows(), a.cols());
    ensure_f32("column_sums", &[(out, cols)])?;
    let params = column_sums_params {
        out: written(out)?,
        a: read(a)?,
        b: b.map_or(Ok(std::ptr::null()), read)?,
        rows: rows as u64,
        cols: cols as u32,
    };
    let name = format!("column_{}_{dtype}", if b.is_some() { "products" } else { "sums" });
    // SAFETY: the operands are as the structure says.
    unsafe { cuda.launch(&name, [cols.div_ceil(COLUMN_THREADS), 1, 1], COLUMN_THREADS, 0, &params) }
}

pub(super) fn scale_columns(
    cuda: &Cuda,
    out: &mut Tensor,
    x: &Tensor,
    factors: &Tensor,
    bias: Option<&Tensor>,
) -> Result<()> {
    let dtype = ensure_alike("scale_columns", &[out, x])?;
    let (n, cols) = (x.elements(), x.cols());
    ensure_f32("scale_columns", &[(factors, cols), (bias.unwrap_or(factors), cols)])?;
    let params = scale_columns_params {
        out: written(out)?,
        x: read(x)?,
        factors: read(factors)?,
        bias: bias.map_or(Ok(std::ptr::null()), read)?,
        n: n as u64,
        cols: cols as u32,
    };
    let grid = [n.div_ceil(THREADS * PACK), 1, 1];
    // SAFETY: the operands are as the structure says.
    unsafe { cuda.launch(&format!("scale_columns_{dtype}"), grid, THREADS, 0, &params) }
}

/// Sum of squares, and the elements of other tensors, by one wait.
pub(super) fn step_report(cuda: &Cuda, x: Option<&Tensor>, others: &[Tensor]) -> Result<(f64, Vec<f32>)> {
    let sums = x.map(|x| block_sums(cuda, x)).transpose()?;
    let mut parts: Vec<(&Tensor, Vec<f32>)> = Vec::with_capacity(others.len() + 1);
    for x in others.iter().chain(&sums) {
        ensure_f32("step_report", &[(x, x.elements())])?;
        parts.push((x, vec![0f32; x.elements()]));
    }
    let mut to: Vec<(&Tensor, &mut [u8])> =
        parts.iter_mut().map(|(x, host)| (*x, bytemuck::cast_slice_mut(host))).collect();
    cuda.to_host(&mut to)?;
    let sums = sums.as_ref().and_then(|_| parts.pop()).map_or(Vec::new(), |(_, sums)| sums);
    let others = parts.into_iter().flat_map(|(_, host)| host).collect();
    Ok((sums.into_iter().map(f64::from).sum(), others))
}

/// Sums of squares of blocks.
pub(super) fn block_sums(cuda: &Cuda, x: &Tensor) -> Result<Tensor> {
    let n = x.elements();
    ensure_f32("sum_squares", &[(x, n)])?;
    let blocks = n.div_ceil(SUM_BLOCK as usize);
    let mut sums = cuda.empty(&[blocks], DType::F32)?;
    let params = sum_squares_params { sums: written(&mut sums)?, x: read(x)?, n: n as u64 };
    // SAFETY: the operands are as the structure says.
    unsafe { cuda.launch("sum_squares", row_grid(blocks), ROW_THREADS, 0, &params)? };
    Ok(sums)
}

pub(super) fn cross_entropy(
    cuda: &Cuda,
    losses: &mut Tensor,
    dlogits: Option<&mut Tensor>,
    logits: &Tensor,
    targets: &Tensor,
    grad_scale: f32,
) -> Result<()> {
    let (rows, vocabulary) = (logits.rows(), logits.cols());
    ensure_f32("cross_entropy", &[(logits, rows * vocabulary), (losses, rows)])?;
    check::ensure(targets.dtype() == DType::I32 && targets.elements() == rows, "cross_entropy", || {
        format!("expected {rows} targets, found {:?} {}", targets.shape(), targets.dtype())
    })?;
    let mut dtype = DType::F32;
    let mut address = std::ptr::null_mut();
    if let Some(dlogits) = dlogits {
        dtype = ensure_alike("cross_entropy", &[dlogits])?;
        check::ensure(dlogits.elements() == logits.elements(), "cross_entropy", || {
            format!("gradient {:?} of logits {:?}", dlogits.shape(), logits.shape())
        })?;
        address = written(dlogits)?;
    }
    let params = cross_entropy_params {
        losses: written(losses)?,
        dlogits: address,
        logits: read(logits)?,
        targets: read(targets)?,
        faults: cuda.faults.device_bytes()?.cast(),
        rows: rows as u64,
        vocabulary: vocabulary as u32,
        grad_scale,
    };
    // SAFETY: the operands are as the structure says; targets are checked by the kernel.
    unsafe { cuda.launch(&format!("cross_entropy_{dtype}"), row_grid(rows), ROW_THREADS, 0, &params) }
}
