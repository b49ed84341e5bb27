//! Several adapters on one base: loaded once, switched by name without touching the base, unloaded.

use super::method::{Method, read_adapter};
use crate::error::{Error, Result};
use crate::model::{Installed, Model};
use std::collections::BTreeMap;
use std::path::Path;

/// The adapters of a model, of which one or none is active.
#[derive(Debug)]
pub struct AdapterSet {
    model: Model,
    /// The model as it is without adapters, while one is active.
    base: Option<Installed>,
    loaded: BTreeMap<String, Loaded>,
    active: Option<String>,
}

/// An adapter, and what it puts on the model while it is not there.
#[derive(Debug)]
struct Loaded {
    method: Box<dyn Method>,
    state: Option<Installed>,
}

impl AdapterSet {
    /// No adapters on a base model.
    pub fn new(base: Model) -> Self {
        AdapterSet { model: base, base: None, loaded: BTreeMap::new(), active: None }
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
        let active = self.active.clone();
        self.set_active(None)?;
        let base = self.model.installed()?;
        let read = method.load(&mut self.model, dir);
        let state = self.model.exchange(base);
        if read.is_ok() {
            self.loaded.insert(name.to_string(), Loaded { method, state: Some(state) });
        }
        self.set_active(active.as_deref())?;
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
            if let Some(loaded) = self.loaded.get_mut(&old) {
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
