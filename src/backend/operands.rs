//! What the operations of a backend take beside tensors: operands, shapes, settings.

use crate::error::{Error, Result};
use crate::quant::Quantized;
use crate::tensor::Tensor;
use std::ops::Range;

/// A matrix operand: a stored matrix or its transpose.
#[derive(Clone, Copy, Debug)]
pub enum Matrix<'a> {
    /// Elements in memory as they are.
    Dense {
        /// The stored matrix, `[rows, cols]`, or `[cols, rows]` if transposed.
        tensor: &'a Tensor,
        /// Whether the operand is the stored matrix's transpose.
        transposed: bool,
    },
    /// A quantized matrix, right operands only: decoded as it is used, each element rounded to the type that
    /// the arithmetic takes, so that the result has the bits of dequantizing first.
    Quantized {
        /// The stored matrix, `[rows, cols]`, or `[cols, rows]` if transposed.
        matrix: &'a Quantized,
        /// Whether the operand is the stored matrix's transpose.
        transposed: bool,
    },
}

impl<'a> Matrix<'a> {
    /// The stored matrix.
    pub fn plain(tensor: &'a Tensor) -> Self {
        Matrix::Dense { tensor, transposed: false }
    }

    /// The stored matrix's transpose.
    pub fn transposed(tensor: &'a Tensor) -> Self {
        Matrix::Dense { tensor, transposed: true }
    }

    /// Rows and columns of the operand.
    pub fn shape(&self) -> (usize, usize) {
        let (rows, cols, transposed) = match *self {
            Matrix::Dense { tensor, transposed } => (tensor.rows(), tensor.cols(), transposed),
            Matrix::Quantized { matrix, transposed } => (matrix.shape()[0], matrix.shape()[1], transposed),
        };
        if transposed { (cols, rows) } else { (rows, cols) }
    }

    /// The stored tensor of an operand that must be dense.
    pub(crate) fn dense(&self) -> Result<&'a Tensor> {
        match *self {
            Matrix::Dense { tensor, .. } => Ok(tensor),
            Matrix::Quantized { .. } => {
                Err(Error::shape("gemm", "expected a dense left operand, found a quantized one"))
            }
        }
    }
}

/// One product of a [`Gemm`].
#[derive(Clone, Copy, Debug)]
pub struct GemmTerm<'a> {
    /// `[m, k]`.
    pub a: Matrix<'a>,
    /// `[k, n]`.
    pub b: Matrix<'a>,
}

/// A product that only some rows of a [`Gemm`]'s result have: as many as `term.a` has, from `first_row` on.
#[derive(Clone, Copy, Debug)]
pub struct RowTerm<'a> {
    /// First row of the result that has it.
    pub first_row: usize,
    /// `[rows, k]` times `[k, n]`.
    pub term: GemmTerm<'a>,
}

/// `out = scale * (init + sum of a b over the terms) + bias`, all terms on the same accumulators in order, those of
/// some rows after those of all: the other rows have the bits that they have without.
///
/// `init` is 0, or `out` itself if `accumulate`. The arithmetic is bf16 (law 2) if every `a` is bf16, else
/// f32; a `b` of another type is converted first. The low-rank part of a LoRA layer is a second term; those of a
/// batch whose rows use different adapters are row terms.
#[derive(Clone, Copy, Debug)]
pub struct Gemm<'a> {
    /// Products, in order.
    pub terms: &'a [GemmTerm<'a>],
    /// Products of some rows, in order; their left operands are dense.
    pub row_terms: &'a [RowTerm<'a>],
    /// Factor on the accumulator.
    pub scale: f32,
    /// `[n]`, added after scaling; f32, bf16 or f16.
    pub bias: Option<&'a Tensor>,
    /// Whether the accumulators start from `out` (f32, or bf16 widened).
    pub accumulate: bool,
}

impl<'a> Gemm<'a> {
    /// The plain sum of products.
    pub fn new(terms: &'a [GemmTerm<'a>]) -> Self {
        Gemm { terms, row_terms: &[], scale: 1.0, bias: None, accumulate: false }
    }

    /// All terms of a result of `rows` rows in order, each with the rows that have it.
    pub(crate) fn terms_by_rows(&self, rows: usize) -> impl Iterator<Item = (Range<usize>, GemmTerm<'a>)> {
        let of_some = |part: &RowTerm<'a>| {
            let end = part.first_row.saturating_add(part.term.a.shape().0);
            (part.first_row..end, part.term)
        };
        let of_all = self.terms.iter().map(move |term| (0..rows, *term));
        of_all.chain(self.row_terms.iter().map(of_some))
    }
}

/// What a frozen output head makes of hidden states, and what is asked of it: logits of a row are
/// `cap(x head^T + bias)`.
#[derive(Clone, Copy, Debug)]
pub struct HeadLoss<'a> {
    /// Hidden states, activations `[tokens, hidden]`.
    pub x: &'a Tensor,
    /// Those that count, i32 `[rows]`; `None`: all.
    pub rows: Option<&'a Tensor>,
    /// `[vocabulary, hidden]`.
    pub head: Matrix<'a>,
    /// `[vocabulary]`; f32, bf16 or f16.
    pub bias: Option<&'a Tensor>,
    /// Logits become `cap tanh(logit / cap)`.
    pub softcap: Option<f32>,
    /// i32 `[rows]`, every one inside the vocabulary.
    pub targets: &'a Tensor,
    /// Factors on the gradient of the losses of runs of rows, in order, which leave out none.
    pub grad_scales: &'a [(Range<usize>, f32)],
}

/// Rows of one sequence in packed tensors. Query `i` (from 0) sees key `j` iff `j <= i + k_len - q_len`:
/// the keys before the queries are a cache or a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// First row of the queries.
    pub q_start: usize,
    /// Number of queries.
    pub q_len: usize,
    /// First row of the keys and values.
    pub k_start: usize,
    /// Number of keys, at least `q_len`.
    pub k_len: usize,
}

/// Geometry of causal attention with grouped heads: query head `h` reads key head `h / (heads / kv_heads)`.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape<'a> {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads, a divisor of `n_heads`.
    pub n_kv_heads: usize,
    /// Elements per head, at most 256.
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Keys that a query sees at most, its own among them; `None`: all before it.
    pub window: Option<usize>,
    /// Scores become `cap tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// The packed sequences.
    pub sequences: &'a [Sequence],
}

/// Rotary embedding of `[tokens, heads * head_dim]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeShape {
    /// Heads per row.
    pub n_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Rotated elements at the start of each head (even); the others pass through.
    pub rotary_dim: usize,
    /// Pairs are `(2i, 2i + 1)` instead of `(i, i + rotary_dim / 2)`.
    pub interleaved: bool,
    /// Rotate backwards: the gradient.
    pub inverse: bool,
}

/// Activation functions of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(x)`, also called swish.
    Silu,
    /// `x Phi(x)` with the error function.
    Gelu,
    /// GELU's tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `tanh(x)`.
    Tanh,
    /// `1 / (1 + exp(-x))`.
    Sigmoid,
}

/// Hyper-parameters of one optimizer step; the gradient `g` is first multiplied by `grad_scale` (clipping).
///
/// The constants `1 - lr wd`, `1 - b1`, `1 - b2` and `lr / (1 - b1^t)` are computed in f64 and rounded to f32;
/// the elements' arithmetic is f32, sums of products by fused multiply-adds.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct OptimizerStep {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    pub grad_scale: f32,
    /// What [`Kernels::judge`](super::Kernels::judge) found: `grad_scale` is there, and nothing changes if a step was not
    /// finite.
    pub verdict: Option<Tensor>,
    /// `1 - beta1^t`, step `t` counted from 1.
    pub bias_correction1: f64,
    /// `sqrt(1 - beta2^t)`.
    pub bias_correction2_sqrt: f64,
}

/// A step's constants as the elements' arithmetic takes them, which every backend shares.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepConstants {
    pub grad_scale: f32,
    /// `1 - lr wd`.
    pub decay: f32,
    pub beta1: f32,
    pub one_minus_beta1: f32,
    pub beta2: f32,
    pub one_minus_beta2: f32,
    pub bias_correction2_sqrt: f32,
    pub epsilon: f32,
    /// `lr / (1 - b1^t)`.
    pub step_size: f32,
    pub weight_decay: f32,
}

impl OptimizerStep {
    /// The constants, rounded once.
    pub(crate) fn constants(&self) -> StepConstants {
        StepConstants {
            grad_scale: self.grad_scale,
            decay: (1.0 - self.learning_rate * self.weight_decay) as f32,
            beta1: self.beta1 as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            bias_correction2_sqrt: self.bias_correction2_sqrt as f32,
            epsilon: self.epsilon as f32,
            step_size: (self.learning_rate / self.bias_correction1) as f32,
            weight_decay: self.weight_decay as f32,
        }
    }
}

/// AdamW's moments in eight bits: a code for each element and, for each block of
/// [`MOMENTS_BLOCKSIZE`](crate::quant::dynamic_map::MOMENTS_BLOCKSIZE) of them, their largest magnitude. `m`'s
/// codes are of the signed dynamic map, `v`'s of the one from zero. Codes of zero ([`SIGNED_ZERO`](crate::quant::dynamic_map::SIGNED_ZERO), 0): no moments.
#[derive(Debug)]
pub struct Moments8bit<'a> {
    /// First moments, u8 `[n]`.
    pub m: &'a mut Tensor,
    /// Second moments, u8 `[n]`.
    pub v: &'a mut Tensor,
    /// f32 `[ceil(n / block)]`.
    pub m_absmax: &'a mut Tensor,
    /// f32 `[ceil(n / block)]`.
    pub v_absmax: &'a mut Tensor,
}
