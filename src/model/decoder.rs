//! The one decoder: embedding, layers of attention and MLP with residuals, final norm, head.

use super::batch::{Batch, DeviceBatch};
use super::config::ModelConfig;
use super::module::{Embedding, Linear, ModuleInfo, ModuleKind, Norm, Parameter};
use crate::autograd::tape::AttentionHeads;
use crate::autograd::{Dropout, Replay, Tape, Var};
use crate::backend::{Backend, Gemm, GemmTerm, Matrix, RopeShape};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::param::ParamStore;
use crate::tensor::Tensor;
use std::ops::Range;
use std::sync::Mutex;

/// Query, key and value projections.
#[derive(Clone, Debug)]
pub enum Qkv {
    /// Three layers.
    Separate(Box<[Linear; 3]>),
    /// One layer: queries, keys, values side by side.
    Fused(Box<Linear>),
}

/// The MLP.
#[derive(Clone, Debug)]
pub enum Mlp {
    /// Gate, up, down.
    Gated(Box<[Linear; 3]>),
    /// First and second layer.
    Plain(Box<[Linear; 2]>),
}

/// One decoder layer.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Layer {
    pub input_norm: Norm,
    pub qkv: Qkv,
    pub qk_norm: Option<[Norm; 2]>,
    pub o: Linear,
    pub post_norm: Norm,
    pub mlp: Mlp,
}

/// Keys and values of the tokens so far, for generation: per layer `[capacity, kv_heads * head_dim]`.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<[Tensor; 2]>,
    len: usize,
    capacity: usize,
}

impl KvCache {
    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets the tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

/// A decoder-only transformer with its trainable parameters.
#[derive(Debug)]
pub struct Model {
    /// What it is made of.
    pub config: ModelConfig,
    /// What computes.
    pub backend: Backend,
    /// Type of activations: f32 or bf16.
    pub dtype: DType,
    /// The trainable parameters; empty for a base model.
    pub params: ParamStore,
    /// Token embedding.
    pub embed: Embedding,
    /// Learned positions.
    pub positions: Option<Embedding>,
    /// The layers.
    pub layers: Vec<Layer>,
    /// Final norm.
    pub norm: Norm,
    /// Output head; shares the embedding's parameter where `tie_word_embeddings`.
    pub head: Linear,
    /// Keep only the input of each so many layers in training, computing them again in the backward pass; 0: keep
    /// everything.
    pub gradient_checkpointing: usize,
    pub(super) rope_table: Mutex<Option<Tensor>>, // f32 [positions, rotary_dim]
}

/// One forward pass: the model with what it sees.
struct Pass<'a> {
    model: &'a Model,
    input: DeviceBatch,
    rope: Option<Tensor>,
}

impl Model {
    /// Forward and backward of one micro-batch: cross-entropies of the counted tokens (f32 `[counted]`);
    /// gradients of `grad_scale` times their sum are added to the parameters'.
    ///
    /// # Errors
    /// When a token is outside the vocabulary, a sequence too long, or memory can't be had.
    pub fn train_step(&self, batch: &Batch, grad_scale: f32, dropout: Option<Dropout>) -> Result<Tensor> {
        let mut tape = Tape::training(&self.backend, &self.params, self.dtype, dropout);
        let pass = self.pass(batch, 0)?;
        let hidden = pass.hidden(&mut tape, None)?;
        let loss = tape.linear_cross_entropy(&hidden, &self.head, &batch.targets, grad_scale)?;
        drop(hidden);
        if let Some(from) = loss.id {
            tape.backward(from, None, None, &pass)?;
        }
        Ok(loss.losses)
    }

    /// Cross-entropies of the counted tokens, in order: f32 `[counted]`.
    ///
    /// # Errors
    /// As [`Model::train_step`].
    pub fn evaluate(&self, batch: &Batch) -> Result<Tensor> {
        let mut tape = Tape::inference(&self.backend, &self.params, self.dtype);
        let hidden = self.pass(batch, 0)?.hidden(&mut tape, None)?;
        Ok(tape.linear_cross_entropy(&hidden, &self.head, &batch.targets, 1.0)?.losses)
    }

    /// Logits of every token: f32 `[tokens, vocab_size]`.
    ///
    /// # Errors
    /// As [`Model::train_step`].
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let mut tape = Tape::inference(&self.backend, &self.params, self.dtype);
        let hidden = self.pass(batch, 0)?.hidden(&mut tape, None)?;
        self.head_logits(&hidden.tensor)
    }

    /// Feeds tokens after those in `cache` and gives the logits of the last one: f32 `[1, vocab_size]`.
    ///
    /// # Errors
    /// When the cache is full or as [`Model::train_step`].
    pub fn extend(&self, input_ids: &[u32], cache: &mut KvCache) -> Result<Tensor> {
        if input_ids.is_empty() || cache.len + input_ids.len() > cache.capacity {
            return Err(Error::shape(
                "generate",
                format!(
                    "{} tokens after {} do not fit a cache of {}",
                    input_ids.len(),
                    cache.len,
                    cache.capacity
                ),
            ));
        }
        let batch = Batch {
            input_ids: input_ids.iter().map(|id| *id as i32).collect(),
            positions: (cache.len..cache.len + input_ids.len()).map(|p| p as i32).collect(),
            targets: vec![crate::backend::IGNORE_INDEX; input_ids.len()],
            lengths: vec![input_ids.len()],
        };
        let mut tape = Tape::inference(&self.backend, &self.params, self.dtype);
        let hidden = self.pass(&batch, cache.len)?.hidden(&mut tape, Some(cache))?;
        cache.len += input_ids.len();
        self.head_logits(&hidden.tensor.slice(input_ids.len() - 1..input_ids.len())?)
    }

    /// An empty cache for up to `capacity` tokens of one sequence.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn kv_cache(&self, capacity: usize) -> Result<KvCache> {
        let cols = self.config.num_key_value_heads * self.config.head_dim;
        let empty = || self.backend.empty(&[capacity, cols], self.dtype);
        let layers = self.layers.iter().map(|_| Ok([empty()?, empty()?])).collect::<Result<_>>()?;
        Ok(KvCache { layers, len: 0, capacity })
    }

    fn head_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let weight = self.head.weight.weight(&self.params)?;
        let mut logits = self.backend.empty(&[hidden.rows(), self.config.vocab_size], DType::F32)?;
        let terms = [GemmTerm { a: Matrix::plain(hidden), b: weight.forward(false) }];
        self.backend.gemm(&mut logits, &Gemm::new(&terms))?;
        Ok(logits)
    }

    fn pass(&self, batch: &Batch, cached: usize) -> Result<Pass<'_>> {
        if let Some(longest) = batch.lengths.iter().max() {
            let limit = self.config.max_sequence();
            if longest + cached > limit {
                return Err(Error::shape(
                    "model",
                    format!(
                        "a sequence of {} tokens is longer than the model's {limit}; use --max-length {limit}",
                        longest + cached
                    ),
                ));
            }
        }
        let input = DeviceBatch::new(&self.backend, batch, self.config.vocab_size, cached)?;
        let rope = self.rope_table(input.max_position + 1)?;
        Ok(Pass { model: self, input, rope })
    }

    /// The rotary table for at least `positions` positions, kept for the next pass.
    fn rope_table(&self, positions: usize) -> Result<Option<Tensor>> {
        let Some(rope) = &self.config.rope else { return Ok(None) };
        let mut kept = self.rope_table.lock().expect("the table's lock is never held across a panic");
        if kept.as_ref().is_none_or(|t| t.rows() < positions) {
            let rows = positions.next_power_of_two().max(256);
            *kept = Some(self.backend.from_slice(&rope.table(rows), &[rows, rope.rotary_dim])?);
        }
        Ok(kept.clone())
    }

    /// The modules as a user of PEFT sees them, in order.
    pub fn modules(&self) -> Vec<ModuleInfo> {
        let mut all = Vec::new();
        let linear = |l: &Linear, is_head: bool| ModuleInfo {
            path: l.path.clone(),
            kind: if l.conv1d { ModuleKind::Conv1d } else { ModuleKind::Linear },
            in_features: l.in_features,
            out_features: l.out_features,
            bias: l.bias.is_some(),
            is_head,
        };
        let norm = |n: &Norm| {
            let cols = n.weight.shape(&self.params)[0];
            ModuleInfo {
                path: n.path.clone(),
                kind: ModuleKind::Norm,
                in_features: cols,
                out_features: cols,
                bias: n.bias.is_some(),
                is_head: false,
            }
        };
        for e in std::iter::once(&self.embed).chain(&self.positions) {
            let shape = e.weight.shape(&self.params);
            all.push(ModuleInfo {
                path: e.path.clone(),
                kind: ModuleKind::Embedding,
                in_features: shape[0],
                out_features: shape[1],
                bias: false,
                is_head: false,
            });
        }
        for layer in &self.layers {
            all.push(norm(&layer.input_norm));
            match &layer.qkv {
                Qkv::Separate(l) => all.extend(l.iter().map(|l| linear(l, false))),
                Qkv::Fused(l) => all.push(linear(l, false)),
            }
            all.extend(layer.qk_norm.iter().flatten().map(norm));
            all.push(linear(&layer.o, false));
            all.push(norm(&layer.post_norm));
            match &layer.mlp {
                Mlp::Gated(l) => all.extend(l.iter().map(|l| linear(l, false))),
                Mlp::Plain(l) => all.extend(l.iter().map(|l| linear(l, false))),
            }
        }
        all.push(norm(&self.norm));
        all.push(linear(&self.head, true));
        all
    }

    /// Number of the base's parameters; a tied head counts once.
    pub fn base_elements(&self) -> usize {
        let tied = self.config.tie_word_embeddings;
        let elements = |m: &ModuleInfo| {
            let bias = if m.bias { m.out_features } else { 0 };
            let weight =
                if m.kind == ModuleKind::Norm { m.out_features } else { m.in_features * m.out_features };
            weight + bias
        };
        self.modules().iter().filter(|m| !(m.is_head && tied)).map(elements).sum()
    }

    /// All linear layers, in the order of [`Model::modules`], the head last.
    pub fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = Vec::new();
        for layer in &mut self.layers {
            match &mut layer.qkv {
                Qkv::Separate(l) => all.extend(l.iter_mut()),
                Qkv::Fused(l) => all.push(l),
            }
            all.push(&mut layer.o);
            match &mut layer.mlp {
                Mlp::Gated(l) => all.extend(l.iter_mut()),
                Mlp::Plain(l) => all.extend(l.iter_mut()),
            }
        }
        all.push(&mut self.head);
        all
    }

    /// All base parameters by their Hugging Face names, in the order of [`Model::modules`]. A tied head is
    /// not listed.
    pub fn parameters_mut(&mut self) -> Vec<(String, &mut Parameter)> {
        fn linear<'a>(all: &mut Vec<(String, &'a mut Parameter)>, l: &'a mut Linear) {
            all.push((format!("{}.weight", l.path), &mut l.weight));
            all.extend(l.bias.as_mut().map(|b| (format!("{}.bias", l.path), b)));
        }
        fn norm<'a>(all: &mut Vec<(String, &'a mut Parameter)>, n: &'a mut Norm) {
            all.push((format!("{}.weight", n.path), &mut n.weight));
            all.extend(n.bias.as_mut().map(|b| (format!("{}.bias", n.path), b)));
        }
        let mut all = Vec::new();
        for e in std::iter::once(&mut self.embed).chain(&mut self.positions) {
            all.push((format!("{}.weight", e.path), &mut e.weight));
        }
        for layer in &mut self.layers {
            norm(&mut all, &mut layer.input_norm);
            match &mut layer.qkv {
                Qkv::Separate(l) => l.iter_mut().for_each(|l| linear(&mut all, l)),
                Qkv::Fused(l) => linear(&mut all, l),
            }
            layer.qk_norm.iter_mut().flatten().for_each(|n| norm(&mut all, n));
            linear(&mut all, &mut layer.o);
            norm(&mut all, &mut layer.post_norm);
            match &mut layer.mlp {
                Mlp::Gated(l) => l.iter_mut().for_each(|l| linear(&mut all, l)),
                Mlp::Plain(l) => l.iter_mut().for_each(|l| linear(&mut all, l)),
            }
        }
        norm(&mut all, &mut self.norm);
        if !self.config.tie_word_embeddings {
            linear(&mut all, &mut self.head);
        }
        all
    }

    /// Makes a tied head share the embedding's parameter again, after the embedding's was replaced.
    pub fn retie(&mut self) {
        if self.config.tie_word_embeddings {
            self.head.weight = self.embed.weight.clone();
        }
    }
}

impl Pass<'_> {
    /// The final norm's output, `[tokens, hidden_size]`.
    fn hidden(&self, tape: &mut Tape<'_>, mut cache: Option<&mut KvCache>) -> Result<Var> {
        let model = self.model;
        let mut x = tape.embedding(&model.embed.weight, &self.input.ids)?;
        if let Some(positions) = &model.positions {
            let p = tape.embedding(&positions.weight, &self.input.positions)?;
            x = tape.add(&x, &p)?;
        }
        let all = 0..model.layers.len();
        if let Some(cache) = &mut cache {
            for (layer, kept) in model.layers.iter().zip(&mut cache.layers) {
                x = self.layer(tape, layer, x, Some((kept, cache.len)))?;
            }
        } else if model.gradient_checkpointing > 0 && tape.is_recording() {
            for start in all.clone().step_by(model.gradient_checkpointing) {
                let layers = start..all.end.min(start + model.gradient_checkpointing);
                let trainable = model.layers[layers.clone()].iter().any(Layer::is_trainable);
                let run = |inner: &mut Tape<'_>, x| self.layers(inner, layers.clone(), x);
                x = tape.segment(layers.clone(), x, trainable, run)?;
            }
        } else {
            x = self.layers(tape, all, x)?;
        }
        tape.norm(&x, &model.norm)
    }

    fn layer(
        &self,
        tape: &mut Tape<'_>,
        layer: &Layer,
        x: Var,
        cache: Option<(&mut [Tensor; 2], usize)>,
    ) -> Result<Var> {
        let h = tape.norm(&x, &layer.input_norm)?;
        let h = self.attention(tape, layer, h, cache)?;
        let h = tape.linear(&h, &layer.o)?;
        let x = tape.add(&x, &h)?;
        let h = tape.norm(&x, &layer.post_norm)?;
        let h = match &layer.mlp {
            Mlp::Gated(l) => {
                let [gate, up] = tape.linears(&h, [&l[0], &l[1]])?;
                drop(h);
                let product = tape.gated(&gate, &up, self.model.config.hidden_act)?;
                tape.linear(&product, &l[2])?
            }
            Mlp::Plain(l) => {
                let inner = tape.linear(&h, &l[0])?;
                let inner = tape.activation(&inner, self.model.config.hidden_act)?;
                tape.linear(&inner, &l[1])?
            }
        };
        tape.add(&x, &h)
    }

    fn attention(
        &self,
        tape: &mut Tape<'_>,
        layer: &Layer,
        x: Var,
        cache: Option<(&mut [Tensor; 2], usize)>,
    ) -> Result<Var> {
        let config = &self.model.config;
        let (n_heads, n_kv_heads, head_dim) =
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let (mut q, mut k, mut v) = match &layer.qkv {
            Qkv::Separate(l) => tape.linears(&x, [&l[0], &l[1], &l[2]])?.into(),
            Qkv::Fused(l) => {
                let all = tape.linear(&x, l)?;
                let (dq, dk) = (n_heads * head_dim, n_kv_heads * head_dim);
                (tape.columns(&all, 0, dq)?, tape.columns(&all, dq, dk)?, tape.columns(&all, dq + dk, dk)?)
            }
        };
        drop(x);
        if let Some([q_norm, k_norm]) = &layer.qk_norm {
            q = tape.norm(&q, q_norm)?;
            k = tape.norm(&k, k_norm)?;
        }
        if let (Some(rope), Some(table)) = (&config.rope, &self.rope) {
            let shape = |n_heads| RopeShape {
                n_heads,
                head_dim,
                rotary_dim: rope.rotary_dim,
                interleaved: rope.interleaved,
                inverse: false,
            };
            q = tape.rope(q, table, &self.input.positions, shape(n_heads))?;
            k = tape.rope(k, table, &self.input.positions, shape(n_kv_heads))?;
        }
        if let Some(([keys, values], len)) = cache {
            let end = len + k.tensor.rows();
            self.model.backend.cast(&mut keys.slice(len..end)?, &k.tensor)?;
            self.model.backend.cast(&mut values.slice(len..end)?, &v.tensor)?;
            k = Var::constant(keys.slice(0..end)?);
            v = Var::constant(values.slice(0..end)?);
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        let heads = AttentionHeads { n_heads, n_kv_heads, head_dim, scale };
        tape.attention(&q, &k, &v, heads, &self.input.sequences)
    }
}

impl Replay for Pass<'_> {
    fn layers(&self, tape: &mut Tape<'_>, layers: Range<usize>, mut x: Var) -> Result<Var> {
        for layer in &self.model.layers[layers] {
            x = self.layer(tape, layer, x, None)?;
        }
        Ok(x)
    }
}

impl Layer {
    /// Whether any parameter of the layer is trained.
    fn is_trainable(&self) -> bool {
        let linear = |l: &Linear| {
            l.adapter.is_some()
                || l.weight.id().is_some()
                || l.bias.as_ref().is_some_and(|b| b.id().is_some())
        };
        let norm = |n: &Norm| n.weight.id().is_some() || n.bias.as_ref().is_some_and(|b| b.id().is_some());
        let qkv = match &self.qkv {
            Qkv::Separate(l) => l.iter().any(linear),
            Qkv::Fused(l) => linear(l),
        };
        let mlp = match &self.mlp {
            Mlp::Gated(l) => l.iter().any(linear),
            Mlp::Plain(l) => l.iter().any(linear),
        };
        let norms = norm(&self.input_norm) || norm(&self.post_norm);
        qkv || mlp || norms || linear(&self.o) || self.qk_norm.iter().flatten().any(norm)
    }
}
