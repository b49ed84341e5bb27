//! Adapter folders: `adapter_config.json` and `adapter_model.safetensors` as PEFT reads and writes them.

use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::save::{StreamedTensor, WriteTensor, write_streamed};
use crate::model::{Checkpoint, Model, Parameter, Weight};
use crate::param::ParamStore;
use crate::tensor::Tensor;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What PEFT puts before every name.
pub(super) const PREFIX: &str = "base_model.model.";

/// The name of the settings' file.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// The name of the tensors' file.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";

/// All parameters with their keys.
///
/// # Errors
/// Never in practice: parameters lie within their buffer.
pub(super) fn named_params(
    params: &ParamStore,
    key: impl Fn(&str) -> String,
) -> Result<Vec<(String, Tensor)>> {
    params.ids().map(|id| Ok((key(&params.info(id).name), params.stored(id)?))).collect()
}

/// Writes tensors in f32 with PyTorch's metadata, atomically and one at a time.
///
/// # Errors
/// When the file can't be written.
pub(super) fn write_tensors(backend: &Backend, path: &Path, tensors: Vec<(String, Tensor)>) -> Result<()> {
    write_streamed(path, tensors.into_iter().map(|(name, x)| streamed_f32(backend, name, x)).collect())
}

/// A tensor to be written in f32.
pub(super) fn streamed_f32(backend: &Backend, name: String, tensor: Tensor) -> StreamedTensor<'_> {
    let shape = tensor.shape().to_vec();
    let write: WriteTensor<'_> = Box::new(move |w| {
        let values = backend.to_f32(&tensor).map_err(std::io::Error::other)?;
        w.write_all(bytemuck::cast_slice(&values))
    });
    StreamedTensor { name, shape, dtype: DType::F32, write }
}

/// Reads the parameters of `model` from a folder's file; `key` names them.
///
/// # Errors
/// When a tensor is missing, left over or of another shape.
pub(super) fn load_params(
    model: &mut Model,
    dir: &Path,
    file: &str,
    key: impl Fn(&ParamStore, &str) -> String,
) -> Result<()> {
    let mut tensors = AdapterTensors::open(dir, file)?;
    load_copies(model, &mut tensors)?;
    for id in model.params.ids() {
        let mut info = model.params.info(id).clone();
        if info.transposed {
            info.shape.reverse();
        }
        let mut tensor = tensors.take(&key(&model.params, &info.name), &info.shape)?;
        if info.transposed {
            tensor = model.backend.transposed(&model.backend.to_dtype(&tensor, DType::F32)?)?;
        }
        let values = model.backend.to_f32(&tensor)?;
        model.params.set(id, &values)?;
    }
    tensors.finish()
}

/// The key of the weight of an embedding or a head in the file of an adapter that is on it.
pub(super) fn copy_key(module: &str) -> String {
    format!("{PREFIX}{module}{COPY_SUFFIX}")
}

/// What follows the module's path in it.
pub(super) const COPY_SUFFIX: &str = ".base_layer.weight";

/// Rows that are compared at a time.
const ROWS: usize = 256;

/// PEFT writes a copy of the weight of an embedding or a head beside an adapter on it, and takes it for the weight when it
/// reads, also for a tied head's. Where it is the base's, nothing is held twice.
fn load_copies(model: &mut Model, tensors: &mut AdapterTensors) -> Result<()> {
    let backend = model.backend.clone();
    for table in model.embeddings_mut().filter(|table| table.adapter.is_some()) {
        load_copy(&backend, &table.path, &mut table.weight, tensors)?;
    }
    if model.embed.adapter.is_some() && !matches!(model.head.weight, Parameter::Frozen(Weight::Quantized(_)))
    {
        model.retie();
    }
    if model.head.lora().is_some() {
        load_copy(&backend, &model.head.path, &mut model.head.weight, tensors)?;
    }
    Ok(())
}

fn load_copy(
    backend: &Backend,
    path: &str,
    parameter: &mut Parameter,
    tensors: &mut AdapterTensors,
) -> Result<()> {
    let (key, Parameter::Frozen(weight)) = (copy_key(path), &*parameter) else { return Ok(()) };
    if tensors.shape(&key).is_none() {
        return Ok(());
    }
    let copy = tensors.take(&key, weight.shape())?;
    let Weight::Dense(own) = weight else { return Ok(()) };
    let mut same = true;
    for start in (0..own.rows()).step_by(ROWS) {
        let rows = start..(start + ROWS).min(own.rows());
        let own = backend.to_dtype(&own.slice(rows.clone())?, copy.dtype())?;
        same = same && backend.to_f32(&own)? == backend.to_f32(&copy.slice(rows)?)?;
    }
    copy.release_pages();
    if !same {
        let dtype = own.dtype();
        *parameter = Parameter::Frozen(Weight::Dense(backend.to_dtype(&copy, dtype)?));
    }
    Ok(())
}

/// The tensors of an adapter folder.
pub(super) fn open_adapter(dir: &Path) -> Result<Checkpoint> {
    let path = dir.join(ADAPTER_FILE);
    if !path.is_file() {
        let pickle = dir.join("adapter_model.bin");
        if pickle.is_file() {
            return Err(Error::format(
                pickle,
                "a pickle can run code when loaded and is not read; load and save the adapter once with PEFT to get adapter_model.safetensors",
            ));
        }
        return Err(Error::format(dir, format!("expected {ADAPTER_FILE}, found none")));
    }
    Checkpoint::open_file(&path)
}

/// An adapter's tensors by their keys, and which of them nothing has asked for.
#[derive(Debug)]
pub(super) struct AdapterTensors {
    tensors: BTreeMap<String, Tensor>,
    unused: BTreeSet<String>,
    origin: String,
}

impl AdapterTensors {
    /// Those of a folder's file.
    ///
    /// # Errors
    /// When it is missing or malformed.
    pub fn open(dir: &Path, file: &str) -> Result<Self> {
        let path = dir.join(file);
        let checkpoint =
            if file == ADAPTER_FILE { open_adapter(dir)? } else { Checkpoint::open_file(&path)? };
        let tensors = checkpoint.names().map(|name| Ok((name.to_string(), checkpoint.tensor(name)?)));
        Ok(Self::new(tensors.collect::<Result<_>>()?, path.display().to_string()))
    }

    /// These; `origin` says in messages where they come from.
    pub fn new(tensors: Vec<(String, Tensor)>, origin: String) -> Self {
        let unused = tensors.iter().map(|(key, _)| key.clone()).collect();
        AdapterTensors { tensors: tensors.into_iter().collect(), unused, origin }
    }

    /// The dimensions of a tensor.
    pub fn shape(&self, key: &str) -> Option<&[usize]> {
        self.tensors.get(key).map(Tensor::shape)
    }

    /// A tensor, of any shape.
    ///
    /// # Errors
    /// When it is missing.
    pub fn get(&mut self, key: &str) -> Result<Tensor> {
        self.unused.remove(key);
        self.tensors
            .get(key)
            .cloned()
            .ok_or_else(|| Error::tensor(key, format!("missing in {}; the settings ask for it", self.origin)))
    }

    /// A tensor that the settings and the base model ask for in this shape.
    ///
    /// # Errors
    /// When it is missing or has another shape.
    pub fn take(&mut self, key: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.get(key)?;
        if tensor.shape() != shape {
            return Err(Error::tensor(
                key,
                format!(
                    "{} has shape {:?}, this base model needs {shape:?}: the adapter is for another base or rank",
                    self.origin,
                    tensor.shape()
                ),
            ));
        }
        Ok(tensor)
    }

    /// An adapter that fits leaves no tensor over.
    ///
    /// # Errors
    /// When one is.
    pub fn finish(&self) -> Result<()> {
        match self.unused.first() {
            None => Ok(()),
            Some(name) => Err(Error::tensor(
                name,
                format!(
                    "in {} but not used by this model with these settings ({} such tensors)",
                    self.origin,
                    self.unused.len()
                ),
            )),
        }
    }
}
