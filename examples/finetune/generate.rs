//! `generate`.

use crate::args::GenerateArgs;
use crate::commands::load_with_adapter;
use crate::generate_rows;
use lowrank::data::{ChatTemplate, Message, Tokenizer};
use lowrank::generate::{GenerationConfig, generate};
use lowrank::model::Model;
use lowrank::{Error, Result};
use serde_json::json;
use std::io::Write;
use std::path::Path;

pub fn run(args: &GenerateArgs) -> Result<()> {
    if let Some(file) = &args.prompts {
        return generate_rows::run(args, file);
    }
    let tokenizer = Tokenizer::load(&args.model.model)?;
    let mut model = load_with_adapter(&args.model, args.adapter.as_deref())?;
    model.lay_out_for_decoding()?;
    let prompt = match (&args.prompt, &args.chat) {
        (Some(text), _) => tokenizer.encode(text, true)?,
        (None, Some(text)) => chat_prompt(&args.model.model, &tokenizer, text)?,
        (None, None) => {
            return Err(Error::config("generate", "--prompt", "expected --prompt or --chat, found neither"));
        }
    };
    let config = generation_config(args, &tokenizer);
    let mut stdout = std::io::stdout();
    let mut stream = tokenizer.decode_stream(true);
    let (mut text, mut shown) = (String::new(), 0);
    let mut stopped = false;
    let mut failed = None;
    let longest_stop = args.stop.iter().map(String::len).max().unwrap_or(0);
    let generation = generate(&model, &prompt, &config, |tokens| {
        let added = match tokens.last().map_or(Ok(String::new()), |id| stream.push(*id)) {
            Ok(added) => added,
            Err(e) => {
                failed = Some(e);
                return false;
            }
        };
        let old = text.len().saturating_sub(longest_stop);
        let from = (0..=old).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        text.push_str(&added);
        if let Some(at) = args.stop.iter().filter_map(|stop| text[from..].find(stop.as_str())).min() {
            text.truncate(from + at);
            stopped = true;
        } else if !args.json && !added.is_empty() && !may_stop(&text, &args.stop) {
            let _ = write!(stdout, "{}", &text[shown..]).and_then(|()| stdout.flush());
            shown = text.len();
        }
        !stopped
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    if !stopped {
        text.push_str(&stream.finish()?);
    }
    if args.json {
        let value = json!({
            "prompt_tokens": prompt.len(),
            "tokens": generation.tokens,
            "text": text,
            "prefill_tokens_per_second": generation.prefill_tokens_per_second,
            "decode_tokens_per_second": generation.decode_tokens_per_second,
        });
        println!("{value}");
    } else {
        println!("{}", text.get(shown..).unwrap_or_default());
        eprintln!(
            "{} tokens, prompt {:.0} tokens/s, new {:.1} tokens/s",
            generation.tokens.len(),
            generation.prefill_tokens_per_second,
            generation.decode_tokens_per_second
        );
    }
    Ok(())
}

/// How the flags say that tokens are chosen.
pub fn generation_config(args: &GenerateArgs, tokenizer: &Tokenizer) -> GenerationConfig {
    GenerationConfig {
        max_new_tokens: args.max_new_tokens,
        min_new_tokens: args.min_new_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        repetition_penalty: args.repetition_penalty,
        eos_token_id: tokenizer.stop_ids().to_vec(),
        seed: args.model.seed,
    }
}

/// Whether the text ends in the beginning of a stop string, so that showing it has to wait.
fn may_stop(text: &str, stops: &[String]) -> bool {
    stops.iter().any(|stop| stop.char_indices().skip(1).any(|(i, _)| text.ends_with(&stop[..i])))
}

/// The tokens of a user's message with the beginning of an answer.
pub fn chat_prompt(model_dir: &Path, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let template = ChatTemplate::load(model_dir, tokenizer)?;
    let message = Message::new("user", text);
    tokenizer.encode(&template.render(&[message], true)?, false)
}

/// The greedy answer to a user's message.
pub fn answer(
    model: &Model,
    model_dir: &Path,
    tokenizer: &Tokenizer,
    text: &str,
    tokens: usize,
) -> Result<String> {
    let config = GenerationConfig {
        max_new_tokens: tokens,
        eos_token_id: tokenizer.stop_ids().to_vec(),
        ..GenerationConfig::default()
    };
    let generation = generate(model, &chat_prompt(model_dir, tokenizer, text)?, &config, |_| true)?;
    Ok(tokenizer.decode(&generation.tokens, true)?.trim().to_string())
}
