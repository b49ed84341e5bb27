//! What a checkpoint's names and shapes say of the model, without loading it.

use super::checkpoint::Checkpoint;
use super::config::ModelConfig;
use super::module::{ModuleInfo, ModuleKind};
use std::collections::BTreeMap;

/// The name of the output head's weight.
pub(crate) fn head_name(config: &ModelConfig) -> String {
    format!("{}.weight", config.names.head)
}

/// A tensor's name with the base model's prefix, which base checkpoints leave out.
pub(crate) fn full_name(name: &str, config: &ModelConfig) -> String {
    let prefix = config.names.base_prefix;
    if name.starts_with(prefix) || name == head_name(config) {
        name.to_string()
    } else {
        format!("{prefix}{name}")
    }
}

/// The model's modules as its weights show them.
pub(crate) fn stored_modules(base: &Checkpoint, config: &ModelConfig) -> Vec<ModuleInfo> {
    let mut shapes: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for name in base.names() {
        if let Some((shape, _)) = base.info(name) {
            shapes.insert(full_name(name, config), shape.to_vec());
        }
    }
    modules_of(shapes, config)
}

/// The modules of these tensors, given by full names.
pub(crate) fn modules_of(mut shapes: BTreeMap<String, Vec<usize>>, config: &ModelConfig) -> Vec<ModuleInfo> {
    if config.tie_word_embeddings
        && let Some(embed) = shapes.get(&format!("{}.weight", config.names.embed)).cloned()
    {
        shapes.insert(head_name(config), embed);
    }
    let module = |name: &str, shape: &[usize]| {
        let path = name.strip_suffix(".weight")?;
        let is_head = path == config.names.head;
        let (kind, out_features, in_features) = match *shape {
            [cols] => (ModuleKind::Norm, cols, cols),
            [a, b] if path == config.names.embed || Some(path) == config.names.positions => {
                (ModuleKind::Embedding, b, a)
            }
            [i, o] if config.conv1d && !is_head => (ModuleKind::Conv1d, o, i),
            [o, i] => (ModuleKind::Linear, o, i),
            _ => return None,
        };
        let bias = shapes.contains_key(&format!("{path}.bias"));
        Some(ModuleInfo { path: path.to_string(), kind, in_features, out_features, bias, is_head })
    };
    shapes.iter().filter_map(|(name, shape)| module(name, shape)).collect()
}
