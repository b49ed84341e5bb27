//! Activation checkpointing by decoder layer: only a layer's input is kept, and the layer computed again in
//! the backward pass. Random masks come from counters, so the second time has the same bits as the first.

use super::backward::Gradients;
use super::tape::{Op, Tape, ValueId, Var};
use crate::error::Result;
use crate::tensor::Tensor;

/// What can compute a decoder layer again.
pub trait Replay {
    /// Layer `layer` of the model on `x`, as in the forward pass.
    ///
    /// # Errors
    /// Whatever its operations report.
    fn layer(&self, tape: &mut Tape<'_>, layer: usize, x: Var) -> Result<Var>;
}

impl<'m> Tape<'m> {
    /// Runs `layer` without recording its inside; one node stands for it.
    ///
    /// # Errors
    /// Whatever `run` reports.
    pub fn segment(
        &mut self,
        layer: usize,
        x: Var,
        trainable: bool,
        run: impl FnOnce(&mut Tape<'m>, Var) -> Result<Var>,
    ) -> Result<Var> {
        let mut inner = self.inner(false);
        let output = run(&mut inner, Var::constant(x.tensor.clone()))?;
        let input = x.tensor.clone();
        Ok(self.record(output.tensor, [&x], trainable, || Op::Segment { layer, input }))
    }

    /// The backward of a segment: forward again with recording, then backward through the inside.
    pub(crate) fn replay_segment(
        &self,
        gradients: &mut Gradients<'m>,
        inputs: [Option<ValueId>; 3],
        dy: Tensor,
        layer: usize,
        input: Tensor,
        replay: &dyn Replay,
    ) -> Result<()> {
        let mut inner = self.inner(true);
        let x = Var { tensor: input, id: inputs[0].map(|_| inner.new_id()) };
        let wanted = x.id;
        let output = replay.layer(&mut inner, layer, x)?;
        let Some(from) = output.id else { return Ok(()) };
        drop(output);
        let dx = inner.backward(from, Some(dy), wanted, replay)?;
        match (inputs[0], dx) {
            (Some(id), Some(dx)) => gradients.add(id, dx),
            _ => Ok(()),
        }
    }
}
