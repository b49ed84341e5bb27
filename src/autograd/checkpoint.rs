//! Activation checkpointing by decoder layers: only the input of a few layers is kept (and the few columns of their
//! low-rank parts' hidden values), and they are computed again in the backward pass. Random masks come from counters, so
//! the second time has the same bits as the first.

use super::backward::Gradients;
use super::tape::{Hidden, Op, Tape, ValueId, Var};
use crate::error::Result;
use crate::tensor::Tensor;
use std::ops::Range;

/// What can compute decoder layers again.
pub trait Replay {
    /// These layers of the model, one after the other, on `x`, as in the forward pass.
    ///
    /// # Errors
    /// Whatever their operations report.
    fn layers(&self, tape: &mut Tape<'_>, layers: Range<usize>, x: Var) -> Result<Var>;
}

impl<'m> Tape<'m> {
    /// Runs `layers` without recording their inside; one node stands for them.
    ///
    /// # Errors
    /// Whatever `run` reports.
    pub fn segment(
        &mut self,
        layers: Range<usize>,
        x: Var,
        trainable: bool,
        run: impl FnOnce(&mut Tape<'m>, Var) -> Result<Var>,
    ) -> Result<Var> {
        let hidden = Hidden::default();
        let mut inner = self.first_time(&hidden);
        let output = run(&mut inner, Var::constant(x.tensor.clone()))?;
        let input = x.tensor.clone();
        Ok(self.record(output.tensor, [&x], trainable, || Op::Segment { layers, input, hidden }))
    }

    /// The backward of a segment: forward again with recording, then backward through the inside.
    pub(crate) fn replay_segment(
        &self,
        gradients: &mut Gradients<'m>,
        inputs: [Option<ValueId>; 3],
        dy: Tensor,
        layers: Range<usize>,
        (input, hidden): (Tensor, Hidden),
        replay: &dyn Replay,
    ) -> Result<()> {
        let mut inner = self.second_time(hidden, layers.len());
        let x = Var { tensor: input, id: inputs[0].map(|_| inner.new_id()) };
        let wanted = x.id;
        let output = replay.layers(&mut inner, layers, x)?;
        let Some(from) = output.id else { return Ok(()) };
        drop(output);
        let dx = inner.backward(from, Some(dy), wanted, replay)?;
        match (inputs[0], dx) {
            (Some(id), Some(dx)) => gradients.add(id, dx),
            _ => Ok(()),
        }
    }
}
