//! Causal attention over packed sequences, with grouped heads.

use crate::autograd::tape::{AttentionHeads, AttentionSaved};
use crate::autograd::{Gradients, Op, Tape, ValueId, Var};
use crate::backend::{AttentionShape, Sequence};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;
use std::sync::Arc;

impl AttentionHeads {
    fn shape(self, sequences: &[Sequence]) -> AttentionShape<'_> {
        AttentionShape {
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            scale: self.scale,
            window: self.window,
            softcap: self.softcap,
            sequences,
        }
    }
}

impl Tape<'_> {
    /// Attention of `q` (`[tokens, n_heads * head_dim]`) over `k` and `v`
    /// (`[key rows, n_kv_heads * head_dim]`): `[tokens, n_heads * head_dim]`.
    ///
    /// # Errors
    /// When shapes or sequences do not fit.
    pub fn attention(
        &mut self,
        q: &Var,
        k: &Var,
        v: &Var,
        heads: AttentionHeads,
        sequences: &Arc<[Sequence]>,
    ) -> Result<Var> {
        let mut out = self.empty(q.tensor.rows(), q.tensor.cols())?;
        let mut lse = self.backend.empty(&[q.tensor.rows(), heads.n_heads], DType::F32)?;
        let shape = heads.shape(sequences);
        self.backend.attention(&mut out, &mut lse, &q.tensor, &k.tensor, &v.tensor, &shape)?;
        let saved = out.clone();
        Ok(self.record(out, [q, k, v], false, || {
            Op::Attention(Box::new(AttentionSaved {
                q: q.tensor.clone(),
                k: k.tensor.clone(),
                v: v.tensor.clone(),
                out: saved,
                lse,
                heads,
                sequences: sequences.clone(),
            }))
        }))
    }
}

pub(crate) fn backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dout: &Tensor,
    saved: &AttentionSaved,
) -> Result<()> {
    let AttentionSaved { q, k, v, out, lse, heads, sequences } = saved;
    let mut dq = g.backend.empty(q.shape(), g.dtype)?;
    let mut dk = g.backend.empty(k.shape(), g.dtype)?;
    let mut dv = g.backend.empty(v.shape(), g.dtype)?;
    let shape = heads.shape(sequences);
    g.backend.attention_backward(&mut dq, &mut dk, &mut dv, dout, q, k, v, out, lse, &shape)?;
    for (id, gradient) in inputs.into_iter().zip([dq, dk, dv]) {
        if let Some(id) = id {
            g.add(id, gradient)?;
        }
    }
    Ok(())
}
