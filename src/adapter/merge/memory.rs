//! Merging into a model in memory.

use super::base::{Base, dequantized};
use super::{MergePlan, Planner, merged_blocks};
use crate::adapter::io::AdapterTensors;
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::stored::head_name;
use crate::model::{Model, ModuleKind, Parameter, Weight};
use crate::tensor::Tensor;
use std::collections::{BTreeMap, BTreeSet};

/// The frozen parameters of a model: handles.
struct Held<'a> {
    backend: &'a Backend,
    weights: BTreeMap<String, Weight>,
    conv1d: BTreeSet<String>, // stored `[in, out]`
    head: String,
    tied: bool,
    stored: DType, // the type of the model's files, as far as it is known here
}

impl<'a> Held<'a> {
    fn of(model: &mut Model, backend: &'a Backend) -> Result<Self> {
        let (head, tied) = (head_name(&model.config), model.config.tie_word_embeddings);
        let modules = model.modules();
        let conv1d = modules.iter().filter(|m| m.kind == ModuleKind::Conv1d);
        let conv1d = conv1d.map(|m| format!("{}.weight", m.path)).collect();
        let tied_head = tied.then(|| (head.clone(), model.head.weight.clone()));
        let parameters = model.parameters_mut().into_iter().map(|(name, p)| (name, p.clone()));
        let weights = parameters
            .chain(tied_head)
            .map(|(name, parameter)| match parameter {
                Parameter::Frozen(weight) => Ok((name, weight)),
                Parameter::Trainable(_) | Parameter::SideBySide(_) => {
                    Err(Error::tensor(name, "is trained; adapters are merged into a frozen base"))
                }
            })
            .collect::<Result<_>>()?;
        let stored = model.embed.weight.tensor(&model.params)?.dtype();
        Ok(Held { backend, weights, conv1d, head, tied, stored })
    }

    fn weight(&self, name: &str) -> Result<&Weight> {
        self.weights.get(name).ok_or_else(|| Error::tensor(name, "missing in the base"))
    }
}

impl Base for Held<'_> {
    fn names(&self) -> Vec<String> {
        self.weights.keys().filter(|name| !(self.tied && **name == self.head)).cloned().collect()
    }

    /// Vectors are held in the activations' type; what is merged has the bits that files of the matrices' type would have.
    fn info(&self, name: &str) -> Result<(Vec<usize>, DType)> {
        let (shape, dtype) = match self.weight(name)? {
            Weight::Dense(tensor) => (tensor.shape().to_vec(), tensor.dtype()),
            Weight::Quantized(matrix) => {
                let [o, i] = *matrix.shape();
                (if self.conv1d.contains(name) { vec![i, o] } else { vec![o, i] }, matrix.dtype())
            }
        };
        let narrower = shape.len() < 2 && self.stored.size() < dtype.size();
        Ok((shape, if narrower { self.stored } else { dtype }))
    }

    fn tensor(&self, name: &str) -> Result<Tensor> {
        match self.weight(name)? {
            Weight::Dense(tensor) => Ok(tensor.clone()),
            Weight::Quantized(matrix) => dequantized(self.backend, matrix, self.conv1d.contains(name)),
        }
    }

    fn tied_head(&self) -> String {
        self.head.clone()
    }
}

/// Merges an adapter into the frozen weights of a base model in memory: what changes gets memory of its own, the rest
/// stays. A quantized matrix that changes becomes a dense one of the type that it was quantized from. `tensors` are the
/// adapter's by the names of its file. Returns the bytes of what changed.
///
/// The weights have the bits of merging the same adapter into the model's files where the model holds the files' type; where
/// it holds them converted (files in f32, activations in bf16), the change is added to the converted ones.
///
/// # Errors
/// When the adapter does not fit, or memory can't be had; then the model is as before.
pub fn merge_into(model: &mut Model, merge: &MergePlan, tensors: Vec<(String, Tensor)>) -> Result<usize> {
    let (backend, config) = (model.backend.clone(), model.config.clone());
    let base = Held::of(model, &backend)?;
    let adapter = AdapterTensors::new(tensors, "the adapter".into());
    let (plans, _) = Planner { backend: &backend, config: &config, merge, base: &base, adapter }.plan()?;
    let mut merged = BTreeMap::new();
    for (name, plan) in plans.iter().filter(|(_, plan)| plan.is_changed()) {
        let out = backend.empty(&plan.shape, plan.dtype)?;
        let rows = if plan.shape.len() < 2 { out.reshape(&[1, out.elements()])? } else { out.clone() };
        merged_blocks(plan, &base, &backend, &mut |range, bytes| {
            backend.upload(&mut rows.slice(range)?, bytes)
        })?;
        let vector = plan.shape.len() < 2;
        merged.insert(name.clone(), if vector { backend.to_dtype(&out, model.dtype)? } else { out });
    }
    let bytes = merged.values().map(Tensor::bytes).sum();
    // A tied head that does not change keeps the embedding as it was: each has a handle of its own.
    let head = (config.tie_word_embeddings).then(|| (base.head.clone(), &mut model.head.weight));
    if let Some((name, parameter)) = head
        && let Some(tensor) = merged.remove(&name)
    {
        *parameter = Parameter::Frozen(Weight::Dense(tensor));
    }
    for (name, parameter) in model.parameters_mut() {
        if let Some(tensor) = merged.remove(&name) {
            *parameter = Parameter::Frozen(Weight::Dense(tensor));
        }
    }
    Ok(bytes)
}
