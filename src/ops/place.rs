//! A block of rows taken out of a value, or put into zeros.

use crate::autograd::{Gradients, Op, Tape, ValueId, Var};
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;

fn place(backend: &Backend, x: &Tensor, at: [usize; 2], shape: [usize; 2], dtype: DType) -> Result<Tensor> {
    let y = backend.zeros(&shape, dtype)?;
    let mut rows = y.slice(at[0]..at[0] + x.rows())?;
    backend.copy_columns(&mut rows, at[1], x, 0, x.cols(), false)?;
    drop(rows);
    Ok(y)
}

impl Tape<'_> {
    /// One row of `x`, `[1, cols]`.
    ///
    /// # Errors
    /// When there is no such row.
    pub fn row(&mut self, x: &Var, row: usize) -> Result<Var> {
        let y = x.tensor.slice(row..row + 1)?;
        let input_rows = x.tensor.rows();
        Ok(self.record(y, [x], false, || Op::Row { row, input_rows }))
    }

    /// Zeros of `shape` with `x` at row and column `at`.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn place(&mut self, x: &Var, at: [usize; 2], shape: [usize; 2]) -> Result<Var> {
        let y = place(&self.backend, &x.tensor, at, shape, self.dtype)?;
        let cols = x.tensor.cols();
        Ok(self.record(y, [x], false, || Op::Place { at, cols }))
    }
}

pub(crate) fn row_backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dy: &Tensor,
    row: usize,
    input_rows: usize,
) -> Result<()> {
    let Some(id) = inputs[0] else { return Ok(()) };
    let dx = place(&g.backend, dy, [row, 0], [input_rows, dy.cols()], g.dtype)?;
    g.add(id, dx)
}

/// The block that was placed is one row.
pub(crate) fn place_backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dy: &Tensor,
    at: [usize; 2],
    cols: usize,
) -> Result<()> {
    let Some(id) = inputs[0] else { return Ok(()) };
    let mut dx = g.backend.empty(&[1, cols], g.dtype)?;
    g.backend.copy_columns(&mut dx, 0, &dy.slice(at[0]..at[0] + 1)?, at[1], cols, false)?;
    g.add(id, dx)
}
