//! A value times a number, and a value under a dropout mask.

use crate::autograd::{Gradients, Op, Tape, ValueId, Var};
use crate::error::Result;
use crate::rng::PhiloxKey;
use crate::tensor::Tensor;

impl Tape<'_> {
    /// `x * factor`, `[tokens, cols]`; `x` itself for 1.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn scale(&mut self, x: &Var, factor: f32) -> Result<Var> {
        if factor == 1.0 {
            return Ok(x.clone());
        }
        let mut y = self.empty(x.tensor.rows(), x.tensor.cols())?;
        self.backend.cast(&mut y, &x.tensor)?;
        self.backend.scale(&mut y, factor)?;
        Ok(self.record(y, [x], false, || Op::Scale { factor }))
    }

    /// `x` with elements dropped with probability `p` and the others scaled by `1 / (1 - p)`; `x` itself where nothing
    /// is dropped.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn dropout(&mut self, x: &Var, p: f32, stream: u64) -> Result<Var> {
        let Some(dropout) = self.dropout.filter(|_| p > 0.0) else { return Ok(x.clone()) };
        let (key, first_row) = (dropout.key(stream), dropout.first_row);
        let mut y = self.empty(x.tensor.rows(), x.tensor.cols())?;
        self.backend.dropout(&mut y, &x.tensor, p, key, first_row, false)?;
        Ok(self.record(y, [x], false, || Op::Dropout { p, key, first_row }))
    }
}

pub(crate) fn backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dy: &Tensor,
    factor: f32,
) -> Result<()> {
    let Some(id) = inputs[0] else { return Ok(()) };
    let mut dx = g.backend.empty(dy.shape(), g.dtype)?;
    g.backend.cast(&mut dx, dy)?;
    g.backend.scale(&mut dx, factor)?;
    g.add(id, dx)
}

pub(crate) fn dropout_backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dy: &Tensor,
    p: f32,
    key: PhiloxKey,
    first_row: usize,
) -> Result<()> {
    let Some(id) = inputs[0] else { return Ok(()) };
    let mut dx = g.backend.empty(dy.shape(), g.dtype)?;
    g.backend.dropout(&mut dx, dy, p, key, first_row, false)?;
    g.add(id, dx)
}
