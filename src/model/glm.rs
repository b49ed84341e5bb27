//! GLM-4 and its kin: `glm` and `glm4` as transformers has them, and ChatGLM2, ChatGLM3 and GLM-4-9B as first
//! published (`chatglm`), with the queries, keys and values in one layer.

use super::config::{Keys, MlpNames, ModelConfig, Names, QkvNames};
use super::llama;
use super::rope::{RopeConfig, RopeScaling};
use crate::backend::Activation;
use crate::error::Result;
use serde_json::json;

const NAMES: Names = Names {
    mlp: MlpNames::FusedGated { gate_up: "mlp.gate_up_proj", down: "mlp.down_proj" },
    ..llama::NAMES
};

/// ChatGLM's module paths.
const CHATGLM_NAMES: Names = Names {
    base_prefix: "transformer.",
    embed: "transformer.embedding.word_embeddings",
    positions: None,
    layers: "transformer.encoder.layers",
    norm: "transformer.encoder.final_layernorm",
    head: "transformer.output_layer",
    input_norm: "input_layernorm",
    attention_norm: None,
    post_norm: "post_attention_layernorm",
    mlp_norm: None,
    qkv: QkvNames::Fused("self_attention.query_key_value"),
    qk_norm: None,
    o: "self_attention.dense",
    mlp: MlpNames::FusedGated { gate_up: "mlp.dense_h_to_4h", down: "mlp.dense_4h_to_h" },
};

/// GLM: Llama with half of each head rotated, pair by pair, and gate and up in one layer.
///
/// # Errors
/// As [`llama::config`].
pub fn glm(keys: &Keys<'_>) -> Result<ModelConfig> {
    let mut config = llama::config(keys, "glm")?;
    if keys.get("head_dim").is_none() {
        config.head_dim = 128;
    }
    let mut rope = RopeConfig::from_keys(keys, config.head_dim, true)?;
    if !has_partial(keys)? {
        rope.rotary_dim = config.head_dim / 2;
    }
    config.rope = Some(rope);
    config.qkv_bias = keys.bool_or("attention_bias", true)?;
    config.padding_idx = keys.padding_idx(Some(151_329), config.vocab_size)?;
    config.o_bias = false;
    config.mlp_bias = false;
    config.max_position_embeddings = keys.usize_opt("max_position_embeddings")?.unwrap_or(131_072);
    config.norm_eps = keys.f64_opt("rms_norm_eps")?.unwrap_or(1.5625e-7) as f32;
    config.names = NAMES;
    Ok(config)
}

/// Whether the share of a head that is rotated is given.
fn has_partial(keys: &Keys<'_>) -> Result<bool> {
    let inner = keys.object("rope_parameters")?;
    Ok(keys.get("partial_rotary_factor").is_some()
        || inner.is_some_and(|inner| inner.get("partial_rotary_factor").is_some()))
}

/// GLM-4 (0414): GLM with norms on what attention and MLP give.
///
/// # Errors
/// As [`llama::config`].
pub fn glm4(keys: &Keys<'_>) -> Result<ModelConfig> {
    let mut config = glm(keys)?;
    config.model_type = "glm4".to_string();
    config.qkv_bias = keys.bool_or("attention_bias", false)?;
    config.names = Names {
        attention_norm: Some("post_self_attn_layernorm"),
        mlp_norm: Some("post_mlp_layernorm"),
        ..NAMES
    };
    Ok(config)
}

/// ChatGLM2 and later, in their own names.
///
/// # Errors
/// When a key is missing, malformed or not supported; ChatGLM 1 has another architecture and is refused.
pub fn chatglm(keys: &Keys<'_>) -> Result<ModelConfig> {
    keys.refuse(&[
        ("multi_query_attention", json!(true)),
        ("rmsnorm", json!(true)),
        ("post_layer_norm", json!(true)),
        ("apply_residual_connection_post_layernorm", json!(false)),
        ("add_bias_linear", json!(false)),
        ("original_rope", json!(true)),
        ("quantization_bit", json!(0)),
        ("pre_seq_len", json!(null)),
    ])?;
    if keys.get("position_encoding_2d").is_some() {
        return Err(
            keys.error("position_encoding_2d", "ChatGLM 1 is not supported; supported: ChatGLM2 and later")
        );
    }
    let (hidden_size, heads) = (keys.usize("hidden_size")?, keys.usize("num_attention_heads")?);
    let head_dim = keys.usize_opt("kv_channels")?.unwrap_or(hidden_size / heads.max(1));
    let rope_theta = 10_000.0 * keys.f64_opt("rope_ratio")?.unwrap_or(1.0);
    Ok(ModelConfig {
        model_type: "chatglm".to_string(),
        vocab_size: keys.usize("padded_vocab_size")?,
        hidden_size,
        intermediate_size: keys.usize("ffn_hidden_size")?,
        num_hidden_layers: keys.usize("num_layers")?,
        num_attention_heads: heads,
        num_key_value_heads: keys.usize_opt("multi_query_group_num")?.unwrap_or(1),
        head_dim,
        max_position_embeddings: keys.usize("seq_length")?,
        hidden_act: Activation::Silu,
        norm_eps: keys.f64_opt("layernorm_epsilon")?.unwrap_or(1e-5) as f32,
        layer_norm: false,
        rope: Some(RopeConfig {
            rope_theta,
            rotary_dim: head_dim / 2,
            interleaved: true,
            scaling: RopeScaling::Default,
        }),
        qkv_bias: keys.bool_or("add_qkv_bias", false)?,
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
        names: CHATGLM_NAMES,
    })
}
