//! `--config FILE`: the file's keys become flags, placed before those of the command line, which win. So do the keys of
//! `train-many --jobs FILE` that are no jobs.

use crate::args::Cli;
use clap::CommandFactory;
use lowrank::{Error, Result, fs::read_text};
use serde_json::{Map, Value};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The words of the command line with the file's keys inserted after the subcommand.
pub fn expand(words: Vec<OsString>) -> Result<Vec<OsString>> {
    let subcommand = words.get(1).map(|w| w.to_string_lossy().into_owned()).unwrap_or_default();
    let of_jobs = subcommand == "train-many";
    let Some(path) = path_of(&words, if of_jobs { "--jobs" } else { "--config" }) else { return Ok(words) };
    let mut keys = read(&path)?;
    if of_jobs {
        keys.retain(|_, value| !value.is_object()); // the jobs
    }
    let mut expanded: Vec<OsString> = words.iter().take(2).cloned().collect();
    expanded.extend(flags(&path, keys, &subcommand)?.into_iter().map(OsString::from));
    expanded.extend(words.into_iter().skip(2));
    Ok(expanded)
}

/// The file that a flag names.
fn path_of(words: &[OsString], flag: &str) -> Option<PathBuf> {
    let mut words = words.iter().skip(2);
    while let Some(word) = words.next() {
        let text = word.to_string_lossy();
        if text == flag {
            return words.next().map(PathBuf::from);
        }
        if let Some(path) = text.strip_prefix(flag).and_then(|rest| rest.strip_prefix('=')) {
            return Some(PathBuf::from(path));
        }
    }
    None
}

/// The keys and values of a TOML, YAML or JSON file.
pub fn read(path: &Path) -> Result<Map<String, Value>> {
    let text = read_text(path)?;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let value: std::result::Result<Value, String> = match extension {
        "json" => serde_json::from_str(&text).map_err(|e| e.to_string()),
        "toml" => toml::from_str(&text).map_err(|e| e.to_string()),
        "yaml" | "yml" => serde_yaml_ng::from_str(&text).map_err(|e| e.to_string()),
        _ => Err("expected a name ending in .toml, .yaml or .json".to_string()),
    };
    match value.map_err(|e| Error::format(path, e))? {
        Value::Object(map) => Ok(map),
        _ => Err(Error::format(path, "expected keys and values")),
    }
}

/// Keys and values of a file as flags of the subcommand.
pub fn flags(path: &Path, keys: Map<String, Value>, subcommand: &str) -> Result<Vec<String>> {
    let command = Cli::command();
    let Some(command) = command.find_subcommand(subcommand) else { return Ok(Vec::new()) };
    let known: Vec<(String, bool)> = command
        .get_arguments()
        .filter_map(|a| Some((a.get_long()?.to_string(), a.get_action().takes_values())))
        .filter(|(name, _)| name != "config" && name != "help")
        .collect();
    let mut words = Vec::new();
    for (key, value) in keys {
        let name = key.replace('_', "-");
        let Some((_, takes_value)) = known.iter().find(|(k, _)| *k == name) else {
            let nearest = known.iter().min_by_key(|(k, _)| lowrank::adapter::target::edit_distance(k, &name));
            let hint =
                nearest.map_or(String::new(), |(k, _)| format!("; did you mean `{}`?", k.replace('-', "_")));
            return Err(Error::config(path.display(), key, format!("is no flag of `{subcommand}`{hint}")));
        };
        match (value, takes_value) {
            (Value::Null | Value::Bool(false), false) | (Value::Null, true) => {}
            (Value::Bool(true), false) => words.push(format!("--{name}")),
            (other, false) => {
                return Err(Error::config(
                    path.display(),
                    key,
                    format!("expected true or false, found {other}"),
                ));
            }
            (value, true) => words.push(format!("--{name}={}", text(path, &key, value)?)),
        }
    }
    Ok(words)
}

/// Words of the command line after the subcommand, without these flags and their values.
pub fn words_without(words: &[OsString], flags: &[&str]) -> Vec<OsString> {
    let mut kept = Vec::new();
    let mut words = words.iter().skip(2);
    while let Some(word) = words.next() {
        let text = word.to_string_lossy();
        if flags.contains(&&*text) {
            words.next();
        } else if !flags.iter().any(|flag| text.starts_with(&format!("{flag}="))) {
            kept.push(word.clone());
        }
    }
    kept
}

fn text(path: &Path, key: &str, value: Value) -> Result<String> {
    match value {
        Value::String(s) => Ok(s),
        Value::Number(n) => Ok(n.to_string()),
        Value::Bool(b) => Ok(b.to_string()),
        Value::Array(items) => {
            let items: Result<Vec<String>> = items.into_iter().map(|item| text(path, key, item)).collect();
            Ok(items?.join(","))
        }
        other => {
            Err(Error::config(path.display(), key, format!("expected a value or a list, found {other}")))
        }
    }
}
