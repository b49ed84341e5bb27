//! Launches of `cuda/elementwise.cu`.

use super::bindings::{self, *};
use super::{Cuda, PACK, THREADS, read, written};
use crate::backend::check::{self, ensure, ensure_alike, ensure_f32};
use crate::backend::{Activation, RopeShape};
use crate::dtype::DType;
use crate::error::Result;
use crate::rng::PhiloxKey;
use crate::tensor::Tensor;

/// The header's number of an activation function.
fn kind(activation: Activation) -> i32 {
    (match activation {
        Activation::Silu => bindings::ACTIVATION_SILU,
        Activation::Gelu => bindings::ACTIVATION_GELU,
        Activation::GeluTanh => bindings::ACTIVATION_GELU_TANH,
        Activation::Relu => bindings::ACTIVATION_RELU,
        Activation::Tanh => bindings::ACTIVATION_TANH,
        Activation::Sigmoid => bindings::ACTIVATION_SIGMOID,
    }) as i32
}

/// Starts a kernel over `n` elements of type `dtype`.
///
/// # Safety
/// As [`Cuda::launch`].
unsafe fn run<P: Copy>(cuda: &Cuda, name: &str, dtype: DType, n: usize, params: &P) -> Result<()> {
    let grid = [n.div_ceil(THREADS * PACK), 1, 1];
    // SAFETY: the caller's promise.
    unsafe { cuda.launch(&format!("{name}_{dtype}"), grid, THREADS, 0, params) }
}

pub(super) fn fill(cuda: &Cuda, out: &mut Tensor, value: f32) -> Result<()> {
    let (n, dtype) = (out.elements(), out.dtype());
    ensure(dtype.is_float(), "fill", || format!("expected floats, found {dtype}"))?;
    let params = fill_params { out: written(out)?, n: n as u64, value };
    // SAFETY: the operand has `n` elements of the kernel's type.
    unsafe { run(cuda, "fill", dtype, n, &params) }
}

/// Between different types; operands were checked.
pub(super) fn cast(cuda: &Cuda, out: &mut Tensor, x: &Tensor) -> Result<()> {
    let (n, dtype) = (x.elements(), out.dtype());
    let params = cast_params { out: written(out)?, x: read(x)?, n: n as u64 };
    // SAFETY: the operands have `n` elements of the kernel's types.
    unsafe { run(cuda, &format!("cast_{}", x.dtype()), dtype, n, &params) }
}

pub(super) fn add(cuda: &Cuda, out: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    let (n, dtype) = (a.elements(), ensure_alike("add", &[out, a, b])?);
    let params = add_params { out: written(out)?, a: read(a)?, b: read(b)?, n: n as u64 };
    // SAFETY: the operands have `n` elements of the kernel's type.
    unsafe { run(cuda, "add", dtype, n, &params) }
}

pub(super) fn scale(cuda: &Cuda, x: &mut Tensor, factor: f32) -> Result<()> {
    let (n, dtype) = (x.elements(), ensure_alike("scale", &[x])?);
    let params = scale_params { x: written(x)?, n: n as u64, factor };
    // SAFETY: the operand has `n` elements of the kernel's type.
    unsafe { run(cuda, "scale", dtype, n, &params) }
}

pub(super) fn activation(cuda: &Cuda, y: &mut Tensor, x: &Tensor, activation: Activation) -> Result<()> {
    let (n, dtype) = (x.elements(), ensure_alike("activation", &[y, x])?);
    let params = activation_params { y: written(y)?, x: read(x)?, n: n as u64, kind: kind(activation) };
    // SAFETY: the operands have `n` elements of the kernel's type.
    unsafe { run(cuda, "activation", dtype, n, &params) }
}

pub(super) fn activation_backward(
    cuda: &Cuda,
    dx: &mut Tensor,
    dy: &Tensor,
    x: &Tensor,
    activation: Activation,
) -> Result<()> {
    let (n, dtype) = (x.elements(), ensure_alike("activation_backward", &[dx, dy, x])?);
    let kind = kind(activation);
    let params =
        activation_backward_params { dx: written(dx)?, dy: read(dy)?, x: read(x)?, n: n as u64, kind };
    // SAFETY: the operands have `n` elements of the kernel's type.
    unsafe { run(cuda, "activation_backward", dtype, n, &params) }
}

pub(super) fn gated(
    cuda: &Cuda,
    y: &mut Tensor,
    gate: &Tensor,
    up: &Tensor,
    activation: Activation,
) -> Result<()> {
    let (n, dtype) = (gate.elements(), ensure_alike("gated", &[y, gate, up])?);
    let kind = kind(activation);
    let params = gated_params { y: written(y)?, gate: read(gate)?, up: read(up)?, n: n as u64, kind };
    // SAFETY: the operands have `n` elements of the kernel's type.
    unsafe { run(cuda, "gated", dtype, n, &params) }
}

pub(super) fn gated_backward(
    cuda: &Cuda,
    dgate: &mut Tensor,
    dup: &mut Tensor,
    dy: &Tensor,
    gate: &Tensor,
    up: &Tensor,
    activation: Activation,
) -> Result<()> {
    let (n, dtype) = (gate.elements(), ensure_alike("gated_backward", &[dgate, dup, dy, gate, up])?);
    let params = gated_backward_params {
        dgate: written(dgate)?,
        dup: written(dup)?,
        dy: read(dy)?,
        gate: read(gate)?,
        up: read(up)?,
        n: n as u64,
        kind: kind(activation),
    };
    // SAFETY: the operands have `n` elements of the kernel's type.
    unsafe { run(cuda, "gated_backward", dtype, n, &params) }
}

pub(super) fn softcap(cuda: &Cuda, x: &mut Tensor, cap: f32) -> Result<()> {
    let n = x.elements();
    ensure_f32("softcap", &[(x, n)])?;
    let params = softcap_params { x: written(x)?, n: n as u64, cap };
    // SAFETY: the operand has `n` floats.
    unsafe { run(cuda, "softcap", DType::F32, n, &params) }
}

pub(super) fn softcap_backward(cuda: &Cuda, dx: &mut Tensor, y: &Tensor, cap: f32) -> Result<()> {
    let (n, dtype) = (dx.elements(), ensure_alike("softcap_backward", &[dx])?);
    ensure_f32("softcap_backward", &[(y, n)])?;
    let params = softcap_backward_params { dx: written(dx)?, y: read(y)?, n: n as u64, cap };
    // SAFETY: the operands have `n` elements of the kernel's types.
    unsafe { run(cuda, "softcap_backward", dtype, n, &params) }
}

pub(super) fn rsqrt(cuda: &Cuda, out: &mut Tensor, x: &Tensor) -> Result<()> {
    let n = x.elements();
    ensure_f32("rsqrt", &[(out, n), (x, n)])?;
    let params = rsqrt_params { out: written(out)?, x: read(x)?, n: n as u64 };
    // SAFETY: the operands have `n` floats.
    unsafe { run(cuda, "rsqrt", DType::F32, n, &params) }
}

pub(super) fn dropout(
    cuda: &Cuda,
    y: &mut Tensor,
    x: &Tensor,
    p: f32,
    key: PhiloxKey,
    first_row: usize,
    accumulate: bool,
) -> Result<()> {
    let dtype = check::dropout(y, x, p)?;
    let n = x.elements();
    let params = dropout_params {
        y: written(y)?,
        x: read(x)?,
        n: n as u64,
        first_element: (first_row * x.cols()) as u64,
        p,
        key: key.0,
        accumulate: i32::from(accumulate),
    };
    // SAFETY: the operands have `n` elements of the kernel's type.
    unsafe { run(cuda, "dropout", dtype, n, &params) }
}

/// Rotates tensors at the same positions; those that differ in nothing but their number of heads share launches.
pub(super) fn rope(
    cuda: &Cuda,
    all: &mut [(&mut Tensor, RopeShape)],
    table: &Tensor,
    positions: &Tensor,
) -> Result<()> {
    let mut dtypes = Vec::with_capacity(all.len());
    for (x, shape) in &mut *all {
        dtypes.push(check::rope(x, table, positions, shape)?);
    }
    let alike = |i: usize| (RopeShape { n_heads: 0, ..all[i].1 }, dtypes[i], all[i].0.rows());
    let together = (1..all.len()).all(|i| alike(i) == alike(0));
    let at_once = if together { ROPE_MAX as usize } else { 1 };
    for (some, dtype) in all.chunks_mut(at_once).zip(dtypes.iter().step_by(at_once)) {
        let (rows, shape) = (some[0].0.rows(), some[0].1);
        let mut params = rope_params {
            x: [std::ptr::null_mut(); ROPE_MAX as usize],
            n_heads: [0; ROPE_MAX as usize],
            table: read(table)?,
            positions: read(positions)?,
            faults: cuda.faults.device_bytes()?.cast(),
            rows: rows as u64,
            head_dim: shape.head_dim as u32,
            rotary_dim: shape.rotary_dim as u32,
            table_rows: table.rows() as u32,
            interleaved: i32::from(shape.interleaved),
            inverse: i32::from(shape.inverse),
        };
        for (i, (x, shape)) in some.iter_mut().enumerate() {
            (params.x[i], params.n_heads[i]) = (written(x)?, shape.n_heads as u32);
        }
        let most_heads = some.iter().map(|(_, shape)| shape.n_heads).max().unwrap_or(0);
        let packs = rows * most_heads * (shape.rotary_dim / 2).div_ceil(PACK);
        let (name, grid) = (format!("rope_{dtype}"), [packs.div_ceil(THREADS), some.len(), 1]);
        // SAFETY: the operands are as the structure says; positions are checked by the kernel.
        unsafe { cuda.launch(&name, grid, THREADS, 0, &params)? };
    }
    Ok(())
}
