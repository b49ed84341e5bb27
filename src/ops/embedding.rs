//! Embedding lookup: `y[i] = table[ids[i]]`, with LoRA as a product on the same accumulators, `h[i] = scale * A[ids[i]]`,
//! `y += h B^T`.
//!
//! Backward, with `u = scale * dy B`: `dtable[ids[i]] += dy[i]`, `dB += dy^T h`, `dA[ids[i]] += u[i]`, tokens ascending, so only
//! the rows of the batch's tokens are touched. As in PyTorch, the entry that pads has no gradient. There is no dropout.
//! Source: Hu et al., "LoRA" (arXiv 2106.09685), section 4.2; PEFT's layer of this name.

use super::dora::{self, Changed, DoraSaved};
use super::linear::accumulate_product;
use crate::autograd::{Gradients, Op, Tape, Var};
use crate::backend::{Backend, Gemm, GemmTerm, Matrix};
use crate::error::Result;
use crate::model::{Embedding, EmbeddingAdapter, EmbeddingLora, Parameter};
use crate::param::ParamId;
use crate::tensor::Tensor;
use std::ops::Range;
use std::sync::Arc;

/// Which entry of a table each token takes.
#[derive(Clone, Debug)]
pub struct Entries {
    /// i32 `[tokens]`.
    pub ids: Tensor,
    /// Where some tokens only pad: the rows of the others and their ids, i32; `None` if there are no others.
    trained: Option<Option<[Tensor; 2]>>,
    /// The ids on the host, and the one that pads.
    host: (Arc<[i32]>, Option<usize>),
}

impl Entries {
    /// These; `padding_idx` is the one without a gradient.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn new(backend: &Backend, ids: &[i32], padding_idx: Option<usize>) -> Result<Self> {
        let pads = |id: i32| padding_idx.is_some_and(|padding| usize::try_from(id) == Ok(padding));
        let trained = match ids.iter().any(|id| pads(*id)) {
            false => None,
            true => {
                let rows = (0..).zip(ids).filter(|(_, id)| !pads(**id));
                let (rows, kept): (Vec<i32>, Vec<i32>) = rows.unzip();
                let upload = |x: &[i32]| backend.from_slice(x, &[x.len()]);
                Some(if rows.is_empty() { None } else { Some([upload(&rows)?, upload(&kept)?]) })
            }
        };
        Ok(Entries { ids: backend.from_slice(ids, &[ids.len()])?, trained, host: (ids.into(), padding_idx) })
    }

    /// Those of some tokens.
    fn rows(&self, backend: &Backend, rows: &Range<usize>) -> Result<Self> {
        Entries::new(backend, &self.host.0[rows.clone()], self.host.1)
    }

    /// `grad[ids[i]] += dy[i]`, `i` ascending, but for padding.
    fn scatter(&self, backend: &Backend, grad: &mut Tensor, dy: &Tensor) -> Result<()> {
        match &self.trained {
            None => backend.scatter_add_rows(grad, dy, &self.ids),
            Some(None) => Ok(()),
            Some(Some([rows, ids])) => {
                let mut kept = backend.empty(&[rows.elements(), dy.cols()], dy.dtype())?;
                backend.gather_rows(&mut kept, dy, rows)?;
                backend.scatter_add_rows(grad, &kept, ids)
            }
        }
    }
}

/// What the backward of a low-rank part needs.
#[derive(Debug)]
pub struct LowRankEntries {
    lora: EmbeddingLora,
    /// `scale * A[ids]`, `[tokens, r]`.
    h: Tensor,
    dora: Option<DoraSaved>,
}

impl Tape<'_> {
    /// The entries of a table with its low-rank part: `[tokens, cols]`.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn embedding(&mut self, table: &Embedding, entries: &Entries) -> Result<Var> {
        if table.is_apart() {
            let backend = self.backend.clone();
            let ids = Var::constant(entries.ids.clone());
            let [y] = self.by_slot(&ids, |tape, _, slot, rows| {
                Ok([tape.embedding(&table.of_slot(slot), &entries.rows(&backend, rows)?)?])
            })?;
            return Ok(y);
        }
        let Some(EmbeddingAdapter::Lora(lora)) = &table.adapter else {
            return self.lookup(&table.weight, entries);
        };
        let (backend, params) = (self.backend.clone(), self.params);
        let weight = table.weight.tensor(params)?;
        let (a, b) = (params.value(lora.a)?, params.value(lora.b)?);
        let mut y = self.gathered(&weight, entries)?;
        let mut h = self.gathered(&a, entries)?;
        backend.scale(&mut h, lora.scale)?;
        let terms = [GemmTerm { a: Matrix::plain(&h), b: Matrix::transposed(&b) }];
        backend.gemm(&mut y, &Gemm { accumulate: true, ..Gemm::new(&terms) })?;
        let mut saved = None;
        if let Some(dora) = &lora.dora {
            let (a, b) = (params.master(lora.a)?, params.master(lora.b)?);
            let changed = Changed {
                weight: Matrix::plain(&weight),
                a: Matrix::transposed(&a),
                a_transposed: Matrix::plain(&a),
                b: &b,
                scale: lora.scale,
            };
            let (scaled, kept) = dora::forward(&backend, params, &changed, dora, None, y)?;
            (y, saved) = (scaled, Some(kept));
        }
        Ok(self.record(y, [], true, || Op::Embedding {
            table: table.weight.id(),
            entries: entries.clone(),
            low_rank: Some(Box::new(LowRankEntries { lora: lora.clone(), h, dora: saved })),
        }))
    }

    /// The entries of a table (`[entries, cols]`): `[tokens, cols]`.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn lookup(&mut self, table: &Parameter, entries: &Entries) -> Result<Var> {
        let y = self.gathered(&table.tensor(self.params)?, entries)?;
        let id = table.id();
        Ok(self.record(y, [], id.is_some(), || Op::Embedding {
            table: id,
            entries: entries.clone(),
            low_rank: None,
        }))
    }

    fn gathered(&self, table: &Tensor, entries: &Entries) -> Result<Tensor> {
        let mut y = self.empty(entries.ids.elements(), table.cols())?;
        self.backend.gather_rows(&mut y, table, &entries.ids)?;
        Ok(y)
    }
}

pub(crate) fn backward(
    g: &Gradients<'_>,
    dy: Tensor,
    table: Option<ParamId>,
    entries: &Entries,
    low_rank: Option<&LowRankEntries>,
) -> Result<()> {
    let (backend, params) = (&g.backend, g.params);
    let dy = match low_rank.and_then(|part| part.lora.dora.as_deref().zip(part.dora.as_ref())) {
        Some((dora, saved)) => dora::backward(g, &dy, dora, saved)?,
        None => dy,
    };
    if let Some(table) = table {
        entries.scatter(backend, &mut params.grad(table)?, &dy)?;
    }
    let Some(LowRankEntries { lora, h, .. }) = low_rank else { return Ok(()) };
    let b = params.value(lora.b)?;
    let mut u = backend.empty(h.shape(), h.dtype())?;
    let up = [GemmTerm { a: Matrix::plain(&dy), b: Matrix::plain(&b) }];
    backend.gemm(&mut u, &Gemm { scale: lora.scale, ..Gemm::new(&up) })?;
    accumulate_product(backend, &mut params.grad(lora.b)?, &dy, h)?;
    entries.scatter(backend, &mut params.grad(lora.a)?, &u)
}
