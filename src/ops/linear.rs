//! Linear layers, with LoRA as a second product on the same accumulators.
//!
//! Forward: `h = scale * drop(x) A^T`, `y = x W^T + h B^T + bias`. Backward, with `u = scale * dy B`:
//! `dB += dy^T h`, `dA += u^T drop(x)`, `dx += dy W + undrop(u A)`. The mask is made again from its key.
//! In a pass whose rows have adapters of their own, each [slot](crate::autograd::Slot) has its low-rank part in its rows
//! alone, on the accumulators of the one product with `W`, and the bits that the rows have without the others.
//! Source: Hu et al., "LoRA" (arXiv 2106.09685).

use super::dora::{self, DoraSaved};
use crate::autograd::tape::{Dropout, Input, Node};
use crate::autograd::{Gradients, Op, Tape, ValueId, Var};
use crate::backend::{Backend, Gemm, GemmTerm, Matrix, RowTerm};
use crate::dtype::DType;
use crate::error::Result;
use crate::model::{Linear, LinearAdapter, Lora, Parameter};
use crate::param::ParamStore;
use crate::tensor::Tensor;
use std::ops::Range;

/// The low-rank part that some rows have of a layer.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// The adapter's slot; `None`: the model's own, which all rows have.
    slot: Option<usize>,
    rows: Range<usize>,
    lora: Lora,
    /// `scale * A dropout(x)`, `[rows, r]`.
    h: Tensor,
}

/// The terms of a layer's product.
struct Terms<'a> {
    of_all: Vec<GemmTerm<'a>>,
    of_some: Vec<RowTerm<'a>>,
    rows: usize,
}

impl<'a> Terms<'a> {
    fn new(base: GemmTerm<'a>) -> Self {
        Terms { of_all: vec![base], of_some: Vec::new(), rows: base.a.shape().0 }
    }

    fn push(&mut self, rows: &Range<usize>, term: GemmTerm<'a>) {
        if rows.len() == self.rows {
            self.of_all.push(term);
        } else {
            self.of_some.push(RowTerm { first_row: rows.start, term });
        }
    }

    fn gemm(&self) -> Gemm<'_> {
        Gemm { row_terms: &self.of_some, ..Gemm::new(&self.of_all) }
    }
}

/// `x` under the layer's dropout mask; `x` itself where nothing is dropped.
pub(crate) fn dropped(
    backend: &Backend,
    x: &Tensor,
    lora: &Lora,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
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
pub(crate) fn total_bias(backend: &Backend, params: &ParamStore, layer: &Linear) -> Result<Option<Tensor>> {
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
            Some(LinearAdapter::Rotation(rotation)) => {
                let x = self.rotate(x, rotation)?;
                let [y] = self.products(&x, [layer])?;
                Ok(y)
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
            Some(LinearAdapter::Lora(_) | LinearAdapter::SideBySide(_)) | None => {
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
        if layers.iter().any(|layer| layer.is_apart()) {
            return self.by_slot(x, |tape, x, slot, _| {
                let own = layers.map(|layer| layer.of_slot(slot));
                tape.linears(x, own.each_ref())
            });
        }
        if layers.iter().all(|layer| layer.is_product()) {
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
        let low_rank = self.low_rank(x, &layers)?;
        let (mut weights, mut ups) = (Vec::with_capacity(N), Vec::with_capacity(N));
        let (mut biases, mut outputs) = (Vec::with_capacity(N), Vec::with_capacity(N));
        for (layer, parts) in layers.iter().zip(&low_rank) {
            weights.push(layer.weight.weight(params)?);
            let up = |part: &LowRank| self.adapter(part.slot).0.value(part.lora.b);
            ups.push(parts.iter().map(up).collect::<Result<Vec<_>>>()?);
            biases.push(total_bias(&backend, params, layer)?);
            outputs.push(self.empty(rows, layer.out_features)?);
        }
        let mut terms = Vec::with_capacity(N);
        for (((layer, weight), ups), parts) in layers.iter().zip(&weights).zip(&ups).zip(&low_rank) {
            let base = GemmTerm { a: Matrix::plain(&x.tensor), b: weight.forward(layer.conv1d) };
            let mut all = Terms::new(base);
            for (part, b) in parts.iter().zip(ups) {
                all.push(&part.rows, GemmTerm { a: Matrix::plain(&part.h), b: Matrix::transposed(b) });
            }
            terms.push(all);
        }
        let products = outputs.iter_mut().zip(&terms).zip(&biases);
        let mut products: Vec<_> =
            products.map(|((y, terms), bias)| (y, Gemm { bias: bias.as_ref(), ..terms.gemm() })).collect();
        backend.gemm_all(&mut products)?;
        let mut results = outputs.into_iter().zip(low_rank);
        let mut finished = Vec::with_capacity(N);
        for layer in layers {
            let (y, parts) = results.next().expect("there is one result for each layer");
            finished.push(self.finish_linear(x, layer, y, parts)?);
        }
        Ok(finished.try_into().expect("there is one result for each layer"))
    }

    /// Scales by DoRA's magnitudes and records the layer.
    fn finish_linear(&mut self, x: &Var, layer: &Linear, y: Tensor, low_rank: Vec<LowRank>) -> Result<Var> {
        match layer.lora().and_then(|lora| Some((lora, lora.dora.as_deref()?))) {
            None => Ok(self.record_linear(x, layer, y, low_rank, None)),
            Some(parts) => {
                let (y, saved) = dora::forward_linear(&self.backend, self.params, layer, parts, y)?;
                Ok(self.record_linear(x, layer, y, low_rank, Some(Box::new(saved))))
            }
        }
    }

    /// The adapters that rows of this pass have on a layer: slot, rows, settings.
    fn adapters<'l>(&self, layer: &'l Linear, rows: usize) -> Vec<(Option<usize>, Range<usize>, &'l Lora)> {
        match &layer.adapter {
            Some(LinearAdapter::Lora(lora)) => vec![(None, 0..rows, lora)],
            Some(LinearAdapter::SideBySide(all)) => {
                let slots = self.slots.iter().zip(all).enumerate();
                let own = slots.filter(|(_, (slot, _))| !slot.rows.is_empty());
                own.filter_map(|(i, (slot, adapter))| match adapter {
                    Some(LinearAdapter::Lora(lora)) => Some((Some(i), slot.rows.clone(), lora)),
                    _ => None,
                })
                .collect()
            }
            _ => Vec::new(),
        }
    }

    /// The low-rank parts of each layer.
    fn low_rank(&self, x: &Var, layers: &[&Linear]) -> Result<Vec<Vec<LowRank>>> {
        if layers.iter().all(|layer| layer.adapter.is_none()) {
            return Ok(vec![Vec::new(); layers.len()]);
        }
        let (mut all, mut operands) = (Vec::with_capacity(layers.len()), Vec::new());
        for layer in layers {
            let mut parts = Vec::new();
            for (slot, rows, lora) in self.adapters(layer, x.tensor.rows()) {
                let h = match self.kept_hidden() {
                    Some(h) => h,
                    None => {
                        let (params, dropout) = self.adapter(slot);
                        let a = params.value(lora.a)?;
                        let h = self.empty(rows.len(), a.rows())?;
                        let input = dropped(&self.backend, &x.tensor.slice(rows.clone())?, lora, dropout)?;
                        operands.push((h.clone(), a, input, lora.scale));
                        self.keep_hidden(&h);
                        h
                    }
                };
                parts.push(LowRank { slot, rows, lora: lora.clone(), h });
            }
            all.push(parts);
        }
        let (mut hidden, mut terms) =
            (Vec::with_capacity(operands.len()), Vec::with_capacity(operands.len()));
        for (h, a, input, scale) in &operands {
            hidden.push(h.clone());
            terms.push(([GemmTerm { a: Matrix::plain(input), b: Matrix::transposed(a) }], *scale));
        }
        let products = hidden.iter_mut().zip(&terms);
        let mut products: Vec<_> =
            products.map(|(h, (terms, scale))| (h, Gemm { scale: *scale, ..Gemm::new(terms) })).collect();
        self.backend.gemm_all(&mut products)?;
        Ok(all)
    }

    fn record_linear(
        &mut self,
        x: &Var,
        layer: &Linear,
        y: Tensor,
        low_rank: Vec<LowRank>,
        dora: Option<Box<DoraSaved>>,
    ) -> Var {
        let bias = layer.bias.as_ref().and_then(Parameter::id);
        let trains_weight = layer.weight.id().is_some();
        let needs_x = trains_weight || !low_rank.is_empty();
        let trainable = needs_x || bias.is_some();
        let input = if needs_x { self.input(x) } else { Input::Unused };
        self.record(y, [x], trainable, || Op::Linear {
            x: input,
            weight: layer.weight.clone(),
            conv1d: layer.conv1d,
            bias,
            low_rank,
            dora,
        })
    }
}

/// A layer with the gradient of its result; what its backward needs.
struct Layer {
    input: Option<ValueId>,
    dy: Tensor,
    x: Option<Tensor>,
    weight: Parameter,
    conv1d: bool,
    low_rank: Vec<LowRank>,
}

impl Layer {
    /// Adds the gradients of the layer's own parameters and of DoRA's; `previous` is the operation recorded before it. None if
    /// nobody used the result.
    fn begin(g: &mut Gradients<'_>, node: Node, previous: Option<&Node>) -> Result<Option<Self>> {
        let (backend, params) = (g.backend.clone(), g.params);
        let Op::Linear { x, weight, conv1d, bias, low_rank, dora } = node.op else {
            unreachable!("the node is one of a linear layer")
        };
        let Some(dy) = g.take(node.output) else { return Ok(None) };
        let x = match (x, previous) {
            (Input::Unused, _) => None,
            (Input::Kept(x), _) => Some(x),
            (Input::FromPrevious, Some(node)) => Some(super::activation::again(&backend, &node.op)?),
            (Input::FromPrevious, None) => unreachable!("recorded after an activation"),
        };
        if let Some(id) = bias {
            backend.add_column_sums(&mut params.grad(id)?, &dy)?;
        }
        let dy = match (low_rank.first().and_then(|part| part.lora.dora.as_deref()), &dora) {
            (Some(dora), Some(kept)) => dora::backward(g, &dy, dora, kept)?,
            _ => dy,
        };
        if let (Some(id), Some(x)) = (weight.id(), &x) {
            let (rows, cols) = if conv1d { (x, &dy) } else { (&dy, x) };
            accumulate_product(&backend, &mut params.grad(id)?, rows, cols)?;
        }
        Ok(Some(Layer { input: node.inputs[0], dy, x, weight, conv1d, low_rank }))
    }

    /// Adds the gradient of the layer's input.
    fn end(&self, g: &mut Gradients<'_>, parts: &[Part<'_>]) -> Result<()> {
        let Some(id) = self.input else { return Ok(()) };
        let (backend, dy) = (g.backend.clone(), &self.dy);
        let weight = self.weight.weight(g.params)?;
        let w = weight.backward(self.conv1d);
        let in_features = w.shape().1;
        let mut terms = Terms::new(GemmTerm { a: Matrix::plain(dy), b: w });
        let mut masked = Vec::new();
        for part in parts {
            let term = GemmTerm { a: Matrix::plain(&part.u), b: Matrix::plain(&part.a) };
            match part.dropout.filter(|_| part.of.lora.dropout > 0.0) {
                None => terms.push(&part.of.rows, term),
                Some(dropout) => masked.push((part.of, term, dropout)),
            }
        }
        g.accumulate(id, &[dy.rows(), in_features], |dx, accumulate| {
            backend.gemm(dx, &Gemm { accumulate, ..terms.gemm() })?;
            for (LowRank { rows, lora, .. }, term, d) in masked {
                let mut dx = dx.slice(rows.clone())?;
                let mut through = backend.empty(dx.shape(), dx.dtype())?;
                backend.gemm(&mut through, &Gemm::new(&[term]))?;
                backend.dropout(&mut dx, &through, lora.dropout, d.key(lora.stream), d.first_row, true)?;
            }
            Ok(())
        })
    }
}

/// A low-rank part in the backward.
struct Part<'a> {
    of: &'a LowRank,
    params: &'a ParamStore,
    dropout: Option<Dropout>,
    dy: Tensor,
    x: Option<Tensor>,
    a: Tensor,
    b: Tensor,
    /// `scale * dy B`, `[rows, r]`.
    u: Tensor,
}

/// The backward of layers with one input, the last recorded first; `previous` is what was recorded before them. Products that
/// do not depend on each other run at once.
pub(crate) fn backward<'m>(
    tape: &Tape<'m>,
    g: &mut Gradients<'m>,
    nodes: Vec<Node>,
    previous: Option<&Node>,
) -> Result<()> {
    let backend = g.backend.clone();
    let mut layers = Vec::with_capacity(nodes.len());
    for node in nodes {
        layers.extend(Layer::begin(g, node, previous)?);
    }
    let mut parts = Vec::with_capacity(layers.len());
    for layer in &layers {
        let of_layer = layer.low_rank.iter().map(|part| part.begin(&backend, tape, layer));
        parts.push(of_layer.collect::<Result<Vec<_>>>()?);
    }
    let all: Vec<&Part<'_>> = parts.iter().flatten().collect();
    up_products(&backend, &all)?;
    parameter_gradients(&backend, &all)?;
    layers.iter().zip(&parts).try_for_each(|(layer, parts)| layer.end(g, parts))
}

impl LowRank {
    fn begin<'a>(&'a self, backend: &Backend, tape: &Tape<'a>, layer: &Layer) -> Result<Part<'a>> {
        let (params, dropout) = tape.adapter(self.slot);
        let x = layer.x.as_ref().map(|x| x.slice(self.rows.clone())).transpose()?;
        Ok(Part {
            of: self,
            params,
            dropout,
            dy: layer.dy.slice(self.rows.clone())?,
            x,
            a: params.value(self.lora.a)?,
            b: params.value(self.lora.b)?,
            u: backend.empty(self.h.shape(), self.h.dtype())?,
        })
    }
}

/// Computes each part's `u`.
fn up_products(backend: &Backend, parts: &[&Part<'_>]) -> Result<()> {
    let terms: Vec<_> = parts
        .iter()
        .map(|part| [GemmTerm { a: Matrix::plain(&part.dy), b: Matrix::plain(&part.b) }])
        .collect();
    let mut results: Vec<_> = parts.iter().map(|part| part.u.clone()).collect();
    let products = results.iter_mut().zip(&terms).zip(parts);
    let mut products: Vec<_> = products
        .map(|((u, terms), part)| (u, Gemm { scale: part.of.lora.scale, ..Gemm::new(terms) }))
        .collect();
    backend.gemm_all(&mut products)
}

/// Adds the gradients of the parts' parameters, of which each part has its own.
fn parameter_gradients(backend: &Backend, parts: &[&Part<'_>]) -> Result<()> {
    let mut products = Vec::with_capacity(2 * parts.len());
    for part in parts {
        let (params, lora) = (part.params, &part.of.lora);
        products.push((params.grad(lora.b)?, part.dy.clone(), part.of.h.clone()));
        if let Some(x) = &part.x {
            products.push((params.grad(lora.a)?, part.u.clone(), dropped(backend, x, lora, part.dropout)?));
        }
    }
    accumulate_products(backend, &mut products)?;
    for part in parts {
        let Some(id) = part.of.lora.bias else { continue };
        let mut sums = backend.zeros(&[part.dy.cols()], DType::F32)?;
        backend.add_column_sums(&mut sums, &part.dy)?;
        backend.scale(&mut sums, part.of.lora.scale)?;
        backend.add_assign(&mut part.params.grad(id)?, &sums)?;
    }
    Ok(())
}

/// [`accumulate_product`] of several `(grad, rows, cols)`, no two with one gradient.
fn accumulate_products(backend: &Backend, all: &mut [(Tensor, Tensor, Tensor)]) -> Result<()> {
    let term = |rows, cols| [GemmTerm { a: Matrix::transposed(rows), b: Matrix::plain(cols) }];
    let (mut grads, mut terms) = (Vec::with_capacity(all.len()), Vec::with_capacity(all.len()));
    for (grad, rows, cols) in all {
        grads.push(grad);
        terms.push(term(rows, cols));
    }
    let products = grads.into_iter().zip(&terms);
    let mut products: Vec<_> =
        products.map(|(grad, terms)| (grad, Gemm { accumulate: true, ..Gemm::new(terms) })).collect();
    backend.gemm_all(&mut products)
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
