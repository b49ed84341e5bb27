//! Text generation, one token at a time over a key-value cache.
//!
//! The order in which settings act on the scores is Hugging Face's: repetition penalty, minimal length,
//! temperature, top-k, top-p.

use crate::adapter::AdapterSet;
use crate::backend::SampleRow;
use crate::error::{Error, Result};
use crate::model::{Model, RowSlot};
use crate::rng::{Philox, PhiloxKey, Stream};
use crate::tensor::Tensor;
use std::collections::BTreeSet;
use std::time::Instant;

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    /// Tokens to make at most.
    pub max_new_tokens: usize,
    /// Tokens before which no end-of-sequence token is made.
    pub min_new_tokens: usize,
    /// Divides the scores; 0: always the likeliest token (greedy).
    pub temperature: f32,
    /// Only this many likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability; 1: all.
    pub top_p: f32,
    /// Divides (or multiplies, if negative) the scores of tokens that were there already; 1: no penalty.
    pub repetition_penalty: f32,
    /// Tokens that end the sequence.
    pub eos_token_id: Vec<u32>,
    /// Seed of the sampling.
    pub seed: u64,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        GenerationConfig {
            max_new_tokens: 128,
            min_new_tokens: 0,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            eos_token_id: Vec::new(),
            seed: 42,
        }
    }
}

impl GenerationConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// When a value is outside.
    pub fn check(&self) -> Result<()> {
        let bad = |key: &str, message: String| Err(Error::config("generation", key, message));
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return bad(
                "temperature",
                format!("expected a number of at least 0, found {}", self.temperature),
            );
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("top_p", format!("expected a number in (0, 1], found {}", self.top_p));
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return bad(
                "repetition_penalty",
                format!("expected a positive number, found {}", self.repetition_penalty),
            );
        }
        Ok(())
    }
}

/// What was generated.
#[derive(Clone, Debug, Default)]
pub struct Generation {
    /// The new tokens, with the end-of-sequence token if one was made.
    pub tokens: Vec<u32>,
    /// Prompt tokens per second.
    pub prefill_tokens_per_second: f64,
    /// New tokens per second, from the second on.
    pub decode_tokens_per_second: f64,
}

/// Continues `prompt`; `go_on` sees all new tokens after each one and may end the generation (stop strings).
///
/// # Errors
/// When the prompt is empty, settings are out of range, or prompt and new tokens exceed the model's length.
pub fn generate(
    model: &Model,
    prompt: &[u32],
    config: &GenerationConfig,
    mut go_on: impl FnMut(&[u32]) -> bool,
) -> Result<Generation> {
    let mut text = Text::new(model, prompt, config)?;
    let mut cache = model.kv_cache(prompt.len() + text.room)?;
    let start = Instant::now();
    let mut goes_on = text.goes_on(model, model.extend(prompt, &mut cache)?, &mut go_on)?;
    text.new.prefill_tokens_per_second = prompt.len() as f64 / start.elapsed().as_secs_f64().max(1e-9);
    let start = Instant::now();
    while goes_on {
        goes_on = text.goes_on(model, model.extend(text.last(), &mut cache)?, &mut go_on)?;
    }
    let decoded = text.new.tokens.len().saturating_sub(1);
    text.new.decode_tokens_per_second = decoded as f64 / start.elapsed().as_secs_f64().max(1e-9);
    Ok(text.new)
}

/// A prompt of a batch.
#[derive(Clone, Debug)]
pub struct Prompt<'a> {
    /// Name of the adapter that continues it; `None`: the base alone.
    pub adapter: Option<&'a str>,
    /// Its tokens.
    pub tokens: &'a [u32],
    /// How tokens are chosen.
    pub config: GenerationConfig,
}

/// Continues several prompts at once, each with the adapter that it names and the bits that it has alone. `go_on` hears of
/// each by its number. Speeds are those of the whole batch.
///
/// # Errors
/// As [`generate`]; when there is no adapter of a name, or one can not be beside others ([`Model::side_by_side`]).
pub fn generate_batch(
    set: &mut AdapterSet,
    prompts: &[Prompt<'_>],
    mut go_on: impl FnMut(usize, &[u32]) -> bool,
) -> Result<Vec<Generation>> {
    let names: BTreeSet<&str> = prompts.iter().filter_map(|prompt| prompt.adapter).collect();
    let names: Vec<&str> = names.into_iter().collect();
    set.side_by_side(&names, |model, adapters| {
        let slot = |prompt: &Prompt<'_>| prompt.adapter.map(|name| names.partition_point(|n| *n < name));
        let mut texts = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            texts.push(Text::new(model, prompt.tokens, &prompt.config)?);
        }
        // Those of one adapter are neighbours.
        let mut going: Vec<usize> = (0..prompts.len()).collect();
        going.sort_by_key(|i| slot(&prompts[*i]));
        let lens = prompts.iter().zip(&texts).map(|(prompt, text)| prompt.tokens.len() + text.room);
        let mut cache = model.kv_caches(prompts.len(), lens.max().unwrap_or(0))?;
        let mut start = Instant::now();
        let mut speeds = (0.0, 0); // of the prompts; tokens after the first of each
        while !going.is_empty() {
            let first = texts[going[0]].new.tokens.is_empty();
            let mut slots = Vec::with_capacity(adapters.len());
            for (number, params) in adapters.iter().enumerate() {
                let begin = going.partition_point(|i| slot(&prompts[*i]) < Some(number));
                let end = going.partition_point(|i| slot(&prompts[*i]) <= Some(number));
                slots.push(RowSlot { rows: begin..end, params });
            }
            let feed = |i: &usize| (*i, if first { prompts[*i].tokens } else { texts[*i].last() });
            let rows: Vec<(usize, &[u32])> = going.iter().map(feed).collect();
            let mut logits = model.extend_all(&rows, &mut cache, &slots)?;
            let choices: Vec<Choice> = going.iter().map(|i| texts[*i].choice()).collect();
            let rows = going.iter().zip(&choices).map(|(i, choice)| choice.row(texts[*i].config));
            let found = model.backend.sample(&mut logits, &rows.collect::<Vec<_>>())?;
            if first {
                let tokens: usize = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
                speeds.0 = tokens as f64 / start.elapsed().as_secs_f64().max(1e-9);
                start = Instant::now();
            } else {
                speeds.1 += going.len();
            }
            let mut still = Vec::with_capacity(going.len());
            for (i, token) in going.iter().zip(found) {
                if texts[*i].take(token, &mut |tokens| go_on(*i, tokens))? {
                    still.push(*i);
                }
            }
            going = still;
        }
        let decode = speeds.1 as f64 / start.elapsed().as_secs_f64().max(1e-9);
        Ok(texts
            .into_iter()
            .map(|text| Generation {
                prefill_tokens_per_second: speeds.0,
                decode_tokens_per_second: decode,
                ..text.new
            })
            .collect())
    })
}

/// A text in the making.
struct Text<'a> {
    prompt: &'a [u32],
    config: &'a GenerationConfig,
    room: usize, // for new tokens
    random: Philox,
    new: Generation,
}

impl<'a> Text<'a> {
    fn new(model: &Model, prompt: &'a [u32], config: &'a GenerationConfig) -> Result<Self> {
        config.check()?;
        if prompt.is_empty() {
            return Err(Error::config("generation", "prompt", "expected at least one token, found none"));
        }
        let limit = model.config.max_sequence();
        if prompt.len() >= limit {
            return Err(Error::config(
                "generation",
                "prompt",
                format!("{} tokens leave no room in the model's {limit}", prompt.len()),
            ));
        }
        Ok(Text {
            prompt,
            config,
            room: config.max_new_tokens.min(limit - prompt.len()),
            random: Philox::new(PhiloxKey::new(config.seed, Stream::Sample, 0)),
            new: Generation::default(),
        })
    }

    /// The newest token.
    fn last(&self) -> &[u32] {
        &self.new.tokens[self.new.tokens.len().saturating_sub(1)..]
    }

    /// What the next token's choice depends on, beside the scores and the settings.
    fn choice(&mut self) -> Choice {
        let (config, new) = (self.config, &self.new.tokens);
        let mut seen = Vec::new();
        if config.repetition_penalty != 1.0 {
            seen.extend(self.prompt.iter().chain(new).copied());
            seen.sort_unstable();
            seen.dedup();
        }
        let banned = if new.len() < config.min_new_tokens { config.eos_token_id.clone() } else { Vec::new() };
        let uniform = if config.temperature == 0.0 { 0.0 } else { self.random.uniform() };
        Choice { seen, banned, uniform }
    }

    /// Adds the next token by its scores, `[1, vocab_size]`; whether there shall be more.
    fn goes_on(
        &mut self,
        model: &Model,
        mut scores: Tensor,
        go_on: &mut dyn FnMut(&[u32]) -> bool,
    ) -> Result<bool> {
        let choice = self.choice();
        let found = model.backend.sample(&mut scores, &[choice.row(self.config)])?;
        self.take(found[0], go_on)
    }

    /// Adds the next token, if there is room for it; whether there shall be more.
    fn take(&mut self, token: Option<u32>, go_on: &mut dyn FnMut(&[u32]) -> bool) -> Result<bool> {
        let tokens = &mut self.new.tokens;
        if tokens.len() >= self.room {
            return Ok(false);
        }
        let token = token.ok_or_else(|| {
            Error::Unsupported("the model's logits are not numbers; its weights may be damaged".into())
        })?;
        tokens.push(token);
        Ok(go_on(tokens) && !self.config.eos_token_id.contains(&token) && tokens.len() < self.room)
    }
}

/// What the choice of a token depends on, beside scores and settings.
struct Choice {
    seen: Vec<u32>,
    banned: Vec<u32>,
    uniform: f32,
}

impl Choice {
    fn row<'a>(&'a self, config: &GenerationConfig) -> SampleRow<'a> {
        SampleRow {
            temperature: config.temperature,
            top_k: config.top_k,
            top_p: config.top_p,
            uniform: self.uniform,
            repetition_penalty: config.repetition_penalty,
            seen: &self.seen,
            banned: &self.banned,
        }
    }
}
