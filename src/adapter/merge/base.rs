//! The weights that an adapter is merged into, tensor by tensor: as files hold them, or as a quantized base stands for
//! them.

use super::{MergeOptions, Onto};
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::load::transposed;
use crate::model::stored::{full_name, head_name, modules_of};
use crate::model::{Checkpoint, ModelConfig, ModuleInfo, ModuleKind, bnb};
use crate::quant::{QuantConfig, Quantized};
use crate::tensor::Tensor;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A base model's tensors by their full names; all are floats, in the layout of Hugging Face's files.
pub(super) trait Base {
    /// The names; a tied head is not among them.
    fn names(&self) -> Vec<String>;

    /// Dimensions, and the type that the merged tensor has.
    fn info(&self, name: &str) -> Result<(Vec<usize>, DType)>;

    /// The elements, of any type of floats; one at a time is asked for.
    fn tensor(&self, name: &str) -> Result<Tensor>;

    /// The name of what a tied head is.
    fn tied_head(&self) -> String;
}

/// A quantized matrix as its file would hold it: dense, stored `[in, out]` if `conv1d`.
pub(super) fn dequantized(backend: &Backend, matrix: &Quantized, conv1d: bool) -> Result<Tensor> {
    let mut dense = backend.empty(matrix.shape(), matrix.dtype())?;
    backend.dequantize(&mut dense, matrix)?;
    if conv1d { transposed(backend, &dense) } else { Ok(dense) }
}

/// A model's files.
pub(super) struct Folder<'a> {
    config: &'a ModelConfig,
    backend: &'a Backend,
    checkpoint: Checkpoint,
    names: BTreeMap<String, String>, // in the files, by full names
    quant: Option<QuantConfig>,      // some weights stand for what this makes of them
    quantized: BTreeSet<String>,     // these
}

impl<'a> Folder<'a> {
    /// Opens a folder, whose linear layers may be quantized by bitsandbytes.
    ///
    /// # Errors
    /// When it is malformed, or the options ask for what it can't give.
    pub fn open(
        dir: &Path,
        config: &'a ModelConfig,
        backend: &'a Backend,
        options: &MergeOptions,
    ) -> Result<Self> {
        let checkpoint = Checkpoint::open(dir)?;
        let stored = checkpoint.names().find(|name| bnb::is_quantized(&checkpoint, name));
        let asked = |key: &str, message: String| Err(Error::config("merge", key, message));
        let quant = match (options.onto, stored, options.quant) {
            (Onto::Original, Some(_), _) => {
                return asked(
                    "onto",
                    format!(
                        "{} is quantized and has not the original weights: give the model that it was quantized from, \
                         or merge onto the dequantized ones (--onto dequantized)",
                        dir.display()
                    ),
                );
            }
            (Onto::Dequantized, None, None) => {
                return asked(
                    "onto",
                    "`dequantized` needs the format of the base in training, for example --quant nf4".into(),
                );
            }
            (Onto::Dequantized, Some(name), Some(quant)) => {
                let found = bnb::read(&checkpoint, name, backend)?.config();
                if found.format != quant.format {
                    return asked(
                        "quant",
                        format!("{} is in {}, not {}", dir.display(), found.format.name, quant.format.name),
                    );
                }
                None
            }
            (Onto::Dequantized, None, Some(quant)) if quant.head && config.tie_word_embeddings => {
                return asked(
                    "quant_head",
                    "a tied head can't be dequantized apart from the embedding; merge onto the original"
                        .into(),
                );
            }
            (Onto::Dequantized, None, quant) => quant,
            _ => None,
        };
        let parents = |name: &str| name.split_once(".weight.").map(|(module, _)| format!("{module}.weight"));
        let is_part = |name: &str| parents(name).is_some_and(|w| bnb::is_quantized(&checkpoint, &w));
        let is_float = |name: &str| {
            matches!(
                checkpoint.info(name),
                Some((_, safetensors::Dtype::F32 | safetensors::Dtype::F16 | safetensors::Dtype::BF16))
            )
        };
        let mut names = BTreeMap::new();
        for name in checkpoint.names() {
            let full = full_name(name, config);
            // Buffers such as GPT-2's causal masks are not weights. A tied head is the embedding, even where a file holds it
            // once more.
            let is_weight = bnb::is_quantized(&checkpoint, name) || is_float(name) && !is_part(name);
            let is_tied_head = config.tie_word_embeddings && full == head_name(config);
            if is_weight && !is_tied_head {
                names.insert(full, name.to_string());
            }
        }
        let mut folder = Folder { config, backend, checkpoint, names, quant, quantized: BTreeSet::new() };
        if let Some(quant) = quant {
            let linear = |m: &ModuleInfo| matches!(m.kind, ModuleKind::Linear | ModuleKind::Conv1d);
            let chosen = folder.modules()?.into_iter().filter(|m| linear(m) && (quant.head || !m.is_head));
            folder.quantized = chosen.map(|m| format!("{}.weight", m.path)).collect();
        }
        Ok(folder)
    }

    /// The modules as the weights show them.
    ///
    /// # Errors
    /// When a quantized weight is malformed.
    pub fn modules(&self) -> Result<Vec<ModuleInfo>> {
        let shapes = self.names.keys().map(|name| Ok((name.clone(), self.info(name)?.0)));
        Ok(modules_of(shapes.collect::<Result<_>>()?, self.config))
    }

    fn stored_name(&self, name: &str) -> Result<&str> {
        let stored = self.names.get(name).map(String::as_str);
        stored.ok_or_else(|| Error::tensor(name, "missing in the base"))
    }

    /// What a weight was quantized to in training.
    fn quantized(&self, name: &str) -> Result<Option<Quantized>> {
        let stored = self.stored_name(name)?;
        if bnb::is_quantized(&self.checkpoint, stored) {
            return bnb::read(&self.checkpoint, stored, self.backend).map(Some);
        }
        let Some(quant) = self.quant.filter(|_| self.quantized.contains(name)) else { return Ok(None) };
        let weight = self.checkpoint.tensor(stored)?;
        let upright = if self.is_conv1d(name) { transposed(self.backend, &weight)? } else { weight.clone() };
        let matrix =
            self.backend.quantize(&upright, &quant).map_err(|e| Error::tensor(name, e.to_string()))?;
        weight.release_pages();
        Ok(Some(matrix))
    }

    fn is_conv1d(&self, name: &str) -> bool {
        self.config.conv1d && name != head_name(self.config)
    }
}

impl Base for Folder<'_> {
    fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Result<(Vec<usize>, DType)> {
        let stored = self.stored_name(name)?;
        if bnb::is_quantized(&self.checkpoint, stored) {
            let matrix = bnb::read(&self.checkpoint, stored, self.backend)?;
            let [o, i] = *matrix.shape();
            let shape = if self.is_conv1d(name) { vec![i, o] } else { vec![o, i] };
            return Ok((shape, matrix.dtype()));
        }
        let tensor = self.checkpoint.tensor(stored)?;
        Ok((tensor.shape().to_vec(), tensor.dtype()))
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        match self.quantized(name)? {
            Some(matrix) => dequantized(self.backend, &matrix, self.is_conv1d(name)),
            None => self.checkpoint.tensor(self.stored_name(name)?),
        }
    }

    fn tied_head(&self) -> String {
        format!("{}.weight", self.config.names.embed)
    }
}
