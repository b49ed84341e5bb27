//! Qwen2 (also Qwen1.5 and Qwen2.5) and Qwen3: Llama with biases, or with norms on queries and keys.

use super::config::{Keys, ModelConfig, Names};
use super::llama;
use crate::error::Result;

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
    }
    config.names = Names { qk_norm: Some(("self_attn.q_norm", "self_attn.k_norm")), ..llama::NAMES };
    sliding_window(keys, &mut config)?;
    Ok(config)
}

/// Qwen's window counts only if `use_sliding_window` says so.
fn sliding_window(keys: &Keys<'_>, config: &mut ModelConfig) -> Result<()> {
    if keys.bool_or("use_sliding_window", false)? {
        config.sliding_window = keys.usize_opt("sliding_window")?;
    }
    Ok(())
}
