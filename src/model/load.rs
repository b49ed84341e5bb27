//! From a Hugging Face folder to a [`Model`]: every tensor found, checked, and kept in place where it can be.

use super::checkpoint::Checkpoint;
use super::config::{MlpNames, ModelConfig, QkvNames};
use super::decoder::{Layer, Mlp, Model, Qkv};
use super::module::{Embedding, Linear, Norm, Parameter, Weight};
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::param::ParamStore;
use crate::rng::{Philox, PhiloxKey, Stream};
use crate::tensor::Tensor;
use std::path::Path;
use std::sync::Mutex;

impl Model {
    /// Loads a base model with everything frozen. `dtype` is the type of activations, f32 or bf16: in f32,
    /// weights stay in the file's type and in the mapped file; in bf16, weights of other types are converted.
    ///
    /// # Errors
    /// When the configuration or the weights are missing, malformed, not supported or do not fit together.
    pub fn load(model_dir: &Path, backend: &Backend, dtype: DType) -> Result<Self> {
        if !model_dir.is_dir() {
            return Err(Error::format(
                model_dir,
                "expected a model folder (config.json, *.safetensors), found none",
            ));
        }
        let config = ModelConfig::load(model_dir)?;
        let checkpoint = Checkpoint::open(model_dir)?;
        let source = Source::File { checkpoint: &checkpoint, base_prefix: config.names.base_prefix };
        Builder { config, backend, dtype, source }.build()
    }

    /// A model of this configuration with random weights (normal, standard deviation 0.02; norms 1; biases
    /// 0), as for pre-training or for measuring without files.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn random(config: ModelConfig, backend: &Backend, dtype: DType, seed: u64) -> Result<Self> {
        Builder { config, backend, dtype, source: Source::Random { seed, next: Mutex::new(0) } }.build()
    }
}

/// Where tensors come from.
enum Source<'a> {
    File { checkpoint: &'a Checkpoint, base_prefix: &'a str },
    Random { seed: u64, next: Mutex<u64> },
}

struct Builder<'a> {
    config: ModelConfig,
    backend: &'a Backend,
    dtype: DType,
    source: Source<'a>,
}

impl Builder<'_> {
    fn build(self) -> Result<Model> {
        let (c, names) = (&self.config, self.config.names);
        if !matches!(self.dtype, DType::F32 | DType::BF16) {
            return Err(Error::config(
                "model",
                "dtype",
                format!("expected f32 or bf16, found {}", self.dtype),
            ));
        }
        let embed = self.embedding(names.embed, c.vocab_size)?;
        let positions = names.positions.map(|p| self.embedding(p, c.max_position_embeddings)).transpose()?;
        let layers = (0..c.num_hidden_layers)
            .map(|i| self.layer(&format!("{}.{i}", names.layers)))
            .collect::<Result<_>>()?;
        let norm = self.norm(names.norm, c.hidden_size)?;
        let head = if c.tie_word_embeddings {
            Linear {
                path: names.head.to_string(),
                weight: embed.weight.clone(),
                bias: None,
                conv1d: false,
                in_features: c.hidden_size,
                out_features: c.vocab_size,
                lora: None,
            }
        } else {
            Linear { conv1d: false, ..self.linear(names.head, c.hidden_size, c.vocab_size, false, false)? }
        };
        let params = ParamStore::empty(self.backend)?;
        Ok(Model {
            backend: self.backend.clone(),
            dtype: self.dtype,
            params,
            embed,
            positions,
            layers,
            norm,
            head,
            gradient_checkpointing: false,
            rope_table: Mutex::new(None),
            config: self.config,
        })
    }

    fn layer(&self, path: &str) -> Result<Layer> {
        let (c, names) = (&self.config, self.config.names);
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let q_cols = c.num_attention_heads * c.head_dim;
        let kv_cols = c.num_key_value_heads * c.head_dim;
        let at = |name: &str| format!("{path}.{name}");
        let linear =
            |name: &str, i: usize, o: usize, bias: bool| self.linear(&at(name), i, o, bias, c.conv1d);
        let qkv = match names.qkv {
            QkvNames::Separate { q, k, v } => Qkv::Separate(Box::new([
                linear(q, hidden, q_cols, c.qkv_bias)?,
                linear(k, hidden, kv_cols, c.qkv_bias)?,
                linear(v, hidden, kv_cols, c.qkv_bias)?,
            ])),
            QkvNames::Fused(name) => {
                Qkv::Fused(Box::new(linear(name, hidden, q_cols + 2 * kv_cols, c.qkv_bias)?))
            }
        };
        let mlp = match names.mlp {
            MlpNames::Gated { gate, up, down } => Mlp::Gated(Box::new([
                linear(gate, hidden, inner, c.mlp_bias)?,
                linear(up, hidden, inner, c.mlp_bias)?,
                linear(down, inner, hidden, c.mlp_bias)?,
            ])),
            MlpNames::Plain { fc, proj } => Mlp::Plain(Box::new([
                linear(fc, hidden, inner, c.mlp_bias)?,
                linear(proj, inner, hidden, c.mlp_bias)?,
            ])),
        };
        let qk_norm = names
            .qk_norm
            .map(|(q, k)| Ok::<_, Error>([self.norm(&at(q), c.head_dim)?, self.norm(&at(k), c.head_dim)?]))
            .transpose()?;
        Ok(Layer {
            input_norm: self.norm(&at(names.input_norm), hidden)?,
            qkv,
            qk_norm,
            o: linear(names.o, q_cols, hidden, c.o_bias)?,
            post_norm: self.norm(&at(names.post_norm), hidden)?,
            mlp,
        })
    }

    fn embedding(&self, path: &str, entries: usize) -> Result<Embedding> {
        let weight = self.matrix(&format!("{path}.weight"), &[entries, self.config.hidden_size])?;
        Ok(Embedding { path: path.to_string(), weight: Parameter::Frozen(Weight::Dense(weight)) })
    }

    fn linear(&self, path: &str, i: usize, o: usize, bias: bool, conv1d: bool) -> Result<Linear> {
        let shape = if conv1d { [i, o] } else { [o, i] };
        let weight = self.matrix(&format!("{path}.weight"), &shape)?;
        let bias = bias.then(|| self.vector(&format!("{path}.bias"), o, 0.0)).transpose()?;
        Ok(Linear {
            path: path.to_string(),
            weight: Parameter::Frozen(Weight::Dense(weight)),
            bias,
            conv1d,
            in_features: i,
            out_features: o,
            lora: None,
        })
    }

    fn norm(&self, path: &str, cols: usize) -> Result<Norm> {
        let weight = self.vector(&format!("{path}.weight"), cols, 1.0)?;
        let bias =
            self.config.layer_norm.then(|| self.vector(&format!("{path}.bias"), cols, 0.0)).transpose()?;
        Ok(Norm {
            path: path.to_string(),
            weight,
            bias,
            eps: self.config.norm_eps,
            layer_norm: self.config.layer_norm,
        })
    }

    /// A matrix: in f32 training as stored, in bf16 training converted unless it is bf16 already.
    fn matrix(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let stored = match &self.source {
            Source::File { .. } => self.find(name, shape)?,
            Source::Random { seed, next } => {
                let mut next = next.lock().expect("never held across a panic");
                *next += 1;
                let mut rng = Philox::new(PhiloxKey::new(*seed, Stream::Dummy, *next));
                let data: Vec<f32> = (0..shape.iter().product()).map(|_| 0.02 * rng.normal()).collect();
                self.backend.from_slice(&data, shape)?
            }
        };
        if self.dtype == DType::F32 || stored.dtype() == self.dtype {
            return Ok(stored);
        }
        let converted = self.backend.to_dtype(&stored, self.dtype)?;
        stored.release_pages();
        Ok(converted)
    }

    /// A bias or a norm's weight, in the activations' type as transformers holds it.
    fn vector(&self, name: &str, len: usize, constant: f32) -> Result<Parameter> {
        let stored = match &self.source {
            Source::File { .. } => self.find(name, &[len])?,
            Source::Random { .. } => self.backend.from_slice(&vec![constant; len], &[len])?,
        };
        Ok(Parameter::Frozen(Weight::Dense(self.backend.to_dtype(&stored, self.dtype)?)))
    }

    /// The stored tensor under its full name, or without the base model's prefix, as base checkpoints are.
    fn find(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let Source::File { checkpoint, base_prefix } = &self.source else {
            return Err(Error::tensor(name, "there is no checkpoint"));
        };
        let bare = name
            .strip_prefix(base_prefix)
            .filter(|bare| !checkpoint.contains(name) && checkpoint.contains(bare));
        let stored = checkpoint.tensor(bare.unwrap_or(name))?;
        if stored.shape() != shape {
            return Err(Error::tensor(
                name,
                format!("expected shape {shape:?} by config.json, found {:?}", stored.shape()),
            ));
        }
        Ok(stored)
    }
}
