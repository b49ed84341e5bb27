//! Forward passes over the decoder: training, evaluation, and generation with a cache.

use super::batch::{Batch, DeviceBatch, KeptRows};
use super::decoder::{Layer, Mlp, Model, Qkv};
use super::prompt::{Encoded, PromptPlace};
use super::rope::RopeConfig;
use crate::autograd::tape::AttentionHeads;
use crate::autograd::{Dropout, Replay, Slot, Tape, Var};
use crate::backend::{IGNORE_INDEX, RopeShape};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::by_slot::rows_by_slot;
use crate::ops::head::Head;
use crate::param::ParamStore;
use crate::tensor::Tensor;
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Mutex;

/// Keys and values of the tokens so far, for generation: per layer `[sequences * capacity, kv_heads * head_dim]`.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<[Tensor; 2]>,
    lens: Vec<usize>, // by sequence
    capacity: usize,
}

impl KvCache {
    /// Tokens held of the first sequence.
    pub fn len(&self) -> usize {
        self.lens[0]
    }

    /// Whether no token is held of the first sequence.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets the tokens of the first sequence from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.lens[0] = self.lens[0].min(len);
    }
}

/// The rows of a generated batch that have one adapter, and its parameters.
#[derive(Clone, Debug)]
pub struct RowSlot<'m> {
    /// A range of the batch's sequences.
    pub rows: Range<usize>,
    /// The adapter's parameters.
    pub params: &'m ParamStore,
}

/// One forward pass: the model with what it sees.
struct Pass<'a> {
    model: &'a Model,
    input: DeviceBatch,
    kept: Vec<KeptRows>, // by sequence, with a cache
    targets: Vec<i32>,
    rope: Option<Tensor>,
    local_rope: Option<Tensor>,
    prompt: Option<PassPrompt>,
}

/// The virtual tokens of a pass.
struct PassPrompt {
    place: PromptPlace,
    values: Tensor,        // [num_virtual_tokens, cols]
    grads: Option<Tensor>, // f32, the same shape
}

impl Model {
    /// Forward and backward of one micro-batch: cross-entropies of the counted tokens (f32 `[counted]`);
    /// gradients of `grad_scale` times their sum are added to the parameters'.
    ///
    /// # Errors
    /// When a token is outside the vocabulary, a sequence too long, or memory can't be had.
    pub fn train_step(&self, batch: &Batch, grad_scale: f32, dropout: Option<Dropout>) -> Result<Tensor> {
        self.train(batch, grad_scale, Tape::training(&self.backend, &self.params, self.dtype, dropout))
    }

    /// [`Model::train_step`] of a batch whose rows have adapters of their own, which were put on the model
    /// [side by side](Model::side_by_side): `slots` in that order. Each slot's losses and gradients have the bits of a
    /// pass over its rows alone.
    ///
    /// # Errors
    /// As [`Model::train_step`], and when slots share rows or leave the batch.
    pub fn train_step_slots(&self, batch: &Batch, slots: &[Slot<'_>]) -> Result<Tensor> {
        check_slots(slots, batch)?;
        let mut tape = Tape::training(&self.backend, &self.params, self.dtype, None);
        tape.slots = slots;
        self.train(batch, 1.0, tape)
    }

    fn train(&self, batch: &Batch, grad_scale: f32, mut tape: Tape<'_>) -> Result<Tensor> {
        let encoded = self.prompt.as_ref().map(|p| p.encode(&tape)).transpose()?;
        let pass = self.pass(batch, Vec::new(), encoded.as_ref())?;
        let hidden = pass.hidden(&mut tape, None)?;
        let loss = tape.linear_cross_entropy(
            &hidden,
            &self.head,
            &pass.targets,
            self.config.final_logit_softcapping,
            grad_scale,
        )?;
        drop(hidden);
        if let Some(from) = loss.id {
            tape.backward(from, None, None, &pass)?;
        }
        encoded.map_or(Ok(()), |encoded| encoded.backward(&pass))?;
        Ok(loss.losses)
    }

    /// Cross-entropies of the counted tokens, in order: f32 `[counted]`.
    ///
    /// # Errors
    /// As [`Model::train_step`].
    pub fn evaluate(&self, batch: &Batch) -> Result<Tensor> {
        let mut tape = Tape::inference(&self.backend, &self.params, self.dtype);
        let encoded = self.prompt.as_ref().map(|p| p.encode(&tape)).transpose()?;
        let pass = self.pass(batch, Vec::new(), encoded.as_ref())?;
        let hidden = pass.hidden(&mut tape, None)?;
        Ok(tape
            .linear_cross_entropy(
                &hidden,
                &self.head,
                &pass.targets,
                self.config.final_logit_softcapping,
                1.0,
            )?
            .losses)
    }

    /// Logits of every token: f32 `[tokens, vocab_size]`.
    ///
    /// # Errors
    /// As [`Model::train_step`].
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let mut tape = Tape::inference(&self.backend, &self.params, self.dtype);
        let encoded = self.prompt.as_ref().map(|p| p.encode(&tape)).transpose()?;
        let hidden = self.pass(batch, Vec::new(), encoded.as_ref())?.hidden(&mut tape, None)?;
        let virtual_tokens = self.virtual_rows();
        if virtual_tokens == 0 {
            return self.head_logits(&tape, &hidden.tensor, None);
        }
        // The rows of the batch's own tokens.
        let mut rows = Vec::with_capacity(batch.tokens());
        for &len in &batch.lengths {
            let next = rows.last().map_or(0, |last| last + 1) + virtual_tokens as i32;
            rows.extend(next..next + len as i32);
        }
        let rows = self.backend.from_slice(&rows, &[rows.len()])?;
        let mut own = self.backend.empty(&[rows.elements(), hidden.tensor.cols()], self.dtype)?;
        self.backend.gather_rows(&mut own, &hidden.tensor, &rows)?;
        self.head_logits(&tape, &own, None)
    }

    /// Feeds tokens after those in `cache` and gives the logits of the last one: f32 `[1, vocab_size]`.
    ///
    /// # Errors
    /// When the cache is full or as [`Model::train_step`].
    pub fn extend(&self, input_ids: &[u32], cache: &mut KvCache) -> Result<Tensor> {
        let mut tape = Tape::inference(&self.backend, &self.params, self.dtype);
        let encoded = match &self.prompt {
            Some(prompt) if cache.is_empty() => Some(prompt.encode(&tape)?),
            _ => None,
        };
        if let Some(encoded) = &encoded
            && self.virtual_rows() == 0
        {
            self.begin_with_prefix(cache, &encoded.values)?;
        }
        let embeddings = encoded.as_ref().filter(|_| self.virtual_rows() > 0);
        self.feed(&[(0, input_ids)], cache, embeddings, &mut tape)
    }

    /// [`Model::extend`] of several sequences of a cache at once, which `rows` names by number, each with the bits that it
    /// has alone: logits f32 `[rows, vocab_size]`. The rows of each slot are a range of `rows`, adapters were put on the
    /// model [side by side](Model::side_by_side).
    ///
    /// # Errors
    /// As [`Model::extend`]; when a sequence is named twice or not there, slots share rows, or the model has trained
    /// virtual tokens.
    pub fn extend_all(
        &self,
        rows: &[(usize, &[u32])],
        cache: &mut KvCache,
        slots: &[RowSlot<'_>],
    ) -> Result<Tensor> {
        let unique: BTreeSet<usize> = rows.iter().map(|(sequence, _)| *sequence).collect();
        if rows.is_empty() || unique.len() != rows.len() || unique.last() >= Some(&cache.lens.len()) {
            return Err(Error::shape(
                "generate",
                format!("expected some of {} sequences, once each, found {unique:?}", cache.lens.len()),
            ));
        }
        if self.prompt.is_some() {
            return Err(Error::Unsupported(
                "sequences with trained virtual tokens can't be generated in a batch; generate them one by one".into(),
            ));
        }
        let mut starts = vec![0];
        starts.extend(rows.iter().scan(0, |end, (_, ids)| {
            *end += ids.len();
            Some(*end)
        }));
        let mut tokens = Vec::with_capacity(slots.len());
        for RowSlot { rows: range, params } in slots {
            let (Some(start), Some(end)) = (starts.get(range.start), starts.get(range.end)) else {
                return Err(Error::shape("generate", format!("slot {range:?} of {} rows", rows.len())));
            };
            tokens.push(Slot { rows: *start..*end, params, dropout: None, grad_scale: 1.0 });
        }
        let mut tape = Tape::inference(&self.backend, &self.params, self.dtype);
        tape.slots = &tokens;
        self.feed(rows, cache, None, &mut tape)
    }

    /// Feeds tokens of sequences; the logits of each one's last token.
    fn feed(
        &self,
        rows: &[(usize, &[u32])],
        cache: &mut KvCache,
        embeddings: Option<&Encoded<'_>>,
        tape: &mut Tape<'_>,
    ) -> Result<Tensor> {
        let virtual_rows = embeddings.map_or(0, |_| self.virtual_rows());
        let (mut batch, mut kept) = (Batch::new(), Vec::with_capacity(rows.len()));
        for &(sequence, ids) in rows {
            let (len, tokens) = (cache.lens[sequence], ids.len());
            if ids.is_empty() || len + virtual_rows + tokens > cache.capacity {
                return Err(Error::shape(
                    "generate",
                    format!("{tokens} tokens after {len} do not fit a cache of {}", cache.capacity),
                ));
            }
            batch.push(ids, &vec![IGNORE_INDEX; tokens]);
            let from = batch.positions.len() - tokens;
            batch.positions[from..].iter_mut().for_each(|p| *p += len as i32);
            kept.push(KeptRows { start: sequence * cache.capacity, len });
        }
        check_slots(tape.slots, &batch)?;
        let hidden = self.pass(&batch, kept, embeddings)?.hidden(tape, Some(cache))?.tensor;
        let mut last = Vec::with_capacity(rows.len());
        for &(sequence, ids) in rows {
            cache.lens[sequence] += virtual_rows + ids.len();
            last.push(last.last().map_or(-1, |row| *row) + (virtual_rows + ids.len()) as i32);
        }
        if last.len() == 1 {
            return self.head_logits(tape, &hidden.slice(hidden.rows() - 1..hidden.rows())?, Some(&last));
        }
        let mut ends = self.backend.empty(&[last.len(), hidden.cols()], self.dtype)?;
        self.backend.gather_rows(&mut ends, &hidden, &self.backend.from_slice(&last, &[last.len()])?)?;
        self.head_logits(tape, &ends, Some(&last))
    }

    /// Trained virtual tokens before a sequence's own.
    pub fn virtual_tokens(&self) -> usize {
        self.prompt.as_ref().map_or(0, |prompt| prompt.num_virtual_tokens)
    }

    /// Number of tokens of a batch whose prediction counts: with virtual embeddings, first tokens too.
    pub fn counted(&self, batch: &Batch) -> usize {
        let firsts = batch.first_labels.iter().filter(|label| **label != IGNORE_INDEX).count();
        batch.counted() + if self.virtual_rows() > 0 { firsts } else { 0 }
    }

    /// Those of them that go through the layers as rows.
    fn virtual_rows(&self) -> usize {
        self.prompt
            .as_ref()
            .filter(|p| p.place == PromptPlace::Embeddings)
            .map_or(0, |p| p.num_virtual_tokens)
    }

    /// The virtual tokens as they are now, `[num_virtual_tokens, cols]`.
    ///
    /// # Errors
    /// When there are none, or memory can't be had.
    pub fn virtual_token_values(&self) -> Result<Tensor> {
        let prompt = self
            .prompt
            .as_ref()
            .ok_or_else(|| Error::Unsupported("the model has no trained virtual tokens".into()))?;
        if prompt.encoder.layers.is_empty() {
            return self.params.master(prompt.encoder.table);
        }
        Ok(prompt.encode(&Tape::inference(&self.backend, &self.params, self.dtype))?.values)
    }

    /// The prefix as the cache's first keys and values.
    fn begin_with_prefix(&self, cache: &mut KvCache, prefix: &Tensor) -> Result<()> {
        let cols = self.config.num_key_value_heads * self.config.head_dim;
        let mut start = 0;
        for kept in cache.layers.iter_mut().flatten() {
            let mut rows = kept.slice(0..prefix.rows())?;
            self.backend.copy_columns(&mut rows, 0, prefix, start, cols, false)?;
            start += cols;
        }
        cache.lens[0] = prefix.rows();
        Ok(())
    }

    /// An empty cache for up to `capacity` tokens of one sequence, besides virtual ones.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn kv_cache(&self, capacity: usize) -> Result<KvCache> {
        self.kv_caches(1, capacity)
    }

    /// [`Model::kv_cache`] for several sequences of up to `capacity` tokens each.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn kv_caches(&self, sequences: usize, capacity: usize) -> Result<KvCache> {
        let capacity = capacity + self.virtual_tokens();
        let cols = self.config.num_key_value_heads * self.config.head_dim;
        let empty = || self.backend.empty(&[sequences * capacity, cols], self.dtype);
        let layers = self.layers.iter().map(|_| Ok([empty()?, empty()?])).collect::<Result<_>>()?;
        Ok(KvCache { layers, lens: vec![0; sequences], capacity })
    }

    /// Logits of some rows of a pass, whose numbers in it are ascending; `None`: of all rows, where there are no slots.
    fn head_logits(&self, tape: &Tape<'_>, hidden: &Tensor, rows: Option<&[i32]>) -> Result<Tensor> {
        let mut logits = self.backend.empty(&[hidden.rows(), self.config.vocab_size], DType::F32)?;
        let pieces = match rows.filter(|_| self.head.differs()) {
            None => vec![(None, 0..hidden.rows())],
            Some(rows) => {
                let place = |row: usize| rows.partition_point(|r| (*r as usize) < row);
                let all = rows.last().map_or(0, |last| *last as usize + 1);
                let pieces = rows_by_slot(tape.slots, all).into_iter();
                pieces.map(|(slot, own)| (slot, place(own.start)..place(own.end))).collect()
            }
        };
        for (slot, own) in pieces {
            let layer = self.head.of_slot(slot);
            let head = Head::new(&self.backend, tape.adapter(slot).0, &layer)?;
            let hidden = hidden.slice(own.clone())?;
            let low_rank = head.rows(&hidden, None, Ok)?;
            head.logits(&mut logits.slice(own)?, &hidden, low_rank.as_ref())?;
        }
        if let Some(cap) = self.config.final_logit_softcapping {
            self.backend.softcap(&mut logits, cap)?;
        }
        Ok(logits)
    }

    fn pass(&self, batch: &Batch, kept: Vec<KeptRows>, encoded: Option<&Encoded<'_>>) -> Result<Pass<'_>> {
        let prompt = self.prompt.as_ref().zip(encoded).map(|(prompt, encoded)| PassPrompt {
            place: prompt.place,
            values: encoded.values.clone(),
            grads: encoded.grads.clone(),
        });
        let virtual_tokens = prompt.as_ref().map_or(0, |p| p.values.rows());
        let whole = |(i, len): (usize, &usize)| len + kept.get(i).map_or(0, |kept| kept.len) + virtual_tokens;
        let longest = batch.lengths.iter().enumerate().map(whole).max().unwrap_or(0);
        let limit = self.config.max_sequence();
        if longest > limit {
            return Err(Error::shape(
                "model",
                format!(
                    "a sequence of {longest} tokens is longer than the model's {limit}; use --max-length {}",
                    limit.saturating_sub(virtual_tokens)
                ),
            ));
        }
        let (batch, prefix) = match prompt.as_ref().map(|p| p.place) {
            Some(PromptPlace::Embeddings) => (Cow::Owned(batch.with_virtual_tokens(virtual_tokens)), 0),
            _ => (Cow::Borrowed(batch), virtual_tokens),
        };
        let vocabulary = (self.config.vocab_size, self.embed.padding_idx);
        let input = DeviceBatch::new(&self.backend, &batch, vocabulary, &kept, prefix)?;
        let positions = input.max_position + 1;
        let rope = self.rope_table(&self.rope_tables[0], self.config.rope.as_ref(), positions)?;
        let local_rope = self.rope_table(&self.rope_tables[1], self.config.local_rope.as_ref(), positions)?;
        Ok(Pass { model: self, input, kept, targets: batch.targets.clone(), rope, local_rope, prompt })
    }

    /// The rotary table for at least `positions` positions, kept for the next pass.
    fn rope_table(
        &self,
        kept: &Mutex<Option<Tensor>>,
        rope: Option<&RopeConfig>,
        positions: usize,
    ) -> Result<Option<Tensor>> {
        let Some(rope) = rope else { return Ok(None) };
        let mut kept = kept.lock().expect("the table's lock is never held across a panic");
        if kept.as_ref().is_none_or(|t| t.rows() < positions) {
            let rows = positions.next_power_of_two().max(256);
            *kept = Some(self.backend.from_slice(&rope.table(rows), &[rows, rope.rotary_dim])?);
        }
        Ok(kept.clone())
    }
}

/// Slots hold ascending ranges of whole sequences.
fn check_slots(slots: &[Slot<'_>], batch: &Batch) -> Result<()> {
    let mut ends = vec![0];
    ends.extend(batch.lengths.iter().scan(0, |end, len| {
        *end += len;
        Some(*end)
    }));
    let mut last = 0;
    for Slot { rows, .. } in slots.iter().filter(|slot| !slot.rows.is_empty()) {
        if rows.start < last || !ends.contains(&rows.start) || !ends.contains(&rows.end) {
            return Err(Error::shape(
                "slots",
                format!(
                    "rows {rows:?} after {last} are not whole sequences of the batch's {}",
                    batch.tokens()
                ),
            ));
        }
        last = rows.end;
    }
    Ok(())
}

impl Pass<'_> {
    /// The final norm's output, `[tokens, hidden_size]`.
    fn hidden(&self, tape: &mut Tape<'_>, mut cache: Option<&mut KvCache>) -> Result<Var> {
        let model = self.model;
        let mut x = tape.embedding(&model.embed, &self.input.ids)?;
        if let Some(scale) = model.config.embed_scale {
            // As transformers: the factor is rounded to the activations' type.
            let scale = if tape.dtype == DType::BF16 { half::bf16::from_f32(scale).to_f32() } else { scale };
            x = tape.scale(&x, scale)?;
        }
        if let Some(p) = self.prompt.as_ref().filter(|p| p.place == PromptPlace::Embeddings) {
            x = tape.prompt(&x, &p.values, p.grads.as_ref(), &self.input.sequences)?;
        }
        if let Some(positions) = &model.positions {
            let p = tape.embedding(positions, &self.input.positions)?;
            x = tape.add(&x, &p)?;
        }
        let all = 0..model.layers.len();
        if let Some(cache) = &mut cache {
            for (number, kept) in cache.layers.iter_mut().enumerate() {
                x = self.layer(tape, number, x, Some(kept))?;
            }
        } else if model.gradient_checkpointing > 0 && tape.is_recording() {
            for start in all.clone().step_by(model.gradient_checkpointing) {
                let layers = start..all.end.min(start + model.gradient_checkpointing);
                let trainable =
                    self.has_prefix() || model.layers[layers.clone()].iter().any(Layer::is_trainable);
                let run = |inner: &mut Tape<'_>, x| self.layers(inner, layers.clone(), x);
                x = tape.segment(layers.clone(), x, trainable, run)?;
            }
        } else {
            x = self.layers(tape, all, x)?;
        }
        tape.norm(&x, &model.norm)
    }

    fn has_prefix(&self) -> bool {
        self.prompt.as_ref().is_some_and(|p| p.place == PromptPlace::KeysValues)
    }

    fn layer(
        &self,
        tape: &mut Tape<'_>,
        number: usize,
        x: Var,
        cache: Option<&mut [Tensor; 2]>,
    ) -> Result<Var> {
        let layer = &self.model.layers[number];
        let h = tape.norm(&x, &layer.input_norm)?;
        let h = self.attention(tape, number, h, cache)?;
        let mut h = tape.linear(&h, &layer.o)?;
        if let Some(norm) = &layer.attention_norm {
            h = tape.norm(&h, norm)?;
        }
        if let Some(adapter) = &layer.attention_adapter {
            h = tape.bottleneck(&x, &h, adapter)?;
        }
        let (x, h) = tape.add_norm(&x, &h, &layer.post_norm)?;
        let mut h = match &layer.mlp {
            Mlp::Gated(l) => {
                let [gate, up] = tape.linears(&h, [&l[0], &l[1]])?;
                drop(h);
                let product = tape.gated(&gate, &up, self.model.config.hidden_act)?;
                tape.linear(&product, &l[2])?
            }
            Mlp::FusedGated(l) => {
                let both = tape.linear(&h, &l[0])?;
                drop(h);
                let inner = l[1].in_features;
                let (gate, up) = (tape.columns(&both, 0, inner)?, tape.columns(&both, inner, inner)?);
                drop(both);
                let product = tape.gated(&gate, &up, self.model.config.hidden_act)?;
                tape.linear(&product, &l[1])?
            }
            Mlp::Plain(l) => {
                let inner = tape.linear(&h, &l[0])?;
                let inner = tape.activation(&inner, self.model.config.hidden_act)?;
                tape.linear(&inner, &l[1])?
            }
        };
        if let Some(norm) = &layer.mlp_norm {
            h = tape.norm(&h, norm)?;
        }
        if let Some(adapter) = &layer.output_adapter {
            h = tape.bottleneck(&x, &h, adapter)?;
        }
        tape.add(&x, &h)
    }

    fn attention(
        &self,
        tape: &mut Tape<'_>,
        number: usize,
        x: Var,
        cache: Option<&mut [Tensor; 2]>,
    ) -> Result<Var> {
        let layer = &self.model.layers[number];
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
        let window = config.window(number);
        let (rope, table) = match (&config.local_rope, &self.local_rope) {
            (Some(rope), Some(table)) if window.is_some() => (Some(rope), Some(table)),
            _ => (config.rope.as_ref(), self.rope.as_ref()),
        };
        if let (Some(rope), Some(table)) = (rope, table) {
            let shape = |n_heads| RopeShape {
                n_heads,
                head_dim,
                rotary_dim: rope.rotary_dim,
                interleaved: rope.interleaved,
                inverse: false,
            };
            let shapes = [shape(n_heads), shape(n_kv_heads)];
            [q, k] = tape.rope([q, k], table, &self.input.positions.ids, shapes)?;
        }
        if let Some([keys, values]) = cache {
            for (kept, s) in self.kept.iter().zip(self.input.sequences.iter()) {
                let (rows, start) = (s.q_start..s.q_start + s.q_len, kept.start + kept.len);
                for (all, new) in [(&mut *keys, &k), (&mut *values, &v)] {
                    let mut to = all.slice(start..start + s.q_len)?;
                    self.model.backend.cast(&mut to, &new.tensor.slice(rows.clone())?)?;
                }
            }
            (k, v) = (Var::constant(keys.clone()), Var::constant(values.clone()));
        }
        if let Some(p) = self.prompt.as_ref().filter(|p| p.place == PromptPlace::KeysValues) {
            let cols = n_kv_heads * head_dim;
            let (start, grads) = (2 * number * cols, p.grads.as_ref());
            k = tape.prefix(&k, &p.values, grads, start, &self.input.sequences)?;
            v = tape.prefix(&v, &p.values, grads, start + cols, &self.input.sequences)?;
        }
        let scale = config.attention_scale.unwrap_or(1.0 / (head_dim as f32).sqrt());
        let softcap = config.attn_logit_softcapping;
        let heads = AttentionHeads { n_heads, n_kv_heads, head_dim, scale, window, softcap };
        tape.attention(&q, &k, &v, heads, &self.input.sequences)
    }
}

impl Replay for Pass<'_> {
    fn layers(&self, tape: &mut Tape<'_>, layers: Range<usize>, mut x: Var) -> Result<Var> {
        for number in layers {
            x = self.layer(tape, number, x, None)?;
        }
        Ok(x)
    }
}
