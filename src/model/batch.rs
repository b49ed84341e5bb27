//! Token sequences as the model takes them: laid end to end, without padding.

use crate::backend::{Backend, IGNORE_INDEX, Sequence};
use crate::error::{Error, Result};
use crate::ops::embedding::Entries;
use std::sync::Arc;

/// Sequences of tokens laid end to end. Attention never crosses from one into another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[tokens]`.
    pub input_ids: Vec<i32>,
    /// Position of each token in its sequence, `[tokens]`.
    pub positions: Vec<i32>,
    /// The token to predict at each place (the next one of the same sequence), or [`IGNORE_INDEX`].
    pub targets: Vec<i32>,
    /// Lengths of the sequences.
    pub lengths: Vec<usize>,
    /// The label of each sequence's first token, which only virtual tokens before it can predict.
    pub first_labels: Vec<i32>,
}

impl Batch {
    /// A batch without sequences.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a sequence; `labels` are per token, as in Hugging Face's data, and shifted here: what is
    /// predicted at a place is the label of the next one.
    pub fn push(&mut self, input_ids: &[u32], labels: &[i32]) {
        debug_assert_eq!(input_ids.len(), labels.len());
        self.input_ids.extend(input_ids.iter().map(|id| *id as i32));
        self.positions.extend(0..input_ids.len() as i32);
        self.targets.extend(labels.iter().skip(1).copied());
        self.targets.push(IGNORE_INDEX);
        self.lengths.push(input_ids.len());
        self.first_labels.push(labels.first().copied().unwrap_or(IGNORE_INDEX));
    }

    /// Appends another batch's sequences.
    pub fn append(&mut self, other: &Batch) {
        self.input_ids.extend(&other.input_ids);
        self.positions.extend(&other.positions);
        self.targets.extend(&other.targets);
        self.lengths.extend(&other.lengths);
        self.first_labels.extend(&other.first_labels);
    }

    /// The batch with `n` places for virtual tokens before each sequence's; as in PEFT, the last one predicts the
    /// sequence's first token.
    pub(crate) fn with_virtual_tokens(&self, n: usize) -> Self {
        let mut batch = Batch::new();
        let mut start = 0;
        let firsts = self.first_labels.iter().copied().chain(std::iter::repeat(IGNORE_INDEX));
        for (&len, first) in self.lengths.iter().zip(firsts) {
            let end = start + len;
            batch.input_ids.extend(std::iter::repeat_n(0, n));
            batch.input_ids.extend(&self.input_ids[start..end]);
            batch.positions.extend(0..n as i32);
            batch.positions.extend(self.positions[start..end].iter().map(|p| p + n as i32));
            batch.targets.extend(std::iter::repeat_n(IGNORE_INDEX, n - 1));
            batch.targets.push(first);
            batch.targets.extend(&self.targets[start..end]);
            batch.lengths.push(n + len);
            batch.first_labels.push(IGNORE_INDEX);
            start = end;
        }
        batch
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Number of tokens whose prediction counts.
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|t| **t != IGNORE_INDEX).count()
    }
}

/// The rows of a sequence in a key-value cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeptRows {
    /// The first one.
    pub start: usize,
    /// How many there are.
    pub len: usize,
}

/// A batch where the backend can use it.
#[derive(Debug)]
pub(crate) struct DeviceBatch {
    pub ids: Entries,
    pub positions: Entries,
    pub sequences: Arc<[Sequence]>,
    pub max_position: usize,
}

impl DeviceBatch {
    /// Uploads token ids and positions. `kept`, if not empty, says for each sequence where in a cache its earlier keys
    /// lie; without, `prefix` keys lie before each one's.
    pub fn new(
        backend: &Backend,
        batch: &Batch,
        (vocab_size, padding_idx): (usize, Option<usize>),
        kept: &[KeptRows],
        prefix: usize,
    ) -> Result<Self> {
        if let Some(bad) = batch.input_ids.iter().find(|id| !(0..vocab_size as i32).contains(id)) {
            return Err(Error::shape(
                "embedding",
                format!(
                    "token id {bad} is outside the vocabulary of {vocab_size}; is this the model's tokenizer?"
                ),
            ));
        }
        let total: usize = batch.lengths.iter().sum();
        if total != batch.tokens() || total != batch.positions.len() || total != batch.targets.len() {
            return Err(Error::shape(
                "batch",
                format!("lengths add up to {total}, tokens are {}", batch.tokens()),
            ));
        }
        let mut sequences = Vec::with_capacity(batch.lengths.len());
        let mut start = 0;
        for (i, &len) in batch.lengths.iter().enumerate() {
            let (k_start, k_len) = match kept.get(i) {
                Some(kept) => (kept.start, kept.len + len),
                None => (start + i * prefix, prefix + len),
            };
            sequences.push(Sequence { q_start: start, q_len: len, k_start, k_len });
            start += len;
        }
        let positions: Vec<i32> = batch.positions.iter().map(|p| p + prefix as i32).collect();
        Ok(DeviceBatch {
            ids: Entries::new(backend, &batch.input_ids, padding_idx)?,
            max_position: positions.iter().copied().max().unwrap_or(0) as usize,
            positions: Entries::new(backend, &positions, None)?,
            sequences: sequences.into(),
        })
    }
}
