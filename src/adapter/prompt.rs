//! Methods that train virtual tokens: prefix tuning, prompt tuning, P-tuning.
//!
//! PEFT keeps one tensor, `prompt_embeddings`, `[num_virtual_tokens, cols]`: what the encoder made. The encoder's own
//! parameters are kept beside it in [`ENCODER_FILE`], which PEFT doesn't look at, so that training can go on.
//! Sources: Li and Liang (arXiv 2101.00190); Lester et al. (arXiv 2104.08691); Liu et al., "GPT Understands, Too"
//! (arXiv 2103.10385).

use super::attach::{Attachment, Initial};
use super::io::{ADAPTER_FILE, AdapterTensors, load_params, named_params, write_tensors};
use super::method::{Method, save_settings};
use super::reader::{Origin, Reader, Settings, common_settings};
use crate::backend::Activation;
use crate::error::{Error, Result};
use crate::model::prompt::{LstmDirection, Prompt, PromptEncoder, PromptPlace};
use crate::model::{Linear, Model, ModelConfig, Parameter};
use crate::param::ParamStore;
use crate::rng::{Philox, PhiloxKey, Stream};
use serde_json::{Value, json};
use std::path::Path;

/// The encoder's parameters, beside PEFT's files.
pub const ENCODER_FILE: &str = "prompt_encoder.safetensors";

/// The name of PEFT's tensor.
const PROMPT_EMBEDDINGS: &str = "prompt_embeddings";

/// How the virtual tokens start or are made.
#[derive(Clone, Debug, PartialEq)]
pub enum PromptKind {
    /// Prefix tuning.
    Prefix {
        /// Made by an MLP while training.
        prefix_projection: bool,
        /// The MLP's width; `None`: the columns of a key.
        encoder_hidden_size: Option<usize>,
        /// Start from zeros (`init_weights` "zero") instead of a standard normal.
        zero: bool,
    },
    /// Prompt tuning.
    Prompt(PromptTuningInit),
    /// P-tuning.
    PTuning {
        /// A bidirectional LSTM and two layers instead of three layers.
        lstm: bool,
        /// Width; `None`: the model's.
        encoder_hidden_size: Option<usize>,
        /// Layers of the LSTM.
        encoder_num_layers: usize,
        /// Probability of dropping an element between them.
        encoder_dropout: f64,
    },
}

/// How prompt tuning starts.
#[derive(Clone, Debug, PartialEq)]
pub enum PromptTuningInit {
    /// A standard normal.
    Random,
    /// Embeddings of tokens drawn from the vocabulary.
    SampleVocab,
    /// Embeddings of a text's tokens, cut or repeated.
    Text {
        /// The text.
        text: String,
        /// The folder of the tokenizer.
        tokenizer_name_or_path: String,
    },
}

/// Settings of a method with virtual tokens.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct PromptLearningConfig {
    pub num_virtual_tokens: usize,
    pub kind: PromptKind,
    pub origin: Origin,
    /// [`GEOMETRY`], set by the model.
    geometry: Option<[usize; 3]>,
    /// Whether the encoder is there; one read from PEFT's file has only what the encoder made.
    encoder: bool,
}

/// The keys that the model says.
const GEOMETRY: [&str; 3] = ["token_dim", "num_attention_heads", "num_layers"];

/// Virtual tokens if the settings don't say.
const NUM_VIRTUAL_TOKENS: usize = 20;

impl PromptLearningConfig {
    /// So many virtual tokens of this kind.
    pub fn new(kind: PromptKind, num_virtual_tokens: usize) -> Self {
        PromptLearningConfig {
            num_virtual_tokens,
            kind,
            origin: Origin::default(),
            geometry: None,
            encoder: true,
        }
    }

    /// Reads the keys of prefix tuning.
    ///
    /// # Errors
    /// When one is malformed, or set and not implemented.
    pub fn read_prefix(reader: &Reader<'_>) -> Result<Self> {
        let zero = match reader.string("init_weights")?.as_deref() {
            None => false,
            Some("zero") => true,
            Some(other) => {
                return Err(
                    reader.error("init_weights", format!("`{other}` is not supported; supported: zero"))
                );
            }
        };
        let kind = PromptKind::Prefix {
            prefix_projection: reader.bool("prefix_projection")?,
            encoder_hidden_size: reader.usize("encoder_hidden_size")?,
            zero,
        };
        Self::finish(reader, kind)
    }

    /// Reads the keys of prompt tuning.
    ///
    /// # Errors
    /// As [`PromptLearningConfig::read_prefix`].
    pub fn read_prompt(reader: &Reader<'_>) -> Result<Self> {
        let text = reader.string("prompt_tuning_init_text")?;
        let tokenizer = reader.string("tokenizer_name_or_path")?;
        let init = match reader.string("prompt_tuning_init")?.as_deref() {
            None | Some("RANDOM") => PromptTuningInit::Random,
            Some("SAMPLE_VOCAB") => PromptTuningInit::SampleVocab,
            Some("TEXT") => {
                let missing = |key: &str| reader.error(key, "expected a string with prompt_tuning_init TEXT");
                let tokenizer = tokenizer.or(reader.string("base_model_name_or_path")?);
                PromptTuningInit::Text {
                    text: text.ok_or_else(|| missing("prompt_tuning_init_text"))?,
                    tokenizer_name_or_path: tokenizer.ok_or_else(|| missing("tokenizer_name_or_path"))?,
                }
            }
            Some(other) => {
                return Err(reader.error(
                    "prompt_tuning_init",
                    format!("`{other}` is not supported; supported: RANDOM, TEXT, SAMPLE_VOCAB"),
                ));
            }
        };
        Self::finish(reader, PromptKind::Prompt(init))
    }

    /// Reads the keys of P-tuning.
    ///
    /// # Errors
    /// As [`PromptLearningConfig::read_prefix`].
    pub fn read_ptuning(reader: &Reader<'_>) -> Result<Self> {
        let lstm = match reader.string("encoder_reparameterization_type")?.as_deref() {
            None | Some("MLP") => false,
            Some("LSTM") => true,
            Some(other) => {
                return Err(reader.error(
                    "encoder_reparameterization_type",
                    format!("`{other}` is not supported; supported: MLP, LSTM"),
                ));
            }
        };
        let kind = PromptKind::PTuning {
            lstm,
            encoder_hidden_size: reader.usize("encoder_hidden_size")?,
            encoder_num_layers: reader.usize("encoder_num_layers")?.unwrap_or(2),
            encoder_dropout: reader.f64("encoder_dropout")?.unwrap_or(0.0),
        };
        Self::finish(reader, kind)
    }

    fn finish(reader: &Reader<'_>, kind: PromptKind) -> Result<Self> {
        let num_virtual_tokens = reader.usize("num_virtual_tokens")?.unwrap_or(NUM_VIRTUAL_TOKENS);
        if !(1..=1 << 20).contains(&num_virtual_tokens) {
            return Err(reader.error(
                "num_virtual_tokens",
                format!("expected a number from 1 to {}, found {num_virtual_tokens}", 1 << 20),
            ));
        }
        let mut geometry = Vec::new();
        for key in GEOMETRY {
            geometry.extend(reader.usize(key)?);
        }
        let submodules = reader.usize("num_transformer_submodules")?;
        if submodules.is_some_and(|n| n != 1) {
            return Err(reader.error("num_transformer_submodules", "expected 1, for a causal language model"));
        }
        let origin = Origin::read(reader)?;
        reader.finish(&[])?;
        let config = PromptLearningConfig {
            origin,
            geometry: geometry.try_into().ok(),
            ..Self::new(kind, num_virtual_tokens)
        };
        let (hidden, layers) = match config.kind {
            PromptKind::Prompt(_) => (None, 1),
            PromptKind::Prefix { encoder_hidden_size, .. } => (encoder_hidden_size, 1),
            PromptKind::PTuning { encoder_hidden_size, encoder_num_layers, .. } => {
                (encoder_hidden_size, encoder_num_layers)
            }
        };
        if hidden.is_some_and(|n| n == 0 || n > 1 << 20) {
            return Err(reader.error("encoder_hidden_size", "expected a number from 1 to 1048576"));
        }
        if let PromptKind::PTuning { encoder_dropout, .. } = config.kind
            && !(0.0..1.0).contains(&encoder_dropout)
        {
            return Err(reader.error("encoder_dropout", "expected a probability in [0, 1)"));
        }
        if !(1..=64).contains(&layers) {
            return Err(reader.error("encoder_num_layers", "expected a number from 1 to 64"));
        }
        Ok(config)
    }

    fn place(&self) -> PromptPlace {
        match self.kind {
            PromptKind::Prefix { .. } => PromptPlace::KeysValues,
            _ => PromptPlace::Embeddings,
        }
    }

    /// `token_dim`, `num_attention_heads`, `num_layers` as PEFT has them: of the keys for a prefix.
    fn geometry(&self, config: &ModelConfig) -> [usize; 3] {
        match self.place() {
            PromptPlace::KeysValues => [
                config.num_key_value_heads * config.head_dim,
                config.num_key_value_heads,
                config.num_hidden_layers,
            ],
            PromptPlace::Embeddings => {
                [config.hidden_size, config.num_attention_heads, config.num_hidden_layers]
            }
        }
    }

    /// Whether more than a table is trained.
    fn has_encoder(&self) -> bool {
        let kind = match self.kind {
            PromptKind::Prefix { prefix_projection, .. } => prefix_projection,
            PromptKind::Prompt(_) => false,
            PromptKind::PTuning { .. } => true,
        };
        kind && self.encoder
    }

    fn encoder_hidden_size(&self, token_dim: usize) -> usize {
        match self.kind {
            PromptKind::Prefix { encoder_hidden_size, .. }
            | PromptKind::PTuning { encoder_hidden_size, .. } => encoder_hidden_size.unwrap_or(token_dim),
            PromptKind::Prompt(_) => token_dim,
        }
    }

    /// The table's first values.
    fn initial(&self, model: &Model, cols: usize, seed: u64) -> Result<Initial> {
        let (n, vocab_size) = (self.num_virtual_tokens, model.config.vocab_size);
        let ids: Vec<usize> = match &self.kind {
            PromptKind::Prefix { zero: true, prefix_projection: false, .. } => {
                return Ok(Initial::Constant(0.0));
            }
            PromptKind::Prompt(PromptTuningInit::SampleVocab) => {
                let mut rng = Philox::new(PhiloxKey::new(seed, Stream::Init, u64::MAX));
                (0..n).map(|_| rng.below(vocab_size as u32) as usize).collect()
            }
            PromptKind::Prompt(PromptTuningInit::Text { text, tokenizer_name_or_path }) => {
                let ids = token_ids(text, Path::new(tokenizer_name_or_path))?;
                ids.iter().cycle().take(n).map(|id| *id as usize).collect()
            }
            _ => return Ok(Initial::Normal(1.0)),
        };
        let table = model.embed.weight.tensor(&model.params)?;
        let mut values = Vec::with_capacity(n * cols);
        for id in ids {
            if id >= vocab_size {
                return Err(Error::config(
                    "adapter",
                    "prompt_tuning_init_text",
                    format!("token {id} is not the model's"),
                ));
            }
            values.extend(model.backend.to_f32(&table.slice(id..id + 1)?)?);
        }
        Ok(Initial::Values(values))
    }

    /// What makes the virtual tokens.
    fn encoder(
        &self,
        attachment: &mut Attachment,
        table: Initial,
        token_dim: usize,
        cols: usize,
    ) -> PromptEncoder {
        let hidden = self.encoder_hidden_size(token_dim);
        let n = self.num_virtual_tokens;
        if !self.has_encoder() {
            let table = attachment.add(PROMPT_EMBEDDINGS, &[n, cols], table);
            return PromptEncoder {
                table,
                lstm: Vec::new(),
                dropout: 0.0,
                layers: Vec::new(),
                activation: Activation::Relu,
            };
        }
        let table = attachment.add("embedding.weight", &[n, token_dim], Initial::Normal(1.0));
        let mut lstm = Vec::new();
        let mut chain = |names: &str, widths: &[usize]| -> Vec<Linear> {
            let pairs = widths.windows(2).enumerate();
            pairs.map(|(i, w)| layer(attachment, &format!("{names}.{}", 2 * i), w[0], w[1])).collect()
        };
        let dropout = match self.kind {
            PromptKind::PTuning { encoder_dropout, .. } => encoder_dropout as f32,
            _ => 0.0,
        };
        let (layers, activation) = match self.kind {
            PromptKind::PTuning { lstm: true, encoder_num_layers, .. } => {
                let layers = chain("mlp_head", &[2 * hidden, 2 * hidden, cols]);
                for i in 0..encoder_num_layers {
                    let inputs = if i == 0 { token_dim } else { 2 * hidden };
                    lstm.push(["", "_reverse"].map(|way| direction(attachment, i, way, inputs, hidden)));
                }
                (layers, Activation::Relu)
            }
            PromptKind::PTuning { .. } => {
                (chain("mlp_head", &[token_dim, hidden, hidden, cols]), Activation::Relu)
            }
            _ => (chain("transform", &[token_dim, hidden, cols]), Activation::Tanh),
        };
        PromptEncoder { table, lstm, dropout, layers, activation }
    }
}

/// A trained linear layer that starts as PyTorch's do.
fn layer(attachment: &mut Attachment, path: &str, inputs: usize, outputs: usize) -> Linear {
    let uniform = || Initial::Uniform(1.0 / (inputs as f32).sqrt());
    let weight = attachment.add(format!("{path}.weight"), &[outputs, inputs], uniform());
    let bias = attachment.add(format!("{path}.bias"), &[outputs], uniform());
    Linear::new(path, Parameter::Trainable(weight), Some(Parameter::Trainable(bias)), inputs, outputs)
}

/// One direction of an LSTM layer, by PyTorch's names.
fn direction(
    attachment: &mut Attachment,
    number: usize,
    way: &str,
    inputs: usize,
    hidden: usize,
) -> LstmDirection {
    let uniform = || Initial::Uniform(1.0 / (hidden as f32).sqrt());
    let mut half = |kind: &str, inputs: usize| {
        let at = |what: &str| format!("lstm_head.{what}_{kind}_l{number}{way}");
        let weight = attachment.add(at("weight"), &[4 * hidden, inputs], uniform());
        let bias = attachment.add(at("bias"), &[4 * hidden], uniform());
        let (weight, bias) = (Parameter::Trainable(weight), Some(Parameter::Trainable(bias)));
        Linear::new("lstm_head", weight, bias, inputs, 4 * hidden)
    };
    LstmDirection { input: half("ih", inputs), recurrent: half("hh", hidden) }
}

/// The tokens of the text a prompt starts from.
#[cfg(feature = "text")]
fn token_ids(text: &str, tokenizer: &Path) -> Result<Vec<u32>> {
    let ids = crate::data::Tokenizer::load(tokenizer)?.encode(text, true)?;
    if ids.is_empty() {
        return Err(Error::config("adapter", "prompt_tuning_init_text", "expected a text with tokens"));
    }
    Ok(ids)
}

#[cfg(not(feature = "text"))]
fn token_ids(_text: &str, _tokenizer: &Path) -> Result<Vec<u32>> {
    Err(Error::config("adapter", "prompt_tuning_init", "TEXT needs the crate's `text` feature"))
}

impl Method for PromptLearningConfig {
    fn name(&self) -> &'static str {
        match self.kind {
            PromptKind::Prefix { .. } => "prefix",
            PromptKind::Prompt(_) => "prompt",
            PromptKind::PTuning { .. } => "ptuning",
        }
    }

    fn settings(&self) -> Settings {
        let geometry = |i: usize| self.geometry.map_or(Value::Null, |g| json!(g[i]));
        let peft_type = match self.kind {
            PromptKind::Prefix { .. } => "PREFIX_TUNING",
            PromptKind::Prompt(_) => "PROMPT_TUNING",
            PromptKind::PTuning { .. } => "P_TUNING",
        };
        let mut keys = common_settings(peft_type, &self.origin);
        keys.extend([
            ("modules_to_save", Value::Null),
            ("num_attention_heads", geometry(1)),
            ("num_layers", geometry(2)),
            ("num_transformer_submodules", self.geometry.map_or(Value::Null, |_| json!(1))),
            ("num_virtual_tokens", json!(self.num_virtual_tokens)),
            ("token_dim", geometry(0)),
        ]);
        let hidden = self.geometry.map(|g| self.encoder_hidden_size(g[0]));
        match &self.kind {
            PromptKind::Prefix { prefix_projection, zero, .. } => keys.extend([
                ("encoder_hidden_size", json!(hidden)),
                ("init_weights", if *zero { json!("zero") } else { Value::Null }),
                ("prefix_projection", json!(prefix_projection)),
            ]),
            PromptKind::Prompt(init) => {
                let (name, text, tokenizer) = match init {
                    PromptTuningInit::Random => ("RANDOM", None, None),
                    PromptTuningInit::SampleVocab => ("SAMPLE_VOCAB", None, None),
                    PromptTuningInit::Text { text, tokenizer_name_or_path } => {
                        ("TEXT", Some(text), Some(tokenizer_name_or_path))
                    }
                };
                keys.extend([
                    ("prompt_tuning_init", json!(name)),
                    ("prompt_tuning_init_text", json!(text)),
                    ("tokenizer_kwargs", Value::Null),
                    ("tokenizer_name_or_path", json!(tokenizer)),
                ]);
            }
            PromptKind::PTuning { lstm, encoder_num_layers, encoder_dropout, .. } => keys.extend([
                ("encoder_dropout", json!(encoder_dropout)),
                ("encoder_hidden_size", json!(hidden)),
                ("encoder_num_layers", json!(encoder_num_layers)),
                ("encoder_reparameterization_type", json!(if *lstm { "LSTM" } else { "MLP" })),
            ]),
        }
        keys
    }

    fn install(&mut self, model: &mut Model, attachment: &mut Attachment) -> Result<()> {
        let geometry = self.geometry(&model.config);
        for ((key, own), read) in GEOMETRY.iter().zip(geometry).zip(self.geometry.into_iter().flatten()) {
            if own != read {
                return Err(Error::config(
                    "adapter",
                    *key,
                    format!("expected {own} for this base model, found {read}"),
                ));
            }
        }
        self.geometry = Some(geometry);
        let [token_dim, _, num_layers] = geometry;
        let cols = match self.place() {
            PromptPlace::KeysValues => 2 * num_layers * token_dim,
            PromptPlace::Embeddings => token_dim,
        };
        let limit = model.config.max_sequence();
        if self.num_virtual_tokens >= limit {
            return Err(Error::config(
                "adapter",
                "num_virtual_tokens",
                format!("{} leave no room in the model's {limit} positions", self.num_virtual_tokens),
            ));
        }
        let table = self.initial(model, cols, attachment.seed())?;
        let encoder = self.encoder(attachment, table, token_dim, cols);
        model.prompt =
            Some(Prompt { place: self.place(), num_virtual_tokens: self.num_virtual_tokens, encoder });
        Ok(())
    }

    fn key(&self, _params: &ParamStore, name: &str) -> String {
        name.to_string()
    }

    fn save(&self, model: &Model, dir: &Path) -> Result<()> {
        let values = model.virtual_token_values()?;
        let table = vec![(PROMPT_EMBEDDINGS.to_string(), values)];
        write_tensors(&model.backend, &dir.join(ADAPTER_FILE), table)?;
        if self.has_encoder() {
            let encoder = named_params(&model.params, str::to_string)?;
            write_tensors(&model.backend, &dir.join(ENCODER_FILE), encoder)?;
        }
        save_settings(Method::settings(self), dir)
    }

    fn load_values(&self, model: &mut Model, dir: &Path) -> Result<()> {
        if self.has_encoder() {
            return load_params(model, dir, ENCODER_FILE, |params, name| self.key(params, name));
        }
        let mut tensors = AdapterTensors::open(dir, ADAPTER_FILE)?;
        for id in model.params.ids() {
            let shape = model.params.info(id).shape.clone();
            let values = model.backend.to_f32(&tensors.take(PROMPT_EMBEDDINGS, &shape)?)?;
            model.params.set(id, &values)?;
        }
        tensors.finish()
    }

    /// Without the encoder's parameters, what the encoder made is itself trained.
    fn load(&mut self, model: &mut Model, dir: &Path) -> Result<()> {
        self.encoder = dir.join(ENCODER_FILE).is_file();
        if let PromptKind::Prompt(init) = &mut self.kind
            && matches!(init, PromptTuningInit::Text { .. })
        {
            // The text was used when the adapter was made; its tokenizer need not be here.
            let kept = std::mem::replace(init, PromptTuningInit::Random);
            let attached = self.attach(model, 0);
            self.kind = PromptKind::Prompt(kept);
            attached?;
        } else {
            self.attach(model, 0)?;
        }
        self.load_values(model, dir)
    }
}
