//! Rotary embedding, in place: nothing else needs a projection before its rotation. The gradient rotates
//! backwards.

use crate::autograd::{Gradients, Op, Tape, ValueId, Var};
use crate::backend::RopeShape;
use crate::error::Result;
use crate::tensor::Tensor;

impl Tape<'_> {
    /// `x` with each head's first `rotary_dim` elements rotated by its token's position.
    ///
    /// # Errors
    /// When shapes do not fit, or `x` is still used elsewhere.
    pub fn rope(&mut self, mut x: Var, table: &Tensor, positions: &Tensor, shape: RopeShape) -> Result<Var> {
        self.backend.rope(&mut x.tensor, table, positions, &shape)?;
        let output = x.tensor.clone();
        Ok(self.record(output, [&x], false, || Op::Rope {
            table: table.clone(),
            positions: positions.clone(),
            shape,
        }))
    }
}

pub(crate) fn backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    mut dy: Tensor,
    table: &Tensor,
    positions: &Tensor,
    shape: RopeShape,
) -> Result<()> {
    let Some(id) = inputs[0] else { return Ok(()) };
    g.backend.rope(&mut dy, table, positions, &RopeShape { inverse: !shape.inverse, ..shape })?;
    g.add(id, dy)
}
