//! The weights that an adapter is merged into, tensor by tensor: as files hold them, or as a quantized base stands for
//! them.

use super::{MergeOptions, Onto};
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::gguf::{Gguf, is_gguf};
use crate::model::stored::{full_name, head_name, modules_of};
use crate::model::{Checkpoint, ModelConfig, ModuleInfo, ModuleKind, bnb};
use crate::quant::{QuantConfig, Quantized};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
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

/// The modules of a base as its weights show them.
///
/// # Errors
/// When a weight is malformed.
pub(super) fn modules(base: &dyn Base, config: &ModelConfig) -> Result<Vec<ModuleInfo>> {
    let shapes = base.names().into_iter().map(|name| {
        let shape = base.info(&name)?.0;
        Ok((name, shape))
    });
    Ok(modules_of(shapes.collect::<Result<_>>()?, config))
}

/// The base that files hold and the options ask for.
///
/// # Errors
/// When a file is malformed, or the options ask for what it can't give.
pub(super) fn open_base<'a>(
    dir: &Path,
    config: &'a ModelConfig,
    backend: &'a Backend,
    options: &MergeOptions,
) -> Result<Box<dyn Base + 'a>> {
    let asked = |key: &str, message: String| Err(Error::config("merge", key, message));
    let (stored, found): (Box<dyn Base + 'a>, _) = if is_gguf(dir) {
        let file = Gguf::open(dir)?;
        let names = file.full_names(config)?;
        (Box::new(GgufFile { config, backend, file, names, dtype: options.gguf_dtype }), None)
    } else {
        let folder = Folder::open(dir, config, backend)?;
        let found = folder.quantized_by_bitsandbytes()?;
        (Box::new(folder), found)
    };
    match (options.onto, found, options.quant) {
        (Onto::Original, Some(_), _) => asked(
            "onto",
            format!(
                "{} is quantized and has not the original weights: give the model that it was quantized from, or merge \
                 onto the dequantized ones (--onto dequantized)",
                dir.display()
            ),
        ),
        (Onto::Dequantized, None, None) => asked(
            "onto",
            "`dequantized` needs the format of the base in training, for example --quant nf4".into(),
        ),
        (Onto::Dequantized, Some(found), Some(quant)) if found.format != quant.format => asked(
            "quant",
            format!("{} is in {}, not {}", dir.display(), found.format.name, quant.format.name),
        ),
        (Onto::Dequantized, None, Some(quant)) if quant.head && config.tie_word_embeddings => asked(
            "quant_head",
            "a tied head can't be dequantized apart from the embedding; merge onto the original".into(),
        ),
        (Onto::Dequantized, None, Some(quant)) => {
            let linear = |m: &ModuleInfo| matches!(m.kind, ModuleKind::Linear | ModuleKind::Conv1d);
            let all = modules(&*stored, config)?.into_iter();
            let chosen = all.filter(|m| linear(m) && (quant.head || !m.is_head));
            let targets =
                chosen.map(|m| (format!("{}.weight", m.path), m.kind == ModuleKind::Conv1d)).collect();
            Ok(Box::new(Requantized { base: stored, backend, quant, targets }))
        }
        _ => Ok(stored),
    }
}

/// A base some of whose weights stand for what quantizing makes of them.
struct Requantized<'a> {
    base: Box<dyn Base + 'a>,
    backend: &'a Backend,
    quant: QuantConfig,
    targets: BTreeMap<String, bool>, // whether stored `[in, out]`
}

impl Base for Requantized<'_> {
    fn names(&self) -> Vec<String> {
        self.base.names()
    }

    fn info(&self, name: &str) -> Result<(Vec<usize>, DType)> {
        self.base.info(name)
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        let weight = self.base.tensor(name)?;
        let Some(conv1d) = self.targets.get(name) else { return Ok(weight) };
        let upright = if *conv1d { self.backend.transposed(&weight)? } else { weight.clone() };
        let matrix = self.backend.quantize(&upright, &self.quant);
        weight.release_pages();
        dequantized(self.backend, &matrix.map_err(|e| Error::tensor(name, e.to_string()))?, *conv1d)
    }

    fn tied_head(&self) -> String {
        self.base.tied_head()
    }
}

/// A GGUF file.
struct GgufFile<'a> {
    config: &'a ModelConfig,
    backend: &'a Backend,
    file: Gguf,
    names: Vec<String>,
    dtype: DType,
}

impl Base for GgufFile<'_> {
    fn names(&self) -> Vec<String> {
        self.names.clone()
    }

    fn info(&self, name: &str) -> Result<(Vec<usize>, DType)> {
        Ok((self.file.shape(name, self.config)?.to_vec(), self.dtype))
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        self.file.tensor(name, self.config, self.backend, self.dtype)
    }

    fn tied_head(&self) -> String {
        format!("{}.weight", self.config.names.embed)
    }
}

/// A quantized matrix as its file would hold it: dense, stored `[in, out]` if `conv1d`.
pub(super) fn dequantized(backend: &Backend, matrix: &Quantized, conv1d: bool) -> Result<Tensor> {
    let mut dense = backend.empty(matrix.shape(), matrix.dtype())?;
    backend.dequantize(&mut dense, matrix)?;
    if conv1d { backend.transposed(&dense) } else { Ok(dense) }
}

/// A model's files.
struct Folder<'a> {
    config: &'a ModelConfig,
    backend: &'a Backend,
    checkpoint: Checkpoint,
    names: BTreeMap<String, String>, // in the files, by full names
}

impl<'a> Folder<'a> {
    /// Opens a folder, whose linear layers may be quantized by bitsandbytes.
    fn open(dir: &Path, config: &'a ModelConfig, backend: &'a Backend) -> Result<Self> {
        let checkpoint = Checkpoint::open(dir)?;
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
        Ok(Folder { config, backend, checkpoint, names })
    }

    /// How the folder's weights are quantized, if they are.
    fn quantized_by_bitsandbytes(&self) -> Result<Option<QuantConfig>> {
        let mut stored = self.names.values();
        let name = stored.find(|name| bnb::is_quantized(&self.checkpoint, name));
        name.map(|name| Ok(bnb::read(&self.checkpoint, name, self.backend)?.config())).transpose()
    }

    fn stored_name(&self, name: &str) -> Result<&str> {
        let stored = self.names.get(name).map(String::as_str);
        stored.ok_or_else(|| Error::tensor(name, "missing in the base"))
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
        let stored = self.stored_name(name)?;
        if !bnb::is_quantized(&self.checkpoint, stored) {
            return self.checkpoint.tensor(stored);
        }
        let matrix = bnb::read(&self.checkpoint, stored, self.backend)?;
        dequantized(self.backend, &matrix, self.is_conv1d(name))
    }

    fn tied_head(&self) -> String {
        format!("{}.weight", self.config.names.embed)
    }
}
