//! Trained virtual tokens: keys and values before every layer's own (prefix tuning), or embeddings before the
//! sequence's (prompt tuning, P-tuning), and the encoders that make them while training.

use super::module::{Linear, Parameter};
use crate::autograd::{Tape, Var};
use crate::backend::Activation;
use crate::error::Result;
use crate::ops::embedding::Entries;
use crate::param::ParamId;
use crate::tensor::Tensor;

/// The encoder's dropout streams lie behind those of adapted modules.
const DROPOUT_STREAM: u64 = 1 << 20;

/// Where virtual tokens come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptPlace {
    /// Columns `[K_0, V_0, K_1, V_1, ...]`, each `num_key_value_heads * head_dim`: keys as they are, not rotated.
    KeysValues,
    /// Rows of `hidden_size` before the tokens' embeddings.
    Embeddings,
}

/// What makes the virtual tokens.
#[derive(Clone, Debug)]
pub struct PromptEncoder {
    /// `[num_virtual_tokens, cols]`.
    pub table: ParamId,
    /// A bidirectional LSTM, layer by layer, on the table's rows.
    pub lstm: Vec<[LstmDirection; 2]>,
    /// Probability of dropping an element between the LSTM's layers, in training only.
    pub dropout: f32,
    /// Layers after it, with this activation between them; none: the table itself.
    pub layers: Vec<Linear>,
    /// Between the layers.
    pub activation: Activation,
}

/// One direction of an LSTM layer, with PyTorch's gates: input, forget, cell, output.
#[derive(Clone, Debug)]
pub struct LstmDirection {
    /// `[4 hidden, inputs]`, with `bias_ih`.
    pub input: Linear,
    /// `[4 hidden, hidden]`, with `bias_hh`.
    pub recurrent: Linear,
}

/// Virtual tokens on a model.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// Where they come in.
    pub place: PromptPlace,
    /// How many.
    pub num_virtual_tokens: usize,
    /// What makes them.
    pub encoder: PromptEncoder,
}

/// The virtual tokens of one pass.
#[derive(Debug)]
pub(crate) struct Encoded<'m> {
    /// `[num_virtual_tokens, cols]`, in the activations' type.
    pub values: Tensor,
    /// Their gradient, f32, to be added to; only in training.
    pub grads: Option<Tensor>,
    /// What made them, if it is more than a table.
    tape: Option<(Tape<'m>, Var)>,
}

impl Prompt {
    /// The virtual tokens, by a tape of their own that is like `tape`.
    pub(crate) fn encode<'m>(&self, tape: &Tape<'m>) -> Result<Encoded<'m>> {
        let PromptEncoder { table, lstm, dropout, layers, activation } = &self.encoder;
        let training = tape.is_recording();
        if layers.is_empty() {
            let grads = training.then(|| tape.params.grad(*table)).transpose()?;
            return Ok(Encoded { values: tape.params.value(*table)?, grads, tape: None });
        }
        let mut inner = tape.inner(training);
        let ids: Vec<i32> = (0..self.num_virtual_tokens as i32).collect();
        let entries = Entries::new(&inner.backend, &ids, None)?;
        let mut x = inner.lookup(&Parameter::Trainable(*table), &entries)?;
        for (i, directions) in lstm.iter().enumerate() {
            if i > 0 {
                x = inner.dropout(&x, *dropout, DROPOUT_STREAM + i as u64)?;
            }
            x = inner.lstm(&x, directions)?;
        }
        for (i, layer) in layers.iter().enumerate() {
            if i > 0 {
                x = inner.activation(&x, *activation)?;
            }
            x = inner.linear(&x, layer)?;
        }
        let grads = training.then(|| inner.backend.zeros(x.tensor.shape(), crate::DType::F32)).transpose()?;
        Ok(Encoded { values: x.tensor.clone(), grads, tape: Some((inner, x)) })
    }
}

impl Encoded<'_> {
    /// The encoder's backward, once the gradient of the virtual tokens is complete.
    pub fn backward(self, replay: &dyn crate::autograd::Replay) -> Result<()> {
        let (Some((tape, output)), Some(grads)) = (self.tape, self.grads) else { return Ok(()) };
        let Some(from) = output.id else { return Ok(()) };
        let seed = tape.backend.to_dtype(&grads, tape.dtype)?;
        tape.backward(from, Some(seed), None, replay)?;
        Ok(())
    }
}
