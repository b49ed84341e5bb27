//! Linear layers, with LoRA as a second product on the same accumulators.
//!
//! Forward: `h = scale * drop(x) A^T`, `y = x W^T + h B^T + bias`. Backward, with `u = scale * dy B`:
//! `dB += dy^T h`, `dA += u^T drop(x)`, `dx += dy W + undrop(u A)`. The mask is made again from its key.
//! Source: Hu et al., "LoRA" (arXiv 2106.09685).

use super::dora::{self, DoraSaved};
use crate::autograd::tape::{Dropout, Input};
use crate::autograd::{Gradients, Op, Tape, ValueId, Var};
use crate::backend::{Backend, Gemm, GemmTerm, Matrix};
use crate::dtype::DType;
use crate::error::Result;
use crate::model::{Linear, LinearAdapter, Lora, Parameter};
use crate::param::{ParamId, ParamStore};
use crate::tensor::Tensor;

/// What a linear layer's backward needs.
pub(crate) struct Saved {
    pub x: Option<Tensor>,
    pub weight: Parameter,
    pub conv1d: bool,
    pub bias: Option<ParamId>,
    pub lora: Option<(Lora, Tensor)>,
    pub dora: Option<Box<DoraSaved>>,
    pub dropout: Option<Dropout>,
}

/// `x` under the layer's dropout mask; `x` itself where nothing is dropped.
fn dropped(backend: &Backend, x: &Tensor, lora: &Lora, dropout: Option<Dropout>) -> Result<Tensor> {
    match dropout {
        Some(d) if lora.dropout > 0.0 => {
            let mut y = backend.empty(x.shape(), x.dtype())?;
            backend.dropout(&mut y, x, lora.dropout, d.key(lora.stream), d.first_row, false)?;
            Ok(y)
        }
        _ => Ok(x.clone()),
    }
}

/// The bias that the product adds: the layer's own, and `scale` times the low-rank part's; none under DoRA.
fn total_bias(backend: &Backend, params: &ParamStore, layer: &Linear) -> Result<Option<Tensor>> {
    if layer.lora().is_some_and(|lora| lora.dora.is_some()) {
        return Ok(None);
    }
    let own = layer.bias.as_ref().map(|b| b.tensor(params)).transpose()?;
    let Some((lora, id)) = layer.lora().and_then(|l| l.bias.map(|id| (l, id))) else {
        return Ok(own);
    };
    let mut total = backend.empty(&[layer.out_features], DType::F32)?;
    backend.cast(&mut total, &params.master(id)?)?;
    backend.scale(&mut total, lora.scale)?;
    if let Some(own) = own {
        backend.add_assign(&mut total, &backend.to_dtype(&own, DType::F32)?)?;
    }
    Ok(Some(total))
}

impl Tape<'_> {
    /// `x W^T + bias`, and the layer's low-rank part: `[tokens, out_features]`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn linear(&mut self, x: &Var, layer: &Linear) -> Result<Var> {
        let [y] = self.linears(x, [layer])?;
        Ok(y)
    }

    /// A layer whose adapter is computed by operations of its own.
    fn adapted(&mut self, x: &Var, layer: &Linear) -> Result<Var> {
        match &layer.adapter {
            Some(LinearAdapter::Ia3 { factors, feedforward: true }) => {
                let x = self.scale_columns(x, *factors)?;
                let [y] = self.products(&x, [layer])?;
                Ok(y)
            }
            Some(LinearAdapter::Ia3 { factors, feedforward: false }) => {
                let [y] = self.products(x, [layer])?;
                self.scale_columns(&y, *factors)
            }
            Some(LinearAdapter::Factored(part)) => {
                let [y] = self.products(x, [layer])?;
                let h = self.dropout(x, part.dropout, part.stream)?;
                let [h] = self.products(&h, [&part.down])?;
                let h = self.scale_columns(&h, part.factors)?;
                let [z] = self.products(&h, [&part.up])?;
                let z = match part.outer {
                    Some(outer) => self.scale_columns(&z, outer)?,
                    None => z,
                };
                let z = self.scale(&z, part.scale)?;
                self.add(&y, &z)
            }
            Some(LinearAdapter::Lora(_)) | None => {
                let [y] = self.products(x, [layer])?;
                Ok(y)
            }
        }
    }

    /// [`Tape::linear`] of several layers with one input, whose products run at once.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn linears<const N: usize>(&mut self, x: &Var, layers: [&Linear; N]) -> Result<[Var; N]> {
        if layers.iter().all(|layer| layer.adapter.is_none() || layer.lora().is_some()) {
            return self.products(x, layers);
        }
        let mut outputs = Vec::with_capacity(N);
        for layer in layers {
            outputs.push(self.adapted(x, layer)?);
        }
        Ok(outputs.try_into().expect("there is one result for each layer"))
    }

    /// The layers' products with their low-rank parts.
    fn products<const N: usize>(&mut self, x: &Var, layers: [&Linear; N]) -> Result<[Var; N]> {
        let (backend, params, rows) = (self.backend.clone(), self.params, x.tensor.rows());
        let hidden = self.low_rank(x, &layers)?;
        let (mut weights, mut ups) = (Vec::with_capacity(N), Vec::with_capacity(N));
        let (mut biases, mut outputs) = (Vec::with_capacity(N), Vec::with_capacity(N));
        for layer in layers {
            weights.push(layer.weight.weight(params)?);
            ups.push(layer.lora().map(|lora| params.value(lora.b)).transpose()?);
            biases.push(total_bias(&backend, params, layer)?);
            outputs.push(self.empty(rows, layer.out_features)?);
        }
        let mut terms = Vec::with_capacity(N);
        for (((layer, weight), up), h) in layers.iter().zip(&weights).zip(&ups).zip(&hidden) {
            let mut all = vec![GemmTerm { a: Matrix::plain(&x.tensor), b: weight.forward(layer.conv1d) }];
            if let (Some(b), Some(h)) = (up, h) {
                all.push(GemmTerm { a: Matrix::plain(h), b: Matrix::transposed(b) });
            }
            terms.push(all);
        }
        let products = outputs.iter_mut().zip(&terms).zip(&biases);
        let mut products: Vec<_> = products
            .map(|((y, terms), bias)| (y, Gemm { bias: bias.as_ref(), ..Gemm::new(terms) }))
            .collect();
        backend.gemm_all(&mut products)?;
        let mut results = outputs.into_iter().zip(hidden);
        let mut finished = Vec::with_capacity(N);
        for layer in layers {
            let (y, h) = results.next().expect("there is one result for each layer");
            finished.push(self.finish_linear(x, layer, y, h)?);
        }
        Ok(finished.try_into().expect("there is one result for each layer"))
    }

    /// Scales by DoRA's magnitudes and records the layer.
    fn finish_linear(&mut self, x: &Var, layer: &Linear, y: Tensor, h: Option<Tensor>) -> Result<Var> {
        match layer.lora().and_then(|lora| Some((lora, lora.dora.as_deref()?))) {
            None => Ok(self.record_linear(x, layer, y, h, None)),
            Some(parts) => {
                let (y, saved) = dora::forward(&self.backend, self.params, layer, parts, y)?;
                Ok(self.record_linear(x, layer, y, h, Some(Box::new(saved))))
            }
        }
    }

    /// `scale * A drop(x)` of each layer that has a low-rank part, `[tokens, r]`.
    fn low_rank(&self, x: &Var, layers: &[&Linear]) -> Result<Vec<Option<Tensor>>> {
        let mut operands = Vec::with_capacity(layers.len());
        for lora in layers.iter().filter_map(|layer| layer.lora()) {
            let a = self.params.value(lora.a)?;
            let h = self.empty(x.tensor.rows(), a.rows())?;
            operands.push((h, a, dropped(&self.backend, &x.tensor, lora, self.dropout)?, lora.scale));
        }
        let terms: Vec<_> = operands
            .iter()
            .map(|(_, a, input, _)| [GemmTerm { a: Matrix::plain(input), b: Matrix::transposed(a) }])
            .collect();
        let scales: Vec<f32> = operands.iter().map(|(.., scale)| *scale).collect();
        let mut hidden: Vec<Tensor> = operands.iter().map(|(h, ..)| h.clone()).collect();
        let mut products: Vec<_> = hidden
            .iter_mut()
            .zip(&terms)
            .zip(scales)
            .map(|((h, terms), scale)| (h, Gemm { scale, ..Gemm::new(terms) }))
            .collect();
        self.backend.gemm_all(&mut products)?;
        let mut hidden = hidden.into_iter();
        Ok(layers.iter().map(|layer| layer.lora().and_then(|_| hidden.next())).collect())
    }

    fn record_linear(
        &mut self,
        x: &Var,
        layer: &Linear,
        y: Tensor,
        h: Option<Tensor>,
        dora: Option<Box<DoraSaved>>,
    ) -> Var {
        let bias = layer.bias.as_ref().and_then(Parameter::id);
        let trains_weight = layer.weight.id().is_some();
        let needs_x = trains_weight || layer.lora().is_some();
        let trainable = needs_x || bias.is_some();
        let input = if needs_x { self.input(x) } else { Input::Unused };
        self.record(y, [x], trainable, || Op::Linear {
            x: input,
            weight: layer.weight.clone(),
            conv1d: layer.conv1d,
            bias,
            lora: layer.lora().cloned().zip(h),
            dora,
        })
    }
}

pub(crate) fn backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dy: Tensor,
    saved: &Saved,
) -> Result<()> {
    let (backend, params) = (g.backend.clone(), g.params);
    if let Some(id) = saved.bias {
        backend.add_column_sums(&mut params.grad(id)?, &dy)?;
    }
    let dy = match (&saved.lora, &saved.dora) {
        (Some((Lora { dora: Some(dora), .. }, _)), Some(kept)) => dora::backward(g, &dy, dora, kept)?,
        _ => dy,
    };
    if let (Some(id), Some(x)) = (saved.weight.id(), &saved.x) {
        let (rows, cols) = if saved.conv1d { (x, &dy) } else { (&dy, x) };
        accumulate_product(&backend, &mut params.grad(id)?, rows, cols)?;
    }
    let u = match &saved.lora {
        Some((lora, h)) => Some(lora_backward(g, &dy, saved, lora, h)?),
        None => None,
    };
    let Some(id) = inputs[0] else { return Ok(()) };
    let weight = saved.weight.weight(params)?;
    let w = weight.backward(saved.conv1d);
    let in_features = w.shape().1;
    let base = GemmTerm { a: Matrix::plain(&dy), b: w };
    g.accumulate(id, &[dy.rows(), in_features], |dx, accumulate| {
        let gemm = |dx: &mut Tensor, terms: &[GemmTerm<'_>]| {
            backend.gemm(dx, &Gemm { accumulate, ..Gemm::new(terms) })
        };
        let (Some((lora, _)), Some(u)) = (&saved.lora, &u) else { return gemm(dx, &[base]) };
        let a = params.value(lora.a)?;
        let low_rank = GemmTerm { a: Matrix::plain(u), b: Matrix::plain(&a) };
        match saved.dropout.filter(|_| lora.dropout > 0.0) {
            None => gemm(dx, &[base, low_rank]),
            Some(d) => {
                gemm(dx, &[base])?;
                let mut through = backend.empty(dx.shape(), dx.dtype())?;
                backend.gemm(&mut through, &Gemm::new(&[low_rank]))?;
                backend.dropout(dx, &through, lora.dropout, d.key(lora.stream), d.first_row, true)
            }
        }
    })
}

/// Gradients of the low-rank part's parameters; returns `u = scale * dy B`, `[tokens, r]`.
fn lora_backward(g: &Gradients<'_>, dy: &Tensor, saved: &Saved, lora: &Lora, h: &Tensor) -> Result<Tensor> {
    let (backend, params) = (&g.backend, g.params);
    let b = params.value(lora.b)?;
    let mut u = backend.empty(h.shape(), h.dtype())?;
    let up = [GemmTerm { a: Matrix::plain(dy), b: Matrix::plain(&b) }];
    backend.gemm(&mut u, &Gemm { scale: lora.scale, ..Gemm::new(&up) })?;
    accumulate_product(backend, &mut params.grad(lora.b)?, dy, h)?;
    if let Some(x) = &saved.x {
        let input = dropped(backend, x, lora, saved.dropout)?;
        accumulate_product(backend, &mut params.grad(lora.a)?, &u, &input)?;
    }
    if let Some(id) = lora.bias {
        let mut sums = backend.zeros(&[dy.cols()], DType::F32)?;
        backend.add_column_sums(&mut sums, dy)?;
        backend.scale(&mut sums, lora.scale)?;
        backend.add_assign(&mut params.grad(id)?, &sums)?;
    }
    Ok(u)
}

/// `grad += rows^T cols`, summed over tokens in order, continuing on the gradient's own accumulators: so
/// several micro-batches give the bits of one large batch.
pub(crate) fn accumulate_product(
    backend: &Backend,
    grad: &mut Tensor,
    rows: &Tensor,
    cols: &Tensor,
) -> Result<()> {
    let terms = [GemmTerm { a: Matrix::transposed(rows), b: Matrix::plain(cols) }];
    backend.gemm(grad, &Gemm { accumulate: true, ..Gemm::new(&terms) })
}
