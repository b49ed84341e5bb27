//! The reverse loop: one step per recorded operation, gradients of values held no longer than needed.

use super::checkpoint::Replay;
use super::tape::{Node, Op, Tape, ValueId};
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops;
use crate::param::ParamStore;
use crate::tensor::Tensor;
use std::ops::Range;

/// The gradients of values during a backward pass.
#[derive(Debug)]
pub struct Gradients<'m> {
    pub(crate) backend: Backend,
    pub(crate) params: &'m ParamStore,
    pub(crate) dtype: DType,
    table: Vec<Option<Tensor>>,
}

impl<'m> Gradients<'m> {
    /// Takes the gradient of a value away from the table.
    pub fn take(&mut self, id: ValueId) -> Option<Tensor> {
        self.table[id.0].take()
    }

    /// Adds a gradient, which becomes the value's own if there was none.
    ///
    /// # Errors
    /// When shapes differ.
    pub fn add(&mut self, id: ValueId, gradient: Tensor) -> Result<()> {
        match self.table[id.0].take() {
            None => self.table[id.0] = Some(gradient),
            Some(old) => {
                let mut sum = self.own(old)?;
                self.backend.add_assign(&mut sum, &gradient)?;
                self.table[id.0] = Some(sum);
            }
        }
        Ok(())
    }

    /// Lets `write` overwrite the value's gradient (`false`) or add to what is there (`true`).
    ///
    /// # Errors
    /// Whatever `write` reports.
    pub fn accumulate(
        &mut self,
        id: ValueId,
        shape: &[usize],
        write: impl FnOnce(&mut Tensor, bool) -> Result<()>,
    ) -> Result<()> {
        let (mut gradient, accumulate) = match self.table[id.0].take() {
            Some(old) => (self.own(old)?, true),
            None => (self.backend.empty(shape, self.dtype)?, false),
        };
        write(&mut gradient, accumulate)?;
        self.table[id.0] = Some(gradient);
        Ok(())
    }

    /// Lets the gradient of rows of the value `all` go on in that of a part, whose first gradient it becomes.
    ///
    /// # Errors
    /// When the rows are not there.
    pub(crate) fn begin_part(&mut self, all: ValueId, part: ValueId, rows: Range<usize>) -> Result<()> {
        if let Some(gradient) = &self.table[all.0] {
            self.table[part.0] = Some(gradient.slice(rows)?);
        }
        Ok(())
    }

    /// Puts the whole gradient of a part in place of its rows of the value `all`.
    ///
    /// # Errors
    /// When shapes differ.
    pub(crate) fn end_part(
        &mut self,
        all: ValueId,
        part: &Tensor,
        rows: Range<usize>,
        all_rows: usize,
    ) -> Result<()> {
        let whole = match self.table[all.0].take() {
            Some(old) => self.own(old)?,
            None => self.backend.zeros(&[all_rows, part.cols()], part.dtype())?,
        };
        self.backend.cast(&mut whole.slice(rows)?, part)?;
        self.table[all.0] = Some(whole);
        Ok(())
    }

    /// The tensor itself if nobody else holds it, else a copy.
    fn own(&self, tensor: Tensor) -> Result<Tensor> {
        if tensor.is_unique() {
            return Ok(tensor);
        }
        let mut copy = self.backend.empty(tensor.shape(), tensor.dtype())?;
        self.backend.cast(&mut copy, &tensor)?;
        Ok(copy)
    }
}

impl<'m> Tape<'m> {
    /// Runs the backward pass from the value `from`, whose gradient is `seed` (`None`: the loss operation
    /// knows its own). Gradients of parameters are added to the store's; the gradient of `wanted` returned.
    ///
    /// # Errors
    /// Whatever an operation reports.
    pub fn backward(
        mut self,
        from: ValueId,
        seed: Option<Tensor>,
        wanted: Option<ValueId>,
        replay: &dyn Replay,
    ) -> Result<Option<Tensor>> {
        let mut nodes = std::mem::take(&mut self.nodes);
        let mut gradients = Gradients {
            backend: self.backend.clone(),
            params: self.params,
            dtype: self.dtype,
            table: vec![None; self.values],
        };
        gradients.table[from.0] = seed;
        while let Some(node) = nodes.pop() {
            let of_slot = node.slot.map(|slot| self.of_slot(Some(slot)));
            let tape = of_slot.as_ref().unwrap_or(&self);
            gradients.params = tape.params;
            if !matches!(node.op, Op::Linear { .. } | Op::Rope { .. }) {
                tape.step(&mut gradients, node, replay)?;
                continue;
            }
            let mut together = vec![node];
            while let Some(node) = nodes.pop_if(|next| next.is_beside(&together[0])) {
                together.push(node);
            }
            match together[0].op {
                Op::Linear { .. } => ops::linear::backward(tape, &mut gradients, together, nodes.last())?,
                _ => ops::rope::backward(&mut gradients, together)?,
            }
        }
        Ok(wanted.and_then(|id| gradients.take(id)))
    }

    /// The backward of one operation whose neighbours may not share it.
    fn step(&self, gradients: &mut Gradients<'m>, node: Node, replay: &dyn Replay) -> Result<()> {
        let Node { op, inputs, output, .. } = node;
        if let Op::LinearCrossEntropy { dx, rows, input_rows } = op {
            return ops::cross_entropy::backward(gradients, inputs, dx, rows, input_rows);
        }
        // A value nobody used has no gradient, and neither have its inputs through it.
        let Some(dy) = gradients.take(output) else { return Ok(()) };
        match op {
            Op::Embedding { table, entries, low_rank } => {
                ops::embedding::backward(gradients, dy, table, &entries, low_rank.as_deref())
            }
            Op::Prefix { grads, start, sequences } => {
                ops::prompt::prefix_backward(gradients, inputs, &dy, &grads, start, &sequences)
            }
            Op::Prompt { grads, sequences } => {
                ops::prompt::prompt_backward(gradients, inputs, dy, &grads, &sequences)
            }
            Op::Row { row, input_rows } => ops::place::row_backward(gradients, inputs, &dy, row, input_rows),
            Op::Place { at, cols } => ops::place::place_backward(gradients, inputs, &dy, at, cols),
            Op::Scale { factor } => ops::scale::backward(gradients, inputs, &dy, factor),
            Op::Dropout { p, key, first_row } => {
                ops::scale::dropout_backward(gradients, inputs, &dy, p, key, first_row)
            }
            Op::ScaleColumns { x, factors } => {
                ops::scale_columns::backward(gradients, inputs, &dy, &x, factors)
            }
            Op::Rotate { x, rotation } => {
                ops::rotate::backward(gradients, inputs, &dy, &x, &rotation, self.dropout)
            }
            Op::Norm { x, stats, weight, bias, layer_norm, plus_one } => {
                ops::norm::backward(gradients, inputs, &dy, &x, &stats, &weight, bias, layer_norm, plus_one)
            }
            Op::Attention(saved) => ops::attention::backward(gradients, inputs, &dy, &saved),
            Op::Columns { start, cols, input_cols } => {
                ops::columns::backward(gradients, inputs, &dy, start, cols, input_cols)
            }
            Op::Activation { x, activation } => {
                ops::activation::backward(gradients, inputs, &dy, &x, activation)
            }
            Op::Gated { gate, up, activation } => {
                ops::activation::gated_backward(gradients, inputs, &dy, &gate, &up, activation)
            }
            Op::Add => ops::add::backward(gradients, inputs, dy),
            Op::Part { rows, input_rows } => {
                ops::by_slot::part_backward(gradients, inputs, &dy, rows, input_rows)
            }
            Op::Joined { parts } => ops::by_slot::joined_backward(gradients, inputs, &dy, &parts),
            Op::Segment { layers, input, hidden } => {
                self.replay_segment(gradients, inputs, dy, layers, (input, hidden), replay)
            }
            Op::LinearCrossEntropy { .. } => unreachable!("handled above: it has no incoming gradient"),
            Op::Linear { .. } | Op::Rope { .. } => {
                unreachable!("neighbours are handled together, by the loop")
            }
        }
    }
}
