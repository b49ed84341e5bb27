//! The output head and the loss in one: logits exist only for a chunk of rows at a time.
//!
//! The loss is linear in what comes after it (a fixed factor), so the gradient of the hidden states is
//! computed with the loss, chunk by chunk, and nothing is computed twice. A backend may have a way of its own for heads that
//! are not trained ([`Kernels::head_loss`](crate::backend::Kernels::head_loss)).

use super::head::Head;
use crate::autograd::{Gradients, Op, Tape, ValueId, Var};
use crate::backend::{Backend, HeadLoss, IGNORE_INDEX};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::Linear;
use crate::tensor::Tensor;
use std::ops::Range;

/// Bytes of logits, in f32, and of their gradients that may exist at a time.
const LOGITS_BYTES: usize = 48 << 20;

/// What [`Tape::linear_cross_entropy`] gives.
#[derive(Debug)]
pub struct Loss {
    /// Cross-entropies of the rows that count, in order: f32 `[counted]`.
    pub losses: Tensor,
    /// Number of rows that count.
    pub counted: usize,
    /// Where backward starts, if recording.
    pub id: Option<ValueId>,
}

/// What is computed: losses of the rows that count, and their gradient, of the same rows at first.
struct Results {
    losses: Tensor,
    dx: Option<Tensor>,
}

impl Tape<'_> {
    /// Cross-entropies of `x head^T` (`x`: `[tokens, hidden]`) against `targets`, leaving out
    /// [`IGNORE_INDEX`]; logits are soft-capped if so asked; the gradient is that of `grad_scale` times their sum, or of
    /// the slots' own factors.
    ///
    /// # Errors
    /// When a target is outside the vocabulary or shapes do not fit.
    pub fn linear_cross_entropy(
        &mut self,
        x: &Var,
        head: &Linear,
        targets: &[i32],
        softcap: Option<f32>,
        grad_scale: f32,
    ) -> Result<Loss> {
        let vocabulary = head.out_features;
        if let Some(bad) = targets.iter().find(|t| **t != IGNORE_INDEX && !(0..vocabulary as i32).contains(t))
        {
            return Err(Error::shape(
                "cross_entropy",
                format!("target {bad} is outside the vocabulary of {vocabulary}"),
            ));
        }
        if head.differs() {
            return self.losses_by_slot(x, head, targets, softcap, grad_scale);
        }
        let backend = self.backend.clone();
        let counted: Vec<i32> =
            (0..targets.len()).filter(|i| targets[*i] != IGNORE_INDEX).map(|i| i as i32).collect();
        let m = counted.len();
        let kept: Vec<i32> = counted.iter().map(|i| targets[*i as usize]).collect();
        let head = Head::new(&backend, self.params, head)?;
        let wants_grad = self.is_recording() && (x.needs_grad() || head.is_trained());
        let mut results = Results {
            losses: backend.empty(&[m], DType::F32)?,
            dx: (wants_grad && x.needs_grad()).then(|| self.empty(m, x.tensor.cols())).transpose()?,
        };
        let (matrix, bias) = head.matrix();
        let rows = (m != targets.len()).then(|| backend.from_slice(&counted, &[m])).transpose()?;
        let loss = HeadLoss {
            x: &x.tensor,
            rows: rows.as_ref(),
            head: matrix,
            bias,
            softcap,
            targets: &backend.from_slice(&kept, &[m])?,
            grad_scales: &self.loss_pieces(&counted, grad_scale),
        };
        let frozen = !head.is_trained();
        let whole = if frozen && backend.head_loss(&mut results.losses, results.dx.as_mut(), &loss)? {
            false
        } else {
            self.losses_by_rows(&mut results, &loss, &head, wants_grad)?
        };
        let Results { losses, dx } = results;
        let rows = rows.filter(|_| !whole);
        let id = dx.and_then(|dx| {
            let op = || Op::LinearCrossEntropy { dx, rows, input_rows: x.tensor.rows() };
            self.record(losses.clone(), [x], false, op).id
        });
        Ok(Loss { losses, counted: m, id })
    }

    /// The same from whole rows of logits, some at a time, with the gradients of the head's parameters if `wants_grad`.
    /// Whether the inputs' gradient then has the rows that don't count, too.
    fn losses_by_rows(
        &self,
        results: &mut Results,
        loss: &HeadLoss<'_>,
        head: &Head<'_>,
        wants_grad: bool,
    ) -> Result<bool> {
        let backend = &self.backend;
        let (m, vocabulary) = (results.losses.elements(), loss.head.shape().0);
        let counted = |x: Tensor| match loss.rows {
            None => Ok(x),
            Some(rows) => gathered(backend, &x, rows),
        };
        let input = counted(loss.x.clone())?;
        let low_rank = head.rows(loss.x, self.dropout, counted)?;
        // Where the low-rank part drops elements of its input, its gradient takes the same mask, by token.
        let drops = head.drops(self.dropout).filter(|_| results.dx.is_some());
        let through = drops.map(|_| self.empty(m, loss.x.cols())).transpose()?;
        let bytes = 4 + if wants_grad { self.dtype.size() } else { 0 };
        let chunk = (LOGITS_BYTES / (bytes * vocabulary)).clamp(1, m.max(1));
        let logits = backend.empty(&[chunk, vocabulary], DType::F32)?;
        let dlogits = wants_grad.then(|| self.empty(chunk, vocabulary)).transpose()?;
        for start in (0..m).step_by(chunk) {
            let range = start..(start + chunk).min(m);
            let part = input.slice(range.clone())?;
            let low_rank = low_rank.as_ref().map(|all| all.slice(range.clone())).transpose()?;
            let mut logits = logits.slice(0..range.len())?;
            let dlogits = dlogits.as_ref().map(|d| d.slice(0..range.len())).transpose()?;
            head.logits(&mut logits, &part, low_rank.as_ref())?;
            if let Some(cap) = loss.softcap {
                backend.softcap(&mut logits, cap)?;
            }
            for (piece, grad_scale) in loss.grad_scales {
                let own = piece.start.max(range.start)..piece.end.min(range.end);
                if own.is_empty() {
                    continue;
                }
                let inside = own.start - start..own.end - start;
                backend.cross_entropy(
                    &mut results.losses.slice(own.clone())?,
                    dlogits.as_ref().map(|d| d.slice(inside.clone())).transpose()?.as_mut(),
                    &logits.slice(inside)?,
                    &loss.targets.slice(own)?,
                    *grad_scale,
                )?;
            }
            let Some(mut dlogits) = dlogits else { continue };
            if let Some(cap) = loss.softcap {
                backend.softcap_backward(&mut dlogits, &logits, cap)?;
            }
            let dx = results.dx.as_ref().map(|dx| dx.slice(range.clone())).transpose()?;
            let through = through.as_ref().map(|all| all.slice(range)).transpose()?;
            head.backward(&dlogits, &part, low_rank.as_ref(), dx, through)?;
        }
        let (Some(dx), Some((lora, dropout)), Some(through)) = (&mut results.dx, drops, through) else {
            return Ok(false);
        };
        let through = scattered(backend, through, loss.rows, loss.x.rows())?;
        *dx = scattered(backend, dx.clone(), loss.rows, loss.x.rows())?;
        let key = dropout.key(lora.stream);
        backend.dropout(dx, &through, lora.dropout, key, dropout.first_row, true)?;
        Ok(true)
    }

    /// Neighbours among the counted rows that have one factor on their losses, with that factor.
    fn loss_pieces(&self, counted: &[i32], grad_scale: f32) -> Vec<(Range<usize>, f32)> {
        let factor = |row: &i32| {
            let slot = self.slots.iter().find(|slot| slot.rows.contains(&(*row as usize)));
            slot.map_or(grad_scale, |slot| slot.grad_scale)
        };
        let mut pieces: Vec<(Range<usize>, f32)> = Vec::new();
        for (i, factor) in counted.iter().map(factor).enumerate() {
            match pieces.last_mut() {
                Some((range, same)) if *same == factor => range.end = i + 1,
                _ => pieces.push((i..i + 1, factor)),
            }
        }
        pieces
    }
}

/// Some rows of a tensor.
fn gathered(backend: &Backend, x: &Tensor, rows: &Tensor) -> Result<Tensor> {
    let mut out = backend.empty(&[rows.elements(), x.cols()], x.dtype())?;
    backend.gather_rows(&mut out, x, rows)?;
    Ok(out)
}

/// Rows at their places among `all`, zeros elsewhere; `x` itself if it has all.
fn scattered(backend: &Backend, x: Tensor, rows: Option<&Tensor>, all: usize) -> Result<Tensor> {
    let Some(rows) = rows else { return Ok(x) };
    let mut out = backend.empty(&[all, x.cols()], x.dtype())?;
    backend.fill(&mut out, 0.0)?;
    backend.scatter_add_rows(&mut out, &x, rows)?;
    Ok(out)
}

pub(crate) fn backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dx: Tensor,
    rows: Option<Tensor>,
    input_rows: usize,
) -> Result<()> {
    let Some(id) = inputs[0] else { return Ok(()) };
    let all = scattered(&g.backend, dx, rows.as_ref(), input_rows)?;
    g.add(id, all)
}
