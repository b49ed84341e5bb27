//! Operations on rows, slot by slot, where adapters that are [side by side](crate::model::Model::side_by_side) differ by
//! more than low-rank parts on a product of all rows: each slot's rows go through what the layer is to them, as if they
//! were alone.
//!
//! Forward: the input's rows are a part for each slot, the outputs are joined. Backward: each part's gradient begins with
//! what the input's rows have of it by then, so that sums run on as they do without the others, and takes their place.

use crate::autograd::tape::Joined;
use crate::autograd::{Gradients, Op, Slot, Tape, ValueId, Var};
use crate::error::Result;
use crate::model::Linear;
use crate::ops::cross_entropy::Loss;
use crate::tensor::Tensor;
use std::ops::Range;

/// The rows `0..rows` in order, by slot; those between slots have none.
pub(crate) fn rows_by_slot(slots: &[Slot<'_>], rows: usize) -> Vec<(Option<usize>, Range<usize>)> {
    let (mut all, mut end) = (Vec::new(), 0);
    for (slot, Slot { rows: own, .. }) in slots.iter().enumerate().filter(|(_, slot)| !slot.rows.is_empty()) {
        all.push((None, end..own.start));
        all.push((Some(slot), own.clone()));
        end = own.end;
    }
    all.push((None, end..rows));
    all.retain(|(_, rows)| !rows.is_empty());
    all
}

impl<'m> Tape<'m> {
    /// Lets `run` record as if a slot's rows were all there is.
    pub(crate) fn on_slot<T>(
        &mut self,
        slot: Option<usize>,
        run: impl FnOnce(&mut Tape<'m>) -> Result<T>,
    ) -> Result<T> {
        let mut inner = self.of_slot(slot);
        (inner.nodes, inner.values) = (std::mem::take(&mut self.nodes), self.values);
        let result = run(&mut inner);
        (self.nodes, self.values) = (inner.nodes, inner.values);
        result
    }

    /// Outputs of as many rows as `x` has, each made by `run` from a slot's rows of it, which are this range.
    ///
    /// # Errors
    /// Whatever `run` reports.
    pub(crate) fn by_slot<const N: usize>(
        &mut self,
        x: &Var,
        mut run: impl FnMut(&mut Tape<'m>, &Var, Option<usize>, &Range<usize>) -> Result<[Var; N]>,
    ) -> Result<[Var; N]> {
        let rows = x.tensor.shape()[0];
        let mut parts = Vec::new();
        for (slot, range) in rows_by_slot(self.slots, rows) {
            let part = self.part(x, &range)?;
            let outputs = self.on_slot(slot, |tape| run(tape, &part, slot, &range))?;
            parts.push((range, part.id, outputs));
        }
        if let [(_, _, outputs)] = parts.as_slice() {
            return Ok(outputs.clone());
        }
        let mut joined = Vec::with_capacity(N);
        for n in 0..N {
            let outputs = parts.iter().map(|(range, input, outputs)| (range, *input, &outputs[n]));
            joined.push(self.joined(x, rows, outputs)?);
        }
        Ok(joined.try_into().expect("there is one result for each output"))
    }

    /// Some rows of a value; the value itself if it has no others.
    fn part(&mut self, x: &Var, rows: &Range<usize>) -> Result<Var> {
        let input_rows = x.tensor.shape()[0];
        if *rows == (0..input_rows) {
            return Ok(x.clone());
        }
        let (tensor, rows) = (x.tensor.slice(rows.clone())?, rows.clone());
        Ok(self.record(tensor, [x], false, || Op::Part { rows, input_rows }))
    }

    fn joined<'a>(
        &mut self,
        x: &Var,
        rows: usize,
        outputs: impl Iterator<Item = (&'a Range<usize>, Option<ValueId>, &'a Var)>,
    ) -> Result<Var> {
        let (mut all, mut parts): (Option<Tensor>, Vec<Joined>) = (None, Vec::new());
        for (rows_of_part, input, output) in outputs {
            let all = match &mut all {
                Some(all) => all,
                None => all.insert(self.empty(rows, output.tensor.cols())?),
            };
            self.backend.cast(&mut all.slice(rows_of_part.clone())?, &output.tensor)?;
            parts.push(Joined { rows: rows_of_part.clone(), input, output: output.id });
        }
        let all = match all {
            Some(all) => all,
            None => self.empty(0, x.tensor.cols())?,
        };
        let trainable = parts.iter().any(|part| part.output.is_some());
        Ok(self.record(all, [x], trainable, || Op::Joined { parts }))
    }

    /// [`Tape::linear_cross_entropy`] with the head that each slot's rows have.
    pub(crate) fn losses_by_slot(
        &mut self,
        x: &Var,
        head: &Linear,
        targets: &[i32],
        softcap: Option<f32>,
        grad_scale: f32,
    ) -> Result<Loss> {
        let mut parts = Vec::new();
        for (slot, rows) in rows_by_slot(self.slots, targets.len()) {
            let grad_scale = slot.map_or(grad_scale, |slot| self.slots[slot].grad_scale);
            let part = self.part(x, &rows)?;
            let own = head.of_slot(slot);
            parts.push(self.on_slot(slot, |tape| {
                tape.linear_cross_entropy(&part, &own, &targets[rows], softcap, grad_scale)
            })?);
        }
        let counted = parts.iter().map(|part| part.counted).sum();
        let losses = self.backend.empty(&[counted], crate::dtype::DType::F32)?;
        let mut start = 0;
        for part in &parts {
            self.backend.cast(&mut losses.slice(start..start + part.counted)?, &part.losses)?;
            start += part.counted;
        }
        // Any of them starts the backward pass: each loss has its own gradient with it.
        Ok(Loss { losses, counted, id: parts.iter().find_map(|part| part.id) })
    }
}

/// Each part gets its rows of the gradient; its input goes on from the rows that the whole input's has.
pub(crate) fn joined_backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dy: &Tensor,
    parts: &[Joined],
) -> Result<()> {
    for part in parts {
        if let Some(output) = part.output {
            g.add(output, dy.slice(part.rows.clone())?)?;
        }
        if let (Some(all), Some(input)) = (inputs[0], part.input) {
            g.begin_part(all, input, part.rows.clone())?;
        }
    }
    Ok(())
}

/// The part's gradient in place of its rows of the whole one's.
pub(crate) fn part_backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dy: &Tensor,
    rows: Range<usize>,
    input_rows: usize,
) -> Result<()> {
    match inputs[0] {
        Some(all) => g.end_part(all, dy, rows, input_rows),
        None => Ok(()),
    }
}
