//! A column range of a value, for fused projections (`c_attn` is queries, keys and values side by side).

use crate::autograd::{Gradients, Op, Tape, ValueId, Var};
use crate::error::Result;
use crate::tensor::Tensor;

impl Tape<'_> {
    /// Columns `start..start + cols` of `x`: `[tokens, cols]`.
    ///
    /// # Errors
    /// When the range leaves `x`.
    pub fn columns(&mut self, x: &Var, start: usize, cols: usize) -> Result<Var> {
        let mut y = self.empty(x.tensor.rows(), cols)?;
        self.backend.copy_columns(&mut y, 0, &x.tensor, start, cols, false)?;
        let input_cols = x.tensor.cols();
        Ok(self.record(y, [x], false, || Op::Columns { start, cols, input_cols }))
    }
}

pub(crate) fn backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dy: &Tensor,
    start: usize,
    cols: usize,
    input_cols: usize,
) -> Result<()> {
    let Some(id) = inputs[0] else { return Ok(()) };
    let backend = g.backend.clone();
    g.accumulate(id, &[dy.rows(), input_cols], |dx, accumulate| {
        if !accumulate {
            backend.fill(dx, 0.0)?;
        }
        backend.copy_columns(dx, start, dy, 0, cols, true)
    })
}
