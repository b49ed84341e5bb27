//! The loss of a frozen head by parts of the vocabulary: launches of `cuda/cross_entropy.cu` between matrix products.
//!
//! Rows of logits and their gradients exist for some thousands of columns at a time. With the largest logit so far and sums
//! relative to it (as attention has them over its keys) logits are computed once, and each part of the head is read
//! twice for all rows that there is room for. The parts follow from the head's size alone, so a row's bits do.

use super::bindings::*;
use super::{Cuda, gemm, quant, read, written};
use crate::backend::check;
use crate::backend::{Gemm, GemmTerm, HeadLoss, Kernels, Matrix};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::Quantized;
use crate::tensor::Tensor;
use std::ops::Range;

/// Bytes that the logits, weights, sums and inputs of the rows at a time take at most, in one block.
const BYTES: usize = 60 << 20;

/// The parts of that block begin at multiples of this.
const ALIGNMENT: usize = 256;

/// Threads of a block, which has a row.
const THREADS: usize = 256;

/// Rows at a time are a multiple of this, which divides the rows of the clusters of products of many rows.
const ROW_STEP: usize = 32;

/// Elements of a row's [`cross_entropy_stats`].
const STATS: usize = size_of::<cross_entropy_stats>() / 4;

/// Columns of the vocabulary at a time. Twice the hidden size, as the sums, which each part reads and writes, then take half
/// of what logits do; see docs/cuda_loss.md.
fn columns_at_once(hidden: usize) -> usize {
    (2 * hidden).clamp(2048, 16_384).next_multiple_of(256)
}

/// Rows at a time, of which each takes so many bytes: those that fit whose products leave fewest multiprocessors idle. No
/// row's bits depend on it.
fn rows_at_once(cuda: &Cuda, bytes: usize, [columns, hidden]: [usize; 2]) -> usize {
    let most = BYTES / bytes.max(1);
    let cycles_of_a_row = |rows: usize| {
        let logits = gemm::least_cycles(cuda, rows, columns, hidden);
        (logits + gemm::least_cycles(cuda, rows, hidden, columns)) as f64 / rows as f64
    };
    let sizes = (1..=most / ROW_STEP).rev().map(|n| n * ROW_STEP).filter(|rows| 3 * rows > 2 * most);
    sizes.min_by(|a, b| cycles_of_a_row(*a).total_cmp(&cycles_of_a_row(*b))).unwrap_or(most.max(1))
}

/// Rows of the head.
enum Rows {
    Dense(Tensor),
    Quantized(Quantized),
}

impl Rows {
    /// The part of a head; none where it can't be cut there.
    fn of(head: &Matrix<'_>, range: &Range<usize>) -> Result<Option<Self>> {
        Ok(match *head {
            Matrix::Dense { transposed: true, .. } | Matrix::Quantized { transposed: true, .. } => None,
            Matrix::Dense { tensor, .. } => Some(Rows::Dense(tensor.slice(range.clone())?)),
            Matrix::Quantized { matrix, .. } => matrix.slice(range.clone())?.map(Rows::Quantized),
        })
    }

    fn matrix(&self, transposed: bool) -> Matrix<'_> {
        match self {
            Rows::Dense(tensor) => Matrix::Dense { tensor, transposed },
            Rows::Quantized(matrix) => Matrix::Quantized { matrix, transposed },
        }
    }
}

/// A part of the vocabulary.
struct Part {
    columns: Range<usize>,
    head: Rows,
    bias: Option<Tensor>,
}

/// The parts of the vocabulary; none where the head can't be cut.
fn parts(loss: &HeadLoss<'_>) -> Result<Option<Vec<Part>>> {
    let (vocabulary, hidden) = loss.head.shape();
    let at_once = columns_at_once(hidden);
    let part = |first: usize| -> Result<Option<Part>> {
        let columns = first..(first + at_once).min(vocabulary);
        let Some(head) = Rows::of(&loss.head, &columns)? else { return Ok(None) };
        let bias = loss.bias.map(|bias| bias.reshape(&[vocabulary])?.slice(columns.clone())).transpose()?;
        Ok(Some(Part { columns, head, bias }))
    };
    (0..vocabulary).step_by(at_once).map(part).collect()
}

/// What the rows at a time are computed with, for the most of them.
struct Buffers {
    stats: Tensor,
    logits: Tensor,
    sums: Option<Tensor>,
    weights: Option<Tensor>,
    inputs: Option<Tensor>,
}

impl Buffers {
    /// Rows of a type and so many columns, of which there are none where they aren't needed: logits, sums, weights, inputs.
    fn columns(loss: &HeadLoss<'_>, gradient: bool) -> [(usize, DType); 4] {
        let (vocabulary, hidden) = loss.head.shape();
        let (columns, dtype) = (columns_at_once(hidden).min(vocabulary), loss.x.dtype());
        let of_gradient = |columns| if gradient { columns } else { 0 };
        let inputs = if loss.rows.is_some() { hidden } else { 0 };
        [
            (columns, DType::F32),
            (of_gradient(hidden), DType::F32),
            (of_gradient(columns), dtype),
            (inputs, dtype),
        ]
    }

    fn new(cuda: &Cuda, rows: usize, loss: &HeadLoss<'_>, gradient: bool) -> Result<Self> {
        let parts = Self::columns(loss, gradient);
        let bytes = parts.map(|(columns, dtype)| rows * columns * dtype.size());
        let all = bytes.iter().map(|bytes| bytes.next_multiple_of(ALIGNMENT)).sum();
        let all = cuda.empty(&[all], DType::U8)?;
        let mut start = 0;
        let mut next = |i: usize| -> Result<Option<Tensor>> {
            let ((columns, dtype), from) = (parts[i], start);
            start += bytes[i].next_multiple_of(ALIGNMENT);
            let part = || all.slice(from..from + bytes[i])?.seen_as(&[rows * columns], dtype);
            (columns > 0).then(part).transpose()
        };
        Ok(Buffers {
            stats: cuda.empty(&[rows * STATS], DType::F32)?,
            logits: next(0)?.ok_or_else(|| Error::shape("head_loss", "the vocabulary is empty"))?,
            sums: next(1)?,
            weights: next(2)?,
            inputs: next(3)?,
        })
    }

    /// Bytes of a row.
    fn bytes(loss: &HeadLoss<'_>, gradient: bool) -> usize {
        Self::columns(loss, gradient).iter().map(|(columns, dtype)| columns * dtype.size()).sum()
    }
}

/// The beginning of a buffer as a matrix.
fn matrix(buffer: &Tensor, rows: usize, columns: usize) -> Result<Tensor> {
    buffer.slice(0..rows * columns)?.reshape(&[rows, columns])
}

pub(super) fn head_loss(
    cuda: &Cuda,
    losses: &mut Tensor,
    dx: Option<&mut Tensor>,
    loss: &HeadLoss<'_>,
) -> Result<bool> {
    check::head_loss(losses, dx.as_deref(), loss)?;
    let Some(parts) = parts(loss)? else { return Ok(false) };
    let m = losses.elements();
    let (vocabulary, hidden) = loss.head.shape();
    let sizes = [columns_at_once(hidden).min(vocabulary), hidden];
    let at_once = rows_at_once(cuda, Buffers::bytes(loss, dx.is_some()), sizes).min(m);
    let buffers = Buffers::new(cuda, at_once, loss, dx.is_some())?;
    for first in (0..m).step_by(at_once.max(1)) {
        let rows = first..(first + at_once).min(m);
        let x = match (loss.rows, &buffers.inputs) {
            (Some(indices), Some(inputs)) => {
                let mut x = matrix(inputs, rows.len(), loss.x.cols())?;
                cuda.gather_rows(&mut x, loss.x, &indices.reshape(&[m])?.slice(rows.clone())?)?;
                x
            }
            _ => loss.x.reshape(&[m, loss.x.cols()])?.slice(rows.clone())?,
        };
        let targets = loss.targets.reshape(&[m])?.slice(rows.clone())?;
        for part in &parts {
            add_part(cuda, &buffers, &x, &targets, part, loss.softcap)?;
        }
        finish(cuda, &buffers, losses, dx.as_deref(), rows, loss)?;
    }
    Ok(true)
}

/// Adds a part of the vocabulary to what is known of some rows.
fn add_part(
    cuda: &Cuda,
    buffers: &Buffers,
    x: &Tensor,
    targets: &Tensor,
    part: &Part,
    softcap: Option<f32>,
) -> Result<()> {
    let (rows, columns, hidden) = (x.rows(), part.columns.len(), x.cols());
    let mut logits = matrix(&buffers.logits, rows, columns)?;
    let terms = [GemmTerm { a: Matrix::plain(x), b: part.head.matrix(true) }];
    cuda.gemm(&mut logits, &Gemm { bias: part.bias.as_ref(), ..Gemm::new(&terms) })?;
    let mut weights = buffers.weights.as_ref().map(|w| matrix(w, rows, columns)).transpose()?;
    let mut sums = buffers.sums.as_ref().map(|s| matrix(s, rows, hidden)).transpose()?;
    let params = cross_entropy_columns_params {
        weights: weights.as_mut().map_or(Ok(std::ptr::null_mut()), written)?,
        sums: sums.as_mut().map_or(Ok(std::ptr::null_mut()), written)?,
        stats: written(&mut buffers.stats.clone())?,
        logits: read(&logits)?,
        targets: read(targets)?,
        first: part.columns.start as u32,
        columns: columns as u32,
        hidden: hidden as u32,
        softcap: softcap.unwrap_or(0.0),
    };
    let kernel = format!("cross_entropy_columns_{}", x.dtype());
    // SAFETY: the operands are as the structure says.
    unsafe { cuda.launch(&kernel, [rows, 1, 1], THREADS, 0, &params)? };
    let (Some(weights), Some(sums)) = (&weights, &mut sums) else { return Ok(()) };
    let terms = [GemmTerm { a: Matrix::plain(weights), b: part.head.matrix(false) }];
    cuda.gemm(sums, &Gemm { accumulate: part.columns.start > 0, ..Gemm::new(&terms) })
}

/// The losses of some rows and the gradient of their inputs.
fn finish(
    cuda: &Cuda,
    buffers: &Buffers,
    losses: &mut Tensor,
    dx: Option<&Tensor>,
    rows: Range<usize>,
    loss: &HeadLoss<'_>,
) -> Result<()> {
    let (vocabulary, hidden) = loss.head.shape();
    let m = losses.elements();
    for (range, grad_scale) in loss.grad_scales {
        let own = range.start.max(rows.start)..range.end.min(rows.end);
        if own.is_empty() {
            continue;
        }
        let part = |x: &Tensor, columns: usize, first: usize| {
            x.reshape(&[x.elements() / columns, columns])?.slice(own.start - first..own.end - first)
        };
        let (sums, mut dx) = match (&buffers.sums, dx) {
            (Some(sums), Some(dx)) => (read(&part(sums, hidden, rows.start)?)?, Some(part(dx, hidden, 0)?)),
            _ => (std::ptr::null(), None),
        };
        let params = cross_entropy_finish_params {
            losses: written(&mut losses.reshape(&[m])?.slice(own.clone())?)?,
            dx: dx.as_mut().map_or(Ok(std::ptr::null_mut()), written)?,
            sums,
            stats: read(&part(&buffers.stats, STATS, rows.start)?)?,
            targets: read(&part(loss.targets, 1, 0)?)?,
            faults: cuda.faults.device_bytes()?.cast(),
            head: gemm::operand(&loss.head)?,
            quantized: match loss.head {
                Matrix::Quantized { matrix, .. } => quant::view(matrix)?,
                // SAFETY: a structure of the C header, of numbers and pointers.
                Matrix::Dense { .. } => unsafe { std::mem::zeroed() },
            },
            vocabulary: vocabulary as u32,
            hidden: hidden as u32,
            softcap: loss.softcap.unwrap_or(0.0),
            grad_scale: *grad_scale,
        };
        let kernel = format!("cross_entropy_finish_{}", loss.x.dtype());
        // SAFETY: the operands are as the structure says; targets are checked by the kernel.
        unsafe { cuda.launch(&kernel, [own.len(), 1, 1], THREADS, 0, &params)? };
    }
    Ok(())
}
