//! Adapter folders: `adapter_config.json` and `adapter_model.safetensors` as PEFT reads and writes them.

use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::save::{StreamedTensor, WriteTensor, write_streamed};
use crate::model::{Checkpoint, Model};
use crate::param::ParamStore;
use crate::tensor::Tensor;
use std::collections::BTreeSet;
use std::path::Path;

/// What PEFT puts before every name.
pub(super) const PREFIX: &str = "base_model.model.";

/// The name of the settings' file.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// The name of the tensors' file.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";

/// Writes all parameters in f32 with PyTorch's metadata, atomically and one at a time; `key` names them.
///
/// # Errors
/// When the file can't be written.
pub fn write_params(params: &ParamStore, path: &Path, key: impl Fn(&str) -> String) -> Result<()> {
    let tensor = |id| {
        let info = params.info(id);
        let write: WriteTensor<'_> = Box::new(move |w| {
            let values = params.to_vec(id).map_err(std::io::Error::other)?;
            w.write_all(bytemuck::cast_slice(&values))
        });
        StreamedTensor { name: key(&info.name), shape: info.shape.clone(), dtype: DType::F32, write }
    };
    write_streamed(path, params.ids().map(tensor).collect())
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
    let path = dir.join(file);
    let checkpoint = if file == ADAPTER_FILE { open_adapter(dir)? } else { Checkpoint::open_file(&path)? };
    let mut unused: BTreeSet<&str> = checkpoint.names().collect();
    for id in model.params.ids() {
        let info = model.params.info(id).clone();
        let tensor = take(&checkpoint, &mut unused, &key(&model.params, &info.name), &info.shape, &path)?;
        let values = model.backend.to_f32(&tensor)?;
        model.params.set(id, &values)?;
    }
    check_all_used(&unused, &path)
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

/// The adapter's tensor `key`, which the settings and the base model ask for in this shape.
pub(super) fn take(
    checkpoint: &Checkpoint,
    unused: &mut BTreeSet<&str>,
    key: &str,
    shape: &[usize],
    path: &Path,
) -> Result<Tensor> {
    if !unused.remove(key) {
        return Err(Error::tensor(key, format!("missing in {}; the settings ask for it", path.display())));
    }
    let tensor = checkpoint.tensor(key)?;
    if tensor.shape() != shape {
        return Err(Error::tensor(
            key,
            format!(
                "{} has shape {:?}, this base model needs {shape:?}: the adapter is for another base or rank",
                path.display(),
                tensor.shape()
            ),
        ));
    }
    Ok(tensor)
}

/// An adapter that fits leaves no tensor over.
pub(super) fn check_all_used(unused: &BTreeSet<&str>, path: &Path) -> Result<()> {
    match unused.first() {
        None => Ok(()),
        Some(name) => Err(Error::tensor(
            *name,
            format!(
                "in {} but not used by this model with these settings ({} such tensors)",
                path.display(),
                unused.len()
            ),
        )),
    }
}
