//! The tokenizer inside a GGUF file, as a `tokenizer.json` and what goes with it.
//!
//! Pre-tokenizers by llama.cpp's names (`llama-vocab.cpp`).

mod sentencepiece;

use crate::error::{Error, Result};
use crate::fs::write_atomic_bytes;
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
    #[cfg_attr(
        not(feature = "text"),
        expect(dead_code, reason = "read where a merged model gets its files")
    )]
    pub ids: Map<String, Value>,
}

impl TokenizerFiles {
    /// Writes `tokenizer.json` and `tokenizer_config.json`.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        write_atomic_bytes(&folder.join("tokenizer.json"), &self.tokenizer)?;
        let mut config = self.config.clone();
        config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        let text = serde_json::to_string_pretty(&config).map_err(|e| Error::format(folder, e.to_string()))?;
        write_atomic_bytes(&folder.join("tokenizer_config.json"), text.as_bytes())
    }
}

/// What differs between kinds of tokenizers, in the terms of `tokenizer.json`.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
    /// Whether a text begins with the beginning-of-sequence token unless the file says otherwise.
    adds_bos: bool,
}

/// The tokenizer of a GGUF file.
///
/// # Errors
/// When it is of a kind that is not known or malformed.
pub(crate) fn tokenizer_files(path: &Path) -> Result<TokenizerFiles> {
    let file = Gguf::open(path)?;
    let key = |name: &str| file.key(&format!("tokenizer.ggml.{name}"));
    let error =
        |name: &str, message: &str| Error::config(path.display(), format!("tokenizer.ggml.{name}"), message);
    let list = |name: &str| key(name).and_then(Value::as_array);
    let need = |name: &str| list(name).ok_or_else(|| error(name, "expected a list, found none"));
    let mut tokens: Vec<String> =
        need("tokens")?.iter().map(|t| t.as_str().unwrap_or_default().to_string()).collect();
    let parts = match key("model").and_then(Value::as_str).unwrap_or("none") {
        "gpt2" => {
            let pre = key("pre").and_then(Value::as_str).unwrap_or("default");
            let found = PRE_TOKENIZERS.iter().find(|(names, _)| names.contains(&pre));
            let (_, patterns) = found.ok_or_else(|| {
                let known: Vec<&str> =
                    PRE_TOKENIZERS.iter().flat_map(|(names, _)| names.iter().copied()).collect();
                error("pre", &format!("`{pre}` is not supported; supported: {}", known.join(", ")))
            })?;
            byte_level(&tokens, need("merges")?, patterns)
        }
        "llama" => {
            let architecture = file.key("general.architecture").and_then(Value::as_str).unwrap_or_default();
            let scores =
                list("scores").map(|s| s.iter().map(|s| s.as_f64().unwrap_or(0.0)).collect::<Vec<_>>());
            let scores = scores.filter(|scores| scores.len() == tokens.len());
            if list("merges").is_none() && scores.is_none() {
                return Err(error("scores", "expected a score for each token, found none"));
            }
            let prefix = key("add_space_prefix").and_then(Value::as_bool).unwrap_or(true);
            sentencepiece::parts(architecture, &mut tokens, scores.as_deref(), list("merges"), prefix)
        }
        other => {
            return Err(error(
                "model",
                &format!(
                    "`{other}` is not supported; supported: gpt2 (byte-level BPE) and llama (sentencepiece); use the model's \
                     Hugging Face folder"
                ),
            ));
        }
    };
    Ok(assemble(&file, &tokens, parts))
}

/// GPT-2's kind: bytes as characters.
fn byte_level(tokens: &[String], merges: &[Value], patterns: &[&str]) -> Parts {
    let mut cuts: Vec<Value> = patterns
        .iter()
        .map(|p| json!({"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": false}))
        .collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    cuts.push(byte_level.clone());
    Parts {
        normalizer: Value::Null,
        pre_tokenizer: json!({"type": "Sequence", "pretokenizers": cuts}),
        decoder: byte_level,
        model: bpe(tokens, json!(merges), &[]),
        adds_bos: false,
    }
}

/// Byte-pair encoding with some settings of its own.
fn bpe(tokens: &[String], merges: Value, settings: &[(&str, Value)]) -> Value {
    let vocab: Map<String, Value> = tokens.iter().enumerate().map(|(i, t)| (t.clone(), json!(i))).collect();
    let mut model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": vocab, "merges": merges,
    });
    for (key, value) in settings {
        model[*key] = value.clone();
    }
    model
}

/// The files: special tokens and what a text begins and ends with are alike for all kinds.
fn assemble(file: &Gguf, tokens: &[String], parts: Parts) -> TokenizerFiles {
    let key = |name: &str| file.key(&format!("tokenizer.{name}"));
    let special = |name: &str| {
        let id = key(&format!("ggml.{name}_token_id"))?.as_u64()?;
        Some((id, tokens.get(id as usize)?.clone()))
    };
    let named = [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")]
        .map(|(name, own)| (name, special(own)));
    let types = key("ggml.token_type").and_then(Value::as_array);
    let kind = |id: usize| types.and_then(|t| t.get(id)?.as_i64()).unwrap_or(1);
    let is_named =
        |id: usize| named.iter().any(|(_, t)| t.as_ref().is_some_and(|(own, _)| *own == id as u64));
    let mut added = Vec::new();
    for (id, content) in tokens.iter().enumerate() {
        let control = kind(id) == CONTROL || is_named(id);
        if control || kind(id) == USER_DEFINED {
            added.push(json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": control,
            }));
        }
    }
    let adds = |name: &str, otherwise: bool| {
        let flag = key(&format!("ggml.add_{name}_token")).and_then(Value::as_bool);
        let token = if name == "bos" { &named[0].1 } else { &named[1].1 };
        token.clone().filter(|_| flag.unwrap_or(otherwise))
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": parts.normalizer, "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": template(adds("bos", parts.adds_bos), adds("eos", false)),
        "decoder": parts.decoder, "model": parts.model,
    });
    let (mut config, mut ids) = (Map::new(), Map::new());
    for (name, token) in named {
        if let Some((id, text)) = token {
            config.insert(format!("{name}_token"), json!(text));
            ids.insert(format!("{name}_token_id"), json!(id));
        }
    }
    if let Some(template) = key("chat_template") {
        config.insert("chat_template".into(), template.clone());
    }
    TokenizerFiles { tokenizer: tokenizer.to_string().into_bytes(), config, ids }
}

/// The post-processor that puts these tokens around a text.
fn template(bos: Option<(u64, String)>, eos: Option<(u64, String)>) -> Value {
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let around = |name: &str, kind: u64| {
        let token = |t: &Option<(u64, String)>| {
            t.iter()
                .map(|(_, text)| json!({"SpecialToken": {"id": text, "type_id": kind}}))
                .collect::<Vec<_>>()
        };
        [token(&bos), vec![json!({"Sequence": {"id": name, "type_id": kind}})], token(&eos)].concat()
    };
    let special: Map<String, Value> = bos
        .iter()
        .chain(&eos)
        .map(|(id, text)| (text.clone(), json!({"id": text, "ids": [id], "tokens": [text]})))
        .collect();
    let pair = [around("A", 0), vec![json!({"Sequence": {"id": "B", "type_id": 1}})]].concat();
    json!({
        "type": "TemplateProcessing", "single": around("A", 0),
        "pair": pair,
        "special_tokens": special,
    })
}
