//! Text generation, one token at a time over a key-value cache.
//!
//! The order in which settings act on the scores is Hugging Face's: repetition penalty, minimal length,
//! temperature, top-k, top-p.

use crate::error::{Error, Result};
use crate::math;
use crate::model::Model;
use crate::rng::{Philox, PhiloxKey, Stream};
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
    let room = config.max_new_tokens.min(limit - prompt.len());
    let mut cache = model.kv_cache(prompt.len() + room)?;
    let mut random = Philox::new(PhiloxKey::new(config.seed, Stream::Sample, 0));
    let mut generation = Generation::default();
    let start = Instant::now();
    let mut logits = model.backend.to_vec::<f32>(&model.extend(prompt, &mut cache)?)?;
    generation.prefill_tokens_per_second = prompt.len() as f64 / start.elapsed().as_secs_f64().max(1e-9);
    let start = Instant::now();
    while generation.tokens.len() < room {
        let token = choose(&mut logits, prompt, &generation.tokens, config, &mut random)?;
        generation.tokens.push(token);
        if !go_on(&generation.tokens)
            || config.eos_token_id.contains(&token)
            || generation.tokens.len() == room
        {
            break;
        }
        logits = model.backend.to_vec::<f32>(&model.extend(&[token], &mut cache)?)?;
    }
    let decoded = generation.tokens.len().saturating_sub(1);
    generation.decode_tokens_per_second = decoded as f64 / start.elapsed().as_secs_f64().max(1e-9);
    Ok(generation)
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
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    let by_score = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
    if config.temperature == 0.0 {
        return Ok(order.into_iter().min_by(by_score).unwrap_or(0));
    }
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
