//! Virtual tokens in front of every sequence: rows of keys and values, or of embeddings.
//!
//! The gradient of the virtual tokens is added to a buffer of its own, f32, so that layers that are computed again
//! need nothing but their input. Sources: Li and Liang, "Prefix-Tuning" (arXiv 2101.00190); Lester et al., "The Power
//! of Scale for Parameter-Efficient Prompt Tuning" (arXiv 2104.08691).

use crate::autograd::{Gradients, Op, Tape, ValueId, Var};
use crate::backend::{Backend, Sequence};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;
use std::sync::Arc;

/// A column range of a matrix as a matrix of its own.
fn columns(backend: &Backend, x: &Tensor, start: usize, cols: usize) -> Result<Tensor> {
    let mut out = backend.empty(&[x.rows(), cols], x.dtype())?;
    backend.copy_columns(&mut out, 0, x, start, cols, false)?;
    Ok(out)
}

impl Tape<'_> {
    /// `x` (`[tokens, cols]`, keys or values) with `cols` columns of the prefix from `start` on before each sequence:
    /// `[key rows, cols]`. `grads` is the buffer for the whole prefix's gradient.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn prefix(
        &mut self,
        x: &Var,
        prefix: &Tensor,
        grads: Option<&Tensor>,
        start: usize,
        sequences: &Arc<[Sequence]>,
    ) -> Result<Var> {
        let (cols, virtual_tokens) = (x.tensor.cols(), prefix.rows());
        let rows = columns(&self.backend, prefix, start, cols)?;
        let y = self.empty(x.tensor.rows() + sequences.len() * virtual_tokens, cols)?;
        for s in sequences.iter() {
            let own = s.k_start + virtual_tokens;
            self.backend.cast(&mut y.slice(s.k_start..own)?, &rows)?;
            self.backend
                .cast(&mut y.slice(own..own + s.q_len)?, &x.tensor.slice(s.q_start..s.q_start + s.q_len)?)?;
        }
        let Some(grads) = grads else { return Ok(Var::constant(y)) };
        let (grads, sequences) = (grads.clone(), sequences.clone());
        Ok(self.record(y, [x], true, || Op::Prefix { grads, start, sequences }))
    }

    /// `x` (`[tokens, cols]`) whose first rows of each sequence are the virtual tokens.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn prompt(
        &mut self,
        x: &Var,
        prompt: &Tensor,
        grads: Option<&Tensor>,
        sequences: &Arc<[Sequence]>,
    ) -> Result<Var> {
        let mut y = self.empty(x.tensor.rows(), x.tensor.cols())?;
        self.backend.cast(&mut y, &x.tensor)?;
        for s in sequences.iter() {
            self.backend.cast(&mut y.slice(s.q_start..s.q_start + prompt.rows())?, prompt)?;
        }
        let Some(grads) = grads else { return Ok(Var::constant(y)) };
        let (grads, sequences) = (grads.clone(), sequences.clone());
        Ok(self.record(y, [x], true, || Op::Prompt { grads, sequences }))
    }
}

pub(crate) fn prefix_backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dy: &Tensor,
    grads: &Tensor,
    start: usize,
    sequences: &[Sequence],
) -> Result<()> {
    let (backend, virtual_tokens, cols) = (g.backend.clone(), grads.rows(), dy.cols());
    let mut sum = backend.zeros(&[virtual_tokens, cols], DType::F32)?;
    for s in sequences {
        let rows = dy.slice(s.k_start..s.k_start + virtual_tokens)?;
        backend.add_assign(&mut sum, &backend.to_dtype(&rows, DType::F32)?)?;
    }
    backend.copy_columns(&mut grads.clone(), start, &sum, 0, cols, true)?;
    let Some(id) = inputs[0] else { return Ok(()) };
    let tokens = sequences.iter().map(|s| s.q_len).sum();
    let dx = backend.empty(&[tokens, cols], dy.dtype())?;
    for s in sequences {
        let own = s.k_start + virtual_tokens;
        backend.cast(&mut dx.slice(s.q_start..s.q_start + s.q_len)?, &dy.slice(own..own + s.q_len)?)?;
    }
    g.add(id, dx)
}

pub(crate) fn prompt_backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dy: Tensor,
    grads: &Tensor,
    sequences: &[Sequence],
) -> Result<()> {
    let (backend, virtual_tokens) = (g.backend.clone(), grads.rows());
    for s in sequences {
        let rows = dy.slice(s.q_start..s.q_start + virtual_tokens)?;
        backend.add_assign(&mut grads.clone(), &backend.to_dtype(&rows, DType::F32)?)?;
    }
    let Some(id) = inputs[0] else { return Ok(()) };
    let mut dx = backend.empty(dy.shape(), dy.dtype())?;
    backend.cast(&mut dx, &dy)?;
    for s in sequences {
        backend.fill(&mut dx.slice(s.q_start..s.q_start + virtual_tokens)?, 0.0)?;
    }
    g.add(id, dx)
}
