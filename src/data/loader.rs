//! The order of the training data: which sequences make up each micro-batch of each optimizer step.
//!
//! The order of an epoch follows from the seed and the epoch's number alone, so that a checkpoint needs no
//! more than the epoch and the place in it to go on exactly.

use super::{Example, pack};
use crate::error::{Error, Result};
use crate::model::Batch;
use crate::rng::{Philox, PhiloxKey, Stream};

/// How a [`Loader`] cuts epochs into steps; the names are those of Hugging Face's training arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoaderConfig {
    /// Rows of a micro-batch: sequences, or packed rows of several.
    pub per_device_train_batch_size: usize,
    /// Micro-batches of an optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Whether each epoch has an order of its own; otherwise it is the file's.
    pub shuffle: bool,
    /// Whether sequences of similar length come together, as `--group-by-length` does in Hugging Face's Trainer.
    pub group_by_length: bool,
    /// Tokens of a packed row, if sequences are to share rows.
    pub packing: Option<usize>,
}

impl Default for LoaderConfig {
    fn default() -> Self {
        LoaderConfig {
            per_device_train_batch_size: 1,
            gradient_accumulation_steps: 1,
            shuffle: true,
            group_by_length: false,
            packing: None,
        }
    }
}

/// Where a [`Loader`] stands; part of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LoaderState {
    /// Finished epochs.
    pub epoch: u64,
    /// Rows of this epoch already used.
    pub position: usize,
    /// What the data, the seed and the settings hash to: only with the same ones it can go on exactly.
    pub fingerprint: u64,
}

/// Gives the micro-batches of one optimizer step after another, epoch after epoch without an end.
#[derive(Clone, Debug)]
pub struct Loader {
    examples: Vec<Example>,
    rows: Vec<Vec<usize>>, // indices of the examples in each row
    config: LoaderConfig,
    seed: u64,
    order: Vec<usize>, // indices of rows, in the order of the current epoch
    state: LoaderState,
}

impl Loader {
    /// A loader at the beginning of epoch 0.
    ///
    /// # Errors
    /// Without examples, or with a batch size or number of micro-batches of zero.
    pub fn new(examples: Vec<Example>, config: LoaderConfig, seed: u64) -> Result<Self> {
        let at_least_one = |key: &str, value: usize| match value {
            0 => Err(Error::config("training data", key, "expected at least 1, found 0")),
            _ => Ok(()),
        };
        at_least_one("per_device_train_batch_size", config.per_device_train_batch_size)?;
        at_least_one("gradient_accumulation_steps", config.gradient_accumulation_steps)?;
        at_least_one("examples", examples.len())?;
        if u32::try_from(examples.len()).is_err() {
            return Err(Error::Unsupported(format!("more than {} rows of training data", u32::MAX)));
        }
        let rows = match config.packing {
            Some(capacity) => {
                let lengths: Vec<usize> = examples.iter().map(|e| e.input_ids.len()).collect();
                pack::first_fit(&lengths, capacity)
            }
            None => (0..examples.len()).map(|i| vec![i]).collect(),
        };
        let fingerprint = fingerprint(&examples, &config, seed);
        let state = LoaderState { epoch: 0, position: 0, fingerprint };
        let mut loader = Loader { examples, rows, config, seed, order: Vec::new(), state };
        loader.order = loader.epoch_order();
        Ok(loader)
    }

    /// The micro-batches of the next optimizer step: `gradient_accumulation_steps` of
    /// `per_device_train_batch_size` rows, fewer at the end of an epoch. Never empty.
    pub fn next_step(&mut self) -> Vec<Batch> {
        if self.state.position == self.order.len() {
            self.state.epoch += 1;
            self.state.position = 0;
            self.order = self.epoch_order();
        }
        let end = (self.state.position + self.rows_per_step()).min(self.order.len());
        let step = &self.order[self.state.position..end];
        let batches =
            step.chunks(self.config.per_device_train_batch_size).map(|rows| self.batch(rows)).collect();
        self.state.position = end;
        batches
    }

    /// Optimizer steps of an epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.rows.len().div_ceil(self.rows_per_step())
    }

    /// Epochs done, with the part of the current one that is done, counted in optimizer steps.
    pub fn epoch(&self) -> f64 {
        let steps = self.state.position.div_ceil(self.rows_per_step());
        self.state.epoch as f64 + steps as f64 / self.steps_per_epoch() as f64
    }

    /// Whether the last step was the last one of its epoch.
    pub fn at_epoch_end(&self) -> bool {
        self.state.position == self.order.len()
    }

    /// Rows of an epoch: sequences, or packed rows.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// The sequences.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// Tokens of the micro-batch with most of them that any order could make.
    pub fn max_batch_tokens(&self) -> usize {
        let mut tokens: Vec<usize> = self.rows.iter().map(|row| self.row_tokens(row)).collect();
        tokens.sort_unstable_by(|a, b| b.cmp(a));
        tokens.iter().take(self.config.per_device_train_batch_size).sum()
    }

    /// Where the loader stands.
    pub fn state(&self) -> &LoaderState {
        &self.state
    }

    /// Goes to where another loader with the same data, seed and settings stood.
    ///
    /// # Errors
    /// When data, seed or settings differ, or the place doesn't exist.
    pub fn restore(&mut self, state: &LoaderState) -> Result<()> {
        if state.fingerprint != self.state.fingerprint {
            return Err(Error::Unsupported(
                "the checkpoint was made with other training data, another seed, batch size, packing or order; \
                 resume with the same, or start anew from its weights with --init-adapter"
                    .to_string(),
            ));
        }
        if state.position > self.rows.len() {
            return Err(Error::config(
                "checkpoint",
                "position",
                format!("expected at most {} rows, found {}", self.rows.len(), state.position),
            ));
        }
        self.state = state.clone();
        self.order = self.epoch_order();
        Ok(())
    }

    fn rows_per_step(&self) -> usize {
        self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps
    }

    fn row_tokens(&self, row: &[usize]) -> usize {
        row.iter().map(|i| self.examples[*i].input_ids.len()).sum()
    }

    fn batch(&self, rows: &[usize]) -> Batch {
        let mut batch = Batch::new();
        for example in rows.iter().flat_map(|row| &self.rows[*row]).map(|i| &self.examples[*i]) {
            batch.push(&example.input_ids, &example.labels);
        }
        batch
    }

    fn epoch_order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.rows.len()).collect();
        if self.config.shuffle {
            shuffle(&mut order, PhiloxKey::new(self.seed, Stream::Shuffle, self.state.epoch));
        }
        if self.config.group_by_length {
            self.group_by_length(&mut order);
        }
        order
    }

    /// As Hugging Face's `get_length_grouped_indices`: longest first within groups of up to 50 steps, and
    /// the longest of all at the very front, so that memory that doesn't suffice shows at once.
    fn group_by_length(&self, order: &mut [usize]) {
        let step = self.rows_per_step();
        let group = step * (order.len() / (4 * step)).clamp(1, 50);
        let tokens: Vec<usize> = self.rows.iter().map(|row| self.row_tokens(row)).collect();
        for rows in order.chunks_mut(group) {
            rows.sort_by(|a, b| tokens[*b].cmp(&tokens[*a]));
        }
        let heads = (0..order.len()).step_by(group);
        // The first of equally long ones, as Python's argmax takes it.
        if let Some(longest) = heads.rev().max_by_key(|i| tokens[order[*i]]) {
            order.swap(0, longest);
        }
    }
}

/// The sequences in order, `batch_size` to a batch: what evaluation goes through.
pub fn sequential_batches(examples: &[Example], batch_size: usize) -> impl Iterator<Item = Batch> {
    examples.chunks(batch_size.max(1)).map(|chunk| {
        let mut batch = Batch::new();
        for example in chunk {
            batch.push(&example.input_ids, &example.labels);
        }
        batch
    })
}

/// Fisher and Yates' shuffle.
fn shuffle(order: &mut [usize], key: PhiloxKey) {
    let mut random = Philox::new(key);
    for last in (1..order.len()).rev() {
        order.swap(last, random.below(last as u32 + 1) as usize);
    }
}

/// FNV-1a over everything that the order and content of the batches follow from.
fn fingerprint(examples: &[Example], config: &LoaderConfig, seed: u64) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |value: u64| hash = (hash ^ value).wrapping_mul(0x0000_0100_0000_01b3);
    add(seed);
    add(config.per_device_train_batch_size as u64);
    add(config.gradient_accumulation_steps as u64);
    add(u64::from(config.shuffle) | u64::from(config.group_by_length) << 1);
    add(config.packing.map_or(0, |capacity| capacity as u64 + 1));
    for example in examples {
        add(example.input_ids.len() as u64);
        for (id, label) in example.input_ids.iter().zip(&example.labels) {
            add(u64::from(*id) << 32 | u64::from(*label as u32));
        }
    }
    hash
}
