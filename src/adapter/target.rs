//! Which modules an adapter sits on: PEFT's matching rules, with errors instead of silent misses.

use super::config::{LoraConfig, TargetModules};
use crate::error::{Error, Result};
use crate::model::{ModuleInfo, ModuleKind};
use std::collections::BTreeSet;

/// A module to adapt.
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
fn default_targets(model_type: &str) -> Option<&'static [&'static str]> {
    Some(match model_type {
        "gpt2" => &["c_attn"],
        "llama" | "mistral" | "qwen2" | "qwen3" | "gemma" | "gemma2" | "glm" | "glm4" => {
            &["q_proj", "v_proj"]
        }
        "chatglm" => &["query_key_value"],
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

/// Modules that the adapter's settings choose, with rank and scale, in the model's order.
///
/// # Errors
/// When nothing matches, when one of several target names matches nothing (with the nearest names), when a
/// target is not a linear layer, or a pattern is malformed.
pub fn select_targets(config: &LoraConfig, modules: &[ModuleInfo], model_type: &str) -> Result<Vec<Target>> {
    let targets = match &config.target_modules {
        Some(targets) => targets.clone(),
        None => defaults(model_type)?,
    };
    check_names(&targets, modules)?;
    if config.layers_to_transform.is_some() && !matches!(targets, TargetModules::Names(_)) {
        return Err(Error::config(
            "adapter",
            "layers_to_transform",
            "can't be used with a pattern or all-linear; list the module names",
        ));
    }
    let mut chosen = Vec::new();
    for module in modules {
        let kept = config.modules_to_save.iter().any(|name| is_under(&module.path, name));
        let excluded = match &config.exclude_modules {
            Some(exclude) => matches(exclude, module, "exclude_modules")?,
            None => false,
        };
        if kept
            || excluded
            || !matches(&targets, module, "target_modules")?
            || !in_layers(config, &targets, &module.path)
        {
            continue;
        }
        if !matches!(module.kind, ModuleKind::Linear | ModuleKind::Conv1d) {
            return Err(Error::config(
                "adapter",
                "target_modules",
                format!(
                    "`{}` is not a linear layer; only linear layers can be adapted (modules_to_save trains it whole)",
                    module.path
                ),
            ));
        }
        let r = by_pattern(&config.rank_pattern, &module.path, "rank_pattern")?.unwrap_or(config.r);
        let alpha =
            by_pattern(&config.alpha_pattern, &module.path, "alpha_pattern")?.unwrap_or(config.lora_alpha);
        chosen.push(Target { path: module.path.clone(), r, scale: config.scale(r, alpha) });
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

/// PEFT's default of the family.
fn defaults(model_type: &str) -> Result<TargetModules> {
    let names = default_targets(model_type).ok_or_else(|| {
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
pub(super) fn spelled_out(
    targets: Option<&TargetModules>,
    modules: &[ModuleInfo],
    model_type: &str,
) -> Result<TargetModules> {
    let names = match targets {
        None => return defaults(model_type),
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
fn in_layers(config: &LoraConfig, targets: &TargetModules, path: &str) -> bool {
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
pub(super) fn no_such_module(key: &str, name: &str, modules: &[ModuleInfo]) -> Error {
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
