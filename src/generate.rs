//! Text generation, one token at a time over a key-value cache.
//!
//! The order in which settings act on the scores is Hugging Face's: repetition penalty, minimal length,
//! temperature, top-k, top-p.

use crate::adapter::AdapterSet;
use crate::error::{Error, Result};
use crate::math;
use crate::model::{Model, RowSlot};
use crate::rng::{Philox, PhiloxKey, Stream};
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
    let mut logits = model.backend.to_vec::<f32>(&model.extend(prompt, &mut cache)?)?;
    text.new.prefill_tokens_per_second = prompt.len() as f64 / start.elapsed().as_secs_f64().max(1e-9);
    let start = Instant::now();
    while text.goes_on(&mut logits, &mut go_on)? {
        logits = model.backend.to_vec::<f32>(&model.extend(text.last(), &mut cache)?)?;
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
            let logits = model.backend.to_vec::<f32>(&model.extend_all(&rows, &mut cache, &slots)?)?;
            if first {
                let tokens: usize = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
                speeds.0 = tokens as f64 / start.elapsed().as_secs_f64().max(1e-9);
                start = Instant::now();
            } else {
                speeds.1 += going.len();
            }
            let mut still = Vec::with_capacity(going.len());
            for (i, scores) in going.iter().zip(logits.chunks_exact(model.config.vocab_size)) {
                if texts[*i].goes_on(&mut scores.to_vec(), &mut |tokens| go_on(*i, tokens))? {
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

    /// Adds the next token by its scores; whether there shall be more.
    fn goes_on(&mut self, scores: &mut [f32], go_on: &mut dyn FnMut(&[u32]) -> bool) -> Result<bool> {
        let tokens = &mut self.new.tokens;
        if tokens.len() >= self.room {
            return Ok(false);
        }
        let token = choose(scores, self.prompt, tokens, self.config, &mut self.random)?;
        tokens.push(token);
        Ok(go_on(tokens) && !self.config.eos_token_id.contains(&token) && tokens.len() < self.room)
    }
}

/// The next token by the scores and the settings.
fn choose(
    scores: &mut [f32],
    prompt: &[u32],
    new: &[u32],
    config: &GenerationConfig,
    random: &mut Philox,
) -> Result<u32> {
    if config.repetition_penalty != 1.0 {
        let mut seen: Vec<u32> = prompt.iter().chain(new).copied().collect();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            let score = &mut scores[id as usize];
            *score = if *score < 0.0 {
                *score * config.repetition_penalty
            } else {
                *score / config.repetition_penalty
            };
        }
    }
    if new.len() < config.min_new_tokens {
        for id in &config.eos_token_id {
            if let Some(score) = scores.get_mut(*id as usize) {
                *score = f32::NEG_INFINITY;
            }
        }
    }
    if scores.iter().any(|s| s.is_nan()) {
        return Err(Error::Unsupported(
            "the model's logits are not numbers; its weights may be damaged".into(),
        ));
    }
    // Likeliest first; equal scores by token id, as argmax takes them.
    if config.temperature == 0.0 {
        let top = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        return Ok(scores.iter().position(|score| *score == top).unwrap_or(0) as u32);
    }
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    let by_score = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
    order.sort_unstable_by(by_score);
    if config.top_k > 0 {
        order.truncate(config.top_k);
    }
    let top = f64::from(scores[order[0] as usize]);
    let temperature = f64::from(config.temperature);
    let weights: Vec<f64> =
        order.iter().map(|id| math::exp((f64::from(scores[*id as usize]) - top) / temperature)).collect();
    let total: f64 = weights.iter().sum();
    let mut kept = weights.len();
    if config.top_p < 1.0 {
        let mut cumulative = 0.0;
        kept = weights
            .iter()
            .position(|w| {
                cumulative += w / total;
                cumulative >= f64::from(config.top_p)
            })
            .map_or(weights.len(), |i| i + 1);
    }
    let total: f64 = weights[..kept].iter().sum();
    let mut left = f64::from(random.uniform()) * total;
    for (id, weight) in order.iter().zip(&weights[..kept]) {
        left -= weight;
        if left < 0.0 {
            return Ok(*id);
        }
    }
    Ok(order[kept - 1])
}
