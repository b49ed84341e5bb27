//! GPT-2 and DialoGPT: learned positions, LayerNorm, fused projections stored as Conv1D, a plain GELU MLP.
//!
//! The base model's own dropout (`resid_pdrop` and its kin) is not applied: the base is frozen.

use super::config::{Keys, MlpNames, ModelConfig, Names, QkvNames};
use crate::error::Result;
use serde_json::json;

const NAMES: Names = Names {
    base_prefix: "transformer.",
    embed: "transformer.wte",
    positions: Some("transformer.wpe"),
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
    mlp: MlpNames::Plain { fc: "mlp.c_fc", proj: "mlp.c_proj" },
};

/// Interprets GPT-2's keys.
///
/// # Errors
/// When a key is missing, malformed or not supported.
pub fn config(keys: &Keys<'_>) -> Result<ModelConfig> {
    keys.refuse(&[
        ("scale_attn_weights", json!(true)),
        ("scale_attn_by_inverse_layer_idx", json!(false)),
        ("add_cross_attention", json!(false)),
    ])?;
    let hidden_size = keys.usize("n_embd")?;
    let num_attention_heads = keys.usize("n_head")?;
    let positions = match keys.usize_opt("n_positions")? {
        Some(n) => n,
        None => keys.usize("n_ctx")?,
    };
    Ok(ModelConfig {
        model_type: "gpt2".to_string(),
        vocab_size: keys.usize("vocab_size")?,
        hidden_size,
        intermediate_size: keys.usize_opt("n_inner")?.unwrap_or(4 * hidden_size),
        num_hidden_layers: keys.usize("n_layer")?,
        num_attention_heads,
        num_key_value_heads: num_attention_heads,
        head_dim: hidden_size / num_attention_heads.max(1),
        max_position_embeddings: positions,
        hidden_act: keys.activation("activation_function", "gelu_new")?,
        norm_eps: keys.f64_opt("layer_norm_epsilon")?.unwrap_or(1e-5) as f32,
        layer_norm: true,
        rope: None,
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        conv1d: true,
        tie_word_embeddings: keys.bool_or("tie_word_embeddings", true)?,
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
        names: NAMES,
    })
}
