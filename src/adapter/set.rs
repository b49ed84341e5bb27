//! Several adapters on one base: loaded once, switched by name without touching the base, unloaded.

use super::io::copy_key;
use super::merge::merge_into;
use super::method::{Method, from_settings, read_adapter};
use crate::error::{Error, Result};
use crate::model::{Installed, Model, Parameter};
use crate::param::ParamStore;
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::path::Path;

/// The adapters of a model, of which one or none is active.
#[derive(Debug)]
pub struct AdapterSet {
    model: Model,
    /// The model as it is without adapters, while one is active: handles.
    base: Option<Installed>,
    loaded: BTreeMap<String, Loaded>,
    active: Option<String>,
    /// Whether the active adapter is in the base's weights instead of beside them.
    merged: bool,
}

/// An adapter, and what it puts on the model while it is not there.
#[derive(Debug)]
struct Loaded {
    method: Box<dyn Method>,
    state: Option<Installed>,
}

/// The dense weights of the head and the embeddings that have adapters, by path.
fn adapted_tables(model: &Model) -> Vec<(String, Tensor)> {
    let tables = [Some(&model.embed), model.positions.as_ref()].into_iter().flatten();
    let tables = tables.filter(|t| t.adapter.is_some()).map(|t| (&t.path, &t.weight));
    let head = model.head.lora().map(|_| (&model.head.path, &model.head.weight));
    let dense =
        |(path, weight): (&String, &Parameter)| Some((path.clone(), weight.tensor(&model.params).ok()?));
    tables.chain(head).filter_map(dense).collect()
}

impl AdapterSet {
    /// No adapters on a base model.
    pub fn new(base: Model) -> Self {
        AdapterSet { model: base, base: None, loaded: BTreeMap::new(), active: None, merged: false }
    }

    /// The model with the active adapter on it.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The base model; the adapters are dropped.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn into_base(mut self) -> Result<Model> {
        self.set_active(None)?;
        Ok(self.model)
    }

    /// Names of the adapters, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.loaded.keys().map(String::as_str)
    }

    /// The active adapter.
    pub fn active(&self) -> Option<&str> {
        self.active.as_deref()
    }

    /// The method of an adapter.
    pub fn method(&self, name: &str) -> Option<&dyn Method> {
        self.loaded.get(name).map(|loaded| &*loaded.method)
    }

    /// Reads the adapter of a folder under a name of its own; it is not active yet.
    ///
    /// # Errors
    /// When the name is taken or the adapter does not fit the model; the set is then as before.
    pub fn load(&mut self, name: &str, dir: &Path) -> Result<()> {
        if self.loaded.contains_key(name) {
            return Err(Error::config(
                "adapters",
                name,
                "an adapter of this name is loaded; unload it first",
            ));
        }
        let mut method = read_adapter(dir)?;
        let (active, merged) = (self.active.clone(), self.merged);
        self.set_active(None)?;
        let base = self.model.installed()?;
        let read = method.load(&mut self.model, dir);
        let state = self.model.exchange(base);
        if read.is_ok() {
            self.loaded.insert(name.to_string(), Loaded { method, state: Some(state) });
        }
        self.set_active(active.as_deref())?;
        if merged {
            self.merge()?;
        }
        read
    }

    /// Puts the adapter `name` on the model in place of the one that is there; `None`: the base alone.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn set_active(&mut self, name: Option<&str>) -> Result<()> {
        if name == self.active.as_deref() {
            return Ok(());
        }
        if let Some(name) = name {
            self.known(name)?;
        }
        if let (Some(old), Some(base)) = (self.active.take(), self.base.take()) {
            let state = self.model.exchange(base);
            // Merged weights are let go; the adapter itself was set aside when they were made.
            if let Some(loaded) = self.loaded.get_mut(&old).filter(|_| !std::mem::take(&mut self.merged)) {
                loaded.state = Some(state);
            }
        }
        if let Some(name) = name
            && let Some(state) = self.loaded.get_mut(name).and_then(|loaded| loaded.state.take())
        {
            self.base = Some(self.model.exchange(state));
            self.active = Some(name.to_string());
        }
        Ok(())
    }

    /// Merges the active adapter into the base's weights: products then cost what the base's cost. The weights that
    /// change get memory of their own (the bytes that are returned) while they are merged; the base's are kept, by handle,
    /// and pages of a mapped file that nothing reads leave memory. A quantized matrix that changes becomes a dense one of
    /// the type that it was quantized from.
    ///
    /// See [`merge_into`] for the bits.
    ///
    /// # Errors
    /// When none is active, the method can't be merged, or memory can't be had; the set is then as before.
    pub fn merge(&mut self) -> Result<usize> {
        let Some(name) = self.active.clone() else {
            return Err(Error::config("adapters", "merge", "no adapter is active; choose one by set_active"));
        };
        if self.merged {
            return Err(Error::config("adapters", name, "is merged already"));
        }
        let method = &self.loaded[&name].method;
        let mut tensors = method.tensors(&self.model)?;
        let held = adapted_tables(&self.model);
        // As it is stored: an adapter that starts as a part of the base is a plain one there.
        let settings = method.settings().into_iter().map(|(key, value)| (key.to_string(), value)).collect();
        let plan = from_settings(&*name, &settings)?
            .merge_plan(&self.model.modules(), &self.model.config.model_type)?;
        self.set_active(None)?;
        // A head or an embedding of its own, which came with the adapter.
        for (path, own) in held {
            let tables = [Some(&self.model.embed), self.model.positions.as_ref()];
            let mut tables = tables.into_iter().flatten();
            let base = tables.find(|table| table.path == path).map_or(&self.model.head.weight, |t| &t.weight);
            if !base.tensor(&self.model.params).is_ok_and(|base| own.is_same(&base)) {
                tensors.push((copy_key(&path), own));
            }
        }
        let base = self.model.installed()?;
        match merge_into(&mut self.model, &plan, tensors) {
            Ok(bytes) => {
                (self.base, self.active, self.merged) = (Some(base), Some(name), true);
                Ok(bytes)
            }
            Err(e) => {
                self.set_active(Some(&name))?;
                Err(e)
            }
        }
    }

    /// Puts the base's weights back, bit for bit, with the adapter beside them again.
    ///
    /// # Errors
    /// When nothing is merged.
    pub fn unmerge(&mut self) -> Result<()> {
        let name = self.active.clone().filter(|_| self.merged);
        let name = name.ok_or_else(|| Error::config("adapters", "unmerge", "no adapter is merged"))?;
        self.set_active(None)?;
        self.set_active(Some(&name))
    }

    /// Whether the active adapter is merged.
    pub fn is_merged(&self) -> bool {
        self.merged
    }

    /// The base with the active adapter merged for good: what it replaces is freed, the adapters are dropped.
    ///
    /// # Errors
    /// As [`AdapterSet::merge`].
    pub fn into_merged(mut self) -> Result<Model> {
        if !self.merged {
            self.merge()?;
        }
        Ok(self.model)
    }

    /// Lets `work` use the model with these adapters side by side on it, whose parameters it gets in the same order:
    /// passes then say which rows have which ([`Model::extend_all`]). Afterwards the active adapter is what it was.
    ///
    /// # Errors
    /// When there is none of a name, one can not be beside others ([`Model::side_by_side`]), or whatever `work` reports.
    pub fn side_by_side<T>(
        &mut self,
        names: &[&str],
        work: impl FnOnce(&Model, &[&ParamStore]) -> Result<T>,
    ) -> Result<T> {
        names.iter().try_for_each(|name| self.known(name))?;
        let (active, merged) = (self.active.clone(), self.merged);
        self.set_active(None)?;
        let mut adapters = Vec::with_capacity(names.len());
        for name in names {
            adapters.extend(self.loaded[*name].state.as_ref().map(|state| (*name, state)));
        }
        let result = self.model.side_by_side(&adapters).and_then(|all| {
            let base = self.model.exchange(all);
            let params: Vec<&ParamStore> = adapters.iter().map(|(_, state)| state.params()).collect();
            let result = work(&self.model, &params);
            self.model.exchange(base);
            result
        });
        self.set_active(active.as_deref())?;
        if merged {
            self.merge()?;
        }
        result
    }

    /// Forgets an adapter.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn unload(&mut self, name: &str) -> Result<()> {
        self.known(name)?;
        if self.active.as_deref() == Some(name) {
            self.set_active(None)?;
        }
        self.loaded.remove(name);
        Ok(())
    }

    fn known(&self, name: &str) -> Result<()> {
        if self.loaded.contains_key(name) {
            return Ok(());
        }
        let names: Vec<&str> = self.names().collect();
        Err(Error::config("adapters", name, format!("no adapter of this name; loaded: {}", names.join(", "))))
    }
}
