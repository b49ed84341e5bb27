//! Which modules an adapter sits on: PEFT's matching rules, with errors instead of silent misses.

use super::config::LoraConfig;
use super::reader::{Reader, Settings, names_or_null, targets_value};
use crate::error::{Error, Result};
use crate::model::{ModuleInfo, ModuleKind};
use serde_json::json;
use std::collections::BTreeSet;

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

/// Which modules an adapter sits on: the keys that most methods share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Targeting {
    /// `None`: PEFT's default of the method and family.
    pub target_modules: Option<TargetModules>,
    pub exclude_modules: Option<TargetModules>,
    pub layers_to_transform: Option<Vec<usize>>,
    pub layers_pattern: Option<Vec<String>>,
    /// Modules trained whole and saved with the adapter.
    pub modules_to_save: Vec<String>,
    /// Weights are stored `[in, out]`; set by the model, as in PEFT.
    pub fan_in_fan_out: bool,
}

impl From<TargetModules> for Targeting {
    fn from(target_modules: TargetModules) -> Self {
        Targeting { target_modules: Some(target_modules), ..Targeting::default() }
    }
}

impl Targeting {
    /// Reads the keys.
    ///
    /// # Errors
    /// When one is malformed.
    pub fn read(reader: &Reader<'_>) -> Result<Self> {
        Ok(Targeting {
            target_modules: reader.targets("target_modules")?,
            exclude_modules: reader.targets("exclude_modules")?,
            layers_to_transform: reader.layers("layers_to_transform")?,
            layers_pattern: reader.strings("layers_pattern")?,
            modules_to_save: reader.strings("modules_to_save")?.unwrap_or_default(),
            fan_in_fan_out: reader.bool("fan_in_fan_out")?,
        })
    }

    /// The keys as PEFT writes them.
    pub fn settings(&self) -> Settings {
        Settings::from([
            ("exclude_modules", targets_value(&self.exclude_modules)),
            ("fan_in_fan_out", json!(self.fan_in_fan_out)),
            ("layers_pattern", json!(self.layers_pattern)),
            ("layers_to_transform", json!(self.layers_to_transform)),
            ("modules_to_save", names_or_null(&self.modules_to_save)),
            ("target_modules", targets_value(&self.target_modules)),
        ])
    }

    /// The modules that are chosen, in the model's order; `defaults` are the method's for the family.
    ///
    /// # Errors
    /// As [`select_targets`].
    pub fn select<'m>(
        &self,
        modules: &'m [ModuleInfo],
        model_type: &str,
        defaults: DefaultTargets,
    ) -> Result<Vec<&'m ModuleInfo>> {
        let targets = match &self.target_modules {
            Some(targets) => targets.clone(),
            None => default_modules(model_type, defaults)?,
        };
        check_names(&targets, modules)?;
        if self.layers_to_transform.is_some() && !matches!(targets, TargetModules::Names(_)) {
            return Err(Error::config(
                "adapter",
                "layers_to_transform",
                "can't be used with a pattern or all-linear; list the module names",
            ));
        }
        let mut chosen = Vec::new();
        for module in modules {
            let kept = self.modules_to_save.iter().any(|name| is_under(&module.path, name));
            let excluded = match &self.exclude_modules {
                Some(exclude) => matches(exclude, module, "exclude_modules")?,
                None => false,
            };
            if !kept
                && !excluded
                && matches(&targets, module, "target_modules")?
                && in_layers(self, &targets, &module.path)
            {
                chosen.push(module);
            }
        }
        if chosen.is_empty() {
            return Err(Error::config(
                "adapter",
                "target_modules",
                format!(
                    "{targets:?} (with exclude_modules and layers_to_transform) matches no module; the model has {}",
                    leaf_names(modules).join(", ")
                ),
            ));
        }
        Ok(chosen)
    }

    /// [`Targeting::select`] for methods that sit on the decoder layers' linear layers.
    ///
    /// # Errors
    /// When another kind of module is chosen, or the head.
    pub fn select_linears<'m>(
        &self,
        modules: &'m [ModuleInfo],
        model_type: &str,
        defaults: DefaultTargets,
    ) -> Result<Vec<&'m ModuleInfo>> {
        let chosen = self.select(modules, model_type, defaults)?;
        for module in &chosen {
            match module.kind {
                ModuleKind::Linear | ModuleKind::Conv1d if !module.is_head => {}
                ModuleKind::Norm => return Err(no_adapter_on(&module.path, "is not a linear layer")),
                _ => {
                    let why = "only LoRA can be on the output head or on embeddings";
                    return Err(no_adapter_on(&module.path, why));
                }
            }
        }
        Ok(chosen)
    }

    /// Checks `modules_to_save`, and sets what follows from the model: `fan_in_fan_out`, and `target_modules` as PEFT
    /// writes them.
    ///
    /// # Errors
    /// When a name is no module's, or the family has no default.
    pub fn complete(
        &mut self,
        modules: &[ModuleInfo],
        model_type: &str,
        conv1d: bool,
        defaults: DefaultTargets,
    ) -> Result<()> {
        for name in &self.modules_to_save {
            if !modules.iter().any(|m| m.path.ends_with(name.as_str())) {
                return Err(no_such_module("modules_to_save", name, modules));
            }
        }
        // PEFT's is that of the last linear layer, and a head is no Conv1D.
        let chosen = self.select(modules, model_type, defaults)?;
        let last = chosen.into_iter().rfind(|m| m.kind != ModuleKind::Embedding);
        self.fan_in_fan_out = conv1d && last.is_some_and(|m| !m.is_head);
        self.target_modules = Some(spelled_out(self.target_modules.as_ref(), modules, model_type, defaults)?);
        Ok(())
    }
}

/// The error for an adapter that a module can't have.
pub(super) fn no_adapter_on(path: &str, why: &str) -> Error {
    let advice = format!("`{path}`: {why}; train it whole by modules_to_save `{path}`");
    Error::config("adapter", "target_modules", advice)
}

/// A method's default targets by `model_type`.
pub type DefaultTargets = fn(&str) -> Option<&'static [&'static str]>;

/// A module to adapt with a low rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// Module path.
    pub path: String,
    /// Rank.
    pub r: usize,
    /// Factor on the low-rank part.
    pub scale: f64,
}

/// PEFT's default targets by `model_type`; it has none for glm and glm4, which get those of their kin.
pub fn lora_defaults(model_type: &str) -> Option<&'static [&'static str]> {
    Some(match model_type {
        "gpt2" => &["c_attn"],
        "llama" | "mistral" | "qwen2" | "qwen3" | "gemma" | "gemma2" | "gemma3_text" | "glm" | "glm4" => {
            &["q_proj", "v_proj"]
        }
        "chatglm" => &["query_key_value"],
        "qwen" => &["c_attn"],
        "phi3" => &["qkv_proj"],
        _ => return None,
    })
}

/// Whether `text` as a whole matches the regular expression, as Python's `re.fullmatch`.
#[cfg(feature = "regex")]
fn full_match(pattern: &str, text: &str, key: &str) -> Result<bool> {
    let regex = fancy_regex::Regex::new(&format!("^(?:{pattern})$")).map_err(|e| {
        Error::config("adapter", key, format!("`{pattern}` is not a regular expression: {e}"))
    })?;
    regex.is_match(text).map_err(|e| Error::config("adapter", key, format!("`{pattern}`: {e}")))
}

/// Without the `regex` feature, only patterns that are plain names are understood.
#[cfg(not(feature = "regex"))]
fn full_match(pattern: &str, text: &str, key: &str) -> Result<bool> {
    let literal = pattern.strip_prefix(r"(.*\.)?(").and_then(|p| p.strip_suffix(")")).unwrap_or(pattern);
    if !literal.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.') {
        return Err(Error::config("adapter", key, format!("`{pattern}` needs the crate's `regex` feature")));
    }
    Ok(text == literal || (literal.len() < pattern.len() && text.ends_with(&format!(".{literal}"))))
}

fn has_suffix(path: &str, name: &str) -> bool {
    path == name || path.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
}

/// Whether the path lies in, or is, the module `name`, as in `modules_to_save`.
fn is_under(path: &str, name: &str) -> bool {
    format!(".{path}.").contains(&format!(".{name}."))
}

/// The layer's number: the digits after the last `<pattern>.`, or after any name.
fn layer_index(path: &str, patterns: Option<&[String]>) -> Option<usize> {
    let parts: Vec<&str> = path.split('.').collect();
    (1..parts.len().saturating_sub(1)).rev().find_map(|i| {
        let named = patterns.is_none_or(|p| p.is_empty() || p.iter().any(|p| p == parts[i - 1]));
        // PEFT's expression wants a name before the pattern: `model.layers.0.`, not `layers.0.`.
        if named && i >= 2 { parts[i].parse().ok() } else { None }
    })
}

/// Whether `all-linear` takes in this module.
fn in_all_linear(module: &ModuleInfo) -> bool {
    matches!(module.kind, ModuleKind::Linear | ModuleKind::Conv1d) && !module.is_head
}

/// Whether the names or the pattern of `targets` take in this module.
fn matches(targets: &TargetModules, module: &ModuleInfo, key: &str) -> Result<bool> {
    match targets {
        TargetModules::AllLinear => Ok(in_all_linear(module)),
        TargetModules::Names(names) => Ok(names.iter().any(|n| has_suffix(&module.path, n))),
        TargetModules::Pattern(pattern) => full_match(pattern, &module.path, key),
    }
}

/// Modules that a LoRA adapter's settings choose, with rank and scale, in the model's order.
///
/// # Errors
/// When nothing matches, when one of several target names matches nothing (with the nearest names), when a
/// target is neither a linear layer nor an embedding, or a pattern is malformed.
pub fn select_targets(config: &LoraConfig, modules: &[ModuleInfo], model_type: &str) -> Result<Vec<Target>> {
    let chosen = config.targets.select(modules, model_type, lora_defaults)?;
    if let Some(norm) = chosen.iter().find(|m| m.kind == ModuleKind::Norm) {
        return Err(no_adapter_on(&norm.path, "is neither a linear layer nor an embedding"));
    }
    chosen.into_iter().map(|module| target_at(config, &module.path)).collect()
}

/// Rank and scale that the settings give the module at `path`.
///
/// # Errors
/// When a pattern is malformed.
pub fn target_at(config: &LoraConfig, path: &str) -> Result<Target> {
    let r = by_pattern(&config.rank_pattern, path, "rank_pattern")?.unwrap_or(config.r);
    let alpha = by_pattern(&config.alpha_pattern, path, "alpha_pattern")?.unwrap_or(config.lora_alpha);
    Ok(Target { path: path.to_string(), r, scale: config.scale(r, alpha) })
}

/// PEFT's default of the family.
fn default_modules(model_type: &str, defaults: DefaultTargets) -> Result<TargetModules> {
    let names = defaults(model_type).ok_or_else(|| {
        Error::config(
            "adapter",
            "target_modules",
            format!("there is no default for `{model_type}`; name the modules, or all-linear"),
        )
    })?;
    Ok(TargetModules::Names(names.iter().map(|n| (*n).to_string()).collect()))
}

/// From this many names on, PEFT looks for fewer and shorter ones.
const MIN_TARGETS_TO_SHORTEN: usize = 20;

/// `target_modules` as PEFT writes it once the model is known: the default and `all-linear` spelled out,
/// and long lists shortened to suffixes that choose the same modules.
///
/// # Errors
/// When the family has no default.
fn spelled_out(
    targets: Option<&TargetModules>,
    modules: &[ModuleInfo],
    model_type: &str,
    defaults: DefaultTargets,
) -> Result<TargetModules> {
    let names = match targets {
        None => return default_modules(model_type, defaults),
        Some(TargetModules::Pattern(pattern)) => return Ok(TargetModules::Pattern(pattern.clone())),
        Some(TargetModules::Names(names)) => names.clone(),
        Some(TargetModules::AllLinear) => {
            modules.iter().filter(|m| in_all_linear(m)).map(|m| m.path.clone()).collect()
        }
    };
    if names.len() < MIN_TARGETS_TO_SHORTEN {
        return Ok(TargetModules::Names(names));
    }
    let shorter = shortest_suffixes(&names, modules);
    Ok(TargetModules::Names(if shorter.len() < names.len() { shorter } else { names }))
}

/// Suffixes, as short as possible, that all `names` have and no other module.
fn shortest_suffixes(names: &[String], modules: &[ModuleInfo]) -> Vec<String> {
    let suffixes = |path: &str| -> Vec<String> {
        let parts: Vec<&str> = path.split('.').collect();
        (0..parts.len()).rev().map(|i| parts[i..].join(".")).collect()
    };
    // Modules and those that contain them.
    let paths = modules.iter().flat_map(|m| {
        let dots = m.path.match_indices('.').map(|(i, _)| &m.path[..i]);
        dots.chain(std::iter::once(m.path.as_str()))
    });
    let others: BTreeSet<String> =
        paths.filter(|p| !names.iter().any(|n| has_suffix(p, n))).flat_map(suffixes).collect();
    let mut by_suffix: Vec<Vec<String>> = names.iter().map(|n| suffixes(n)).collect();
    by_suffix.sort();
    let mut chosen: Vec<String> = Vec::new();
    for suffixes in &by_suffix {
        let name = &suffixes[suffixes.len() - 1];
        if !chosen.iter().any(|c| has_suffix(name, c)) {
            chosen.extend(suffixes.iter().find(|s| !others.contains(*s)).cloned());
        }
    }
    chosen
}

/// Whether `layers_to_transform` lets the module through; a full path in the list always passes.
fn in_layers(config: &Targeting, targets: &TargetModules, path: &str) -> bool {
    let Some(layers) = &config.layers_to_transform else { return true };
    if let TargetModules::Names(names) = targets
        && names.iter().any(|n| n == path)
    {
        return true;
    }
    layer_index(path, config.layers_pattern.as_deref()).is_some_and(|index| layers.contains(&index))
}

/// Every name of a list must match something.
fn check_names(targets: &TargetModules, modules: &[ModuleInfo]) -> Result<()> {
    let TargetModules::Names(names) = targets else { return Ok(()) };
    for name in names {
        if !modules.iter().any(|m| has_suffix(&m.path, name)) {
            return Err(no_such_module("target_modules", name, modules));
        }
    }
    Ok(())
}

/// The error for a name that is no module's, with the nearest that are.
fn no_such_module(key: &str, name: &str, modules: &[ModuleInfo]) -> Error {
    let mut leaves = leaf_names(modules);
    let wanted = name.rsplit('.').next().unwrap_or(name);
    leaves.sort_by_key(|leaf| edit_distance(leaf, wanted));
    let nearest = leaves.first().map_or(String::new(), |n| format!("; did you mean `{n}`?"));
    leaves.sort();
    Error::config(
        "adapter",
        key,
        format!("no module is named `{name}`{nearest} The model has {}", leaves.join(", ")),
    )
}

/// The distinct last parts of the modules' paths.
fn leaf_names(modules: &[ModuleInfo]) -> Vec<String> {
    let mut leaves: Vec<String> =
        modules.iter().map(|m| m.path.rsplit('.').next().unwrap_or(&m.path).to_string()).collect();
    leaves.sort();
    leaves.dedup();
    leaves
}

/// Levenshtein's distance.
pub fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substitution = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substitution.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// The value of the first key that matches the end of the path.
fn by_pattern<T: Copy>(pattern: &[(String, T)], path: &str, key: &str) -> Result<Option<T>> {
    for (expression, value) in pattern {
        if full_match(&format!(r"(.*\.)?({expression})"), path, key)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}
