//! The specification of every computation: trait [`Kernels`].
//!
//! A backend owns memory and computes coarse operations on [`Tensor`]s; nothing above it sees an address.
//! `reference` is the slow oracle, `cpu` the SIMD one. A device backend fits the same trait: its
//! tensors lie in device storage, its launches may be asynchronous, and only [`Kernels::download`],
//! [`Kernels::sum_squares`], [`Kernels::step_report`] and [`Kernels::sample`] wait.
//!
//! # Shapes and types
//! A tensor is seen as a matrix `[rows, cols]`: `cols` is its last dimension, `rows` the product of the
//! others. *Activations* are f32 or bf16 (all of one operation alike); frozen weights are f32, bf16 or f16;
//! trainable parameters are seen in the activations' type; gradients of parameters are f32. Inside an
//! operation everything is f32 but for products of bf16 matrices; a result is rounded once, to nearest even.
//!
//! # The numerics law
//! 1. An element of a matrix product is one f32 accumulator, k ascending, fused multiply-add; never split.
//!    A row's bits depend on that row alone: not on how many rows there are, the tiles or the threads.
//! 2. bf16 products are pairs of fused multiply-adds, k ascending, denormal inputs and results taken as zero.
//! 3. Sums over a row (norms, softmax, losses) use 16 lanes by index mod 16, each ascending, joined by the
//!    tree i + (i + 8), i + (i + 4), i + (i + 2), i + (i + 1). Sums over rows (gradients of norms, biases,
//!    embeddings) are one accumulator, rows ascending, starting from what is there.
//! 4. exp, log, tanh and erf are the crate's own polynomials.

use crate::arena::Arena;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::{QuantConfig, Quantized};
use crate::rng::PhiloxKey;
use crate::tensor::Tensor;
use std::sync::Arc;

mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod operands;
mod quantized;
pub mod reference;
mod sampling;
mod transfer;

pub use operands::{
    Activation, AttentionShape, Gemm, GemmTerm, HeadLoss, Matrix, Moments8bit, OptimizerStep, RopeShape,
    RowTerm, Sequence,
};
pub use sampling::SampleRow;

#[cfg(feature = "cuda")]
use cuda::driver_is_present;

/// A backend chosen at start-up, shared by everything that computes.
pub type Backend = Arc<dyn Kernels>;

/// The backend of a device's name: `cpu`, `cuda`, `cuda:N`, or `auto`, which is the first GPU if there is one that can
/// be used, else the CPU. `threads` are the CPU's.
///
/// # Errors
/// When the device is not known, not there or can't be used.
pub fn open(device: &str, threads: Option<usize>) -> Result<Backend> {
    let ordinal = match device.strip_prefix("cuda") {
        Some("") => Some(0),
        Some(rest) => rest.strip_prefix(':').and_then(|n| n.parse().ok()),
        None => None,
    };
    match (device, ordinal) {
        ("cpu", _) => cpu::Cpu::new(threads),
        ("auto", _) => open_cuda(0).or_else(|e| {
            if driver_is_present() {
                eprintln!("warning: computing on the CPU, as the GPU can't be used: {e}");
            }
            cpu::Cpu::new(threads)
        }),
        (_, Some(ordinal)) => open_cuda(ordinal),
        _ => Err(Error::config(
            "command line",
            "--device",
            format!("expected auto, cpu or cuda[:N], found `{device}`"),
        )),
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(ordinal: usize) -> Result<Backend> {
    cuda::Cuda::new(ordinal)
}

#[cfg(not(feature = "cuda"))]
fn driver_is_present() -> bool {
    false
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(ordinal: usize) -> Result<Backend> {
    Err(Error::device(format!("cuda:{ordinal}"), "this program was built without the feature `cuda`"))
}

/// Pages of optimizer state that are on their way or in use at a time.
pub const PAGES_AHEAD: usize = 2;

/// Where work beside other operations ends, by a number of the backend's own; see [`Kernels::beside`].
#[derive(Debug, PartialEq, Eq)]
pub struct Mark(pub(crate) usize);

/// The label of a token whose prediction does not count, as in Hugging Face's data.
pub const IGNORE_INDEX: i32 = -100;

/// A backend: memory and about thirty coarse operations.
///
/// Outputs are allocated by the caller and overwritten, or added to where `accumulate` says so. Every method
/// fails with [`Error::Shape`] when operands do not fit, before it writes anything.
pub trait Kernels: Send + Sync + std::fmt::Debug {
    /// What computes, for people: `cpu (avx512bf16, 2 threads)`.
    fn name(&self) -> String;

    /// The memory that tensors come from.
    fn arena(&self) -> &Arena;

    /// Bytes of a device's memory that are free; none where tensors lie in the host's.
    fn free_memory(&self) -> Option<usize> {
        None
    }

    /// A backend of the same kind that allocates and checks, but neither takes memory nor computes: its arena counts
    /// what a run would need. Downloads give zeros.
    ///
    /// # Errors
    /// When this kind has none.
    fn planner(&self) -> Result<Backend> {
        Err(Error::Unsupported(format!("{} can't plan memory", self.name())))
    }

    /// Bytes of working memory beside the arena that all threads have together (a planner: would have at most).
    fn scratch_bytes(&self) -> usize {
        0
    }

    /// A tensor with unspecified content.
    fn empty(&self, shape: &[usize], dtype: DType) -> Result<Tensor>;

    /// Copies host bytes into `out` (native byte order, all of it).
    fn upload(&self, out: &mut Tensor, bytes: &[u8]) -> Result<()>;

    /// A tensor that this backend computes with and has the elements of `x`, which may lie on the host, as those of a
    /// checkpoint do: `x` itself where that serves.
    ///
    /// # Errors
    /// When memory can't be had.
    fn place(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.clone())
    }

    /// Copies `x` to the host; waits for everything that writes it.
    fn download(&self, x: &Tensor, bytes: &mut [u8]) -> Result<()>;

    /// Every element becomes `value` (f32, bf16 or f16 tensors).
    fn fill(&self, out: &mut Tensor, value: f32) -> Result<()>;

    /// `out = x`, converted between f32, bf16 and f16 (or the same type); round to nearest even.
    fn cast(&self, out: &mut Tensor, x: &Tensor) -> Result<()>;

    /// See [`Gemm`].
    fn gemm(&self, out: &mut Tensor, gemm: &Gemm<'_>) -> Result<()>;

    /// Several products that do not depend on each other, which a backend may run at once.
    fn gemm_all(&self, products: &mut [(&mut Tensor, Gemm<'_>)]) -> Result<()> {
        products.iter_mut().try_for_each(|(out, gemm)| self.gemm(out, gemm))
    }

    /// Quantizes a float matrix `[rows, cols]`: for each block `scale = absmax / max_level` (with zero points:
    /// range / max_level), then the nearest code of `x * (1 / scale)`, a scale below 1e-38 counting as that.
    /// Waits.
    ///
    /// # Errors
    /// When the settings do not fit, or an element is not finite.
    fn quantize(&self, x: &Tensor, config: &QuantConfig) -> Result<Quantized>;

    /// `out = x`, rounded to `out`'s type (f32, bf16 or f16).
    fn dequantize(&self, out: &mut Tensor, x: &Quantized) -> Result<()>;

    /// Puts matrices into the layout in which this backend multiplies few rows by their transposes fastest, in the order
    /// in which they are used, where there is one. Every operation takes it, but those that train are slower, and it can't
    /// be saved.
    ///
    /// # Errors
    /// When memory can't be had; those that were laid out before stay so.
    fn lay_out_for_decoding(&self, all: &mut [&mut Quantized]) -> Result<()> {
        let _ = all;
        Ok(())
    }

    /// `out[i] = x[rows[i]]`, converted to `out`'s type; `rows` is i32. Embedding lookup.
    fn gather_rows(&self, out: &mut Tensor, x: &Tensor, rows: &Tensor) -> Result<()>;

    /// `out[rows[i]] += x[i]`, `i` ascending; `out` is f32 or of `x`'s type. Embedding's gradient.
    fn scatter_add_rows(&self, out: &mut Tensor, x: &Tensor, rows: &Tensor) -> Result<()>;

    /// `out[:, out_col..][..cols] (+)= x[:, x_col..][..cols]`, same type; splits and joins fused projections.
    fn copy_columns(
        &self,
        out: &mut Tensor,
        out_col: usize,
        x: &Tensor,
        x_col: usize,
        cols: usize,
        accumulate: bool,
    ) -> Result<()>;

    /// `out = a + b`; activations.
    fn add(&self, out: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()>;

    /// `out += x`; activations, or f32 gradients.
    fn add_assign(&self, out: &mut Tensor, x: &Tensor) -> Result<()>;

    /// `out *= factor`.
    fn scale(&self, out: &mut Tensor, factor: f32) -> Result<()>;

    /// `out[c] += sum over rows of x[:, c]`; `out` f32 `[cols]`. Gradient of a bias.
    fn add_column_sums(&self, out: &mut Tensor, x: &Tensor) -> Result<()>;

    /// `out[c] += sum over rows of a[:, c] * b[:, c]` by fused multiply-adds; `out` f32 `[cols]`. Gradient of factors.
    fn add_column_products(&self, out: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()>;

    /// `out[:, c] = x[:, c] * factors[c] + bias[c]` by a fused multiply-add; `factors`, `bias` f32 `[cols]`.
    fn scale_columns(
        &self,
        out: &mut Tensor,
        x: &Tensor,
        factors: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<()>;

    /// `out = 1 / sqrt(x)`; f32.
    fn rsqrt(&self, out: &mut Tensor, x: &Tensor) -> Result<()>;

    /// `y = x * rstd * weight`, `rstd = 1 / sqrt(mean(x^2) + eps)` (f32 `[rows]`, written for the backward).
    /// As in Hugging Face's Llama, the normalized row is rounded to the activations' type before `weight`.
    fn rms_norm(
        &self,
        y: &mut Tensor,
        rstd: &mut Tensor,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
    ) -> Result<()>;

    /// `sum = a + b` and [`Kernels::rms_norm`] of it, with their bits.
    fn add_rms_norm(
        &self,
        [sum, y, rstd]: [&mut Tensor; 3],
        [a, b]: [&Tensor; 2],
        weight: &Tensor,
        eps: f32,
    ) -> Result<()> {
        self.add(sum, a, b)?;
        self.rms_norm(y, rstd, sum, weight, eps)
    }

    /// Gradients of [`Kernels::rms_norm`]: `dx` overwritten (or added to), `dweight` (f32 `[cols]`) added to.
    fn rms_norm_backward(
        &self,
        dx: Option<&mut Tensor>,
        accumulate: bool,
        dweight: Option<&mut Tensor>,
        dy: &Tensor,
        x: &Tensor,
        rstd: &Tensor,
        weight: &Tensor,
    ) -> Result<()>;

    /// `y = (x - mean) * rstd * weight + bias`; `stats` is f32 `[rows, 2]`: mean, rstd.
    fn layer_norm(
        &self,
        y: &mut Tensor,
        stats: &mut Tensor,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        eps: f32,
    ) -> Result<()>;

    /// Gradients of [`Kernels::layer_norm`], as [`Kernels::rms_norm_backward`]; `dbias` needs only `dy`.
    #[allow(clippy::too_many_arguments)]
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
    ) -> Result<()>;

    /// Rotates `x` in place. `table` is f32 `[max_positions, rotary_dim]`: the cosines of a position's
    /// `rotary_dim / 2` angles, then the sines. `positions` is i32 `[tokens]`.
    fn rope(&self, x: &mut Tensor, table: &Tensor, positions: &Tensor, shape: &RopeShape) -> Result<()>;

    /// [`Kernels::rope`] of several tensors, which a backend may rotate at once.
    fn rope_all(
        &self,
        all: &mut [(&mut Tensor, RopeShape)],
        table: &Tensor,
        positions: &Tensor,
    ) -> Result<()> {
        all.iter_mut().try_for_each(|(x, shape)| self.rope(x, table, positions, shape))
    }

    /// Causal attention. `q`, `out`: `[tokens, n_heads * head_dim]`; `k`, `v`:
    /// `[key rows, n_kv_heads * head_dim]`; `lse`: f32 `[tokens, n_heads]`, the rows' log-sum-exp of scores.
    /// Products are in the activations' type (bf16: scores' softmax is rounded to bf16 before it meets `v`).
    fn attention(
        &self,
        out: &mut Tensor,
        lse: &mut Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: &AttentionShape<'_>,
    ) -> Result<()>;

    /// Gradients of [`Kernels::attention`], all overwritten; rows of `dk`, `dv` outside every sequence become 0.
    #[allow(clippy::too_many_arguments)]
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
    ) -> Result<()>;

    /// `y = activation(x)`.
    fn activation(&self, y: &mut Tensor, x: &Tensor, activation: Activation) -> Result<()>;

    /// `dx = dy * activation'(x)`.
    fn activation_backward(
        &self,
        dx: &mut Tensor,
        dy: &Tensor,
        x: &Tensor,
        activation: Activation,
    ) -> Result<()>;

    /// `y = activation(gate) * up`.
    fn gated(&self, y: &mut Tensor, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<()>;

    /// Gradients of [`Kernels::gated`].
    fn gated_backward(
        &self,
        dgate: &mut Tensor,
        dup: &mut Tensor,
        dy: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        activation: Activation,
    ) -> Result<()>;

    /// `y = x / (1 - p)` where kept, else 0 (or added to `y` if `accumulate`). Element `e` (counted from
    /// `first_row * cols`) is kept iff the top 24 bits of word `e mod 4` of the key's counter `e / 4`,
    /// as a fraction, are at least `p`. Its own gradient.
    fn dropout(
        &self,
        y: &mut Tensor,
        x: &Tensor,
        p: f32,
        key: PhiloxKey,
        first_row: usize,
        accumulate: bool,
    ) -> Result<()>;

    /// Softmax cross-entropy of `logits` (f32 `[rows, vocabulary]`): `losses` (f32 `[rows]`) becomes
    /// `lse - logits[target]`, and `dlogits` (activations), if given, `(softmax - onehot) * grad_scale`.
    /// `targets` is i32 `[rows]`, every one inside the vocabulary.
    fn cross_entropy(
        &self,
        losses: &mut Tensor,
        dlogits: Option<&mut Tensor>,
        logits: &Tensor,
        targets: &Tensor,
        grad_scale: f32,
    ) -> Result<()>;

    /// [`Kernels::cross_entropy`] of a frozen head's logits without whole rows of them in memory, where this backend has a way
    /// to do that: `losses` (f32 `[rows]`), and `dx` (activations `[rows, hidden]`), if given, the gradient of the rows that
    /// count times their factors. A row's bits depend on that row and the head alone, those of its loss not on whether there is
    /// a `dx`, either.
    /// `false`: nothing was done, the caller computes logits.
    fn head_loss(
        &self,
        _losses: &mut Tensor,
        _dx: Option<&mut Tensor>,
        _loss: &HeadLoss<'_>,
    ) -> Result<bool> {
        Ok(false)
    }

    /// `x = cap * tanh(x / cap)`; f32. Caps logits.
    fn softcap(&self, x: &mut Tensor, cap: f32) -> Result<()>;

    /// `dx *= 1 - (y / cap)^2`, with `y` (f32) what [`Kernels::softcap`] gave.
    fn softcap_backward(&self, dx: &mut Tensor, y: &Tensor, cap: f32) -> Result<()>;

    /// Sum of the squares of an f32 tensor: 16 lanes within fixed blocks of 4096, blocks added in f64,
    /// ascending. Not finite if any element is not. Waits.
    fn sum_squares(&self, x: &Tensor) -> Result<f64>;

    /// The token that each row of `logits` (f32 `[rows, vocabulary]`) gives by its settings; none where a score is not a
    /// number. Order of settings: repetition penalty, banned tokens, temperature, top-k, top-p. The tokens drawn from are
    /// in ascending order; see `sampling.rs`. What is in `logits` afterwards is unspecified. Waits.
    fn sample(&self, logits: &mut Tensor, rows: &[SampleRow<'_>]) -> Result<Vec<Option<u32>>> {
        check::ensure_f32("sample", &[(logits, rows.len() * logits.cols())])?;
        let mut scores = vec![0f32; logits.elements()];
        self.download(logits, bytemuck::cast_slice_mut(&mut scores))?;
        let scores = scores.chunks_exact_mut(logits.cols().max(1));
        Ok(scores.zip(rows).map(|(scores, row)| sampling::choose(scores, row)).collect())
    }

    /// What a step tells the host, in one wait: [`Kernels::sum_squares`] of the gradients (0 without), and the elements of
    /// the losses (f32), one tensor after the other.
    fn step_report(&self, gradients: Option<&Tensor>, losses: &[Tensor]) -> Result<(f64, Vec<f32>)> {
        let mut all = vec![0f32; losses.iter().map(Tensor::elements).sum()];
        let mut rest = all.as_mut_slice();
        for losses in losses {
            let own;
            (own, rest) = rest.split_at_mut(losses.elements());
            self.download(losses, bytemuck::cast_slice_mut(own))?;
        }
        Ok((gradients.map_or(Ok(0.0), |g| self.sum_squares(g))?, all))
    }

    /// A place for what [`Kernels::judge`] finds out about steps, f32 `[3]`: the first step whose losses or gradients are not
    /// finite, counted from 1, or 0; 1 if they are its losses, else 0; the last step's `grad_scale`. `None` where the host
    /// does not wait for a step's results anyway.
    ///
    /// # Errors
    /// When memory can't be had.
    fn verdict(&self) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// Adds to a verdict what step `step` (counted from 1) is like, with the numbers that the host has by
    /// [`Kernels::step_report`] and [`clip_scale`](crate::optim::clip_scale).
    fn judge(
        &self,
        _verdict: &mut Tensor,
        _step: usize,
        _gradients: Option<&Tensor>,
        _losses: &[Tensor],
        _max_grad_norm: Option<f64>,
    ) -> Result<()> {
        Err(Error::Unsupported(format!("{} does not judge steps", self.name())))
    }

    /// Calls `work`, whose operations come after all that were started before, in the order of such calls, and may run
    /// beside those that are started after it, until [`Kernels::join`] takes the mark. Their tensors live until then, are
    /// not written by others, and those that they write are not read.
    ///
    /// # Errors
    /// What `work` fails with; whatever it started is done then.
    fn beside(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Mark> {
        work().map(|()| Mark(0))
    }

    /// Operations from now on come after the work that ended with the last of these marks, which are in its order.
    fn join(&self, _marks: Vec<Mark>) -> Result<()> {
        Ok(())
    }

    /// Zeros in memory of the host, where optimizer state lives that this backend's own has no room for; `None` where a
    /// mapped file serves.
    ///
    /// # Errors
    /// When there is no such memory.
    fn page_memory(&self, _shape: &[usize], _dtype: DType) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// Starts to bring a page of optimizer state to where operations take it, which is what it gives. Pages come in the
    /// order of these calls, and the place is another page's when all handles to it are gone. A page that is not at home
    /// yet is waited for.
    fn fetch_page(&self, page: &[Tensor]) -> Result<Vec<Tensor>> {
        page.iter().for_each(Tensor::fetch_pages);
        Ok(page.to_vec())
    }

    /// Operations, or those of the work that calls this, from now on find what [`Kernels::fetch_page`] brought.
    fn begin_page(&self, _here: &[Tensor]) -> Result<()> {
        Ok(())
    }

    /// Starts to bring a page back, as the operations behind [`Kernels::begin_page`] left it.
    fn store_page(&self, _page: &[Tensor], here: Vec<Tensor>) -> Result<()> {
        here.iter().for_each(Tensor::release_pages);
        Ok(())
    }

    /// An AdamW step on flat f32 tensors of equal length, in PyTorch's order: `p *= 1 - lr wd;
    /// m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)`.
    fn adamw(
        &self,
        p: &mut Tensor,
        g: &Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
        step: &OptimizerStep,
    ) -> Result<()>;

    /// [`Kernels::adamw`] with moments that are decoded for the step and encoded after it.
    fn adamw_8bit(
        &self,
        p: &mut Tensor,
        g: &Tensor,
        moments: &mut Moments8bit<'_>,
        step: &OptimizerStep,
    ) -> Result<()>;

    /// A Lion step: `p = (1 - lr wd) p - lr sign(b1 m + (1 - b1) g); m = b2 m + (1 - b2) g`.
    fn lion(&self, p: &mut Tensor, g: &Tensor, m: &mut Tensor, step: &OptimizerStep) -> Result<()>;

    /// A step of gradient descent, PyTorch's without momentum: `p -= lr (g + wd p)`.
    fn sgd(&self, p: &mut Tensor, g: &Tensor, step: &OptimizerStep) -> Result<()>;
}
