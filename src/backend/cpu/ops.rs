//! Norms, activations, rotary embedding, dropout and loss.

use super::bindings::rope_args;
use super::{Cpu, Shared, kernel, type_code};
use crate::backend::check::{self, ensure, ensure_alike, ensure_f32};
use crate::backend::{Activation, RopeShape};
use crate::error::Result;
use crate::rng::PhiloxKey;
use crate::tensor::Tensor;

/// Elements per job below which sharing out costs more than it gains.
pub(super) const GRAIN: usize = 1 << 13;

/// Elements per partial sum of [`crate::backend::Kernels::sum_squares`].
const SUM_BLOCK: usize = 4096;

/// The header's number of an activation function.
fn activation_code(activation: Activation) -> i32 {
    match activation {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::Relu => 3,
        Activation::Tanh => 4,
        Activation::Sigmoid => 5,
    }
}

/// An operand whose elements jobs read or write by chunk.
#[derive(Clone, Copy)]
pub(super) struct Elements(Shared<u8>, usize);

impl Elements {
    pub fn of(x: &Tensor) -> Self {
        Elements(Shared(x.host_bytes().cast_mut()), x.dtype().size())
    }

    pub fn of_mut(x: &mut Tensor) -> Result<Self> {
        let size = x.dtype().size();
        Ok(Elements(Shared(x.host_bytes_mut()?), size))
    }

    pub fn at<T>(self, index: usize) -> *mut T {
        self.0.at(index * self.1).cast()
    }
}

impl Cpu {
    pub(super) fn run_add(&self, out: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
        let code = type_code(ensure_alike("add", &[out, a, b])?);
        let (n, y, a, b) = (out.elements(), Elements::of_mut(out)?, Elements::of(a), Elements::of(b));
        // SAFETY: chunks are disjoint and inside all operands.
        self.run_chunks(n, GRAIN, |i, len| unsafe {
            kernel!(self, add)(y.at(i), a.at(i), b.at(i), len, code)
        });
        Ok(())
    }

    pub(super) fn run_scale(&self, out: &mut Tensor, factor: f32) -> Result<()> {
        let code = type_code(ensure_alike("scale", &[out])?);
        let (n, y) = (out.elements(), Elements::of_mut(out)?);
        // SAFETY: chunks are disjoint and inside the tensor.
        self.run_chunks(n, GRAIN, |i, len| unsafe { kernel!(self, scale)(y.at(i), len, factor, code) });
        Ok(())
    }

    pub(super) fn run_activation(&self, y: &mut Tensor, x: &Tensor, activation: Activation) -> Result<()> {
        let code = type_code(ensure_alike("activation", &[y, x])?);
        let kind = activation_code(activation);
        let (n, y, x) = (x.elements(), Elements::of_mut(y)?, Elements::of(x));
        // SAFETY: chunks are disjoint and inside all operands.
        self.run_chunks(n, GRAIN, |i, len| unsafe {
            kernel!(self, activation)(y.at(i), x.at(i), len, kind, code)
        });
        Ok(())
    }

    pub(super) fn run_activation_backward(
        &self,
        dx: &mut Tensor,
        dy: &Tensor,
        x: &Tensor,
        activation: Activation,
    ) -> Result<()> {
        let code = type_code(ensure_alike("activation_backward", &[dx, dy, x])?);
        let kind = activation_code(activation);
        let (n, dx, dy, x) = (x.elements(), Elements::of_mut(dx)?, Elements::of(dy), Elements::of(x));
        // SAFETY: chunks are disjoint and inside all operands.
        self.run_chunks(n, GRAIN, |i, len| unsafe {
            kernel!(self, activation_backward)(dx.at(i), dy.at(i), x.at(i), len, kind, code);
        });
        Ok(())
    }

    pub(super) fn run_gated(
        &self,
        y: &mut Tensor,
        gate: &Tensor,
        up: &Tensor,
        activation: Activation,
    ) -> Result<()> {
        let code = type_code(ensure_alike("gated", &[y, gate, up])?);
        let kind = activation_code(activation);
        let (n, y, gate, up) = (gate.elements(), Elements::of_mut(y)?, Elements::of(gate), Elements::of(up));
        // SAFETY: chunks are disjoint and inside all operands.
        self.run_chunks(n, GRAIN, |i, len| unsafe {
            kernel!(self, gated)(y.at(i), gate.at(i), up.at(i), len, kind, code);
        });
        Ok(())
    }

    pub(super) fn run_gated_backward(
        &self,
        dgate: &mut Tensor,
        dup: &mut Tensor,
        dy: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        activation: Activation,
    ) -> Result<()> {
        let code = type_code(ensure_alike("gated_backward", &[dgate, dup, dy, gate, up])?);
        let kind = activation_code(activation);
        let n = gate.elements();
        let (dgate, dup) = (Elements::of_mut(dgate)?, Elements::of_mut(dup)?);
        let (dy, gate, up) = (Elements::of(dy), Elements::of(gate), Elements::of(up));
        // SAFETY: chunks are disjoint and inside all operands.
        self.run_chunks(n, GRAIN, |i, len| unsafe {
            kernel!(self, gated_backward)(
                dgate.at(i),
                dup.at(i),
                dy.at(i),
                gate.at(i),
                up.at(i),
                len,
                kind,
                code,
            );
        });
        Ok(())
    }

    pub(super) fn run_column_sums(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        let code = type_code(ensure_alike("add_column_sums", &[x])?);
        let (rows, cols) = (x.rows(), x.cols());
        ensure_f32("add_column_sums", &[(out, cols)])?;
        let (out, x) = (Elements::of_mut(out)?, Elements::of(x));
        // SAFETY: each job has its own columns.
        self.run_chunks(cols, 64, |first, len| unsafe {
            kernel!(self, column_sums)(out.at(0), x.at(0), rows, cols, first, first + len, code);
        });
        Ok(())
    }

    pub(super) fn run_column_products(&self, out: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
        let code = type_code(ensure_alike("add_column_products", &[a, b])?);
        let (rows, cols) = (a.rows(), a.cols());
        ensure_f32("add_column_products", &[(out, cols)])?;
        let (out, a, b) = (Elements::of_mut(out)?, Elements::of(a), Elements::of(b));
        // SAFETY: each job has its own columns.
        self.run_chunks(cols, 64, |first, len| unsafe {
            kernel!(self, column_products)(out.at(0), a.at(0), b.at(0), rows, cols, first, first + len, code);
        });
        Ok(())
    }

    pub(super) fn run_scale_columns(
        &self,
        out: &mut Tensor,
        x: &Tensor,
        factors: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<()> {
        let code = type_code(ensure_alike("scale_columns", &[out, x])?);
        let (rows, cols) = (x.rows(), x.cols());
        ensure_f32("scale_columns", &[(factors, cols)])?;
        let bias = match bias {
            None => Shared(std::ptr::null_mut()),
            Some(bias) => {
                ensure_f32("scale_columns", &[(bias, cols)])?;
                Shared(bias.host_bytes().cast_mut())
            }
        };
        let (out, x, factors) = (Elements::of_mut(out)?, Elements::of(x), Elements::of(factors));
        // SAFETY: each job has its own rows.
        self.run_chunks(rows, (GRAIN / cols.max(1)).max(1), |first, len| unsafe {
            kernel!(self, scale_columns)(
                out.at(first * cols),
                x.at(first * cols),
                factors.at(0),
                bias.at(0).cast(),
                len,
                cols,
                code,
            );
        });
        Ok(())
    }

    pub(super) fn run_softcap(&self, x: &mut Tensor, cap: f32) -> Result<()> {
        let n = x.elements();
        ensure_f32("softcap", &[(x, n)])?;
        let x = Elements::of_mut(x)?;
        // SAFETY: chunks are disjoint and inside the tensor.
        self.run_chunks(n, GRAIN, |i, len| unsafe { kernel!(self, softcap)(x.at(i), len, cap) });
        Ok(())
    }

    pub(super) fn run_softcap_backward(&self, dx: &mut Tensor, y: &Tensor, cap: f32) -> Result<()> {
        let code = type_code(ensure_alike("softcap_backward", &[dx])?);
        let n = dx.elements();
        ensure_f32("softcap_backward", &[(y, n)])?;
        let (dx, y) = (Elements::of_mut(dx)?, Elements::of(y));
        // SAFETY: chunks are disjoint and inside both tensors.
        self.run_chunks(n, GRAIN, |i, len| unsafe {
            kernel!(self, softcap_backward)(dx.at(i), y.at(i), len, cap, code);
        });
        Ok(())
    }

    pub(super) fn run_rsqrt(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        let n = x.elements();
        ensure_f32("rsqrt", &[(out, n), (x, n)])?;
        let (out, x) = (Elements::of_mut(out)?, Elements::of(x));
        // SAFETY: chunks are disjoint and inside both tensors.
        self.run_chunks(n, GRAIN, |i, len| unsafe { kernel!(self, rsqrt)(out.at(i), x.at(i), len) });
        Ok(())
    }

    pub(super) fn run_norm(
        &self,
        y: &mut Tensor,
        stats: &mut Tensor,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        eps: f32,
        layer_norm: bool,
    ) -> Result<()> {
        let code = type_code(check::norm(y, stats, x, weight, bias, layer_norm)?);
        let (rows, cols) = (x.rows(), x.cols());
        let weight_code = type_code(weight.dtype());
        let bias = bias.map_or(Shared(std::ptr::null_mut()), |b| Shared(b.host_bytes().cast_mut()));
        let (y, stats, x, w) =
            (Elements::of_mut(y)?, Elements::of_mut(stats)?, Elements::of(x), Elements::of(weight));
        self.run_rows(rows, cols, |i| {
            let (y, x, w) = (y.at(i * cols), x.at(i * cols), w.at(0));
            // SAFETY: each job writes its own rows; shapes were checked.
            unsafe {
                if layer_norm {
                    let (stats, bias) = (stats.at(2 * i), bias.at(0).cast());
                    kernel!(self, layer_norm)(y, stats, x, w, bias, weight_code, 1, cols, eps, code);
                } else {
                    kernel!(self, rms_norm)(y, stats.at(i), x, w, weight_code, 1, cols, eps, code);
                }
            }
        });
        Ok(())
    }

    pub(super) fn run_norm_backward(
        &self,
        dx: Option<&mut Tensor>,
        accumulate: bool,
        dweight: Option<&mut Tensor>,
        dy: &Tensor,
        x: &Tensor,
        stats: &Tensor,
        weight: &Tensor,
        layer_norm: bool,
    ) -> Result<()> {
        let (dx_, dweight_) = (dx.as_deref(), dweight.as_deref());
        let checked = check::norm_backward(dx_, dweight_, dy, x, stats, weight, layer_norm)?;
        let code = type_code(checked);
        let (rows, cols) = (x.rows(), x.cols());
        let per_row = check::stats_per_row(layer_norm);
        let weight_code = type_code(weight.dtype());
        let (dy_, x_, stats, w) =
            (Elements::of(dy), Elements::of(x), Elements::of(stats), Elements::of(weight));
        let dx_kernel = if layer_norm { kernel!(self, layer_norm_dx) } else { kernel!(self, rms_norm_dx) };
        let dweight_kernel =
            if layer_norm { kernel!(self, layer_norm_dweight) } else { kernel!(self, rms_norm_dweight) };
        if let Some(dweight) = dweight {
            let dweight = Elements::of_mut(dweight)?;
            // SAFETY: each job has its own columns.
            self.run_chunks(cols, 64, |first, len| unsafe {
                dweight_kernel(
                    dweight.at(0),
                    dy_.at(0),
                    x_.at(0),
                    stats.at(0),
                    rows,
                    cols,
                    first,
                    first + len,
                    code,
                );
            });
        }
        let Some(dx) = dx else { return Ok(()) };
        let dx = Elements::of_mut(dx)?;
        self.run_rows(rows, cols, |i| {
            let o = i * cols;
            let stats = stats.at(i * per_row);
            // SAFETY: each job writes its own rows; shapes were checked.
            unsafe {
                dx_kernel(
                    dx.at(o),
                    dy_.at(o),
                    x_.at(o),
                    stats,
                    w.at(0),
                    weight_code,
                    1,
                    cols,
                    i32::from(accumulate),
                    code,
                );
            }
        });
        Ok(())
    }

    pub(super) fn run_rope(
        &self,
        x: &mut Tensor,
        table: &Tensor,
        positions: &Tensor,
        shape: &RopeShape,
    ) -> Result<()> {
        let dtype = check::rope(x, table, positions, shape)?;
        let (rows, cols) = (x.rows(), x.cols());
        let RopeShape { n_heads, head_dim, rotary_dim, interleaved, inverse } = *shape;
        // SAFETY: the tensor holds that many i32 and is not written during the operation.
        let numbers = unsafe { std::slice::from_raw_parts(positions.host::<i32>()?, rows) };
        let limit = table.rows();
        if let Some(bad) = numbers.iter().find(|p| usize::try_from(**p).map_or(true, |p| p >= limit)) {
            return ensure(false, "rope", || format!("position {bad} of a table of {limit}"));
        }
        let (x, table) = (Elements::of_mut(x)?, Shared(table.host::<f32>()?.cast_mut()));
        self.run_rows(rows, cols, |i| {
            let args = rope_args {
                x: x.at(i * cols),
                rows: 1,
                n_heads,
                head_dim,
                rotary_dim,
                table: table.at(0),
                table_rows: limit,
                positions: &numbers[i],
                type_: type_code(dtype),
                interleaved: i32::from(interleaved),
                inverse: i32::from(inverse),
            };
            // SAFETY: each job writes its own rows; shapes and positions were checked.
            unsafe { kernel!(self, rope)(&args) };
        });
        Ok(())
    }

    pub(super) fn run_dropout(
        &self,
        y: &mut Tensor,
        x: &Tensor,
        p: f32,
        key: PhiloxKey,
        first_row: usize,
        accumulate: bool,
    ) -> Result<()> {
        let code = type_code(check::dropout(y, x, p)?);
        let offset = (first_row * x.cols()) as u64;
        let (n, y, x) = (x.elements(), Elements::of_mut(y)?, Elements::of(x));
        // SAFETY: chunks are disjoint and inside all operands.
        self.run_chunks(n, GRAIN, |i, len| unsafe {
            let first = offset + i as u64;
            let accumulate = i32::from(accumulate);
            kernel!(self, dropout)(y.at(i), x.at(i), len, first, p, key.0[0], key.0[1], accumulate, code);
        });
        Ok(())
    }

    pub(super) fn run_cross_entropy(
        &self,
        losses: &mut Tensor,
        dlogits: Option<&mut Tensor>,
        logits: &Tensor,
        targets: &Tensor,
        grad_scale: f32,
    ) -> Result<()> {
        let (rows, vocabulary) = (logits.rows(), logits.cols());
        ensure_f32("cross_entropy", &[(logits, rows * vocabulary), (losses, rows)])?;
        // SAFETY: the tensor holds that many i32 and is not written during the operation.
        let numbers = unsafe { std::slice::from_raw_parts(targets.host::<i32>()?, targets.elements()) };
        let inside = numbers.iter().all(|t| usize::try_from(*t).is_ok_and(|t| t < vocabulary));
        ensure(inside && numbers.len() == rows, "cross_entropy", || {
            format!("expected {rows} targets below {vocabulary}, found {:?}", targets.shape())
        })?;
        let (grad, code) = match dlogits {
            None => (None, 0),
            Some(d) => {
                ensure(d.elements() == logits.elements(), "cross_entropy", || {
                    format!("gradient {:?}", d.shape())
                })?;
                let code = type_code(ensure_alike("cross_entropy", &[d])?);
                (Some(Elements::of_mut(d)?), code)
            }
        };
        let (losses, x) = (Elements::of_mut(losses)?, Elements::of(logits));
        self.run_rows(rows, vocabulary, |i| {
            let o = i * vocabulary;
            let grad = grad.map_or(std::ptr::null_mut(), |g| g.at(o));
            // SAFETY: each job writes its own rows; shapes and targets were checked.
            unsafe {
                kernel!(self, cross_entropy)(
                    losses.at(i),
                    grad,
                    code,
                    x.at(o),
                    &numbers[i],
                    1,
                    vocabulary,
                    grad_scale,
                );
            }
        });
        Ok(())
    }

    pub(super) fn run_sum_squares(&self, x: &Tensor) -> Result<f64> {
        ensure_f32("sum_squares", &[(x, x.elements())])?;
        if self.is_planner() {
            return Ok(0.0);
        }
        let n = x.elements();
        let x = Shared(x.host::<f32>()?.cast_mut());
        let mut sums = vec![0f32; n.div_ceil(SUM_BLOCK)];
        let to = Shared(sums.as_mut_ptr());
        self.run(sums.len(), |block| {
            let start = block * SUM_BLOCK;
            // SAFETY: the block lies inside the tensor; each job writes its own sum.
            unsafe { *to.at(block) = kernel!(self, sum_squares)(x.at(start), SUM_BLOCK.min(n - start)) };
        });
        Ok(sums.into_iter().map(f64::from).sum())
    }
}
