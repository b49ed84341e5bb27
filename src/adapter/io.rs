//! Adapter folders: `adapter_config.json` and `adapter_model.safetensors` as PEFT reads and writes them.

use super::config::LoraConfig;
use super::lora::attach;
use crate::error::{Error, Result};
use crate::fs::write_atomic;
use crate::model::{Checkpoint, Model};
use crate::param::ParamStore;
use crate::tensor::Tensor;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write;
use std::path::Path;

/// What PEFT puts before every name.
const PREFIX: &str = "base_model.model.";

/// The name of the tensors' file.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";

/// PEFT's key of a parameter: the bias of an adapted layer belongs to its `base_layer`.
pub fn peft_key(params: &ParamStore, name: &str) -> String {
    if let Some(module) = name.strip_suffix(".bias")
        && params.find(&format!("{module}.lora_A.weight")).is_some()
    {
        return format!("{PREFIX}{module}.base_layer.bias");
    }
    format!("{PREFIX}{name}")
}

/// Writes the adapter on `model` to a folder. Equal adapters give equal bytes.
///
/// # Errors
/// When a file can't be written.
pub fn save_adapter(model: &Model, config: &LoraConfig, dir: &Path) -> Result<()> {
    let mut tensors = BTreeMap::new();
    for id in model.params.ids() {
        let info = model.params.info(id);
        tensors.insert(peft_key(&model.params, &info.name), (info.shape.clone(), model.params.to_vec(id)?));
    }
    write_tensors(&dir.join(ADAPTER_FILE), &tensors)?;
    config.save(dir)
}

/// Writes f32 tensors with PyTorch's metadata, atomically.
///
/// # Errors
/// When the file can't be written.
pub fn write_tensors(path: &Path, tensors: &BTreeMap<String, (Vec<usize>, Vec<f32>)>) -> Result<()> {
    let views: Vec<(&str, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, (shape, data))| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(data))
                .map_err(|e| Error::tensor(name, e.to_string()))?;
            Ok((name.as_str(), view))
        })
        .collect::<Result<_>>()?;
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let bytes =
        safetensors::serialize(views, Some(metadata)).map_err(|e| Error::format(path, e.to_string()))?;
    write_atomic(path, |w| w.write_all(&bytes))
}

/// Puts the adapter of a folder on a base model; returns its settings.
///
/// # Errors
/// When the folder is not a LoRA adapter that fits this model: every tensor must be there, have the right
/// shape, and be used.
pub fn load_adapter(model: &mut Model, dir: &Path) -> Result<LoraConfig> {
    let mut config = LoraConfig::load(dir)?;
    let checkpoint = open_adapter(dir)?;
    attach(model, &mut config, 0)?;
    load_tensors(model, &checkpoint, &dir.join(ADAPTER_FILE))?;
    Ok(config)
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

fn load_tensors(model: &mut Model, checkpoint: &Checkpoint, path: &Path) -> Result<()> {
    let mut unused: BTreeSet<&str> = checkpoint.names().collect();
    for id in model.params.ids() {
        let info = model.params.info(id).clone();
        let tensor = take(checkpoint, &mut unused, &peft_key(&model.params, &info.name), &info.shape, path)?;
        let values = model.backend.to_f32(&tensor)?;
        model.params.set(id, &values)?;
    }
    check_all_used(&unused, path)
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
