//! The tokenizer inside a GGUF file, as a `tokenizer.json` and what goes with it.
//!
//! Pre-tokenizers by llama.cpp's names (`llama-vocab.cpp`).

use crate::error::{Error, Result};
use crate::model::gguf::Gguf;
use serde_json::{Map, Value, json};
use std::path::Path;

/// GPT-2's pattern.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How text is cut before merges, by llama.cpp's names: patterns one after the other.
const PRE_TOKENIZERS: [(&[&str], &[&str]); 4] = [
    (&["default", "gpt-2", "phi-2"], &[GPT2]),
    (&["smollm", "starcoder", "refact", "command-r"], &[r"\p{N}", GPT2]),
    (&["llama-bpe", "llama3", "smaug-bpe"], &[LLAMA3]),
    (&["qwen2", "deepseek-r1-qwen"], &[QWEN2]),
];

/// Kinds of tokens that stand for themselves in a text: control and user-defined ones.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// What a model's folder would hold.
pub(crate) struct TokenizerFiles {
    /// The content of `tokenizer.json`.
    pub tokenizer: Vec<u8>,
    /// The special tokens and the chat template, by the keys of `tokenizer_config.json`.
    pub config: Map<String, Value>,
    /// `bos_token_id` and `eos_token_id`.
    pub ids: Map<String, Value>,
}

/// The tokenizer of a GGUF file.
///
/// # Errors
/// When it is of a kind that is not known or malformed.
pub(crate) fn tokenizer_files(path: &Path) -> Result<TokenizerFiles> {
    let file = Gguf::open(path)?;
    let key = |name: &str| file.key(&format!("tokenizer.{name}"));
    let error =
        |name: &str, message: String| Error::config(path.display(), format!("tokenizer.{name}"), message);
    let list = |name: &str| {
        key(name)
            .and_then(Value::as_array)
            .ok_or_else(|| error(name, "expected a list, found none".to_string()))
    };
    let kind = key("ggml.model").and_then(Value::as_str).unwrap_or("none");
    if kind != "gpt2" {
        return Err(error(
            "ggml.model",
            format!(
                "`{kind}` is not supported; supported: gpt2 (byte-level BPE); use the model's Hugging Face folder"
            ),
        ));
    }
    let pre = key("ggml.pre").and_then(Value::as_str).unwrap_or("default");
    let found = PRE_TOKENIZERS.iter().find(|(names, _)| names.contains(&pre));
    let (_, patterns) = found.ok_or_else(|| {
        let known: Vec<&str> = PRE_TOKENIZERS.iter().flat_map(|(names, _)| names.iter().copied()).collect();
        error("ggml.pre", format!("`{pre}` is not supported; supported: {}", known.join(", ")))
    })?;
    let tokens: Vec<&str> = list("ggml.tokens")?.iter().map(|t| t.as_str().unwrap_or_default()).collect();
    let types: Vec<i64> = match key("ggml.token_type").and_then(Value::as_array) {
        Some(types) => types.iter().map(|t| t.as_i64().unwrap_or(1)).collect(),
        None => vec![1; tokens.len()],
    };
    let merges = list("ggml.merges")?;
    let vocab: Map<String, Value> =
        tokens.iter().enumerate().map(|(i, t)| (t.to_string(), json!(i))).collect();
    let added = tokens.iter().zip(&types).enumerate();
    let added: Vec<Value> = added
        .filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED))
        .map(|(id, (content, kind))| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *kind == CONTROL,
            })
        })
        .collect();
    let mut cuts: Vec<Value> = patterns
        .iter()
        .map(|p| json!({"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": false}))
        .collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    cuts.push(byte_level.clone());
    let special = |name: &str| {
        let id = key(name)?.as_u64()?;
        Some((id, *tokens.get(id as usize)?))
    };
    let bos = special("ggml.bos_token_id");
    let add_bos = key("ggml.add_bos_token").and_then(Value::as_bool).unwrap_or(false);
    let post_processor = match bos.filter(|_| add_bos) {
        None => Value::Null,
        Some((id, text)) => json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]}},
        }),
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "post_processor": post_processor, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        },
    });
    let (mut config, mut ids) = (Map::new(), Map::new());
    for (name, own) in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")] {
        if let Some((id, text)) = special(&format!("ggml.{own}_token_id")) {
            config.insert(format!("{name}_token"), json!(text));
            ids.insert(format!("{name}_token_id"), json!(id));
        }
    }
    if let Some(template) = key("chat_template") {
        config.insert("chat_template".into(), template.clone());
    }
    Ok(TokenizerFiles { tokenizer: tokenizer.to_string().into_bytes(), config, ids })
}
