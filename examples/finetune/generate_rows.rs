//! `generate --prompts FILE`: rows of a file in batches, each continued by the adapter that it names.

use crate::args::GenerateArgs;
use crate::commands::load_model;
use crate::generate::{chat_prompt, generation_config};
use lowrank::adapter::AdapterSet;
use lowrank::data::Tokenizer;
use lowrank::fs::read_text;
use lowrank::generate::{GenerationConfig, Prompt, generate_batch};
use lowrank::{Error, Result};
use serde::Deserialize;
use serde_json::json;
use std::path::{Path, PathBuf};

/// PEFT's name of the model without an adapter.
const BASE: &str = "__base__";

/// A row of the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    prompt: Option<String>,
    chat: Option<String>,
    adapter_name: Option<String>,
}

pub fn run(args: &GenerateArgs, file: &Path) -> Result<()> {
    let tokenizer = Tokenizer::load(&args.model.model)?;
    let adapters = named_adapters(args)?;
    let names: Vec<&str> = adapters.iter().map(|(name, _)| name.as_str()).collect();
    let mut rows = Vec::new();
    for (number, line) in read_text(file)?.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let (tokens, adapter) = read_row(args, &tokenizer, line, &names)
            .map_err(|message| Error::data(file, number + 1, message))?;
        rows.push((tokens, adapter));
    }
    let mut model = load_model(&args.model)?;
    model.lay_out_for_decoding()?;
    let mut set = AdapterSet::new(model);
    adapters.iter().try_for_each(|(name, dir)| set.load(name, dir))?;
    let config = generation_config(args, &tokenizer);
    for rows in rows.chunks(args.batch_size.max(1)) {
        run_batch(args, &tokenizer, &mut set, &config, rows)?;
    }
    Ok(())
}

/// The adapters with the names that rows know them by.
fn named_adapters(args: &GenerateArgs) -> Result<Vec<(String, PathBuf)>> {
    let mut named: Vec<(String, PathBuf)> = Vec::new();
    let single = args.adapter.iter().map(|dir| dir.display().to_string());
    for text in args.adapters.iter().cloned().chain(single) {
        let (name, dir) = match text.split_once('=') {
            Some((name, dir)) => (name.to_string(), PathBuf::from(dir)),
            None => {
                let dir = PathBuf::from(&text);
                let last = dir.file_name().map(|name| name.to_string_lossy().into_owned());
                (last.unwrap_or(text), dir)
            }
        };
        if name == BASE || named.iter().any(|(other, _)| *other == name) {
            let message = format!("`{name}` names the base or another adapter already; give it as NAME=DIR");
            return Err(Error::config("generate", "--adapters", message));
        }
        named.push((name, dir));
    }
    Ok(named)
}

/// The tokens of a row's prompt and its adapter; without a name the only one there is.
fn read_row(
    args: &GenerateArgs,
    tokenizer: &Tokenizer,
    line: &str,
    names: &[&str],
) -> std::result::Result<(Vec<u32>, Option<String>), String> {
    let row: Row = serde_json::from_str(line)
        .map_err(|e| format!("expected an object with prompt or chat, and perhaps adapter_name: {e}"))?;
    let adapter = match (row.adapter_name, names) {
        (Some(name), _) if name == BASE => None,
        (Some(name), _) if names.contains(&name.as_str()) => Some(name),
        (Some(name), _) => {
            return Err(format!("no adapter is called `{name}`; there are {BASE}, {}", names.join(", ")));
        }
        (None, []) => None,
        (None, [only]) => Some(only.to_string()),
        (None, _) => return Err(format!("expected an adapter_name: {BASE}, {}", names.join(", "))),
    };
    let tokens = match (row.prompt, row.chat) {
        (Some(text), None) => tokenizer.encode(&text, true),
        (None, Some(text)) => chat_prompt(&args.model.model, tokenizer, &text),
        _ => return Err("expected either prompt or chat".into()),
    };
    Ok((tokens.map_err(|e| e.to_string())?, adapter))
}

/// Continues some rows and prints them.
fn run_batch(
    args: &GenerateArgs,
    tokenizer: &Tokenizer,
    set: &mut AdapterSet,
    config: &GenerationConfig,
    rows: &[(Vec<u32>, Option<String>)],
) -> Result<()> {
    let prompts: Vec<Prompt<'_>> = rows
        .iter()
        .map(|(tokens, adapter)| Prompt { adapter: adapter.as_deref(), tokens, config: config.clone() })
        .collect();
    let mut failed = None;
    let end_of = |tokens: &[u32]| {
        let text = tokenizer.decode(tokens, true)?;
        let end = args.stop.iter().filter_map(|stop| text.find(stop.as_str())).min();
        Ok((text, end))
    };
    let generations = generate_batch(set, &prompts, |_, tokens| {
        if args.stop.is_empty() {
            return true;
        }
        match end_of(tokens) {
            Ok((_, end)) => end.is_none(),
            Err(error) => {
                failed = Some(error);
                false
            }
        }
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    for ((tokens, adapter), generation) in rows.iter().zip(generations) {
        let (mut text, end) = end_of(&generation.tokens)?;
        text.truncate(end.unwrap_or(text.len()));
        let value = json!({
            "adapter_name": adapter.as_deref().unwrap_or(BASE),
            "prompt_tokens": tokens.len(),
            "tokens": generation.tokens,
            "text": text,
            "prefill_tokens_per_second": generation.prefill_tokens_per_second,
            "decode_tokens_per_second": generation.decode_tokens_per_second,
        });
        println!("{value}");
    }
    Ok(())
}
