//! From a Hugging Face folder to a [`Model`]: every tensor found, checked, and kept in place where it can be.

use super::bnb;
use super::checkpoint::Checkpoint;
use super::config::{MlpNames, ModelConfig, QkvNames};
use super::decoder::{Layer, Mlp, Model, Qkv};
use super::gguf::{Gguf, is_gguf};
use super::module::{Embedding, Linear, Norm, Parameter, Weight};
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::param::ParamStore;
use crate::quant::QuantConfig;
use crate::rng::{PhiloxKey, Stream};
use crate::tensor::Tensor;
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// How a base model is held.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoadOptions {
    /// Type of activations, f32 or bf16: in f32, weights stay in the file's type and in the mapped file; in
    /// bf16, weights of other types are converted.
    pub dtype: DType,
    /// Format of the linear layers' weights, quantized one by one as they are read. A checkpoint that is
    /// quantized already stays as it is.
    pub quant: Option<QuantConfig>,
}

impl From<DType> for LoadOptions {
    fn from(dtype: DType) -> Self {
        LoadOptions { dtype, quant: None }
    }
}

impl Model {
    /// Loads a base model, of a Hugging Face folder or a GGUF file, with everything frozen. `options` may be just the type of activations.
    ///
    /// # Errors
    /// When the configuration or the weights are missing, malformed, not supported or do not fit together.
    pub fn load(model_dir: &Path, backend: &Backend, options: impl Into<LoadOptions>) -> Result<Self> {
        if is_gguf(model_dir) {
            let file = Gguf::open(model_dir)?;
            let source = Source::Gguf(&file);
            let origin = Origin::Path(model_dir.to_path_buf());
            return Builder { config: file.config()?, backend, options: options.into(), source }
                .build(origin);
        }
        if !model_dir.is_dir() {
            return Err(Error::format(
                model_dir,
                "expected a model folder (config.json, *.safetensors) or a GGUF file, found none",
            ));
        }
        let config = ModelConfig::load(model_dir)?;
        let checkpoint = Checkpoint::open(model_dir)?;
        let source = Source::File { checkpoint: &checkpoint, base_prefix: config.names.base_prefix };
        let origin = Origin::Path(model_dir.to_path_buf());
        Builder { config, backend, options: options.into(), source }.build(origin)
    }

    /// A model of this configuration with random weights (nearly normal, standard deviation 0.02; norms 1; biases
    /// 0), as for pre-training or for measuring without files.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn random(
        config: ModelConfig,
        backend: &Backend,
        options: impl Into<LoadOptions>,
        seed: u64,
    ) -> Result<Self> {
        let source = Source::Random { seed, next: Mutex::new(0) };
        Builder { config, backend, options: options.into(), source }.build(Origin::Random)
    }

    /// A model of a GGUF file without content on a backend that only counts.
    pub(crate) fn planned_gguf(file: &Gguf, planner: &Backend, options: LoadOptions) -> Result<Self> {
        let origin = Origin::Planned(StoredWeights { dtype: None, quant: None });
        Builder { config: file.config()?, backend: planner, options, source: Source::Gguf(file) }
            .build(origin)
    }

    /// A model without content on a backend that only counts; see [`crate::backend::Kernels::planner`].
    pub(crate) fn planned(
        config: ModelConfig,
        planner: &Backend,
        options: LoadOptions,
        stored: StoredWeights,
    ) -> Result<Self> {
        let source = Source::Planned(stored);
        Builder { config, backend: planner, options, source }.build(Origin::Planned(stored))
    }
}

/// What a checkpoint holds, by its config.json.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct StoredWeights {
    /// Type of the tensors in the files; `None`: there are no files and weights are made.
    pub dtype: Option<DType>,
    /// The format of linear layers that are quantized already.
    pub quant: Option<QuantConfig>,
}

/// Where a model's weights came from.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    Path(PathBuf),
    Random,
    Planned(StoredWeights),
}

/// The weights of a model as its files have them, read one at a time: what they were before they were quantized.
pub(crate) struct Originals {
    config: ModelConfig,
    backend: Backend,
    dtype: DType,
    file: OriginalFile,
}

enum OriginalFile {
    Folder(Checkpoint),
    Gguf(Gguf),
    Planned(StoredWeights),
}

impl Originals {
    /// Opens the files again.
    ///
    /// # Errors
    /// When there are none, or they are gone.
    pub(crate) fn open(model: &Model) -> Result<Self> {
        let file = match &model.origin {
            Origin::Path(path) if is_gguf(path) => OriginalFile::Gguf(Gguf::open(path)?),
            Origin::Path(path) => OriginalFile::Folder(Checkpoint::open(path)?),
            Origin::Planned(stored) => OriginalFile::Planned(*stored),
            Origin::Random => {
                let message =
                    "random weights have no files to read what they were before they were quantized";
                return Err(Error::Unsupported(message.into()));
            }
        };
        let (config, backend) = (model.config.clone(), model.backend.clone());
        Ok(Originals { config, backend, dtype: model.dtype, file })
    }

    /// The weight of a layer, upright: f32 `[out_features, in_features]`.
    ///
    /// # Errors
    /// When its file holds it quantized.
    pub(crate) fn weight(&self, linear: &Linear) -> Result<Tensor> {
        let name = format!("{}.weight", linear.path);
        let source = match &self.file {
            OriginalFile::Folder(checkpoint) => {
                Source::File { checkpoint, base_prefix: self.config.names.base_prefix }
            }
            OriginalFile::Gguf(file) => Source::Gguf(file),
            OriginalFile::Planned(stored) => Source::Planned(*stored),
        };
        let options = LoadOptions::from(self.dtype);
        let builder = Builder { config: self.config.clone(), backend: &self.backend, options, source };
        let quantized = match &self.file {
            OriginalFile::Folder(checkpoint) => bnb::is_quantized(checkpoint, builder.stored_name(&name)),
            OriginalFile::Gguf(file) => {
                file.own_matrix(&name, &self.config, &self.backend, self.dtype)?.is_some()
            }
            OriginalFile::Planned(stored) => stored.quant.is_some(),
        };
        if quantized {
            let message =
                "is quantized in its file; what it was before is needed: load that model with --quant";
            return Err(Error::tensor(name, message));
        }
        let shape = [linear.out_features, linear.in_features];
        let stored = builder.stored(&name, &if linear.conv1d { [shape[1], shape[0]] } else { shape })?;
        let wide = self.backend.to_dtype(&stored, DType::F32)?;
        let upright = if linear.conv1d { self.backend.transposed(&wide)? } else { wide };
        stored.release_pages();
        Ok(upright)
    }
}

/// Where tensors come from.
enum Source<'a> {
    File {
        checkpoint: &'a Checkpoint,
        base_prefix: &'a str,
    },
    Gguf(&'a Gguf),
    Random {
        seed: u64,
        next: Mutex<u64>,
    },
    /// Nowhere: the backend only counts.
    Planned(StoredWeights),
}

struct Builder<'a> {
    config: ModelConfig,
    backend: &'a Backend,
    options: LoadOptions,
    source: Source<'a>,
}

impl Builder<'_> {
    fn build(self, origin: Origin) -> Result<Model> {
        let (c, names) = (&self.config, self.config.names);
        let LoadOptions { dtype, quant } = self.options;
        if !matches!(dtype, DType::F32 | DType::BF16) {
            return Err(Error::config("model", "dtype", format!("expected f32 or bf16, found {dtype}")));
        }
        quant.map_or(Ok(()), |q| q.check())?;
        let params = ParamStore::empty(self.backend)?;
        let embed = self.embedding(names.embed, c.vocab_size, c.padding_idx)?;
        let positions = names.positions.map(|p| self.embedding(p, c.max_position_embeddings, None));
        let positions = positions.transpose()?;
        let layers = (0..c.num_hidden_layers)
            .map(|i| self.layer(&format!("{}.{i}", names.layers)))
            .collect::<Result<_>>()?;
        let norm = self.norm(names.norm, c.hidden_size)?;
        let quantized_head = quant.filter(|q| q.head);
        let head_weight = match (c.tie_word_embeddings, quantized_head) {
            (true, None) => embed.weight.clone(),
            (true, Some(quant)) => {
                let embed = embed.weight.tensor(&params)?;
                Parameter::Frozen(Weight::Quantized(self.backend.quantize(&embed, &quant)?))
            }
            (false, quant) => self.weight(names.head, [c.vocab_size, c.hidden_size], false, quant)?,
        };
        let head = Linear {
            path: names.head.to_string(),
            weight: head_weight,
            bias: None,
            conv1d: false,
            in_features: c.hidden_size,
            out_features: c.vocab_size,
            adapter: None,
        };
        if let Source::File { checkpoint, .. } = &self.source {
            // Reading one tensor may have brought back pages of its neighbours that were released before.
            checkpoint.release_pages();
        }
        Ok(Model {
            backend: self.backend.clone(),
            dtype,
            params,
            embed,
            positions,
            layers,
            norm,
            head,
            gradient_checkpointing: 0,
            prompt: None,
            origin,
            rope_tables: [Mutex::new(None), Mutex::new(None)],
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
            MlpNames::FusedGated { gate_up, down } => Mlp::FusedGated(Box::new([
                linear(gate_up, hidden, 2 * inner, c.mlp_bias)?,
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
        let optional = |name: Option<&str>| name.map(|name| self.norm(&at(name), hidden)).transpose();
        Ok(Layer {
            attention_adapter: None,
            output_adapter: None,
            attention_norm: optional(names.attention_norm)?,
            mlp_norm: optional(names.mlp_norm)?,
            input_norm: self.norm(&at(names.input_norm), hidden)?,
            qkv,
            qk_norm,
            o: linear(names.o, q_cols, hidden, c.o_bias)?,
            post_norm: self.norm(&at(names.post_norm), hidden)?,
            mlp,
        })
    }

    fn embedding(&self, path: &str, entries: usize, padding_idx: Option<usize>) -> Result<Embedding> {
        let weight = self.matrix(&format!("{path}.weight"), &[entries, self.config.hidden_size])?;
        let weight = Parameter::Frozen(Weight::Dense(weight));
        Ok(Embedding { path: path.to_string(), weight, padding_idx, adapter: None })
    }

    fn linear(&self, path: &str, i: usize, o: usize, bias: bool, conv1d: bool) -> Result<Linear> {
        let weight = self.weight(path, [o, i], conv1d, self.options.quant)?;
        let bias = bias.then(|| self.vector(&format!("{path}.bias"), o, 0.0)).transpose()?;
        let path = path.to_string();
        Ok(Linear { path, weight, bias, conv1d, in_features: i, out_features: o, adapter: None })
    }

    /// The weight `[o, i]` of a linear layer: as bitsandbytes quantized it, else quantized now if `quant` says so.
    fn weight(
        &self,
        path: &str,
        [o, i]: [usize; 2],
        conv1d: bool,
        quant: Option<QuantConfig>,
    ) -> Result<Parameter> {
        let name = format!("{path}.weight");
        if let Source::File { checkpoint, .. } = &self.source
            && bnb::is_quantized(checkpoint, self.stored_name(&name))
        {
            return self.stored_quantized(&name, [o, i], quant);
        }
        if let Source::Gguf(file) = &self.source
            && quant.is_none()
            && let Some(matrix) = file.own_matrix(&name, &self.config, self.backend, self.options.dtype)?
        {
            if *matrix.shape() != [o, i] {
                return Err(Error::tensor(
                    &name,
                    format!("expected shape {:?} by the file's keys, found {:?}", [o, i], matrix.shape()),
                ));
            }
            return Ok(Parameter::Frozen(Weight::Quantized(matrix)));
        }
        let shape = if conv1d { [i, o] } else { [o, i] };
        let stored_quant = match &self.source {
            Source::Planned(stored) if path != self.config.names.head => stored.quant,
            _ => None,
        };
        let Some(quant) = quant.or(stored_quant) else {
            return Ok(Parameter::Frozen(Weight::Dense(self.matrix(&name, &shape)?)));
        };
        let stored = self.stored(&name, &shape)?;
        let upright = if conv1d { self.backend.transposed(&stored)? } else { stored.clone() };
        let quantized =
            self.backend.quantize(&upright, &quant).map_err(|e| Error::tensor(&name, e.to_string()))?;
        stored.release_pages();
        Ok(Parameter::Frozen(Weight::Quantized(quantized)))
    }

    /// A weight that the checkpoint holds quantized.
    fn stored_quantized(
        &self,
        name: &str,
        shape: [usize; 2],
        quant: Option<QuantConfig>,
    ) -> Result<Parameter> {
        let Source::File { checkpoint, .. } = &self.source else {
            return Err(Error::tensor(name, "there is no checkpoint"));
        };
        let matrix = bnb::read(checkpoint, self.stored_name(name), self.backend)?;
        if *matrix.shape() != shape {
            return Err(Error::tensor(
                name,
                format!("expected shape {shape:?} by config.json, found {:?}", matrix.shape()),
            ));
        }
        let found = matrix.config().format.name;
        match quant.filter(|q| q.format.name != found) {
            None => Ok(Parameter::Frozen(Weight::Quantized(matrix))),
            Some(q) => Err(Error::tensor(
                name,
                format!("the checkpoint is quantized to {found} already and can't become {}", q.format.name),
            )),
        }
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
            plus_one: self.config.norm_plus_one,
        })
    }

    /// A matrix: in f32 training as stored, in bf16 training converted unless it is bf16 already.
    fn matrix(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let stored = self.stored(name, shape)?;
        if self.options.dtype == DType::F32 || stored.dtype() == self.options.dtype {
            return Ok(stored);
        }
        let converted = self.backend.to_dtype(&stored, self.options.dtype)?;
        stored.release_pages();
        Ok(converted)
    }

    /// A matrix as it is stored, or random.
    fn stored(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match &self.source {
            Source::File { .. } | Source::Gguf(_) => self.find(name, shape),
            Source::Random { seed, next } => {
                let mut next = next.lock().expect("never held across a panic");
                *next += 1;
                random(self.backend, shape, self.options.dtype, PhiloxKey::new(*seed, Stream::Dummy, *next))
            }
            Source::Planned(StoredWeights { dtype: None, .. }) => {
                self.backend.empty(shape, self.options.dtype)
            }
            Source::Planned(StoredWeights { dtype: Some(dtype), .. }) => {
                let bytes = shape.iter().product::<usize>() * dtype.size();
                Tensor::from_block(self.backend.arena().count_mapped(bytes)?, shape, *dtype)
            }
        }
    }

    /// A bias or a norm's weight, in the activations' type as transformers holds it.
    fn vector(&self, name: &str, len: usize, constant: f32) -> Result<Parameter> {
        let stored = match &self.source {
            Source::File { .. } | Source::Gguf(_) => self.find(name, &[len])?,
            Source::Random { .. } | Source::Planned(_) => {
                self.backend.from_slice(&vec![constant; len], &[len])?
            }
        };
        Ok(Parameter::Frozen(Weight::Dense(self.backend.to_dtype(&stored, self.options.dtype)?)))
    }

    /// The name that the checkpoint has for a tensor: the full one, or the one without the base model's
    /// prefix, as base checkpoints are.
    fn stored_name<'n>(&self, name: &'n str) -> &'n str {
        let Source::File { checkpoint, base_prefix } = &self.source else { return name };
        name.strip_prefix(base_prefix)
            .filter(|bare| !checkpoint.contains(name) && checkpoint.contains(bare))
            .unwrap_or(name)
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let stored = match &self.source {
            Source::File { checkpoint, .. } => checkpoint.tensor(self.stored_name(name))?,
            Source::Gguf(file) => file.tensor(name, &self.config, self.backend, self.options.dtype)?,
            _ => return Err(Error::tensor(name, "there is no checkpoint")),
        };
        if stored.shape() != shape {
            return Err(Error::tensor(
                name,
                format!("expected shape {shape:?} by config.json, found {:?}", stored.shape()),
            ));
        }
        if !stored.dtype().is_float() {
            return Err(Error::tensor(name, format!("expected floats, found {}", stored.dtype())));
        }
        let placed = self.backend.place(&stored)?;
        if placed.is_on_device() {
            stored.release_pages();
        }
        Ok(placed)
    }
}

/// Standard deviation of the sum of four uniform bytes.
const BYTES_DEVIATION: f32 = 147.801;

/// Elements that are made at a time.
const RANDOM_CHUNK: usize = 1 << 20;

/// A matrix of nearly normal numbers with standard deviation 0.02: each the sum of a random word's bytes, which is
/// several times faster than true ones. Element `i` follows from the key and `i` alone.
fn random(backend: &Backend, shape: &[usize], dtype: DType, key: PhiloxKey) -> Result<Tensor> {
    let out = backend.empty(shape, dtype)?;
    let flat = out.reshape(&[out.elements()])?;
    for start in (0..out.elements()).step_by(RANDOM_CHUNK) {
        let end = (start + RANDOM_CHUNK).min(out.elements());
        let mut data = vec![0f32; end - start];
        data.par_chunks_mut(RANDOM_CHUNK / 64).enumerate().for_each(|(i, part)| {
            let first = (start + i * (RANDOM_CHUNK / 64)) as u64 / 4;
            for (counter, x) in (first..).zip(part.chunks_mut(4)) {
                for (x, word) in x.iter_mut().zip(key.words(counter)) {
                    let sum: u32 = word.to_ne_bytes().map(u32::from).iter().sum();
                    *x = (sum as f32 - 510.0) * (0.02 / BYTES_DEVIATION);
                }
            }
        });
        let data = backend.from_slice(&data, &[end - start])?;
        backend.cast(&mut flat.slice(start..end)?, &data)?;
    }
    Ok(out)
}
