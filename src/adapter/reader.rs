//! The keys of an `adapter_config.json`, read and written as PEFT does (version 0.21.2).
//!
//! A key that is set and not read is refused by name, since it may change the numbers; one that is null, false, empty
//! or at its default is ignored. PEFT writes sets in random order; here they are sorted.

use super::target::TargetModules;
use crate::error::{Error, Result};
use crate::fs::read_text;
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// PEFT's version whose files are written.
pub const PEFT_VERSION: &str = "0.21.2";

/// The settings of an adapter by PEFT's keys.
pub type Settings = BTreeMap<&'static str, Value>;

/// Keys that say where an adapter comes from and change no numbers.
const INFORMATIVE: [&str; 6] =
    ["auto_mapping", "inference_mode", "peft_type", "peft_version", "runtime_config", "megatron_core"];

/// A whole number as an integer, as a user of PEFT writes it.
pub fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

/// Characters outside ASCII as escapes, as Python's json writes them.
fn ascii(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    out
}

/// The file's content: keys sorted, two spaces, no newline at the end.
pub fn to_json(settings: &Settings) -> String {
    ascii(&serde_json::to_string_pretty(settings).expect("a map of JSON values is JSON"))
}

/// What every adapter's file has besides its own keys.
pub fn common_settings(peft_type: &str, origin: &Origin) -> Settings {
    Settings::from([
        ("auto_mapping", Value::Null),
        ("base_model_name_or_path", json!(origin.base_model_name_or_path)),
        ("inference_mode", json!(true)),
        ("peft_type", json!(peft_type)),
        ("peft_version", json!(PEFT_VERSION)),
        ("revision", json!(origin.revision)),
        ("task_type", json!(origin.task_type)),
    ])
}

/// A list of names, or null for none.
pub fn names_or_null(names: &[String]) -> Value {
    if names.is_empty() { Value::Null } else { json!(names) }
}

/// Targets as PEFT writes them, sets sorted.
pub fn targets_value(targets: &Option<TargetModules>) -> Value {
    match targets {
        None => Value::Null,
        Some(TargetModules::AllLinear) => json!("all-linear"),
        Some(TargetModules::Pattern(pattern)) => json!(pattern),
        Some(TargetModules::Names(names)) => {
            let mut names = names.clone();
            names.sort();
            json!(names)
        }
    }
}

/// What an adapter was made for and from.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Origin {
    pub task_type: Option<String>,
    pub base_model_name_or_path: Option<String>,
    pub revision: Option<String>,
}

impl Default for Origin {
    fn default() -> Self {
        Origin { task_type: Some("CAUSAL_LM".to_string()), base_model_name_or_path: None, revision: None }
    }
}

impl Origin {
    /// Reads the keys.
    ///
    /// # Errors
    /// When one is malformed, or the task is not supported.
    pub fn read(reader: &Reader<'_>) -> Result<Self> {
        let origin = Origin {
            task_type: reader.string("task_type")?,
            base_model_name_or_path: reader.string("base_model_name_or_path")?,
            revision: reader.string("revision")?,
        };
        match origin.task_type.as_deref() {
            None | Some("CAUSAL_LM") => Ok(origin),
            Some(task) => {
                Err(reader.error("task_type", format!("`{task}` is not supported; supported: CAUSAL_LM")))
            }
        }
    }
}

/// The keys of one adapter, with errors that name them; remembers which were asked for.
#[derive(Debug)]
pub struct Reader<'a> {
    /// What the settings come from, for messages.
    pub context: String,
    map: &'a Map<String, Value>,
    read: RefCell<BTreeSet<String>>,
}

/// The content of an adapter folder's `adapter_config.json`.
///
/// # Errors
/// When it is missing or no JSON object.
pub fn read_map(adapter_dir: &Path) -> Result<Map<String, Value>> {
    let path = adapter_dir.join("adapter_config.json");
    let value: Value = serde_json::from_str(&read_text(&path)?)
        .map_err(|e| Error::format(&path, format!("not JSON: {e}")))?;
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(Error::format(&path, "expected a JSON object")),
    }
}

impl<'a> Reader<'a> {
    /// The settings in `map`; `context` says where they come from.
    pub fn new(context: impl Into<String>, map: &'a Map<String, Value>) -> Self {
        Reader { context: context.into(), map, read: RefCell::default() }
    }

    /// An error about a key.
    pub fn error(&self, key: &str, message: impl Into<String>) -> Error {
        Error::config(&self.context, key, message)
    }

    /// The value of a key; null counts as absent.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key.to_string());
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// The kind of adapter that the file says it is.
    ///
    /// # Errors
    /// When it says nothing, or is another tool's.
    pub fn kind(&self) -> Result<String> {
        match self.get("peft_type").map(|v| v.as_str().unwrap_or("?")) {
            Some(kind) => Ok(kind.to_string()),
            None if self.get("fine_tune_type").is_some() || self.get("lora_parameters").is_some() => Err(self.error(
                "peft_type",
                "missing: this is mlx-lm's adapter format, which transposes its matrices; convert it to PEFT's first",
            )),
            None if self.get("config").is_some() || self.get("model_class").is_some() => {
                Ok("BOTTLENECK".to_string())
            }
            None => Err(self.error("peft_type", "expected an adapter's kind such as LORA, found nothing")),
        }
    }

    /// Refuses keys that are set, were not read, and have not the `neutral` value that does nothing.
    ///
    /// # Errors
    /// When there is one.
    pub fn finish(&self, neutral: &[(&str, Value)]) -> Result<()> {
        let read = self.read.borrow();
        for (key, value) in self.map {
            if read.contains(key) || INFORMATIVE.contains(&key.as_str()) {
                continue;
            }
            let default = neutral.iter().find(|(k, _)| k == key).map(|(_, v)| v);
            let empty = match value {
                Value::Null | Value::Bool(false) => true,
                Value::String(s) => s.is_empty(),
                Value::Array(a) => a.is_empty(),
                Value::Object(o) => o.is_empty(),
                _ => false,
            };
            if !empty && default != Some(value) {
                return Err(self.error(
                    key,
                    format!("{value} is not supported, and ignoring it could change the numbers"),
                ));
            }
        }
        Ok(())
    }

    /// An integer.
    ///
    /// # Errors
    /// When it is of another kind.
    pub fn usize(&self, key: &str) -> Result<Option<usize>> {
        self.get(key)
            .map(|v| {
                v.as_u64()
                    .map(|n| n as usize)
                    .ok_or_else(|| self.error(key, format!("expected an integer, found {v}")))
            })
            .transpose()
    }

    /// A number.
    ///
    /// # Errors
    /// When it is of another kind.
    pub fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.get(key)
            .map(|v| v.as_f64().ok_or_else(|| self.error(key, format!("expected a number, found {v}"))))
            .transpose()
    }

    /// A boolean, false if absent.
    ///
    /// # Errors
    /// When it is of another kind.
    pub fn bool(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(self.error(key, format!("expected true or false, found {other}"))),
        }
    }

    /// A string.
    ///
    /// # Errors
    /// When it is of another kind.
    pub fn string(&self, key: &str) -> Result<Option<String>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s.clone())),
            Some(other) => Err(self.error(key, format!("expected a string, found {other}"))),
        }
    }

    /// A list of strings, or one string.
    ///
    /// # Errors
    /// When it is of another kind.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<String>>> {
        let bad = |v: &Value| self.error(key, format!("expected a string or a list of strings, found {v}"));
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(vec![s.clone()])),
            Some(Value::Array(list)) => list
                .iter()
                .map(|v| v.as_str().map(str::to_string).ok_or_else(|| bad(v)))
                .collect::<Result<_>>()
                .map(Some),
            Some(other) => Err(bad(other)),
        }
    }

    /// Modules: `all-linear`, a pattern, or a list of names.
    ///
    /// # Errors
    /// When it is of another kind.
    pub fn targets(&self, key: &str) -> Result<Option<TargetModules>> {
        Ok(match self.get(key) {
            Some(Value::String(s)) if s.eq_ignore_ascii_case("all-linear") => Some(TargetModules::AllLinear),
            Some(Value::String(s)) => Some(TargetModules::Pattern(s.clone())),
            _ => self.strings(key)?.map(TargetModules::Names),
        })
    }

    /// A layer number or a list of them.
    ///
    /// # Errors
    /// When it is of another kind.
    pub fn layers(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let bad =
            |v: &Value| self.error(key, format!("expected a layer number or a list of them, found {v}"));
        let layer = |v: &Value| v.as_u64().map(|n| n as usize).ok_or_else(|| bad(v));
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => list.iter().map(layer).collect::<Result<_>>().map(Some),
            Some(v) => Ok(Some(vec![layer(v)?])),
        }
    }

    /// An object of numbers, in its order.
    ///
    /// # Errors
    /// When it is of another kind.
    pub fn pattern<T>(&self, key: &str, value: impl Fn(&Value) -> Option<T>) -> Result<Vec<(String, T)>> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Object(map)) => map
                .iter()
                .map(|(k, v)| {
                    let v = value(v).ok_or_else(|| {
                        self.error(&format!("{key}.{k}"), format!("expected a number, found {v}"))
                    })?;
                    Ok((k.clone(), v))
                })
                .collect(),
            Some(other) => Err(self.error(key, format!("expected an object, found {other}"))),
        }
    }
}
