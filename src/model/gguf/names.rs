//! GGUF's names and settings in transformers' terms.

use super::Gguf;
use crate::error::{Error, Result};
use crate::model::config::{MlpNames, ModelConfig, QkvNames};
use serde_json::{Value, json};

/// Architectures by GGUF's name, with transformers' name and class, and the activation.
const ARCHITECTURES: [(&str, &str, &str, &str); 8] = [
    ("llama", "llama", "LlamaForCausalLM", "silu"),
    ("qwen2", "qwen2", "Qwen2ForCausalLM", "silu"),
    ("qwen3", "qwen3", "Qwen3ForCausalLM", "silu"),
    ("phi3", "phi3", "Phi3ForCausalLM", "silu"),
    ("glm4", "glm4", "Glm4ForCausalLM", "silu"),
    ("gemma", "gemma", "GemmaForCausalLM", "gelu_pytorch_tanh"),
    ("gemma2", "gemma2", "Gemma2ForCausalLM", "gelu_pytorch_tanh"),
    ("gemma3", "gemma3_text", "Gemma3ForCausalLM", "gelu_pytorch_tanh"),
];

/// A `config.json` with what the file's keys say.
pub fn config(file: &Gguf) -> Result<Value> {
    let error = |key: &str, message: String| Error::config(file.path.display(), key, message);
    let arch = file.key("general.architecture").and_then(Value::as_str).unwrap_or("none");
    let found = ARCHITECTURES.iter().find(|(name, ..)| *name == arch);
    let (arch, model_type, class, activation) = *found.ok_or_else(|| {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|(name, ..)| *name).collect();
        error("general.architecture", format!("`{arch}` is not supported; supported: {}", known.join(", ")))
    })?;
    let get = |name: &str| file.key(&format!("{arch}.{name}")).cloned();
    let need = |name: &str| {
        get(name)
            .ok_or_else(|| error(&format!("{arch}.{name}"), "expected a number, found nothing".to_string()))
    };
    let vocab_size = match file.info("token_embd.weight") {
        Some(([vocab_size, _], _)) => *vocab_size,
        _ => return Err(Error::tensor("token_embd.weight", format!("missing in {}", file.path.display()))),
    };
    let heads = need("attention.head_count")?;
    let mut keys = json!({
        "architectures": [class],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": need("embedding_length")?,
        "intermediate_size": need("feed_forward_length")?,
        "num_hidden_layers": need("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv").unwrap_or(heads),
        "max_position_embeddings": need("context_length")?,
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon")?,
        "hidden_act": activation,
        "hidden_activation": activation,
        "rope_theta": get("rope.freq_base").unwrap_or(json!(10_000.0)),
        "tie_word_embeddings": file.info("output.weight").is_none(),
        "attention_bias": file.info("blk.0.attn_q.bias").is_some(),
        "eos_token_id": file.key("tokenizer.ggml.eos_token_id").cloned().unwrap_or(Value::Null),
        "pad_token_id": file.key("tokenizer.ggml.padding_token_id").cloned().unwrap_or(Value::Null),
        "bos_token_id": file.key("tokenizer.ggml.bos_token_id").cloned().unwrap_or(Value::Null),
    });
    if arch == "llama" && file.info("blk.0.attn_q.bias").is_some() {
        return Err(Error::tensor("blk.0.attn_q.bias", "biases of the llama architecture are not supported"));
    }
    let mut set = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            keys[key] = value;
        }
    };
    let head_dim = get("attention.key_length");
    if let (Some(rotary), Some(dim)) = (
        get("rope.dimension_count").and_then(|v| v.as_f64()),
        head_dim.as_ref().and_then(Value::as_f64).filter(|dim| *dim > 0.0),
    ) {
        set("partial_rotary_factor", Some(json!(rotary / dim)));
    }
    set("head_dim", head_dim);
    if model_type.starts_with("gemma") || model_type == "phi3" {
        set("sliding_window", get("attention.sliding_window").filter(|w| w.as_u64() != Some(0)));
    }
    set("attn_logit_softcapping", get("attn_logit_softcapping"));
    set("final_logit_softcapping", get("final_logit_softcapping"));
    match get("rope.scaling.type").as_ref().and_then(Value::as_str) {
        None | Some("none") => {}
        Some(kind) => set(
            "rope_scaling",
            Some(json!({
                "rope_type": kind,
                "factor": get("rope.scaling.factor"),
                "original_max_position_embeddings": get("rope.scaling.original_context_length"),
                "attention_factor": get("rope.scaling.attn_factor"),
            })),
        ),
    }
    Ok(keys)
}

/// The modules outside the layers: transformers' names with the file's.
fn outer(config: &ModelConfig) -> [(&'static str, &'static str); 3] {
    let names = &config.names;
    [(names.embed, "token_embd"), (names.norm, "output_norm"), (names.head, "output")]
}

/// The modules of a layer: transformers' names with the file's.
fn inner(config: &ModelConfig) -> Vec<(&'static str, &'static str)> {
    let names = &config.names;
    let mut table =
        vec![(names.input_norm, "attn_norm"), (names.post_norm, "ffn_norm"), (names.o, "attn_output")];
    table.extend(names.attention_norm.map(|n| (n, "post_attention_norm")));
    table.extend(names.mlp_norm.map(|n| (n, "post_ffw_norm")));
    match names.qkv {
        QkvNames::Separate { q, k, v } => table.extend([(q, "attn_q"), (k, "attn_k"), (v, "attn_v")]),
        QkvNames::Fused(qkv) => table.push((qkv, "attn_qkv")),
    }
    if let Some((q, k)) = names.qk_norm {
        table.extend([(q, "attn_q_norm"), (k, "attn_k_norm")]);
    }
    match names.mlp {
        MlpNames::Gated { gate, up, down } => {
            table.extend([(gate, "ffn_gate"), (up, "ffn_up"), (down, "ffn_down")]);
        }
        // Gate and up are one tensor by the name of up.
        MlpNames::FusedGated { gate_up, down } => table.extend([(gate_up, "ffn_up"), (down, "ffn_down")]),
        MlpNames::Plain { fc, proj } => table.extend([(fc, "ffn_up"), (proj, "ffn_down")]),
    }
    table
}

/// The file's name of the tensor that transformers calls `name`.
pub fn own_name(name: &str, config: &ModelConfig) -> Option<String> {
    let (module, kind) = name.rsplit_once('.')?;
    if let Some((_, own)) = outer(config).into_iter().find(|(ours, _)| *ours == module) {
        return Some(format!("{own}.{kind}"));
    }
    let (number, part) = module.strip_prefix(config.names.layers)?.strip_prefix('.')?.split_once('.')?;
    let own = inner(config).into_iter().find(|(ours, _)| *ours == part)?.1;
    Some(format!("blk.{number}.{own}.{kind}"))
}

/// What transformers calls the file's tensor `own`.
pub fn full_name(own: &str, config: &ModelConfig) -> Option<String> {
    let (module, kind) = own.rsplit_once('.')?;
    if let Some((ours, _)) = outer(config).into_iter().find(|(_, name)| *name == module) {
        return Some(format!("{ours}.{kind}"));
    }
    let (number, part) = module.strip_prefix("blk.")?.split_once('.')?;
    let ours = inner(config).into_iter().find(|(_, name)| *name == part)?.0;
    Some(format!("{}.{number}.{ours}.{kind}", config.names.layers))
}

/// Where each row of a tensor is in the file. llama.cpp keeps the pairs that rotary embedding turns beside each other
/// for the `llama` architecture; transformers keeps halves.
pub fn rows(
    file: &Gguf,
    own: &str,
    config: &ModelConfig,
    rows: usize,
) -> impl Fn(usize) -> usize + Sync + use<> {
    let permuted = file.key("general.architecture").and_then(Value::as_str) == Some("llama")
        && (own.contains(".attn_q.") || own.contains(".attn_k."));
    let head_dim = config.head_dim;
    let permuted = permuted && rows.is_multiple_of(head_dim);
    move |row| {
        if !permuted {
            return row;
        }
        let (head, within) = (row / head_dim, row % head_dim);
        let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
        head * head_dim + 2 * pair + half
    }
}

/// Whether the file's norm has the 1 in it that the family adds.
pub fn is_shifted(own: &str, config: &ModelConfig) -> bool {
    config.norm_plus_one && own.ends_with("norm.weight")
}
