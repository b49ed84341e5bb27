//! `adapter_config.json` of LoRA adapters, read and written as PEFT does (version 0.21.2).
//!
//! A key that is set and not implemented is refused by name, since it may change the numbers; one that is
//! null, false, empty or at its default is ignored. PEFT writes sets in random order; here they are sorted.

use crate::error::{Error, Result};
use crate::fs::{read_text, write_atomic_bytes};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// PEFT's version whose files are written.
pub const PEFT_VERSION: &str = "0.21.2";

/// Which modules are adapted or excluded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetModules {
    /// All linear layers but the head.
    AllLinear,
    /// Modules whose path is, or ends in, one of these names.
    Names(Vec<String>),
    /// Modules whose whole path matches this regular expression.
    Pattern(String),
}

impl TargetModules {
    /// From a command line: `all-linear`, names separated by commas, or a regular expression (anything with
    /// a character that no module path has).
    pub fn parse(text: &str) -> Self {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | ',' | ' ');
        if text.eq_ignore_ascii_case("all-linear") {
            TargetModules::AllLinear
        } else if text.chars().all(plain) && !text.contains(".*") {
            TargetModules::Names(
                text.split(',').map(|n| n.trim().to_string()).filter(|n| !n.is_empty()).collect(),
            )
        } else {
            TargetModules::Pattern(text.to_string())
        }
    }
}

/// Which biases are trained with the adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// None.
    None,
    /// Every bias of the model.
    All,
    /// Those of the adapted layers.
    LoraOnly,
}

/// How the low-rank matrices start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// A uniform in `+-1 / sqrt(in_features)`, B zero.
    Default,
    /// A normal with standard deviation `1 / r`, B zero.
    Gaussian,
    /// Both uniform: the adapter changes the model from the start (PEFT's `false`, for tests).
    Random,
}

/// A LoRA adapter's settings, in PEFT's names.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct LoraConfig {
    pub r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    /// Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`.
    pub use_rslora: bool,
    /// A bias on B.
    pub lora_bias: bool,
    pub bias: Bias,
    /// `None`: PEFT's default of the family.
    pub target_modules: Option<TargetModules>,
    pub exclude_modules: Option<TargetModules>,
    pub layers_to_transform: Option<Vec<usize>>,
    pub layers_pattern: Option<Vec<String>>,
    /// Ranks of modules whose path ends in a match of the key; the first match counts.
    pub rank_pattern: Vec<(String, usize)>,
    pub alpha_pattern: Vec<(String, f64)>,
    /// Weights are stored `[in, out]`; set by the model, as in PEFT.
    pub fan_in_fan_out: bool,
    /// Modules trained whole and saved with the adapter.
    pub modules_to_save: Vec<String>,
    pub init_lora_weights: InitLoraWeights,
    pub task_type: Option<String>,
    pub base_model_name_or_path: Option<String>,
    pub revision: Option<String>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            lora_bias: false,
            bias: Bias::None,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            fan_in_fan_out: false,
            modules_to_save: Vec::new(),
            init_lora_weights: InitLoraWeights::Default,
            task_type: Some("CAUSAL_LM".to_string()),
            base_model_name_or_path: None,
            revision: None,
        }
    }
}

/// Keys that PEFT writes and this crate does not implement, with the values under which they do nothing.
fn neutral_keys() -> Vec<(&'static str, Value)> {
    vec![
        ("alora_invocation_tokens", Value::Null),
        ("arrow_config", Value::Null),
        ("corda_config", Value::Null),
        ("ensure_weight_tying", json!(false)),
        ("eva_config", Value::Null),
        ("kasa_config", Value::Null),
        ("layer_replication", Value::Null),
        ("loftq_config", json!({})),
        ("lora_ga_config", Value::Null),
        ("megatron_config", Value::Null),
        ("megatron_core", json!("megatron.core")),
        ("monteclora_config", Value::Null),
        ("qalora_group_size", json!(16)),
        ("target_parameters", Value::Null),
        ("trainable_token_indices", Value::Null),
        ("use_bdlora", Value::Null),
        ("use_dora", json!(false)),
        ("use_qalora", json!(false)),
        ("velora_config", Value::Null),
    ]
}

/// Keys that say where an adapter comes from and change no numbers.
const INFORMATIVE: [&str; 6] =
    ["auto_mapping", "inference_mode", "peft_type", "peft_version", "runtime_config", "megatron_core"];

impl LoraConfig {
    /// Reads `adapter_config.json` of an adapter folder.
    ///
    /// # Errors
    /// When it is missing, malformed, of another kind or tool, or sets a key that is not implemented.
    pub fn load(adapter_dir: &Path) -> Result<Self> {
        let path = adapter_dir.join("adapter_config.json");
        let value: Value = serde_json::from_str(&read_text(&path)?)
            .map_err(|e| Error::format(&path, format!("not JSON: {e}")))?;
        let map = value.as_object().ok_or_else(|| Error::format(&path, "expected a JSON object"))?;
        Self::from_map(&Reader { path: &path, map })
    }

    fn from_map(reader: &Reader<'_>) -> Result<Self> {
        reader.check_kind()?;
        reader.refuse_unknown()?;
        let defaults = LoraConfig::default();
        let config = LoraConfig {
            r: reader.usize("r")?.unwrap_or(defaults.r),
            lora_alpha: reader.f64("lora_alpha")?.unwrap_or(defaults.lora_alpha),
            lora_dropout: reader.f64("lora_dropout")?.unwrap_or(0.0),
            use_rslora: reader.bool("use_rslora")?,
            lora_bias: reader.bool("lora_bias")?,
            bias: match reader.get("bias").map(|v| v.as_str().unwrap_or("?")) {
                None | Some("none") => Bias::None,
                Some("all") => Bias::All,
                Some("lora_only") => Bias::LoraOnly,
                Some(_) => return Err(reader.error("bias", "expected none, all or lora_only")),
            },
            target_modules: reader.targets("target_modules")?,
            exclude_modules: reader.targets("exclude_modules")?,
            layers_to_transform: reader.layers("layers_to_transform")?,
            layers_pattern: reader.strings("layers_pattern")?,
            rank_pattern: reader
                .pattern("rank_pattern", |v| v.as_u64().map(|n| n as usize).filter(|n| *n > 0))?,
            alpha_pattern: reader.pattern("alpha_pattern", Value::as_f64)?,
            fan_in_fan_out: reader.bool("fan_in_fan_out")?,
            modules_to_save: reader.strings("modules_to_save")?.unwrap_or_default(),
            init_lora_weights: match reader.get("init_lora_weights") {
                None | Some(Value::Bool(true)) => InitLoraWeights::Default,
                Some(Value::Bool(false)) => InitLoraWeights::Random,
                Some(Value::String(s)) if s.eq_ignore_ascii_case("gaussian") => InitLoraWeights::Gaussian,
                Some(other) => {
                    return Err(reader.error(
                        "init_lora_weights",
                        format!("{other} is not supported; supported: true, false, \"gaussian\""),
                    ));
                }
            },
            task_type: reader.string("task_type")?,
            base_model_name_or_path: reader.string("base_model_name_or_path")?,
            revision: reader.string("revision")?,
        };
        config.check(&reader.path.display().to_string())?;
        Ok(config)
    }

    /// Checks the values that can't be right for any model; `context` is for messages.
    ///
    /// # Errors
    /// When one can't.
    pub fn check(&self, context: &str) -> Result<()> {
        if self.r == 0 || self.r > 65_536 {
            return Err(Error::config(
                context,
                "r",
                format!("expected a rank from 1 to 65536, found {}", self.r),
            ));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(Error::config(
                context,
                "lora_dropout",
                format!("expected a probability in [0, 1), found {}", self.lora_dropout),
            ));
        }
        if !self.lora_alpha.is_finite() {
            return Err(Error::config(
                context,
                "lora_alpha",
                format!("expected a number, found {}", self.lora_alpha),
            ));
        }
        if let Some(task) = self.task_type.as_deref().filter(|t| *t != "CAUSAL_LM") {
            return Err(Error::config(
                context,
                "task_type",
                format!("`{task}` is not supported; supported: CAUSAL_LM"),
            ));
        }
        Ok(())
    }

    /// The factor on the low-rank part of rank `r` and this alpha.
    pub fn scale(&self, r: usize, lora_alpha: f64) -> f64 {
        if self.use_rslora { lora_alpha / (r as f64).sqrt() } else { lora_alpha / r as f64 }
    }

    /// The file's content: PEFT's keys, sorted, two spaces, no newline at the end.
    pub fn to_json(&self) -> String {
        let mut keys: BTreeMap<&str, Value> = neutral_keys().into_iter().collect();
        let sorted = |names: &[String]| {
            let mut names = names.to_vec();
            names.sort();
            json!(names)
        };
        let targets = |t: &Option<TargetModules>| match t {
            None => Value::Null,
            Some(TargetModules::AllLinear) => json!("all-linear"),
            Some(TargetModules::Pattern(p)) => json!(p),
            Some(TargetModules::Names(names)) => sorted(names),
        };
        let entries = [
            (
                "alpha_pattern",
                Value::Object(self.alpha_pattern.iter().map(|(k, v)| (k.clone(), number(*v))).collect()),
            ),
            ("auto_mapping", Value::Null),
            ("base_model_name_or_path", json!(self.base_model_name_or_path)),
            (
                "bias",
                json!(match self.bias {
                    Bias::None => "none",
                    Bias::All => "all",
                    Bias::LoraOnly => "lora_only",
                }),
            ),
            ("exclude_modules", targets(&self.exclude_modules)),
            ("fan_in_fan_out", json!(self.fan_in_fan_out)),
            ("inference_mode", json!(true)),
            (
                "init_lora_weights",
                match self.init_lora_weights {
                    InitLoraWeights::Default => json!(true),
                    InitLoraWeights::Gaussian => json!("gaussian"),
                    InitLoraWeights::Random => json!(false),
                },
            ),
            ("layers_pattern", json!(self.layers_pattern)),
            ("layers_to_transform", json!(self.layers_to_transform)),
            ("lora_alpha", number(self.lora_alpha)),
            ("lora_bias", json!(self.lora_bias)),
            ("lora_dropout", json!(self.lora_dropout)),
            (
                "modules_to_save",
                if self.modules_to_save.is_empty() { Value::Null } else { json!(self.modules_to_save) },
            ),
            ("peft_type", json!("LORA")),
            ("peft_version", json!(PEFT_VERSION)),
            ("r", json!(self.r)),
            (
                "rank_pattern",
                Value::Object(self.rank_pattern.iter().map(|(k, v)| (k.clone(), json!(v))).collect()),
            ),
            ("revision", json!(self.revision)),
            ("target_modules", targets(&self.target_modules)),
            ("task_type", json!(self.task_type)),
            ("use_rslora", json!(self.use_rslora)),
        ];
        keys.extend(entries);
        let text = serde_json::to_string_pretty(&keys).expect("a map of JSON values is JSON");
        ascii(&text)
    }

    /// Writes `adapter_config.json`.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn save(&self, adapter_dir: &Path) -> Result<()> {
        write_atomic_bytes(&adapter_dir.join("adapter_config.json"), self.to_json().as_bytes())
    }
}

/// A whole number as an integer, as a user of PEFT writes it.
fn number(x: f64) -> Value {
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

struct Reader<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
}

impl Reader<'_> {
    fn error(&self, key: &str, message: impl Into<String>) -> Error {
        Error::config(self.path.display(), key, message)
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn check_kind(&self) -> Result<()> {
        match self.get("peft_type").map(|v| v.as_str().unwrap_or("?")) {
            Some("LORA") => Ok(()),
            Some(other) => Err(self.error("peft_type", format!("`{other}` is not supported; supported: LORA"))),
            None if self.get("fine_tune_type").is_some() || self.get("lora_parameters").is_some() => Err(self.error(
                "peft_type",
                "missing: this is mlx-lm's adapter format, which transposes its matrices; convert it to PEFT's first",
            )),
            None if self.get("config").is_some() || self.get("model_class").is_some() => {
                Err(self.error("peft_type", "missing: this is AdapterHub's format; convert it to PEFT's first"))
            }
            None => Err(self.error("peft_type", "expected LORA, found nothing")),
        }
    }

    /// Refuses keys that are set and not implemented.
    fn refuse_unknown(&self) -> Result<()> {
        const READ: [&str; 18] = [
            "r",
            "lora_alpha",
            "lora_dropout",
            "use_rslora",
            "lora_bias",
            "bias",
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "rank_pattern",
            "alpha_pattern",
            "fan_in_fan_out",
            "modules_to_save",
            "init_lora_weights",
            "task_type",
            "base_model_name_or_path",
            "revision",
        ];
        let neutral = neutral_keys();
        for (key, value) in self.map {
            if READ.contains(&key.as_str()) || INFORMATIVE.contains(&key.as_str()) {
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

    fn usize(&self, key: &str) -> Result<Option<usize>> {
        self.get(key)
            .map(|v| {
                v.as_u64()
                    .map(|n| n as usize)
                    .ok_or_else(|| self.error(key, format!("expected an integer, found {v}")))
            })
            .transpose()
    }

    fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.get(key)
            .map(|v| v.as_f64().ok_or_else(|| self.error(key, format!("expected a number, found {v}"))))
            .transpose()
    }

    fn bool(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(self.error(key, format!("expected true or false, found {other}"))),
        }
    }

    fn string(&self, key: &str) -> Result<Option<String>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s.clone())),
            Some(other) => Err(self.error(key, format!("expected a string, found {other}"))),
        }
    }

    /// A list of strings, or one string.
    fn strings(&self, key: &str) -> Result<Option<Vec<String>>> {
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

    fn targets(&self, key: &str) -> Result<Option<TargetModules>> {
        Ok(match self.get(key) {
            Some(Value::String(s)) if s.eq_ignore_ascii_case("all-linear") => Some(TargetModules::AllLinear),
            Some(Value::String(s)) => Some(TargetModules::Pattern(s.clone())),
            _ => self.strings(key)?.map(TargetModules::Names),
        })
    }

    fn layers(&self, key: &str) -> Result<Option<Vec<usize>>> {
        let bad =
            |v: &Value| self.error(key, format!("expected a layer number or a list of them, found {v}"));
        let layer = |v: &Value| v.as_u64().map(|n| n as usize).ok_or_else(|| bad(v));
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => list.iter().map(layer).collect::<Result<_>>().map(Some),
            Some(v) => Ok(Some(vec![layer(v)?])),
        }
    }

    fn pattern<T>(&self, key: &str, value: impl Fn(&Value) -> Option<T>) -> Result<Vec<(String, T)>> {
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
