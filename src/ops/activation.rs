//! Activation functions of the MLP, plain and gated.

use crate::autograd::{Gradients, Op, Tape, ValueId, Var};
use crate::backend::{Activation, Backend};
use crate::error::Result;
use crate::tensor::Tensor;

impl Tape<'_> {
    /// `activation(x)`, `[tokens, cols]`.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn activation(&mut self, x: &Var, activation: Activation) -> Result<Var> {
        let mut y = self.empty(x.tensor.rows(), x.tensor.cols())?;
        self.backend.activation(&mut y, &x.tensor, activation)?;
        let saved = x.tensor.clone();
        Ok(self.record(y, [x], false, || Op::Activation { x: saved, activation }))
    }

    /// `activation(gate) * up`, `[tokens, cols]`.
    ///
    /// # Errors
    /// When shapes differ.
    pub fn gated(&mut self, gate: &Var, up: &Var, activation: Activation) -> Result<Var> {
        let mut y = self.empty(gate.tensor.rows(), gate.tensor.cols())?;
        self.backend.gated(&mut y, &gate.tensor, &up.tensor, activation)?;
        let (g, u) = (gate.tensor.clone(), up.tensor.clone());
        Ok(self.record(y, [gate, up], false, || Op::Gated { gate: g, up: u, activation }))
    }
}

/// The result of an activation, computed again from what its backward keeps.
pub(crate) fn again(backend: &Backend, op: &Op) -> Result<Tensor> {
    match op {
        Op::Gated { gate, up, activation } => {
            let mut y = backend.empty(gate.shape(), gate.dtype())?;
            backend.gated(&mut y, gate, up, *activation)?;
            Ok(y)
        }
        Op::Activation { x, activation } => {
            let mut y = backend.empty(x.shape(), x.dtype())?;
            backend.activation(&mut y, x, *activation)?;
            Ok(y)
        }
        other => unreachable!("only activations are computed again, not {other:?}"),
    }
}

pub(crate) fn backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dy: &Tensor,
    x: &Tensor,
    activation: Activation,
) -> Result<()> {
    let Some(id) = inputs[0] else { return Ok(()) };
    let mut dx = g.backend.empty(x.shape(), g.dtype)?;
    g.backend.activation_backward(&mut dx, dy, x, activation)?;
    g.add(id, dx)
}

pub(crate) fn gated_backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dy: &Tensor,
    gate: &Tensor,
    up: &Tensor,
    activation: Activation,
) -> Result<()> {
    let mut dgate = g.backend.empty(gate.shape(), g.dtype)?;
    let mut dup = g.backend.empty(up.shape(), g.dtype)?;
    g.backend.gated_backward(&mut dgate, &mut dup, dy, gate, up, activation)?;
    for (id, gradient) in [(inputs[0], dgate), (inputs[1], dup)] {
        if let Some(id) = id {
            g.add(id, gradient)?;
        }
    }
    Ok(())
}
