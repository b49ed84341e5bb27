//! The Llama family: Llama 1 to 3, Mistral, and all that share their layout.

use super::config::{Keys, MlpNames, ModelConfig, Names, QkvNames};
use super::rope::RopeConfig;
use crate::error::Result;
use serde_json::json;

/// Llama's module paths.
pub const NAMES: Names = Names {
    base_prefix: "model.",
    embed: "model.embed_tokens",
    positions: None,
    layers: "model.layers",
    norm: "model.norm",
    head: "lm_head",
    input_norm: "input_layernorm",
    attention_norm: None,
    post_norm: "post_attention_layernorm",
    mlp_norm: None,
    qkv: QkvNames::Separate { q: "self_attn.q_proj", k: "self_attn.k_proj", v: "self_attn.v_proj" },
    qk_norm: None,
    o: "self_attn.o_proj",
    mlp: MlpNames::Gated { gate: "mlp.gate_proj", up: "mlp.up_proj", down: "mlp.down_proj" },
};

/// Interprets the keys that Llama, Mistral and Qwen share.
///
/// # Errors
/// When a key is missing, malformed or not supported.
pub fn config(keys: &Keys<'_>, model_type: &str) -> Result<ModelConfig> {
    keys.refuse(&[("pretraining_tp", json!(1))])?;
    let hidden_size = keys.usize("hidden_size")?;
    let num_attention_heads = keys.usize("num_attention_heads")?;
    let head_dim = match keys.usize_opt("head_dim")? {
        Some(head_dim) => head_dim,
        None => hidden_size / num_attention_heads.max(1),
    };
    let vocab_size = keys.usize("vocab_size")?;
    let attention_bias = keys.bool_or("attention_bias", false)?;
    Ok(ModelConfig {
        model_type: model_type.to_string(),
        vocab_size,
        hidden_size,
        intermediate_size: keys.usize("intermediate_size")?,
        num_hidden_layers: keys.usize("num_hidden_layers")?,
        num_attention_heads,
        num_key_value_heads: keys.usize_opt("num_key_value_heads")?.unwrap_or(num_attention_heads),
        head_dim,
        max_position_embeddings: keys.usize_opt("max_position_embeddings")?.unwrap_or(2048),
        hidden_act: keys.activation("hidden_act", "silu")?,
        norm_eps: keys.f64_opt("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        layer_norm: false,
        rope: Some(RopeConfig::from_keys(keys, head_dim, false)?),
        qkv_bias: attention_bias,
        o_bias: attention_bias,
        mlp_bias: keys.bool_or("mlp_bias", false)?,
        conv1d: false,
        tie_word_embeddings: keys.bool_or("tie_word_embeddings", false)?,
        sliding_window: if model_type == "mistral" { keys.usize_opt("sliding_window")? } else { None },
        sliding_layers: Vec::new(),
        local_rope: None,
        attention_scale: None,
        attn_logit_softcapping: None,
        final_logit_softcapping: None,
        embed_scale: None,
        norm_plus_one: false,
        eos_token_id: keys.token_ids("eos_token_id")?,
        bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
        padding_idx: keys.padding_idx(None, vocab_size)?,
        names: NAMES,
    })
}
