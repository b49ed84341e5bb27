//! Launches of `cuda/rows.cu`.

use super::bindings::*;
use super::{Cuda, PACK, THREADS, read, written};
use crate::backend::check;
use crate::error::Result;
use crate::tensor::Tensor;

/// Threads of a block where each has a column.
const COLUMN_THREADS: usize = 64;

/// Blocks where each thread has a pack of a row.
fn pack_grid(rows: usize, cols: usize) -> [usize; 3] {
    [(rows * cols.div_ceil(PACK)).div_ceil(THREADS), 1, 1]
}

pub(super) fn gather_rows(cuda: &Cuda, out: &mut Tensor, x: &Tensor, rows: &Tensor) -> Result<()> {
    check::gather_rows(out, x, rows)?;
    let (n, cols) = (rows.elements(), x.cols());
    let name = format!("gather_rows_{}_{}", x.dtype(), out.dtype());
    let params = gather_rows_params {
        out: written(out)?,
        x: read(x)?,
        indices: read(rows)?,
        faults: cuda.faults.device_bytes()?.cast(),
        n: n as u64,
        x_rows: x.rows() as u64,
        cols: cols as u32,
    };
    // SAFETY: the operands are as the structure says; indices are checked by the kernel.
    unsafe { cuda.launch(&name, pack_grid(n, cols), THREADS, 0, &params) }
}

pub(super) fn scatter_add_rows(cuda: &Cuda, out: &mut Tensor, x: &Tensor, rows: &Tensor) -> Result<()> {
    check::scatter_add_rows(out, x, rows)?;
    let cols = x.cols();
    let name = format!("scatter_add_rows_{}_{}", x.dtype(), out.dtype());
    let params = scatter_add_rows_params {
        out_rows: out.rows() as u64,
        out: written(out)?,
        x: read(x)?,
        indices: read(rows)?,
        faults: cuda.faults.device_bytes()?.cast(),
        n: rows.elements() as u64,
        cols: cols as u32,
    };
    // SAFETY: the operands are as the structure says; indices are checked by the kernel.
    unsafe { cuda.launch(&name, [cols.div_ceil(COLUMN_THREADS), 1, 1], COLUMN_THREADS, 0, &params) }
}

pub(super) fn copy_columns(
    cuda: &Cuda,
    out: &mut Tensor,
    out_col: usize,
    x: &Tensor,
    x_col: usize,
    cols: usize,
    accumulate: bool,
) -> Result<()> {
    let dtype = check::copy_columns(out, out_col, x, x_col, cols)?;
    let rows = x.rows();
    let params = copy_columns_params {
        out_cols: out.cols() as u32,
        out: written(out)?,
        x: read(x)?,
        rows: rows as u64,
        out_col: out_col as u32,
        x_cols: x.cols() as u32,
        x_col: x_col as u32,
        cols: cols as u32,
        accumulate: i32::from(accumulate),
    };
    // SAFETY: the operands are as the structure says; the column ranges were checked.
    unsafe { cuda.launch(&format!("copy_columns_{dtype}"), pack_grid(rows, cols), THREADS, 0, &params) }
}
