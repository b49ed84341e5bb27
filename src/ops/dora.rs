//! DoRA: the columns of an adapted layer's product are scaled to a trained magnitude.
//!
//! `y = c z + bias`, `z = x (W + s B A)^T`, `c = magnitude / |W + s B A|` by rows; the norm counts as a constant in the
//! backward pass. It is computed without the sum of the matrices: with `P = A W^T` and `G = A A^T`,
//! `|w + s b A|^2 = |w|^2 + 2 s b . (P + s/2 G b)`. Under dropout only the low-rank part's input is dropped.
//! Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353).

use super::scale_columns::vector;
use crate::autograd::Gradients;
use crate::backend::{Backend, Gemm, GemmTerm, Matrix};
use crate::dtype::DType;
use crate::error::Result;
use crate::model::{Dora, Linear, Lora};
use crate::param::ParamStore;
use crate::tensor::Tensor;

/// What the backward needs.
#[derive(Clone, Debug)]
pub struct DoraSaved {
    /// Before scaling and without bias, `[tokens, out_features]`.
    pub z: Tensor,
    /// `magnitude / norm`, f32 `[out_features]`.
    pub factors: Tensor,
    /// `1 / norm`, f32 `[out_features]`.
    pub inverse_norms: Tensor,
}

/// A weight and its low-rank change.
pub(crate) struct Changed<'a> {
    /// `W^T`, `[in_features, out_features]`.
    pub weight: Matrix<'a>,
    /// `A`, f32 `[r, in_features]`.
    pub a: Matrix<'a>,
    /// `A^T`.
    pub a_transposed: Matrix<'a>,
    /// `B`, f32 `[out_features, r]`.
    pub b: &'a Tensor,
    /// Factor on the change.
    pub scale: f32,
}

/// `1 / |W + s B A|` for each output, f32 `[out_features]`.
fn inverse_norms(backend: &Backend, changed: &Changed<'_>, dora: &Dora) -> Result<Tensor> {
    let &Changed { weight, a, a_transposed, b, scale } = changed;
    let (outputs, r) = (b.rows(), b.cols());
    let mut gram = backend.empty(&[r, r], DType::F32)?;
    let terms = [GemmTerm { a, b: a_transposed }];
    backend.gemm(&mut gram, &Gemm { scale: scale / 2.0, ..Gemm::new(&terms) })?;
    let mut inner = backend.empty(&[r, outputs], DType::F32)?;
    let terms = [GemmTerm { a, b: weight }, GemmTerm { a: Matrix::plain(&gram), b: Matrix::transposed(b) }];
    backend.gemm(&mut inner, &Gemm::new(&terms))?;
    let mut up = backend.empty(&[r, outputs], DType::F32)?;
    let terms = [GemmTerm { a: Matrix::plain(&dora.identity), b: Matrix::transposed(b) }];
    backend.gemm(&mut up, &Gemm::new(&terms))?;
    let mut squares = backend.zeros(&[outputs], DType::F32)?;
    backend.add_column_products(&mut squares, &up, &inner)?;
    backend.scale(&mut squares, 2.0 * scale)?;
    backend.add_assign(&mut squares, &dora.base_squares)?;
    let mut inverse = backend.empty(&[outputs], DType::F32)?;
    backend.rsqrt(&mut inverse, &squares)?;
    Ok(inverse)
}

/// A linear layer's output from `z`, and what the backward needs.
pub(crate) fn forward_linear(
    backend: &Backend,
    params: &ParamStore,
    layer: &Linear,
    (lora, dora): (&Lora, &Dora),
    z: Tensor,
) -> Result<(Tensor, DoraSaved)> {
    let (a, b) = (params.master(lora.a)?, params.master(lora.b)?);
    let weight = layer.weight.weight(params)?;
    let changed = Changed {
        weight: weight.forward(layer.conv1d),
        a: Matrix::plain(&a),
        a_transposed: Matrix::transposed(&a),
        b: &b,
        scale: lora.scale,
    };
    let bias = layer.bias.as_ref().map(|b| backend.to_dtype(&b.tensor(params)?, DType::F32)).transpose()?;
    forward(backend, params, &changed, dora, bias.as_ref(), z)
}

/// `z` with its columns scaled, and the bias (f32 `[out_features]`); and what the backward needs.
pub(crate) fn forward(
    backend: &Backend,
    params: &ParamStore,
    changed: &Changed<'_>,
    dora: &Dora,
    bias: Option<&Tensor>,
    z: Tensor,
) -> Result<(Tensor, DoraSaved)> {
    let inverse_norms = inverse_norms(backend, changed, dora)?;
    let mut factors = backend.empty(inverse_norms.shape(), DType::F32)?;
    backend.scale_columns(&mut factors, &inverse_norms, &vector(params, dora.magnitude)?, None)?;
    let mut y = backend.empty(z.shape(), z.dtype())?;
    backend.scale_columns(&mut y, &z, &factors, bias)?;
    Ok((y, DoraSaved { z, factors, inverse_norms }))
}

/// The gradient of `z`; that of the magnitude is added to the store's.
pub(crate) fn backward(g: &Gradients<'_>, dy: &Tensor, dora: &Dora, saved: &DoraSaved) -> Result<Tensor> {
    let backend = &g.backend;
    let mut products = backend.zeros(saved.factors.shape(), DType::F32)?;
    backend.add_column_products(&mut products, dy, &saved.z)?;
    let mut gradient = backend.empty(products.shape(), DType::F32)?;
    backend.scale_columns(&mut gradient, &products, &saved.inverse_norms, None)?;
    backend.add_assign(&mut g.params.grad(dora.magnitude)?, &gradient)?;
    let mut dz = backend.empty(dy.shape(), dy.dtype())?;
    backend.scale_columns(&mut dz, dy, &saved.factors, None)?;
    Ok(dz)
}
