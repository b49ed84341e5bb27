//! Columns times trained factors: `y[:, c] = x[:, c] * factors[c]`.

use crate::autograd::{Gradients, Op, Tape, ValueId, Var};
use crate::error::Result;
use crate::param::{ParamId, ParamStore};
use crate::tensor::Tensor;

/// A parameter as a vector of factors, f32.
pub(crate) fn vector(params: &ParamStore, id: ParamId) -> Result<Tensor> {
    let values = params.master(id)?;
    values.reshape(&[values.elements()])
}

impl Tape<'_> {
    /// `x` with each column times its factor, `[tokens, cols]`.
    ///
    /// # Errors
    /// When there are not as many factors as columns.
    pub fn scale_columns(&mut self, x: &Var, factors: ParamId) -> Result<Var> {
        let mut y = self.empty(x.tensor.rows(), x.tensor.cols())?;
        self.backend.scale_columns(&mut y, &x.tensor, &vector(self.params, factors)?, None)?;
        let saved = x.tensor.clone();
        Ok(self.record(y, [x], true, || Op::ScaleColumns { x: saved, factors }))
    }
}

pub(crate) fn backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dy: &Tensor,
    x: &Tensor,
    factors: ParamId,
) -> Result<()> {
    let mut gradient = g.params.grad(factors)?;
    gradient = gradient.reshape(&[gradient.elements()])?;
    g.backend.add_column_products(&mut gradient, dy, x)?;
    let Some(id) = inputs[0] else { return Ok(()) };
    let mut dx = g.backend.empty(dy.shape(), g.dtype)?;
    g.backend.scale_columns(&mut dx, dy, &vector(g.params, factors)?, None)?;
    g.add(id, dx)
}
