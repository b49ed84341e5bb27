//! The output head with its low-rank part: logits of rows, and what their gradient gives.
//!
//! Forward: `h = scale * drop(x) A^T`, `logits = x W^T + h B^T + scale * bias`; backward as in [`super::linear`], a chunk of
//! rows at a time.

use super::linear::{accumulate_product, dropped, total_bias};
use crate::autograd::Dropout;
use crate::backend::{Backend, Gemm, GemmTerm, Matrix};
use crate::dtype::DType;
use crate::error::Result;
use crate::model::{Linear, Lora, Weight};
use crate::param::ParamStore;
use crate::tensor::Tensor;
use std::borrow::Cow;

/// The head's operands.
pub(crate) struct Head<'a> {
    backend: &'a Backend,
    params: &'a ParamStore,
    layer: &'a Linear,
    weight: Cow<'a, Weight>,
    low_rank: Option<(&'a Lora, [Tensor; 2])>, // with A, B
    bias: Option<Tensor>,
}

/// Rows of the low-rank part: its input, and `scale * A input`.
pub(crate) struct HeadRows {
    /// `[rows, hidden_size]`.
    pub input: Tensor,
    /// `[rows, r]`.
    pub h: Tensor,
}

impl HeadRows {
    /// Some of the rows.
    pub fn slice(&self, range: std::ops::Range<usize>) -> Result<HeadRows> {
        Ok(HeadRows { input: self.input.slice(range.clone())?, h: self.h.slice(range)? })
    }
}

impl<'a> Head<'a> {
    pub fn new(backend: &'a Backend, params: &'a ParamStore, layer: &'a Linear) -> Result<Self> {
        let low_rank = match layer.lora() {
            Some(lora) => Some((lora, [params.value(lora.a)?, params.value(lora.b)?])),
            None => None,
        };
        let bias = total_bias(backend, params, layer)?;
        Ok(Head { backend, params, layer, weight: layer.weight.weight(params)?, low_rank, bias })
    }

    /// Whether a parameter of the head is trained.
    pub fn is_trained(&self) -> bool {
        self.layer.weight.id().is_some() || self.low_rank.is_some()
    }

    /// The weight, `[vocabulary, hidden]`, and the bias.
    pub fn matrix(&self) -> (Matrix<'_>, Option<&Tensor>) {
        (self.weight.backward(false), self.bias.as_ref())
    }

    /// Whether the low-rank part's input is dropped here.
    pub fn drops(&self, dropout: Option<Dropout>) -> Option<(&'a Lora, Dropout)> {
        let (lora, _) = self.low_rank.as_ref()?;
        Some((lora, dropout.filter(|_| lora.dropout > 0.0)?))
    }

    /// The low-rank part of all rows of a step, of which `gather` takes those that count.
    pub fn rows(
        &self,
        x: &Tensor,
        dropout: Option<Dropout>,
        gather: impl FnOnce(Tensor) -> Result<Tensor>,
    ) -> Result<Option<HeadRows>> {
        let Some((lora, [a, _])) = &self.low_rank else { return Ok(None) };
        let input = gather(dropped(self.backend, x, lora, dropout)?)?;
        let mut h = self.backend.empty(&[input.rows(), a.rows()], x.dtype())?;
        let terms = [GemmTerm { a: Matrix::plain(&input), b: Matrix::transposed(a) }];
        self.backend.gemm(&mut h, &Gemm { scale: lora.scale, ..Gemm::new(&terms) })?;
        Ok(Some(HeadRows { input, h }))
    }

    /// Logits of the rows `x`, f32.
    pub fn logits(&self, out: &mut Tensor, x: &Tensor, low_rank: Option<&HeadRows>) -> Result<()> {
        let mut terms = vec![GemmTerm { a: Matrix::plain(x), b: self.weight.forward(false) }];
        if let (Some((_, [_, b])), Some(rows)) = (&self.low_rank, low_rank) {
            terms.push(GemmTerm { a: Matrix::plain(&rows.h), b: Matrix::transposed(b) });
        }
        self.backend.gemm(out, &Gemm { bias: self.bias.as_ref(), ..Gemm::new(&terms) })
    }

    /// Adds the gradients of parameters; writes that of `x` to `dx`, and, where the low-rank part's input is dropped, what
    /// comes through it to `through` instead.
    pub fn backward(
        &self,
        dlogits: &Tensor,
        x: &Tensor,
        low_rank: Option<&HeadRows>,
        dx: Option<Tensor>,
        through: Option<Tensor>,
    ) -> Result<()> {
        let (backend, params) = (self.backend, self.params);
        if let Some(id) = self.layer.weight.id() {
            accumulate_product(backend, &mut params.grad(id)?, dlogits, x)?;
        }
        let mut terms = vec![GemmTerm { a: Matrix::plain(dlogits), b: self.weight.backward(false) }];
        let mut u = None;
        if let (Some((lora, [_, b])), Some(rows)) = (&self.low_rank, low_rank) {
            let mut product = backend.empty(rows.h.shape(), rows.h.dtype())?;
            let up = [GemmTerm { a: Matrix::plain(dlogits), b: Matrix::plain(b) }];
            backend.gemm(&mut product, &Gemm { scale: lora.scale, ..Gemm::new(&up) })?;
            accumulate_product(backend, &mut params.grad(lora.b)?, dlogits, &rows.h)?;
            accumulate_product(backend, &mut params.grad(lora.a)?, &product, &rows.input)?;
            if let Some(id) = lora.bias {
                let mut sums = backend.zeros(&[dlogits.cols()], DType::F32)?;
                backend.add_column_sums(&mut sums, dlogits)?;
                backend.scale(&mut sums, lora.scale)?;
                backend.add_assign(&mut params.grad(id)?, &sums)?;
            }
            u = Some(product);
        }
        if let (Some((_, [a, _])), Some(u)) = (&self.low_rank, &u) {
            let term = GemmTerm { a: Matrix::plain(u), b: Matrix::plain(a) };
            match through {
                Some(mut through) => backend.gemm(&mut through, &Gemm::new(&[term]))?,
                None => terms.push(term),
            }
        }
        dx.map_or(Ok(()), |mut dx| backend.gemm(&mut dx, &Gemm::new(&terms)))
    }
}
