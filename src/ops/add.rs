//! Residual addition: `y = a + b`. Both inputs get the output's gradient.

use crate::autograd::{Gradients, Op, Tape, ValueId, Var};
use crate::error::Result;
use crate::tensor::Tensor;

impl Tape<'_> {
    /// `a + b`, `[tokens, cols]`.
    ///
    /// # Errors
    /// When shapes differ.
    pub fn add(&mut self, a: &Var, b: &Var) -> Result<Var> {
        let mut y = self.empty(a.tensor.rows(), a.tensor.cols())?;
        self.backend.add(&mut y, &a.tensor, &b.tensor)?;
        Ok(self.record(y, [a, b], false, || Op::Add))
    }
}

pub(crate) fn backward(g: &mut Gradients<'_>, inputs: [Option<ValueId>; 3], dy: Tensor) -> Result<()> {
    for id in inputs.into_iter().flatten() {
        g.add(id, dy.clone())?;
    }
    Ok(())
}
