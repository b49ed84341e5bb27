//! The tape: what was computed, as data.

use crate::backend::{Activation, Backend, RopeShape, Sequence};
use crate::dtype::DType;
use crate::error::Result;
use crate::model::{Parameter, Rotation};
use crate::ops::dora::DoraSaved;
use crate::ops::embedding::{Entries, LowRankEntries};
use crate::ops::linear::LowRank;
use crate::param::{ParamId, ParamStore};
use crate::rng::{PhiloxKey, Stream};
use crate::tensor::Tensor;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// Number of a differentiable value on its tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ValueId(pub(crate) usize);

/// A value of the forward pass; it has an id iff its gradient is needed.
#[derive(Clone, Debug)]
pub struct Var {
    /// The activations, `[tokens, cols]`.
    pub tensor: Tensor,
    pub(crate) id: Option<ValueId>,
}

impl Var {
    /// A value that needs no gradient.
    pub fn constant(tensor: Tensor) -> Self {
        Var { tensor, id: None }
    }

    /// Whether a gradient will be computed for it.
    pub fn needs_grad(&self) -> bool {
        self.id.is_some()
    }
}

/// Where dropout masks come from: they depend on the run's seed, the optimizer step and the token's number
/// within the step, not on how the step is cut into micro-batches.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// Seed of the run.
    pub seed: u64,
    /// Optimizer step.
    pub step: u64,
    /// Tokens of the step before this micro-batch.
    pub first_row: usize,
}

impl Dropout {
    /// The key of the module numbered `stream`.
    pub fn key(&self, stream: u64) -> PhiloxKey {
        PhiloxKey::new(self.seed, Stream::Dropout, self.step << 24 | stream)
    }
}

/// Rows of a batch that have an adapter of their own, in a pass whose rows have different ones. Each slot has the bits
/// that its rows have in a pass alone.
#[derive(Clone, Debug)]
pub struct Slot<'m> {
    /// The rows, which no other slot has; perhaps none.
    pub rows: Range<usize>,
    /// The adapter's parameters.
    pub params: &'m ParamStore,
    /// Where the adapter's masks come from in training; `first_row` counts the adapter's own tokens.
    pub dropout: Option<Dropout>,
    /// The rows' gradients are those of this times the sum of their losses.
    pub grad_scale: f32,
}

/// An operation with what its backward needs. Tensors are saved by handle; the names are those of the forward.
#[allow(missing_docs)]
#[derive(Debug)]
pub enum Op {
    /// Entries of a table, trainable or with a low-rank part.
    Embedding { table: Option<ParamId>, entries: Entries, low_rank: Option<Box<LowRankEntries>> },
    /// `x W^T + bias`, with or without low-rank parts.
    Linear {
        x: Input, // [n, in]
        weight: Parameter,
        conv1d: bool,
        bias: Option<ParamId>,
        low_rank: Vec<LowRank>,
        dora: Option<Box<DoraSaved>>,
    },
    /// Columns times trained factors.
    ScaleColumns { x: Tensor, factors: ParamId },
    /// Columns rotated by blocks.
    Rotate { x: Tensor, rotation: Box<Rotation> },
    /// Rows of a prefix before each sequence's keys or values; `grads` is the whole prefix's gradient.
    Prefix { grads: Tensor, start: usize, sequences: Arc<[Sequence]> },
    /// Virtual tokens as the first rows of each sequence; `grads` is their gradient.
    Prompt { grads: Tensor, sequences: Arc<[Sequence]> },
    /// One row of the input.
    Row { row: usize, input_rows: usize },
    /// The input, one row, put into zeros.
    Place { at: [usize; 2], cols: usize },
    /// A value times a number.
    Scale { factor: f32 },
    /// A value under a mask.
    Dropout { p: f32, key: PhiloxKey, first_row: usize },
    /// RMSNorm or LayerNorm over groups of the weight's length.
    Norm {
        x: Tensor,
        stats: Tensor,
        weight: Parameter,
        bias: Option<ParamId>,
        layer_norm: bool,
        plus_one: bool,
    },
    /// Rotary embedding, in place.
    Rope { table: Tensor, positions: Tensor, shape: RopeShape },
    /// Causal attention; inputs are queries, keys, values.
    Attention(Box<AttentionSaved>),
    /// A column range of the input.
    Columns { start: usize, cols: usize, input_cols: usize },
    /// An activation function.
    Activation { x: Tensor, activation: Activation },
    /// `activation(gate) * up`; inputs are gate, up.
    Gated { gate: Tensor, up: Tensor, activation: Activation },
    /// Sum of two values.
    Add,
    /// Some rows of the input.
    Part { rows: Range<usize>, input_rows: usize },
    /// Values made from parts of the input's rows, one after the other.
    Joined { parts: Vec<Joined> },
    /// The head and the loss: the input's gradient is known already.
    LinearCrossEntropy { dx: Tensor, rows: Option<Tensor>, input_rows: usize },
    /// Decoder layers to be computed again, but for the low-rank parts' `hidden` values.
    Segment { layers: Range<usize>, input: Tensor, hidden: Hidden },
}

/// The low-rank parts' hidden values (`[rows, r]`) of a segment in the order in which its layers come to them: too small not to
/// be kept, but each group of them is a product over whole rows.
#[derive(Clone, Debug, Default)]
pub struct Hidden(Arc<Mutex<VecDeque<Tensor>>>);

impl Hidden {
    fn values(&self) -> MutexGuard<'_, VecDeque<Tensor>> {
        self.0.lock().expect("the lock is never held across a panic")
    }
}

/// Rows of a value that was made part by part.
#[derive(Clone, Debug)]
pub struct Joined {
    /// The part's rows.
    pub(crate) rows: Range<usize>,
    /// The part's rows of the input.
    pub(crate) input: Option<ValueId>,
    /// What was made of them.
    pub(crate) output: Option<ValueId>,
}

/// A linear layer's input, if a parameter's gradient needs it.
#[derive(Clone, Debug)]
pub enum Input {
    /// Not needed.
    Unused,
    /// Kept.
    Kept(Tensor),
    /// Made by the operation recorded just before, an activation, which is computed again: that is cheaper
    /// than the memory.
    FromPrevious,
}

/// What attention's backward needs.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct AttentionSaved {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub out: Tensor,
    pub lse: Tensor,
    pub heads: AttentionHeads,
    pub sequences: Arc<[Sequence]>,
}

/// Geometry of the heads.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct AttentionHeads {
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub window: Option<usize>,
    pub softcap: Option<f32>,
}

/// One recorded operation.
#[derive(Debug)]
pub struct Node {
    /// What was done.
    pub op: Op,
    /// The inputs that need gradients (`None`: this one does not), in the operation's order.
    pub inputs: [Option<ValueId>; 3],
    /// The value it made, whose gradient is the backward's input.
    pub output: ValueId,
    /// Whose parameters the operation's are; `None`: the model's own.
    pub(crate) slot: Option<usize>,
}

impl Node {
    /// Whether both are linear layers of one input, or rotations of different values at the same positions, so that neither's
    /// backward needs the other's.
    pub(crate) fn is_beside(&self, later: &Node) -> bool {
        let alike = match (&self.op, &later.op) {
            (Op::Linear { .. }, Op::Linear { .. }) => self.inputs[0] == later.inputs[0],
            (Op::Rope { table, positions, .. }, Op::Rope { table: t, positions: p, .. }) => {
                table.is_same(t) && positions.is_same(p) && later.inputs[0] != Some(self.output)
            }
            _ => false,
        };
        alike && self.slot == later.slot
    }
}

/// A forward pass in the making.
#[derive(Debug)]
pub struct Tape<'m> {
    /// What computes.
    pub backend: Backend,
    /// The trainable parameters.
    pub params: &'m ParamStore,
    /// The type of activations.
    pub dtype: DType,
    /// Set while training, where dropout applies.
    pub dropout: Option<Dropout>,
    /// Rows with adapters of their own, in the order in which those were put
    /// [side by side](crate::model::Model::side_by_side).
    pub slots: &'m [Slot<'m>],
    slot: Option<usize>,            // whose rows alone this tape sees
    hidden: Option<(Hidden, bool)>, // of the segment, and whether it is computed again
    keeps_activations: bool,        // and computes none again
    pub(crate) nodes: Vec<Node>,
    pub(crate) values: usize,
    recording: bool,
}

impl<'m> Tape<'m> {
    /// A tape that records for a backward pass.
    pub fn training(
        backend: &Backend,
        params: &'m ParamStore,
        dtype: DType,
        dropout: Option<Dropout>,
    ) -> Self {
        Tape {
            backend: backend.clone(),
            params,
            dtype,
            dropout,
            slots: &[],
            slot: None,
            hidden: None,
            keeps_activations: false,
            nodes: Vec::new(),
            values: 0,
            recording: true,
        }
    }

    /// A tape that records nothing: evaluation and generation.
    pub fn inference(backend: &Backend, params: &'m ParamStore, dtype: DType) -> Self {
        Tape {
            backend: backend.clone(),
            params,
            dtype,
            dropout: None,
            slots: &[],
            slot: None,
            hidden: None,
            keeps_activations: false,
            nodes: Vec::new(),
            values: 0,
            recording: false,
        }
    }

    /// Whether operations leave nodes.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// The recorded operations, in order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A tape for one segment of this one: same parameters and dropout, nothing recorded yet.
    pub(crate) fn inner(&self, recording: bool) -> Tape<'m> {
        let (backend, hidden) = (self.backend.clone(), self.hidden.clone());
        Tape { backend, hidden, nodes: Vec::new(), values: 0, recording, ..*self }
    }

    /// A tape for the first time through a segment, which records nothing but its hidden values.
    pub(crate) fn first_time(&self, hidden: &Hidden) -> Tape<'m> {
        Tape { hidden: Some((hidden.clone(), false)), ..self.inner(false) }
    }

    /// A tape for the second time. Activations of one layer are kept until its backward, which follows at once.
    pub(crate) fn second_time(&self, hidden: Hidden, layers: usize) -> Tape<'m> {
        Tape { hidden: Some((hidden, true)), keeps_activations: layers == 1, ..self.inner(true) }
    }

    /// The next hidden values where they were kept.
    pub(crate) fn kept_hidden(&self) -> Option<Tensor> {
        let (hidden, _) = self.hidden.as_ref().filter(|(_, again)| *again)?;
        hidden.values().pop_front()
    }

    /// Keeps hidden values for the second time through a segment.
    pub(crate) fn keep_hidden(&self, values: &Tensor) {
        if let Some((hidden, false)) = &self.hidden {
            hidden.values().push_back(values.clone());
        }
    }

    /// A tape for what a slot's rows see: its parameters and masks, and no slots; nothing recorded yet.
    pub(crate) fn of_slot(&self, slot: Option<usize>) -> Tape<'m> {
        let (params, dropout) = self.adapter(slot);
        Tape { params, dropout, slots: &[], slot, ..self.inner(self.recording) }
    }

    /// The parameters of a slot's adapter and where its masks come from; without a slot the model's own.
    pub(crate) fn adapter(&self, slot: Option<usize>) -> (&'m ParamStore, Option<Dropout>) {
        match slot {
            Some(slot) => (self.slots[slot].params, self.slots[slot].dropout),
            None => (self.params, self.dropout),
        }
    }

    /// A tensor for activations.
    pub(crate) fn empty(&self, rows: usize, cols: usize) -> Result<Tensor> {
        self.backend.empty(&[rows, cols], self.dtype)
    }

    /// A new id for a value whose gradient is needed.
    pub(crate) fn new_id(&mut self) -> ValueId {
        self.values += 1;
        ValueId(self.values - 1)
    }

    /// How a linear layer's backward gets its input `x`.
    pub(crate) fn input(&self, x: &Var) -> Input {
        match self.nodes.last() {
            Some(Node { op: Op::Gated { .. } | Op::Activation { .. }, output, .. })
                if x.id == Some(*output) && !self.keeps_activations =>
            {
                Input::FromPrevious
            }
            _ => Input::Kept(x.tensor.clone()),
        }
    }

    /// Wraps an operation's result; records the node if any input, or a parameter of it, needs a gradient.
    pub(crate) fn record<const N: usize>(
        &mut self,
        output: Tensor,
        inputs: [&Var; N],
        trainable: bool,
        op: impl FnOnce() -> Op,
    ) -> Var {
        let needed = self.recording && (trainable || inputs.iter().any(|v| v.needs_grad()));
        if !needed {
            return Var::constant(output);
        }
        let mut ids = [None; 3];
        for (slot, input) in ids.iter_mut().zip(inputs) {
            *slot = input.id;
        }
        let id = self.new_id();
        self.nodes.push(Node { op: op(), inputs: ids, output: id, slot: self.slot });
        Var { tensor: output, id: Some(id) }
    }
}
