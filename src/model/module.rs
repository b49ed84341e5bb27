//! The parts that decoders are made of, and their parameters: frozen or trainable.

use crate::backend::{Activation, Backend, Matrix};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::param::{ParamId, ParamStore};
use crate::quant::Quantized;
use crate::tensor::Tensor;
use std::borrow::Cow;

/// A frozen weight matrix in its stored format. There is no gradient of it, by construction.
#[derive(Clone, Debug)]
pub enum Weight {
    /// f32, bf16 or f16 elements as they are in the file or converted.
    Dense(Tensor),
    /// Codes and constants, `[out_features, in_features]` whatever the family's layout of dense weights.
    Quantized(Quantized),
}

impl Weight {
    /// The stored dimensions.
    pub fn shape(&self) -> &[usize] {
        match self {
            Weight::Dense(tensor) => tensor.shape(),
            Weight::Quantized(matrix) => matrix.shape(),
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match self {
            Weight::Dense(tensor) => tensor.bytes(),
            Weight::Quantized(matrix) => matrix.bytes(),
        }
    }

    /// `W^T`, `[in_features, out_features]`, the right operand of `y = x W^T`. `conv1d` says that a dense
    /// weight is stored that way.
    pub fn forward(&self, conv1d: bool) -> Matrix<'_> {
        match self {
            Weight::Dense(tensor) => Matrix::Dense { tensor, transposed: !conv1d },
            Weight::Quantized(matrix) => Matrix::Quantized { matrix, transposed: true },
        }
    }

    /// `W`, `[out_features, in_features]`, the right operand of `dx = dy W`.
    pub fn backward(&self, conv1d: bool) -> Matrix<'_> {
        match self {
            Weight::Dense(tensor) => Matrix::Dense { tensor, transposed: conv1d },
            Weight::Quantized(matrix) => Matrix::Quantized { matrix, transposed: false },
        }
    }
}

/// A parameter of the model.
#[derive(Clone, Debug)]
pub enum Parameter {
    /// Part of the base model.
    Frozen(Weight),
    /// A slice of the model's [`ParamStore`].
    Trainable(ParamId),
    /// Several adapters' own, of which rows of a batch have one each: that of their [slot](crate::autograd::Slot).
    SideBySide(Box<Apart>),
}

/// What a parameter is to adapters that are side by side.
#[derive(Clone, Debug)]
pub struct Apart {
    /// To rows without an adapter.
    pub base: Parameter,
    /// To each adapter, by slot: the base's, or one of its own.
    pub own: Vec<Parameter>,
}

impl Parameter {
    /// The slice of the store, if trainable.
    pub fn id(&self) -> Option<ParamId> {
        match *self {
            Parameter::Trainable(id) => Some(id),
            Parameter::Frozen(_) | Parameter::SideBySide(_) => None,
        }
    }

    /// Whether any adapter trains it.
    pub fn is_trained(&self) -> bool {
        match self {
            Parameter::Frozen(_) => false,
            Parameter::Trainable(_) => true,
            Parameter::SideBySide(apart) => apart.own.iter().any(Parameter::is_trained),
        }
    }

    /// Whether rows of different slots have different ones.
    pub(crate) fn is_apart(&self) -> bool {
        matches!(self, Parameter::SideBySide(_))
    }

    /// What it is to the rows of a slot; `None`: to rows without one.
    pub(crate) fn of_slot(&self, slot: Option<usize>) -> Parameter {
        match (self, slot) {
            (Parameter::SideBySide(apart), None) => apart.base.clone(),
            (Parameter::SideBySide(apart), Some(slot)) => apart.own[slot].clone(),
            (same, _) => same.clone(),
        }
    }

    /// The weight that products read.
    ///
    /// # Errors
    /// When it differs from slot to slot.
    pub fn weight(&self, params: &ParamStore) -> Result<Cow<'_, Weight>> {
        match self {
            Parameter::Frozen(weight) => Ok(Cow::Borrowed(weight)),
            Parameter::Trainable(id) => Ok(Cow::Owned(Weight::Dense(params.value(*id)?))),
            Parameter::SideBySide(_) => {
                Err(Error::shape("parameter", "expected one for all rows, found one for each slot"))
            }
        }
    }

    /// The dense tensor that operations other than products read.
    ///
    /// # Errors
    /// When the weight is quantized.
    pub fn tensor(&self, params: &ParamStore) -> Result<Tensor> {
        match &*self.weight(params)? {
            Weight::Dense(tensor) => Ok(tensor.clone()),
            Weight::Quantized(_) => {
                Err(Error::shape("parameter", "expected a dense tensor, found a quantized matrix"))
            }
        }
    }

    /// The stored dimensions.
    pub fn shape(&self, params: &ParamStore) -> Vec<usize> {
        match self {
            Parameter::Frozen(weight) => weight.shape().to_vec(),
            Parameter::Trainable(id) => params.info(*id).shape.clone(),
            Parameter::SideBySide(apart) => apart.base.shape(params),
        }
    }
}

/// The low-rank part of a linear layer: `y += scale * B (A dropout(x))`.
#[derive(Clone, Debug)]
pub struct Lora {
    /// `[r, in_features]`.
    pub a: ParamId,
    /// `[out_features, r]`.
    pub b: ParamId,
    /// `[out_features]`, PEFT's `lora_bias`; added with the low-rank part, times `scale`.
    pub bias: Option<ParamId>,
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rank-stabilized LoRA.
    pub scale: f32,
    /// Probability of dropping an element of `x`, in training only.
    pub dropout: f32,
    /// Number of the dropout stream: its position among the adapted modules.
    pub stream: u64,
    /// The trained magnitude of DoRA.
    pub dora: Option<Box<Dora>>,
    /// What was taken out of the base's weight at the start: `[r, in_features]` and `[out_features, r]`, f32.
    pub taken_out: Option<Box<[Tensor; 2]>>,
}

/// DoRA's part of a low-rank adapter.
#[derive(Clone, Debug)]
pub struct Dora {
    /// `[out_features]`.
    pub magnitude: ParamId,
    /// Squared norms of the frozen weight's rows, f32 `[out_features]`.
    pub base_squares: Tensor,
    /// The unit matrix, f32 `[r, r]`.
    pub identity: Tensor,
}

/// A linear layer, `y = x W^T + bias`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// Module path, as Hugging Face names it: `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// `[out_features, in_features]`, or `[in_features, out_features]` if `conv1d`.
    pub weight: Parameter,
    /// `[out_features]`.
    pub bias: Option<Parameter>,
    /// Stored the other way round, as GPT-2's Conv1D (PEFT's `fan_in_fan_out`).
    pub conv1d: bool,
    /// Columns of the input.
    pub in_features: usize,
    /// Columns of the output.
    pub out_features: usize,
    /// The adapter on it.
    pub adapter: Option<LinearAdapter>,
}

/// What a method puts on a linear layer.
#[derive(Clone, Debug)]
pub enum LinearAdapter {
    /// A low-rank part.
    Lora(Lora),
    /// What several adapters have here, of which rows of a batch have one each: that of their
    /// [slot](crate::autograd::Slot). Rows without a slot have none.
    SideBySide(Vec<Option<LinearAdapter>>),
    /// Trained factors on the columns of the output, or of the input (IA3).
    Ia3 {
        /// As many as columns.
        factors: ParamId,
        /// Whether the input is scaled.
        feedforward: bool,
    },
    /// Low-rank matrices with trained factors between them: `y += up(factors * down(drop(x)))`, times `outer` by column.
    Factored(Box<Factored>),
    /// The input is rotated: `y = (x R) W^T` (OFT).
    Rotation(Rotation),
}

/// A rotation of blocks of columns.
#[derive(Clone, Debug)]
pub struct Rotation {
    /// Upper triangles of skew-symmetric matrices, `[blocks, b (b - 1) / 2]`; if there is one, all blocks share it.
    pub skew: ParamId,
    /// b, columns of a block.
    pub block_size: usize,
    /// Terms of the series that stands for Cayley's transform; `None`: the transform itself.
    pub terms: Option<usize>,
    /// The length that a block's matrix has at most, times the root of the number of blocks (COFT).
    pub max_norm: Option<f64>,
    /// Share of the blocks that a step of training leaves as they are.
    pub dropout: f32,
    /// Number of the dropout stream.
    pub stream: u64,
}

/// A bottleneck adapter: a small MLP on what a sublayer gives, or beside it.
#[derive(Clone, Debug)]
pub struct Bottleneck {
    /// On its input.
    pub norm_before: Option<Norm>,
    /// `[inner, hidden_size]`.
    pub down: Linear,
    /// `[hidden_size, inner]`.
    pub up: Linear,
    /// On its output.
    pub norm_after: Option<Norm>,
    /// Between the layers.
    pub activation: Activation,
    /// On its output.
    pub scale: f32,
    /// Probability of dropping an element of its output, in training only.
    pub dropout: f32,
    /// Number of the dropout stream.
    pub stream: u64,
    /// Its input is the sublayer's residual input instead of its output.
    pub parallel: bool,
    /// Its input is the sum of both.
    pub sees_sum: bool,
    /// The sublayer's output is added before the norm.
    pub adds_before_norm: bool,
}

/// A low-rank part whose matrices are layers of their own (VeRA, AdaLoRA).
#[derive(Clone, Debug)]
pub struct Factored {
    /// `[r, in_features]`.
    pub down: Linear,
    /// `[r]`.
    pub factors: ParamId,
    /// `[out_features, r]`.
    pub up: Linear,
    /// `[out_features]`.
    pub outer: Option<ParamId>,
    /// On the whole part.
    pub scale: f32,
    /// Probability of dropping an element of `x`, in training only.
    pub dropout: f32,
    /// Number of the dropout stream.
    pub stream: u64,
}

impl Linear {
    /// A layer `[out_features, in_features]` without an adapter.
    pub fn new(
        path: &str,
        weight: Parameter,
        bias: Option<Parameter>,
        in_features: usize,
        out_features: usize,
    ) -> Self {
        let path = path.to_string();
        Linear { path, weight, bias, conv1d: false, in_features, out_features, adapter: None }
    }

    /// Whether the layer is one product, the adapter's on the same accumulators.
    pub(crate) fn is_product(&self) -> bool {
        matches!(self.adapter, None | Some(LinearAdapter::Lora(_) | LinearAdapter::SideBySide(_)))
    }

    /// Whether rows of different slots have more that differs than low-rank parts on one product.
    pub(crate) fn is_apart(&self) -> bool {
        let plain = |adapter: &LinearAdapter| match adapter {
            LinearAdapter::Lora(lora) => lora.dora.is_none() && lora.bias.is_none(),
            _ => false,
        };
        let adapters = match &self.adapter {
            Some(LinearAdapter::SideBySide(all)) => all.iter().flatten().any(|adapter| !plain(adapter)),
            _ => false,
        };
        adapters || self.weight.is_apart() || self.bias.as_ref().is_some_and(Parameter::is_apart)
    }

    /// Whether the layer has parameters that differ from slot to slot, low-rank parts on one product among them.
    pub(crate) fn differs(&self) -> bool {
        self.is_apart() || matches!(self.adapter, Some(LinearAdapter::SideBySide(_)))
    }

    /// What the layer is to the rows of a slot; `None`: to rows without one.
    pub(crate) fn of_slot(&self, slot: Option<usize>) -> Linear {
        let adapter = match (&self.adapter, slot) {
            (Some(LinearAdapter::SideBySide(all)), Some(slot)) => all[slot].clone(),
            (Some(LinearAdapter::SideBySide(_)), None) => None,
            (same, _) => same.clone(),
        };
        Linear {
            path: self.path.clone(),
            weight: self.weight.of_slot(slot),
            bias: self.bias.as_ref().map(|bias| bias.of_slot(slot)),
            adapter,
            ..*self
        }
    }

    /// The low-rank part that is computed together with the layer's product.
    pub fn lora(&self) -> Option<&Lora> {
        match &self.adapter {
            Some(LinearAdapter::Lora(lora)) => Some(lora),
            _ => None,
        }
    }
}

/// RMSNorm or LayerNorm.
#[derive(Clone, Debug)]
pub struct Norm {
    /// Module path.
    pub path: String,
    /// `[cols]`.
    pub weight: Parameter,
    /// `[cols]`; LayerNorm only.
    pub bias: Option<Parameter>,
    /// Added to the variance.
    pub eps: f32,
    /// LayerNorm (mean and variance) instead of RMSNorm.
    pub layer_norm: bool,
    /// The factor is 1 plus the weight.
    pub plus_one: bool,
}

impl Norm {
    /// Whether rows of different slots have different parameters.
    pub(crate) fn is_apart(&self) -> bool {
        self.weight.is_apart() || self.bias.as_ref().is_some_and(Parameter::is_apart)
    }

    /// What the norm is to the rows of a slot; `None`: to rows without one.
    pub(crate) fn of_slot(&self, slot: Option<usize>) -> Norm {
        Norm {
            path: self.path.clone(),
            weight: self.weight.of_slot(slot),
            bias: self.bias.as_ref().map(|bias| bias.of_slot(slot)),
            ..*self
        }
    }

    /// The factors of the columns, `[cols]`.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn factors(&self, params: &ParamStore, backend: &Backend) -> Result<Tensor> {
        factors(&self.weight, self.plus_one, params, backend)
    }
}

/// A norm's weight as the factors of the columns, `[cols]`.
pub(crate) fn factors(
    weight: &Parameter,
    plus_one: bool,
    params: &ParamStore,
    backend: &Backend,
) -> Result<Tensor> {
    let weight = weight.tensor(params)?;
    if !plus_one {
        return Ok(weight);
    }
    let mut factors = backend.empty(weight.shape(), DType::F32)?;
    backend.fill(&mut factors, 1.0)?;
    backend.add_assign(&mut factors, &backend.to_dtype(&weight, DType::F32)?)?;
    Ok(factors)
}

/// A table of row vectors.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// Module path.
    pub path: String,
    /// `[entries, hidden_size]`.
    pub weight: Parameter,
    /// The entry that has no gradient (`torch.nn.Embedding`'s `padding_idx`).
    pub padding_idx: Option<usize>,
    /// The adapter on it.
    pub adapter: Option<EmbeddingAdapter>,
}

impl Embedding {
    /// Whether rows of different slots have different ones.
    pub(crate) fn is_apart(&self) -> bool {
        self.weight.is_apart() || matches!(self.adapter, Some(EmbeddingAdapter::SideBySide(_)))
    }

    /// What the table is to the rows of a slot; `None`: to rows without one.
    pub(crate) fn of_slot(&self, slot: Option<usize>) -> Embedding {
        let adapter = match (&self.adapter, slot) {
            (Some(EmbeddingAdapter::SideBySide(all)), Some(slot)) => all[slot].clone(),
            (Some(EmbeddingAdapter::SideBySide(_)), None) => None,
            (same, _) => same.clone(),
        };
        Embedding { path: self.path.clone(), weight: self.weight.of_slot(slot), adapter, ..*self }
    }
}

/// What a method puts on a table of row vectors.
#[derive(Clone, Debug)]
pub enum EmbeddingAdapter {
    /// A low-rank part.
    Lora(EmbeddingLora),
    /// What several adapters have here, by [slot](crate::autograd::Slot). Rows without a slot have none.
    SideBySide(Vec<Option<EmbeddingAdapter>>),
}

/// The low-rank part of an embedding: `y += scale * B A[id]`.
#[derive(Clone, Debug)]
pub struct EmbeddingLora {
    /// `[entries, r]`: a token is a row, so that a batch touches the rows of its tokens alone. Files hold the transpose.
    pub a: ParamId,
    /// `[hidden_size, r]`.
    pub b: ParamId,
    /// `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rank-stabilized LoRA.
    pub scale: f32,
    /// The trained magnitude of DoRA, of each column.
    pub dora: Option<Box<Dora>>,
}

/// What a module is, for choosing the targets of an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleKind {
    /// `torch.nn.Linear`.
    Linear,
    /// transformers' `Conv1D`: a linear layer stored `[in, out]`.
    Conv1d,
    /// `torch.nn.Embedding`.
    Embedding,
    /// LayerNorm or RMSNorm.
    Norm,
}

/// A module as a user of PEFT sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleInfo {
    /// Path within the causal language model, as Hugging Face names it.
    pub path: String,
    /// What it is.
    pub kind: ModuleKind,
    /// Input columns (entries of an embedding, columns of a norm).
    pub in_features: usize,
    /// Output columns.
    pub out_features: usize,
    /// Whether it has a bias.
    pub bias: bool,
    /// Whether it is the output head, which `all-linear` leaves out.
    pub is_head: bool,
}
