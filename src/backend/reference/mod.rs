//! The reference: every operation as directly as its definition reads, one element after the other.
//!
//! The functions are generic over [`Real`]: in f32 they follow the numerics law of [`crate::backend`], in
//! f64 they are the truth that errors are measured against, with [`Dual`] they are their own derivatives.

pub mod attention;
pub mod elementwise;
pub mod matrix;
pub mod norm;
mod operands;
mod optimizer;
mod quant;
mod real;

use operands::{alike, check_attention, fits, is_activation, is_f32};
pub use real::{Dual, Real};

use super::{
    Activation, AttentionShape, Backend, Gemm, GemmTerm, Kernels, Moments8bit, OptimizerStep, RopeShape,
};
use crate::arena::Arena;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::dynamic_map::{DynamicMap, MOMENTS_BLOCKSIZE};
use crate::quant::{QuantConfig, Quantized};
use crate::rng::PhiloxKey;
use crate::tensor::Tensor;
use std::marker::PhantomData;
use std::sync::Arc;

/// A backend that computes in `R` (f32 or f64) and rounds results when it stores them, once for f32; f64
/// results become 16-bit numbers by way of f32.
#[derive(Debug, Default)]
pub struct Reference<R> {
    arena: Arena,
    number: PhantomData<R>,
}

impl<R: Real> Reference<R> {
    /// The backend.
    pub fn backend() -> Backend {
        Arc::new(Reference::<R> { arena: Arena::new(), number: PhantomData })
    }
}

impl<R: Real> Kernels for Reference<R> {
    fn name(&self) -> String {
        format!("reference ({})", std::any::type_name::<R>())
    }

    fn arena(&self) -> &Arena {
        &self.arena
    }

    fn empty(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let bytes = shape.iter().try_fold(dtype.size(), |n, d| n.checked_mul(*d));
        let bytes = bytes.ok_or_else(|| Error::shape("tensor", format!("{shape:?} is too large")))?;
        Tensor::from_block(self.arena.allocate(bytes)?, shape, dtype)
    }

    fn upload(&self, out: &mut Tensor, bytes: &[u8]) -> Result<()> {
        fits("upload", out.bytes() == bytes.len(), &[out])?;
        // SAFETY: `out` has as many bytes as the source, which lies outside the arena.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), out.host_bytes_mut()?, bytes.len()) };
        Ok(())
    }

    fn download(&self, x: &Tensor, bytes: &mut [u8]) -> Result<()> {
        fits("download", x.bytes() == bytes.len(), &[x])?;
        // SAFETY: `x` has as many bytes as the destination, which lies outside the arena.
        unsafe { std::ptr::copy_nonoverlapping(x.host_bytes(), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn fill(&self, out: &mut Tensor, value: f32) -> Result<()> {
        let values = vec![R::from_f64(value.into()); out.elements()];
        self.store(out, &values)
    }

    fn cast(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        fits("cast", out.elements() == x.elements(), &[out, x])?;
        if out.dtype() == x.dtype() {
            let mut bytes = vec![0; x.bytes()];
            self.download(x, &mut bytes)?;
            return self.upload(out, &bytes);
        }
        let values = self.load(x)?;
        self.store(out, &values)
    }

    fn gemm(&self, out: &mut Tensor, gemm: &Gemm<'_>) -> Result<()> {
        let (m, n) = (out.rows(), out.cols());
        fits("gemm", is_activation(out), &[out])?;
        for (rows, term) in gemm.terms_by_rows(m) {
            let a = term.a.dense()?;
            let b_is_float = term.b.dense().map_or(true, |b| b.dtype().is_float());
            let (a_shape, b_shape) = (term.a.shape(), term.b.shape());
            let shapes = (a_shape.0, b_shape.1) == (rows.len(), n) && a_shape.1 == b_shape.0 && rows.end <= m;
            fits("gemm", shapes && a.dtype().is_float() && b_is_float, &[out, a])?;
        }
        if let Some(bias) = gemm.bias {
            fits("gemm", bias.elements() == n && bias.dtype().is_float(), &[out, bias])?;
        }
        let is_bf16 = |t: &GemmTerm<'_>| t.a.dense().is_ok_and(|a| a.dtype() == DType::BF16);
        let bf16 = gemm.terms_by_rows(m).all(|(_, term)| is_bf16(&term));
        let arithmetic = if bf16 { DType::BF16 } else { DType::F32 };
        let mut values = if gemm.accumulate { self.load(out)? } else { vec![R::zero(); out.elements()] };
        let mut operands = Vec::new();
        for (rows, term) in gemm.terms_by_rows(m) {
            let (a, b) = (self.operand(&term.a, arithmetic)?, self.operand(&term.b, arithmetic)?);
            operands.push((rows, term.a.shape().1, a, b));
        }
        let bias = gemm.bias.map(|b| self.load(b)).transpose()?;
        let terms: Vec<matrix::Term<'_, R>> =
            operands.iter().map(|(rows, k, a, b)| (rows.clone(), *k, a.as_slice(), b.as_slice())).collect();
        let scale = R::from_f64(gemm.scale.into());
        matrix::gemm(&mut values, n, &terms, scale, bias.as_deref(), arithmetic);
        self.store(out, &values)
    }

    fn quantize(&self, x: &Tensor, config: &QuantConfig) -> Result<Quantized> {
        quant::quantize(self, x, config)
    }

    fn dequantize(&self, out: &mut Tensor, x: &Quantized) -> Result<()> {
        fits("dequantize", out.rows() == x.shape()[0] && out.cols() == x.shape()[1], &[out])?;
        self.store(out, &quant::values(self, x)?)
    }

    fn gather_rows(&self, out: &mut Tensor, x: &Tensor, rows: &Tensor) -> Result<()> {
        let cols = x.cols();
        let shapes = out.cols() == cols && out.rows() == rows.elements();
        fits("gather_rows", shapes && out.dtype().is_float(), &[out, x, rows])?;
        let rows = self.load_indices("gather_rows", rows, x.rows())?;
        let x = self.load(x)?;
        let values: Vec<R> =
            rows.iter().flat_map(|row| x[*row as usize * cols..][..cols].iter().copied()).collect();
        self.store(out, &values)
    }

    fn scatter_add_rows(&self, out: &mut Tensor, x: &Tensor, rows: &Tensor) -> Result<()> {
        let types = is_activation(x) && (out.dtype() == x.dtype() || out.dtype() == DType::F32);
        let shapes = out.cols() == x.cols() && x.rows() == rows.elements();
        fits("scatter_add_rows", types && shapes, &[out, x, rows])?;
        let rows = self.load_indices("scatter_add_rows", rows, out.rows())?;
        let mut values = self.load(out)?;
        elementwise::scatter_add_rows(&mut values, x.cols(), &self.load(x)?, &rows, out.dtype());
        self.store(out, &values)
    }

    fn copy_columns(
        &self,
        out: &mut Tensor,
        out_col: usize,
        x: &Tensor,
        x_col: usize,
        cols: usize,
        accumulate: bool,
    ) -> Result<()> {
        let (out_cols, x_cols) = (out.cols(), x.cols());
        let shapes = out.rows() == x.rows() && out_col + cols <= out_cols && x_col + cols <= x_cols;
        fits("copy_columns", shapes && is_activation(x) && out.dtype() == x.dtype(), &[out, x])?;
        let (mut values, from) = (self.load(out)?, self.load(x)?);
        for row in 0..x.rows() {
            for c in 0..cols {
                let to = &mut values[row * out_cols + out_col + c];
                let new = from[row * x_cols + x_col + c];
                *to = if accumulate { *to + new } else { new };
            }
        }
        self.store(out, &values)
    }

    fn add(&self, out: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
        self.zip(out, a, b, |a, b| a + b)
    }

    fn add_assign(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        let old = out.clone();
        self.zip(out, &old, x, |a, b| a + b)
    }

    fn scale(&self, out: &mut Tensor, factor: f32) -> Result<()> {
        let (old, factor) = (out.clone(), R::from_f64(factor.into()));
        self.zip(out, &old, &old, |x, _| x * factor)
    }

    fn add_column_sums(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        fits("add_column_sums", is_f32(out, x.cols()) && is_activation(x), &[out, x])?;
        let mut sums = self.load(out)?;
        matrix::add_column_sums(&mut sums, &self.load(x)?);
        self.store(out, &sums)
    }

    fn add_column_products(&self, out: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
        alike("add_column_products", &[a, b])?;
        fits("add_column_products", is_f32(out, a.cols()), &[out, a, b])?;
        let mut sums = self.load(out)?;
        matrix::add_column_products(&mut sums, &self.load(a)?, &self.load(b)?);
        self.store(out, &sums)
    }

    fn scale_columns(
        &self,
        out: &mut Tensor,
        x: &Tensor,
        factors: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<()> {
        alike("scale_columns", &[out, x])?;
        let cols = x.cols();
        fits(
            "scale_columns",
            is_f32(factors, cols) && bias.is_none_or(|b| is_f32(b, cols)),
            &[out, x, factors],
        )?;
        let (mut values, factors) = (self.load(x)?, self.load(factors)?);
        let bias = bias.map(|b| self.load(b)).transpose()?;
        for row in values.chunks_mut(cols) {
            for (c, x) in row.iter_mut().enumerate() {
                *x = bias.as_ref().map_or(*x * factors[c], |bias| x.mul_add(factors[c], bias[c]));
            }
        }
        self.store(out, &values)
    }

    fn softcap(&self, x: &mut Tensor, cap: f32) -> Result<()> {
        fits("softcap", is_f32(x, x.elements()), &[x])?;
        let cap = R::from_f64(cap.into());
        let values: Vec<R> = self.load(x)?.into_iter().map(|x| cap * (x / cap).tanh()).collect();
        self.store(x, &values)
    }

    fn softcap_backward(&self, dx: &mut Tensor, y: &Tensor, cap: f32) -> Result<()> {
        fits("softcap_backward", is_activation(dx) && is_f32(y, dx.elements()), &[dx, y])?;
        let cap = R::from_f64(cap.into());
        let slope = |y: R| R::one() - (y / cap) * (y / cap);
        let (d, y) = (self.load(dx)?, self.load(y)?);
        let values: Vec<R> = d.into_iter().zip(y).map(|(d, y)| d * slope(y)).collect();
        self.store(dx, &values)
    }

    fn rsqrt(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        fits("rsqrt", is_f32(out, x.elements()) && is_f32(x, x.elements()), &[out, x])?;
        let values: Vec<R> = self.load(x)?.into_iter().map(|x| R::one() / x.sqrt()).collect();
        self.store(out, &values)
    }

    fn rms_norm(
        &self,
        y: &mut Tensor,
        rstd: &mut Tensor,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
    ) -> Result<()> {
        alike("rms_norm", &[y, x])?;
        fits("rms_norm", is_f32(rstd, x.rows()) && weight.elements() == x.cols(), &[x, rstd, weight])?;
        let (values, w, eps) = (self.load(x)?, self.load(weight)?, R::from_f64(eps.into()));
        let (values, stats) = norm::rms_norm(&values, &w, eps, x.dtype());
        self.store(y, &values)?;
        self.store(rstd, &stats)
    }

    fn rms_norm_backward(
        &self,
        dx: Option<&mut Tensor>,
        accumulate: bool,
        dweight: Option<&mut Tensor>,
        dy: &Tensor,
        x: &Tensor,
        rstd: &Tensor,
        weight: &Tensor,
    ) -> Result<()> {
        fits("rms_norm_backward", is_f32(rstd, x.rows()), &[x, rstd])?;
        self.norm_backward(dx, accumulate, dweight, dy, x, rstd, weight)
    }

    fn layer_norm(
        &self,
        y: &mut Tensor,
        stats: &mut Tensor,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        eps: f32,
    ) -> Result<()> {
        alike("layer_norm", &[y, x])?;
        let cols = x.cols();
        let lengths = weight.elements() == cols && bias.is_none_or(|b| b.elements() == cols);
        fits("layer_norm", is_f32(stats, 2 * x.rows()) && lengths, &[x, stats, weight])?;
        let (x, w, eps) = (self.load(x)?, self.load(weight)?, R::from_f64(eps.into()));
        let bias = bias.map(|b| self.load(b)).transpose()?;
        let (values, numbers) = norm::layer_norm(&x, &w, bias.as_deref(), eps);
        self.store(y, &values)?;
        self.store(stats, &numbers)
    }

    fn layer_norm_backward(
        &self,
        dx: Option<&mut Tensor>,
        accumulate: bool,
        dweight: Option<&mut Tensor>,
        dbias: Option<&mut Tensor>,
        dy: &Tensor,
        x: &Tensor,
        stats: &Tensor,
        weight: &Tensor,
    ) -> Result<()> {
        fits("layer_norm_backward", is_f32(stats, 2 * x.rows()), &[x, stats])?;
        if let Some(dbias) = &dbias {
            fits("layer_norm_backward", is_f32(dbias, x.cols()), &[x, dbias])?;
        }
        self.norm_backward(dx, accumulate, dweight, dy, x, stats, weight)?;
        dbias.map_or(Ok(()), |dbias| self.add_column_sums(dbias, dy))
    }

    fn rope(&self, x: &mut Tensor, table: &Tensor, positions: &Tensor, shape: &RopeShape) -> Result<()> {
        let RopeShape { n_heads, head_dim, rotary_dim, .. } = *shape;
        let dims = x.cols() == n_heads * head_dim && rotary_dim <= head_dim && rotary_dim.is_multiple_of(2);
        let shapes = table.cols() == rotary_dim && positions.elements() == x.rows();
        let types = is_activation(x) && table.dtype() == DType::F32;
        fits("rope", dims && shapes && types, &[x, table, positions])?;
        let positions = self.load_indices("rope", positions, table.rows())?;
        let mut values = self.load(x)?;
        elementwise::rope(&mut values, &self.load(table)?, &positions, shape);
        self.store(x, &values)
    }

    fn attention(
        &self,
        out: &mut Tensor,
        lse: &mut Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: &AttentionShape<'_>,
    ) -> Result<()> {
        alike("attention", &[out, q])?;
        check_attention(shape, q, k, v, lse)?;
        let (mut values, mut sums) = (self.load(out)?, self.load(lse)?);
        let (q_, k, v) = (self.load(q)?, self.load(k)?, self.load(v)?);
        let inputs = attention::Inputs { q: &q_, k: &k, v: &v, dtype: q.dtype(), shape };
        inputs.forward(&mut values, &mut sums);
        self.store(out, &values)?;
        self.store(lse, &sums)
    }

    fn attention_backward(
        &self,
        dq: &mut Tensor,
        dk: &mut Tensor,
        dv: &mut Tensor,
        dout: &Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        shape: &AttentionShape<'_>,
    ) -> Result<()> {
        alike("attention_backward", &[dq, dout, q, out])?;
        alike("attention_backward", &[dk, dv, k, v])?;
        check_attention(shape, q, k, v, lse)?;
        let mut gradients = [self.load(dq)?, vec![R::zero(); k.elements()], vec![R::zero(); k.elements()]];
        let [dq_, dk_, dv_] = &mut gradients;
        let (q_, k, v) = (self.load(q)?, self.load(k)?, self.load(v)?);
        let inputs = attention::Inputs { q: &q_, k: &k, v: &v, dtype: q.dtype(), shape };
        inputs.backward(dq_, dk_, dv_, &self.load(dout)?, &self.load(out)?, &self.load(lse)?);
        self.store(dq, &gradients[0])?;
        self.store(dk, &gradients[1])?;
        self.store(dv, &gradients[2])
    }

    fn activation(&self, y: &mut Tensor, x: &Tensor, activation: Activation) -> Result<()> {
        self.zip(y, x, x, |x, _| elementwise::activate(x, activation))
    }

    fn activation_backward(
        &self,
        dx: &mut Tensor,
        dy: &Tensor,
        x: &Tensor,
        activation: Activation,
    ) -> Result<()> {
        self.zip(dx, dy, x, |dy, x| dy * elementwise::activation_slope(x, activation))
    }

    fn gated(&self, y: &mut Tensor, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<()> {
        self.zip(y, gate, up, |gate, up| elementwise::activate(gate, activation) * up)
    }

    fn gated_backward(
        &self,
        dgate: &mut Tensor,
        dup: &mut Tensor,
        dy: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        activation: Activation,
    ) -> Result<()> {
        alike("gated_backward", &[dgate, dup, dy, gate, up])?;
        let (dy, gate, up) = (self.load(dy)?, self.load(gate)?, self.load(up)?);
        let (mut gates, mut ups) = (Vec::new(), Vec::new());
        for i in 0..dy.len() {
            gates.push(dy[i] * up[i] * elementwise::activation_slope(gate[i], activation));
            ups.push(dy[i] * elementwise::activate(gate[i], activation));
        }
        self.store(dgate, &gates)?;
        self.store(dup, &ups)
    }

    fn dropout(
        &self,
        y: &mut Tensor,
        x: &Tensor,
        p: f32,
        key: PhiloxKey,
        first_row: usize,
        accumulate: bool,
    ) -> Result<()> {
        alike("dropout", &[y, x])?;
        if !(0.0..1.0).contains(&p) {
            return Err(Error::shape("dropout", format!("expected a probability in [0, 1), found {p}")));
        }
        let mut values = elementwise::dropout(&self.load(x)?, p, key, (first_row * x.cols()) as u64);
        if accumulate {
            values = self.load(y)?.into_iter().zip(values).map(|(old, new)| old + new).collect();
        }
        self.store(y, &values)
    }

    fn cross_entropy(
        &self,
        losses: &mut Tensor,
        dlogits: Option<&mut Tensor>,
        logits: &Tensor,
        targets: &Tensor,
        grad_scale: f32,
    ) -> Result<()> {
        let (rows, vocabulary) = (logits.rows(), logits.cols());
        let types = is_f32(logits, rows * vocabulary) && is_f32(losses, rows) && targets.elements() == rows;
        let gradient = dlogits.as_ref().is_none_or(|d| is_activation(d) && d.elements() == logits.elements());
        fits("cross_entropy", types && gradient, &[losses, logits, targets])?;
        let targets = self.load_indices("cross_entropy", targets, vocabulary)?;
        let logits = self.load(logits)?;
        let (mut values, mut gradient) = (Vec::new(), Vec::new());
        for (row, target) in logits.chunks(vocabulary).zip(targets) {
            let scale = R::from_f64(grad_scale.into());
            let (loss, row_gradient) = elementwise::cross_entropy(row, target as usize, scale);
            values.push(loss);
            gradient.extend(row_gradient);
        }
        self.store(losses, &values)?;
        dlogits.map_or(Ok(()), |dlogits| self.store(dlogits, &gradient))
    }

    fn sum_squares(&self, x: &Tensor) -> Result<f64> {
        fits("sum_squares", x.dtype() == DType::F32, &[x])?;
        Ok(matrix::sum_squares(&self.load(x)?))
    }

    fn adamw(
        &self,
        p: &mut Tensor,
        g: &Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
        step: &OptimizerStep,
    ) -> Result<()> {
        let n = p.elements();
        fits("adamw", [&*p, g, m, v].iter().all(|t| is_f32(t, n)), &[p, g, m, v])?;
        let (mut ps, g, mut ms, mut vs) = (self.load(p)?, self.load(g)?, self.load(m)?, self.load(v)?);
        for i in 0..n {
            (ps[i], ms[i], vs[i]) = optimizer::adamw(ps[i], g[i], ms[i], vs[i], step);
        }
        self.store(p, &ps)?;
        self.store(m, &ms)?;
        self.store(v, &vs)
    }

    fn adamw_8bit(
        &self,
        p: &mut Tensor,
        g: &Tensor,
        moments: &mut Moments8bit<'_>,
        step: &OptimizerStep,
    ) -> Result<()> {
        let Moments8bit { m, v, m_absmax, v_absmax } = moments;
        let (n, blocks) = (p.elements(), p.elements().div_ceil(MOMENTS_BLOCKSIZE));
        let numbers = is_f32(p, n) && is_f32(g, n) && is_f32(m_absmax, blocks) && is_f32(v_absmax, blocks);
        let codes = [&**m, &**v].iter().all(|t| t.dtype() == DType::U8 && t.elements() == n);
        fits("adamw_8bit", numbers && codes, &[p, g, m, v, m_absmax, v_absmax])?;
        let (mut m_codes, mut v_codes) = (vec![0u8; n], vec![0u8; n]);
        self.download(m, &mut m_codes)?;
        self.download(v, &mut v_codes)?;
        let (mut ps, g) = (self.load(p)?, self.load(g)?);
        let (mut m_scales, mut v_scales) = (self.load(m_absmax)?, self.load(v_absmax)?);
        for block in 0..blocks {
            let range = block * MOMENTS_BLOCKSIZE..n.min((block + 1) * MOMENTS_BLOCKSIZE);
            let mut ms =
                optimizer::decode_moments(&m_codes[range.clone()], m_scales[block], DynamicMap::signed());
            let mut vs =
                optimizer::decode_moments(&v_codes[range.clone()], v_scales[block], DynamicMap::unsigned());
            for (j, i) in range.clone().enumerate() {
                (ps[i], ms[j], vs[j]) = optimizer::adamw(ps[i], g[i], ms[j], vs[j], step);
            }
            let (codes, scale) = optimizer::encode_moments(&ms, DynamicMap::signed());
            m_codes[range.clone()].copy_from_slice(&codes);
            m_scales[block] = scale;
            let (codes, scale) = optimizer::encode_moments(&vs, DynamicMap::unsigned());
            v_codes[range].copy_from_slice(&codes);
            v_scales[block] = scale;
        }
        self.store(p, &ps)?;
        self.upload(m, &m_codes)?;
        self.upload(v, &v_codes)?;
        self.store(m_absmax, &m_scales)?;
        self.store(v_absmax, &v_scales)
    }

    fn lion(&self, p: &mut Tensor, g: &Tensor, m: &mut Tensor, step: &OptimizerStep) -> Result<()> {
        let n = p.elements();
        fits("lion", [&*p, g, m].iter().all(|t| is_f32(t, n)), &[p, g, m])?;
        let (mut ps, g, mut ms) = (self.load(p)?, self.load(g)?, self.load(m)?);
        for i in 0..n {
            (ps[i], ms[i]) = optimizer::lion(ps[i], g[i], ms[i], step);
        }
        self.store(p, &ps)?;
        self.store(m, &ms)
    }

    fn sgd(&self, p: &mut Tensor, g: &Tensor, step: &OptimizerStep) -> Result<()> {
        fits("sgd", is_f32(p, p.elements()) && is_f32(g, p.elements()), &[p, g])?;
        let (ps, g) = (self.load(p)?, self.load(g)?);
        let stepped: Vec<R> = ps.into_iter().zip(g).map(|(p, g)| optimizer::sgd(p, g, step)).collect();
        self.store(p, &stepped)
    }
}
