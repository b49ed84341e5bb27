//! Gemma 1 to 3 (text): scaled embeddings, norms by 1 plus their weight; Gemma 2 with bounded scores and logits and
//! norms after attention and MLP; Gemma 3 with norms on queries and keys and a rotary embedding of its own for layers
//! with a window.

use super::config::{Keys, ModelConfig, Names};
use super::llama;
use super::rope::{RopeConfig, RopeScaling};
use crate::error::Result;
use serde_json::json;

/// Gemma: Llama with GELU, large heads and a tied head.
///
/// # Errors
/// As [`llama::config`].
pub fn gemma(keys: &Keys<'_>) -> Result<ModelConfig> {
    named(keys, "gemma")
}

fn named(keys: &Keys<'_>, model_type: &str) -> Result<ModelConfig> {
    keys.refuse(&[("use_bidirectional_attention", json!(false))])?;
    let mut config = llama::config(keys, model_type)?;
    if keys.get("head_dim").is_none() {
        config.head_dim = 256;
        config.rope = Some(RopeConfig::from_keys(keys, config.head_dim, false)?);
    }
    // Old files of Gemma 1 say \"gelu\" in `hidden_act` and mean the approximation, as `hidden_activation` says.
    config.hidden_act = match keys.get("hidden_activation") {
        Some(_) => keys.activation("hidden_activation", "gelu_pytorch_tanh")?,
        None => keys.activation("", "gelu_pytorch_tanh")?,
    };
    config.max_position_embeddings = keys.usize_opt("max_position_embeddings")?.unwrap_or(8192);
    config.tie_word_embeddings = keys.bool_or("tie_word_embeddings", true)?;
    config.padding_idx = keys.padding_idx(Some(0), config.vocab_size)?;
    config.norm_plus_one = true;
    config.embed_scale = Some((config.hidden_size as f32).sqrt());
    Ok(config)
}

/// Gemma 2.
///
/// # Errors
/// As [`llama::config`].
pub fn gemma2(keys: &Keys<'_>) -> Result<ModelConfig> {
    let mut config = named(keys, "gemma2")?;
    config.sliding_window = Some(keys.usize_opt("sliding_window")?.unwrap_or(4096));
    config.sliding_layers = keys.sliding_layers(config.num_hidden_layers, |layer| layer % 2 == 0)?;
    let scalar = keys.f64_opt("query_pre_attn_scalar")?.unwrap_or(256.0);
    config.attention_scale = Some(scalar.powf(-0.5) as f32);
    config.attn_logit_softcapping = cap(keys, "attn_logit_softcapping", Some(50.0))?;
    config.final_logit_softcapping = cap(keys, "final_logit_softcapping", Some(30.0))?;
    config.names = Names {
        attention_norm: Some("post_attention_layernorm"),
        post_norm: "pre_feedforward_layernorm",
        mlp_norm: Some("post_feedforward_layernorm"),
        ..llama::NAMES
    };
    Ok(config)
}

/// A bound; the key may be there and null, which means none.
fn cap(keys: &Keys<'_>, key: &str, absent: Option<f32>) -> Result<Option<f32>> {
    if !keys.contains(key) {
        return Ok(absent);
    }
    match keys.f64_opt(key)? {
        Some(cap) if cap <= 0.0 || !cap.is_finite() => {
            Err(keys.error(key, format!("expected a positive number, found {cap}")))
        }
        cap => Ok(cap.map(|cap| cap as f32)),
    }
}

/// Gemma 3's language model.
///
/// # Errors
/// As [`llama::config`].
pub fn gemma3(keys: &Keys<'_>) -> Result<ModelConfig> {
    let mut config = gemma2(keys)?;
    config.model_type = "gemma3_text".to_string();
    let pattern = keys.usize_opt("sliding_window_pattern")?.unwrap_or(6).max(1);
    config.sliding_layers =
        keys.sliding_layers(config.num_hidden_layers, |layer| !(layer + 1).is_multiple_of(pattern))?;
    config.max_position_embeddings = keys.usize_opt("max_position_embeddings")?.unwrap_or(131_072);
    config.attn_logit_softcapping = cap(keys, "attn_logit_softcapping", None)?;
    config.final_logit_softcapping = cap(keys, "final_logit_softcapping", None)?;
    config.names.qk_norm = Some(("self_attn.q_norm", "self_attn.k_norm"));
    let (global, local) = match keys.object("rope_parameters")? {
        Some(both) if both.contains("full_attention") => {
            let side = |name: &str| RopeConfig::from_section(keys, &both, name, config.head_dim);
            (side("full_attention")?, side("sliding_attention")?)
        }
        _ => {
            let mut global = RopeConfig::from_keys(keys, config.head_dim, false)?;
            if keys.get("rope_theta").is_none() && keys.get("rope_parameters").is_none() {
                global.rope_theta = 1_000_000.0;
            }
            let theta = keys.f64_opt("rope_local_base_freq")?.unwrap_or(10_000.0);
            (global, RopeConfig { rope_theta: theta, scaling: RopeScaling::Default, ..global })
        }
    };
    config.rope = Some(global);
    config.local_rope = Some(local);
    Ok(config)
}
