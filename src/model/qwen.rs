//! The first Qwen, in its own names; Qwen2 (also Qwen1.5 and Qwen2.5) and Qwen3: Llama with biases, or with norms on
//! queries and keys.

use super::config::{Keys, MlpNames, ModelConfig, Names, QkvNames};
use super::llama;
use super::rope::{RopeConfig, RopeScaling};
use crate::backend::Activation;
use crate::error::Result;
use serde_json::json;

/// The first Qwen's module paths; its `w1` is multiplied by the activation of its `w2`.
const QWEN_NAMES: Names = Names {
    base_prefix: "transformer.",
    embed: "transformer.wte",
    positions: None,
    layers: "transformer.h",
    norm: "transformer.ln_f",
    head: "lm_head",
    input_norm: "ln_1",
    attention_norm: None,
    post_norm: "ln_2",
    mlp_norm: None,
    qkv: QkvNames::Fused("attn.c_attn"),
    qk_norm: None,
    o: "attn.c_proj",
    mlp: MlpNames::Gated { gate: "mlp.w2", up: "mlp.w1", down: "mlp.c_proj" },
};

/// The first Qwen. Beyond `seq_length` it changes frequencies and scores by the length; such sequences are refused.
///
/// # Errors
/// When a key is missing, malformed or not supported.
pub fn qwen(keys: &Keys<'_>) -> Result<ModelConfig> {
    keys.refuse(&[
        ("scale_attn_weights", json!(true)),
        ("rotary_pct", json!(1.0)),
        ("no_bias", json!(true)),
    ])?;
    let (hidden_size, heads) = (keys.usize("hidden_size")?, keys.usize("num_attention_heads")?);
    let head_dim = keys.usize_opt("kv_channels")?.unwrap_or(hidden_size / heads.max(1));
    let positions = match keys.usize_opt("seq_length")? {
        Some(n) => n,
        None => keys.usize("max_position_embeddings")?,
    };
    Ok(ModelConfig {
        model_type: "qwen".to_string(),
        vocab_size: keys.usize("vocab_size")?,
        hidden_size,
        // The key counts gate and up.
        intermediate_size: keys.usize("intermediate_size")? / 2,
        num_hidden_layers: keys.usize("num_hidden_layers")?,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim,
        max_position_embeddings: positions,
        hidden_act: Activation::Silu,
        norm_eps: keys.f64_opt("layer_norm_epsilon")?.unwrap_or(1e-6) as f32,
        layer_norm: false,
        rope: Some(RopeConfig {
            rope_theta: keys.f64_opt("rotary_emb_base")?.unwrap_or(10_000.0),
            rotary_dim: head_dim,
            interleaved: false,
            scaling: RopeScaling::Default,
        }),
        qkv_bias: true,
        o_bias: false,
        mlp_bias: false,
        conv1d: false,
        tie_word_embeddings: keys.bool_or("tie_word_embeddings", false)?,
        sliding_window: None,
        sliding_layers: Vec::new(),
        local_rope: None,
        attention_scale: None,
        attn_logit_softcapping: None,
        final_logit_softcapping: None,
        embed_scale: None,
        norm_plus_one: false,
        eos_token_id: keys.token_ids("eos_token_id")?,
        bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
        padding_idx: None,
        names: QWEN_NAMES,
    })
}

/// Qwen2: biases on the query, key and value projections.
///
/// # Errors
/// As [`llama::config`].
pub fn qwen2(keys: &Keys<'_>) -> Result<ModelConfig> {
    let mut config = llama::config(keys, "qwen2")?;
    config.qkv_bias = true;
    config.o_bias = false;
    config.max_position_embeddings = keys.usize_opt("max_position_embeddings")?.unwrap_or(32_768);
    sliding_window(keys, &mut config)?;
    Ok(config)
}

/// Qwen3: an RMSNorm over each head's queries and keys, and an explicit `head_dim`.
///
/// # Errors
/// As [`llama::config`].
pub fn qwen3(keys: &Keys<'_>) -> Result<ModelConfig> {
    let mut config = llama::config(keys, "qwen3")?;
    if keys.get("head_dim").is_none() {
        config.head_dim = 128;
        config.rope = Some(RopeConfig::from_keys(keys, config.head_dim, false)?);
    }
    config.names = Names { qk_norm: Some(("self_attn.q_norm", "self_attn.k_norm")), ..llama::NAMES };
    sliding_window(keys, &mut config)?;
    Ok(config)
}

/// Qwen's window counts only if `use_sliding_window` says so.
fn sliding_window(keys: &Keys<'_>, config: &mut ModelConfig) -> Result<()> {
    if keys.bool_or("use_sliding_window", false)? {
        config.sliding_window = keys.usize_opt("sliding_window")?;
        let full = keys.usize_opt("max_window_layers")?.unwrap_or(28);
        config.sliding_layers = keys.sliding_layers(config.num_hidden_layers, |layer| layer >= full)?;
    }
    Ok(())
}
