//! Phi-3: Llama with queries, keys and values in one layer, and gate and up in another.

use super::config::{Keys, MlpNames, ModelConfig, Names, QkvNames};
use super::llama;
use crate::error::Result;

const NAMES: Names = Names {
    qkv: QkvNames::Fused("self_attn.qkv_proj"),
    mlp: MlpNames::FusedGated { gate_up: "mlp.gate_up_proj", down: "mlp.down_proj" },
    ..llama::NAMES
};

/// Interprets Phi-3's keys.
///
/// # Errors
/// As [`llama::config`].
pub fn config(keys: &Keys<'_>) -> Result<ModelConfig> {
    let mut config = llama::config(keys, "phi3")?;
    config.max_position_embeddings = keys.usize_opt("max_position_embeddings")?.unwrap_or(4096);
    config.norm_eps = keys.f64_opt("rms_norm_eps")?.unwrap_or(1e-5) as f32;
    config.padding_idx = keys.padding_idx(Some(32_000), config.vocab_size)?;
    config.sliding_window = keys.usize_opt("sliding_window")?;
    config.names = NAMES;
    Ok(config)
}
