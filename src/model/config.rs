//! `config.json`: what a decoder is made of, in Hugging Face's names.
//!
//! A family's own file ([`super::llama`], [`super::qwen`], [`super::gpt2`]) turns its keys into one
//! [`ModelConfig`]. A key that would change the numbers and is not implemented is an error that names it.

use super::rope::RopeConfig;
use crate::backend::Activation;
use crate::error::{Error, Result};
use crate::fs::read_text;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// How the query, key and value projections are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkvNames {
    /// Three linear layers.
    Separate {
        /// Query projection.
        q: &'static str,
        /// Key projection.
        k: &'static str,
        /// Value projection.
        v: &'static str,
    },
    /// One layer whose output columns are the queries, then the keys, then the values.
    Fused(&'static str),
}

/// How the MLP is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpNames {
    /// `down(act(gate x) * up x)`.
    Gated {
        /// Gate projection.
        gate: &'static str,
        /// Up projection.
        up: &'static str,
        /// Down projection.
        down: &'static str,
    },
    /// `down(act(gate x) * up x)`, gate and up side by side in one layer.
    FusedGated {
        /// Gate and up projection.
        gate_up: &'static str,
        /// Down projection.
        down: &'static str,
    },
    /// `proj(act(fc x))`.
    Plain {
        /// First layer.
        fc: &'static str,
        /// Second layer.
        proj: &'static str,
    },
}

/// Module paths of a family, as Hugging Face names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    /// What base checkpoints without the head leave out: `model.` or `transformer.`.
    pub base_prefix: &'static str,
    /// Token embedding.
    pub embed: &'static str,
    /// Learned positions.
    pub positions: Option<&'static str>,
    /// The list of layers; a layer is `<layers>.<index>`.
    pub layers: &'static str,
    /// Final norm.
    pub norm: &'static str,
    /// Output head.
    pub head: &'static str,
    /// Norm before attention, within a layer.
    pub input_norm: &'static str,
    /// Norm on attention's output, within a layer.
    pub attention_norm: Option<&'static str>,
    /// Norm before the MLP, within a layer.
    pub post_norm: &'static str,
    /// Norm on the MLP's output, within a layer.
    pub mlp_norm: Option<&'static str>,
    /// Query, key and value projections, within a layer.
    pub qkv: QkvNames,
    /// Norms on each head's queries and keys, within a layer.
    pub qk_norm: Option<(&'static str, &'static str)>,
    /// Attention's output projection, within a layer.
    pub o: &'static str,
    /// The MLP, within a layer.
    pub mlp: MlpNames,
}

/// A decoder-only transformer.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct ModelConfig {
    /// Hugging Face's name of the family.
    pub model_type: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub hidden_act: Activation,
    /// Epsilon of all norms.
    pub norm_eps: f32,
    /// LayerNorm with bias instead of RMSNorm.
    pub layer_norm: bool,
    /// Rotary embedding, unless positions are learned.
    pub rope: Option<RopeConfig>,
    /// Biases of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of attention's output projection.
    pub o_bias: bool,
    /// Biases of the MLP.
    pub mlp_bias: bool,
    /// Linear weights are stored `[in, out]` (GPT-2's Conv1D).
    pub conv1d: bool,
    pub tie_word_embeddings: bool,
    /// Keys that a token of a sliding layer sees at most, its own among them.
    pub sliding_window: Option<usize>,
    /// Whether a layer has the window; layers beyond the list do.
    pub sliding_layers: Vec<bool>,
    /// Rotary embedding of sliding layers, where it differs.
    pub local_rope: Option<RopeConfig>,
    /// Factor on attention's scores; `None`: `1 / sqrt(head_dim)`.
    pub attention_scale: Option<f32>,
    /// Bound of attention's scores.
    pub attn_logit_softcapping: Option<f32>,
    /// Bound of the logits.
    pub final_logit_softcapping: Option<f32>,
    /// Factor on token embeddings.
    pub embed_scale: Option<f32>,
    /// A norm's factor is 1 plus its weight.
    pub norm_plus_one: bool,
    pub eos_token_id: Vec<u32>,
    pub bos_token_id: Option<u32>,
    /// The token whose embedding has no gradient; transformers' `pad_token_id` in most families.
    pub padding_idx: Option<usize>,
    /// Module paths.
    pub names: Names,
}

/// The values of `model_type` that are known.
pub const FAMILIES: [&str; 13] = [
    "chatglm",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt2",
    "llama",
    "mistral",
    "phi3",
    "qwen",
    "qwen2",
    "qwen3",
];

impl ModelConfig {
    /// Reads `config.json` of a model folder, or the keys of a GGUF file.
    ///
    /// # Errors
    /// When the file is missing or malformed, the architecture is not known, or a key can't be honoured.
    pub fn load(model_dir: &Path) -> Result<Self> {
        if super::gguf::is_gguf(model_dir) {
            return super::gguf::Gguf::open(model_dir)?.config();
        }
        let path = model_dir.join("config.json");
        let text = read_text(&path)?;
        let value: Value =
            serde_json::from_str(&text).map_err(|e| Error::format(&path, format!("not JSON: {e}")))?;
        Self::from_json(&path, &value)
    }

    /// Interprets the content of a `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// As [`ModelConfig::load`].
    pub fn from_json(path: &Path, value: &Value) -> Result<Self> {
        let map = value.as_object().ok_or_else(|| Error::format(path, "expected a JSON object"))?;
        let keys = Keys { path: path.to_path_buf(), map };
        let model_type = keys.string("model_type")?;
        let config = match model_type.as_str() {
            "llama" => super::llama::config(&keys, "llama")?,
            "mistral" => super::llama::config(&keys, "mistral")?,
            "qwen2" => super::qwen::qwen2(&keys)?,
            "qwen3" => super::qwen::qwen3(&keys)?,
            "gpt2" => super::gpt2::config(&keys)?,
            "glm" => super::glm::glm(&keys)?,
            "glm4" => super::glm::glm4(&keys)?,
            "chatglm" => super::glm::chatglm(&keys)?,
            "gemma" => super::gemma::gemma(&keys)?,
            "gemma2" => super::gemma::gemma2(&keys)?,
            "gemma3_text" => super::gemma::gemma3(&keys)?,
            "phi3" => super::phi3::config(&keys)?,
            "qwen" => super::qwen::qwen(&keys)?,
            other => {
                return Err(keys.error(
                    "model_type",
                    format!("`{other}` is not supported; supported: {}", FAMILIES.join(", ")),
                ));
            }
        };
        config.check(&keys)?;
        check_quantization(&keys)?;
        Ok(config)
    }

    /// The longest sequence the model can see.
    pub fn max_sequence(&self) -> usize {
        self.max_position_embeddings
    }

    /// The window of a layer's attention.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.sliding_window.filter(|_| self.sliding_layers.get(layer).copied().unwrap_or(true))
    }

    fn check(&self, keys: &Keys<'_>) -> Result<()> {
        for (key, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("sliding_window", self.sliding_window.unwrap_or(1)),
        ] {
            if value == 0 || value > 1 << 24 {
                return Err(
                    keys.error(key, format!("expected a number from 1 to {}, found {value}", 1 << 24))
                );
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(keys.error(
                "num_key_value_heads",
                format!(
                    "expected a divisor of num_attention_heads {}, found {}",
                    self.num_attention_heads, self.num_key_value_heads
                ),
            ));
        }
        if self.head_dim > 256 || (self.rope.is_some() && !self.head_dim.is_multiple_of(2)) {
            return Err(
                keys.error("head_dim", format!("expected an even number up to 256, found {}", self.head_dim))
            );
        }
        Ok(())
    }
}

/// Fails unless the weights are stored plainly or in bitsandbytes' four bits (see [`super::bnb`]).
fn check_quantization(keys: &Keys<'_>) -> Result<()> {
    let Some(settings) = keys.object("quantization_config")? else { return Ok(()) };
    let method = settings.string("quant_method")?;
    if method == "bitsandbytes" && settings.bool_or("load_in_4bit", false)? {
        return Ok(());
    }
    Err(keys.error(
        "quantization_config",
        format!("`{method}` in this form is not supported; supported: bitsandbytes with load_in_4bit"),
    ))
}

/// The keys of a `config.json`, with errors that name them.
#[derive(Clone, Debug)]
pub struct Keys<'a> {
    path: PathBuf,
    map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    /// Which layers slide by `layer_types`, else by `default` from the layer's number.
    ///
    /// # Errors
    /// When a type is not known or there are not as many as layers.
    pub fn sliding_layers(&self, layers: usize, default: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
        let Some(value) = self.get("layer_types") else { return Ok((0..layers).map(default).collect()) };
        let sliding = |v: &Value| match v.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => Err(self.error(
                "layer_types",
                format!("{v} is not supported; supported: sliding_attention, full_attention"),
            )),
        };
        match value.as_array() {
            Some(list) if list.len() == layers => list.iter().map(sliding).collect(),
            _ => Err(self.error("layer_types", format!("expected a list of {layers} types"))),
        }
    }

    /// An error about `key`.
    pub fn error(&self, key: &str, message: impl Into<String>) -> Error {
        Error::config(self.path.display(), key, message)
    }

    /// The value of `key`; `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Whether the key is there, even if null.
    pub fn contains(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The keys of the object under `key`.
    ///
    /// # Errors
    /// When the value is not an object.
    pub fn object(&self, key: &str) -> Result<Option<Keys<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Keys { path: self.path.clone(), map })),
            Some(other) => Err(self.error(key, format!("expected an object, found {other}"))),
        }
    }

    /// A required string.
    ///
    /// # Errors
    /// When it is missing or of another kind.
    pub fn string(&self, key: &str) -> Result<String> {
        match self.get(key) {
            Some(Value::String(s)) => Ok(s.clone()),
            Some(other) => Err(self.error(key, format!("expected a string, found {other}"))),
            None => Err(self.error(key, "expected a string, found nothing")),
        }
    }

    /// An optional non-negative integer.
    ///
    /// # Errors
    /// When it is of another kind.
    pub fn usize_opt(&self, key: &str) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => v
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .map(Some)
                .ok_or_else(|| self.error(key, format!("expected a non-negative integer, found {v}"))),
        }
    }

    /// A required non-negative integer.
    ///
    /// # Errors
    /// When it is missing or of another kind.
    pub fn usize(&self, key: &str) -> Result<usize> {
        self.usize_opt(key)?.ok_or_else(|| self.error(key, "expected an integer, found nothing"))
    }

    /// An optional number.
    ///
    /// # Errors
    /// When it is of another kind.
    pub fn f64_opt(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => {
                v.as_f64().map(Some).ok_or_else(|| self.error(key, format!("expected a number, found {v}")))
            }
        }
    }

    /// The token that pads, whose embedding transformers doesn't train; `default` if the key is absent. A negative number
    /// counts from the end.
    ///
    /// # Errors
    /// When it is no integer.
    pub fn padding_idx(&self, default: Option<usize>, vocab_size: usize) -> Result<Option<usize>> {
        let Some(value) = self.get("pad_token_id") else {
            return Ok(default.filter(|_| !self.contains("pad_token_id")));
        };
        let id = value
            .as_i64()
            .ok_or_else(|| self.error("pad_token_id", format!("expected an integer, found {value}")))?;
        let id = if id < 0 { id.saturating_add(vocab_size as i64) } else { id };
        Ok(usize::try_from(id).ok())
    }

    /// A boolean with a default.
    ///
    /// # Errors
    /// When it is of another kind.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(self.error(key, format!("expected true or false, found {other}"))),
        }
    }

    /// Token ids: a number, a list of numbers, or nothing.
    ///
    /// # Errors
    /// When it is of another kind.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let bad = |v: &Value| self.error(key, format!("expected a token id or a list of them, found {v}"));
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(|v| id(v).ok_or_else(|| bad(v))).collect(),
            Some(v) => Ok(vec![id(v).ok_or_else(|| bad(v))?]),
        }
    }

    /// An activation function by Hugging Face's name.
    ///
    /// # Errors
    /// When the name is not known.
    pub fn activation(&self, key: &str, default: &str) -> Result<Activation> {
        let name = if self.get(key).is_some() { self.string(key)? } else { default.to_string() };
        match name.as_str() {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu" => Ok(Activation::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
            "relu" => Ok(Activation::Relu),
            other => Err(self.error(
                key,
                format!(
                    "`{other}` is not supported; supported: silu, gelu, gelu_new, gelu_pytorch_tanh, relu"
                ),
            )),
        }
    }

    /// Refuses keys that are set to anything but the value under which they change nothing.
    ///
    /// # Errors
    /// When one is set.
    pub fn refuse(&self, unsupported: &[(&str, Value)]) -> Result<()> {
        for (key, neutral) in unsupported {
            match self.get(key) {
                Some(v) if v != neutral => {
                    return Err(self.error(key, format!("{v} is not supported; supported: {neutral}")));
                }
                _ => {}
            }
        }
        Ok(())
    }
}
