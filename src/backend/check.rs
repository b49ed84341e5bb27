//! Whether operands fit an operation: the checks that every backend makes before it writes anything.

use super::{AttentionShape, Gemm, HeadLoss, Moments8bit, RopeShape};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::dynamic_map::MOMENTS_BLOCKSIZE;
use crate::tensor::Tensor;

pub(super) fn ensure(holds: bool, operation: &'static str, message: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::shape(operation, message())) }
}

/// Fails unless all operands are activations of one type and size; returns the type.
pub(super) fn ensure_alike(operation: &'static str, tensors: &[&Tensor]) -> Result<DType> {
    let first = tensors[0];
    let alike = tensors.iter().all(|t| t.elements() == first.elements() && t.dtype() == first.dtype());
    ensure(alike && matches!(first.dtype(), DType::F32 | DType::BF16), operation, || {
        let found: Vec<_> = tensors.iter().map(|t| format!("{:?} {}", t.shape(), t.dtype())).collect();
        format!("expected f32 or bf16 operands of one type and size, found {}", found.join(", "))
    })?;
    Ok(first.dtype())
}

/// Fails unless the tensors are f32 with so many elements.
pub(super) fn ensure_f32(operation: &'static str, tensors: &[(&Tensor, usize)]) -> Result<()> {
    for (tensor, elements) in tensors {
        ensure(tensor.dtype() == DType::F32 && tensor.elements() == *elements, operation, || {
            format!("expected f32 of {elements} elements, found {:?} {}", tensor.shape(), tensor.dtype())
        })?;
    }
    Ok(())
}

pub(super) fn cast(out: &Tensor, x: &Tensor) -> Result<()> {
    let same = out.dtype() == x.dtype();
    let fits = out.elements() == x.elements() && (same || out.dtype().is_float() && x.dtype().is_float());
    ensure(fits, "cast", || format!("{:?} {} into {:?} {}", x.shape(), x.dtype(), out.shape(), out.dtype()))
}

pub(super) fn gather_rows(out: &Tensor, x: &Tensor, rows: &Tensor) -> Result<()> {
    let shapes = out.cols() == x.cols() && out.rows() == rows.elements();
    ensure(shapes && out.dtype().is_float() && x.dtype().is_float(), "gather_rows", || {
        format!("{:?} rows of {:?} into {:?}", rows.shape(), x.shape(), out.shape())
    })
}

pub(super) fn scatter_add_rows(out: &Tensor, x: &Tensor, rows: &Tensor) -> Result<()> {
    let (to, from) = (out.dtype(), x.dtype());
    let types = matches!(from, DType::F32 | DType::BF16) && (to == from || to == DType::F32);
    ensure(out.cols() == x.cols() && x.rows() == rows.elements() && types, "scatter_add_rows", || {
        format!("{:?} {from} at {:?} rows of {:?} {to}", x.shape(), rows.shape(), out.shape())
    })
}

pub(super) fn copy_columns(
    out: &Tensor,
    out_col: usize,
    x: &Tensor,
    x_col: usize,
    cols: usize,
) -> Result<DType> {
    let fits = out.rows() == x.rows() && out_col + cols <= out.cols() && x_col + cols <= x.cols();
    let types = out.dtype() == x.dtype() && matches!(out.dtype(), DType::F32 | DType::BF16);
    ensure(fits && types, "copy_columns", || {
        format!("{cols} columns from {x_col} of {:?} to {out_col} of {:?}", x.shape(), out.shape())
    })?;
    Ok(out.dtype())
}

/// A norm's weight and bias for rows of `cols` elements.
fn norm_weight(weight: &Tensor, bias: Option<&Tensor>, cols: usize) -> Result<()> {
    let fits = |t: &Tensor| t.elements() == cols && t.dtype() == weight.dtype() && t.dtype().is_float();
    ensure(fits(weight) && bias.is_none_or(fits), "norm", || {
        format!("expected a weight (and bias) of {cols}, found {:?} {}", weight.shape(), weight.dtype())
    })
}

/// Numbers that a norm keeps of a row: its mean and the reciprocal of its deviation, or the latter alone.
pub(super) fn stats_per_row(layer_norm: bool) -> usize {
    if layer_norm { 2 } else { 1 }
}

pub(super) fn norm(
    y: &Tensor,
    stats: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    layer_norm: bool,
) -> Result<DType> {
    let dtype = ensure_alike("norm", &[y, x])?;
    ensure_f32("norm", &[(stats, x.rows() * stats_per_row(layer_norm))])?;
    norm_weight(weight, bias, x.cols())?;
    Ok(dtype)
}

pub(super) fn norm_backward(
    dx: Option<&Tensor>,
    dweight: Option<&Tensor>,
    dy: &Tensor,
    x: &Tensor,
    stats: &Tensor,
    weight: &Tensor,
    layer_norm: bool,
) -> Result<DType> {
    let dtype = ensure_alike("norm_backward", &[dy, x, dx.unwrap_or(dy)])?;
    ensure_f32("norm_backward", &[(stats, x.rows() * stats_per_row(layer_norm))])?;
    if let Some(dweight) = dweight {
        ensure_f32("norm_backward", &[(dweight, x.cols())])?;
    }
    norm_weight(weight, None, x.cols())?;
    Ok(dtype)
}

/// AdamW's operands with moments in eight bits; the number of their blocks.
pub(super) fn moments_8bit(p: &Tensor, g: &Tensor, moments: &Moments8bit<'_>) -> Result<usize> {
    let (n, blocks) = (p.elements(), p.elements().div_ceil(MOMENTS_BLOCKSIZE));
    ensure_f32("adamw_8bit", &[(p, n), (g, n), (moments.m_absmax, blocks), (moments.v_absmax, blocks)])?;
    for codes in [&*moments.m, &*moments.v] {
        ensure(codes.dtype() == DType::U8 && codes.elements() == n, "adamw_8bit", || {
            format!("expected {n} codes, found {:?} {}", codes.shape(), codes.dtype())
        })?;
    }
    Ok(blocks)
}

pub(super) fn rope(x: &Tensor, table: &Tensor, positions: &Tensor, shape: &RopeShape) -> Result<DType> {
    let dtype = ensure_alike("rope", &[x])?;
    let RopeShape { n_heads, head_dim, rotary_dim, .. } = *shape;
    let fits = x.cols() == n_heads * head_dim && rotary_dim <= head_dim && rotary_dim.is_multiple_of(2);
    ensure(fits && table.cols() == rotary_dim && positions.elements() == x.rows(), "rope", || {
        format!(
            "{:?} with a table of {:?}, {:?} positions and {shape:?}",
            x.shape(),
            table.shape(),
            positions.shape()
        )
    })?;
    Ok(dtype)
}

pub(super) fn dropout(y: &Tensor, x: &Tensor, p: f32) -> Result<DType> {
    let dtype = ensure_alike("dropout", &[y, x])?;
    ensure((0.0..1.0).contains(&p), "dropout", || format!("expected a probability in [0, 1), found {p}"))?;
    Ok(dtype)
}

pub(super) fn attention(
    shape: &AttentionShape<'_>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    lse: &Tensor,
) -> Result<()> {
    let AttentionShape { n_heads, n_kv_heads, head_dim, .. } = *shape;
    let heads = n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads) && (1..=256).contains(&head_dim);
    ensure(heads, "attention", || format!("{n_heads} heads over {n_kv_heads} of {head_dim} elements"))?;
    let cols = q.cols() == n_heads * head_dim && k.cols() == n_kv_heads * head_dim && k.shape() == v.shape();
    ensure(cols && q.dtype() == k.dtype() && q.dtype() == v.dtype(), "attention", || {
        format!(
            "queries {:?}, keys {:?}, values {:?} for {n_heads}/{n_kv_heads} heads of {head_dim}",
            q.shape(),
            k.shape(),
            v.shape()
        )
    })?;
    ensure(lse.dtype() == DType::F32 && lse.elements() == q.rows() * n_heads, "attention", || {
        format!("expected lse f32 [{}, {n_heads}], found {:?}", q.rows(), lse.shape())
    })?;
    for s in shape.sequences {
        let inside = s.q_start + s.q_len <= q.rows() && s.k_start + s.k_len <= k.rows() && s.k_len >= s.q_len;
        ensure(inside, "attention", || format!("{s:?} with {} queries and {} keys", q.rows(), k.rows()))?;
    }
    Ok(())
}

pub(super) fn head_loss(losses: &Tensor, dx: Option<&Tensor>, loss: &HeadLoss<'_>) -> Result<()> {
    let HeadLoss { x, rows, targets, .. } = loss;
    let (vocabulary, hidden) = loss.head.shape();
    let m = rows.map_or(x.rows(), Tensor::elements);
    let is_i32 = |t: &Tensor| t.dtype() == DType::I32 && t.elements() == m;
    let gradient = dx.is_none_or(|dx| (dx.rows(), dx.cols(), dx.dtype()) == (m, hidden, x.dtype()));
    let mut end = 0;
    let follows =
        |(range, _): &(std::ops::Range<usize>, f32)| range.start == std::mem::replace(&mut end, range.end);
    let covers = loss.grad_scales.iter().all(follows) && end == m;
    let fits = x.cols() == hidden && matches!(x.dtype(), DType::F32 | DType::BF16) && is_i32(targets);
    ensure(fits && gradient && covers && rows.is_none_or(is_i32), "head_loss", || {
        format!(
            "{m} rows of {:?} {} with a head of [{vocabulary}, {hidden}], {} targets and factors of {end} rows",
            x.shape(),
            x.dtype(),
            targets.elements()
        )
    })?;
    if let Some(bias) = loss.bias {
        ensure(bias.elements() == vocabulary && bias.dtype().is_float(), "head_loss", || {
            format!("expected a float bias of {vocabulary}, found {:?} {}", bias.shape(), bias.dtype())
        })?;
    }
    ensure_f32("head_loss", &[(losses, m)])
}

pub(super) fn gemm(out: &Tensor, gemm: &Gemm<'_>) -> Result<()> {
    let (m, n) = (out.rows(), out.cols());
    ensure(matches!(out.dtype(), DType::F32 | DType::BF16), "gemm", || {
        format!("expected an f32 or bf16 result, found {}", out.dtype())
    })?;
    for (rows, term) in gemm.terms_by_rows(m) {
        let ((am, ak), (bk, bn)) = (term.a.shape(), term.b.shape());
        ensure((am, bn) == (rows.len(), n) && ak == bk && rows.end <= m, "gemm", || {
            format!("[{am}, {ak}] times [{bk}, {bn}] into rows {rows:?} of [{m}, {n}]")
        })?;
        let (a, b) = (term.a.dense()?.dtype(), term.b.dense().map_or(DType::F32, Tensor::dtype));
        ensure(a.is_float() && b.is_float(), "gemm", || {
            format!("expected float operands, found {a} and {b}")
        })?;
    }
    if let Some(bias) = gemm.bias {
        ensure(bias.elements() == n && bias.dtype().is_float(), "gemm", || {
            format!("expected a float bias of {n}, found {:?} {}", bias.shape(), bias.dtype())
        })?;
    }
    Ok(())
}
