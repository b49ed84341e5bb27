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

pub(super) fn rope(
    cuda: &Cuda,
    x: &mut Tensor,
    table: &Tensor,
    positions: &Tensor,
    shape: &RopeShape,
) -> Result<()> {
    let dtype = check::rope(x, table, positions, shape)?;
    let rows = x.rows();
    let params = rope_params {
        x: written(x)?,
        table: read(table)?,
        positions: read(positions)?,
        faults: cuda.faults.device_bytes()?.cast(),
        rows: rows as u64,
        n_heads: shape.n_heads as u32,
        head_dim: shape.head_dim as u32,
        rotary_dim: shape.rotary_dim as u32,
        table_rows: table.rows() as u32,
        interleaved: i32::from(shape.interleaved),
        inverse: i32::from(shape.inverse),
    };
    let packs = rows * shape.n_heads * (shape.rotary_dim / 2).div_ceil(PACK);
    let name = format!("rope_{dtype}");
    // SAFETY: the operands are as the structure says; positions are checked by the kernel.
    unsafe { cuda.launch(&name, [packs.div_ceil(THREADS), 1, 1], THREADS, 0, &params) }
}
