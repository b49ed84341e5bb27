//! `eval`, `merge` and `inspect`, and what all commands share.

use crate::args::{
    CombineArgs, EvalArgs, InspectArgs, LoadFormat, MergeArgs, ModelArgs, OntoArg, QuantizeArgs,
};
use crate::train::load_data;
use lowrank::adapter::combine::CombinationType;
use lowrank::adapter::merge::{Drift, MergeOptions, Onto, compare};
use lowrank::adapter::reader::to_json;
use lowrank::adapter::{LoraConfig, load_adapter, read_adapter, select_targets};
use lowrank::backend::cpu::Cpu;
use lowrank::backend::{self, Backend};
use lowrank::data::Tokenizer;
use lowrank::model::{Checkpoint, LoadOptions, Model, ModelConfig};
use lowrank::quant::{Format, QuantConfig};
use lowrank::train::{base_bytes, evaluate};
use lowrank::{DType, Error, Result};
use serde_json::json;
use std::path::Path;

/// The backend that the flags ask for. `auto` is a GPU only if the base fits into its free memory.
pub fn open_backend(args: &ModelArgs) -> Result<Backend> {
    let backend = backend::open(&args.device, args.threads)?;
    let Some(free) = backend.free_memory().filter(|_| args.device == "auto") else { return Ok(backend) };
    let options = LoadOptions { dtype: args.dtype.into(), quant: quant_config(args)? };
    let dummy = args.load_format == LoadFormat::Dummy;
    let base = base_bytes(&args.model, &backend, options, dummy)?;
    if base <= free {
        return Ok(backend);
    }
    eprintln!("{} has {free} bytes free, the base takes {base}: computing on the CPU", backend.name());
    Cpu::new(args.threads)
}

/// The format of the base that the flags ask for.
pub fn quant_config(args: &ModelArgs) -> Result<Option<QuantConfig>> {
    if args.quant == "none" {
        let set = args.double_quant.is_some() || args.blocksize != 64 || args.quant_head;
        return match set {
            false => Ok(None),
            true => Err(Error::config(
                "command line",
                "--quant",
                "--double-quant, --blocksize and --quant-head need a format, for example --quant nf4",
            )),
        };
    }
    let new = QuantConfig::new(Format::by_name(&args.quant)?);
    let config = QuantConfig {
        blocksize: args.blocksize,
        double_quant: args.double_quant.unwrap_or(new.double_quant),
        head: args.quant_head,
        ..new
    };
    config.check()?;
    Ok(Some(config))
}

/// The base model that the flags ask for.
pub fn load_model(args: &ModelArgs) -> Result<Model> {
    let backend = open_backend(args)?;
    let options = LoadOptions { dtype: args.dtype.into(), quant: quant_config(args)? };
    match args.load_format {
        LoadFormat::Auto => Model::load(&args.model, &backend, options),
        LoadFormat::Dummy => Model::random(ModelConfig::load(&args.model)?, &backend, options, args.seed),
    }
}

pub fn quantize(args: &QuantizeArgs) -> Result<()> {
    let model = &args.model;
    let config = quant_config(model)?
        .ok_or_else(|| Error::config("command line", "--quant", "expected nf4 or fp4, found none"))?;
    if config.head || model.load_format != LoadFormat::Auto {
        return Err(Error::config(
            "command line",
            "quantize",
            "--quant-head and --load-format are for training and generation; on disk the head stays as it is",
        ));
    }
    let backend = open_backend(model)?;
    let count = lowrank::model::quantize::quantize(
        &model.model,
        &args.output,
        &backend,
        &config,
        model.dtype.into(),
    )?;
    eprintln!("{count} weights are in {} now; the model is in {}", config.format.name, args.output.display());
    Ok(())
}

/// The base model, with an adapter if there is one.
pub fn load_with_adapter(args: &ModelArgs, adapter: Option<&Path>) -> Result<Model> {
    let mut model = load_model(args)?;
    if let Some(dir) = adapter {
        load_adapter(&mut model, dir)?;
    }
    Ok(model)
}

pub fn eval(args: &EvalArgs) -> Result<()> {
    let tokenizer = Tokenizer::load(&args.model.model)?;
    let config = ModelConfig::load(&args.model.model)?;
    let data = load_data(&args.data, &args.model, &args.text, &tokenizer, &config)?;
    let model = load_with_adapter(&args.model, args.adapter.as_deref())?;
    let (loss, tokens) = evaluate(&model, &data.examples, args.per_device_eval_batch_size)?;
    if args.json {
        println!("{}", json!({"loss": loss, "perplexity": loss.exp(), "tokens": tokens}));
    } else {
        eprintln!("data: {}", data.report);
        println!("loss {loss:.6}, perplexity {:.4}, {tokens} tokens", loss.exp());
    }
    Ok(())
}

pub fn combine(args: &CombineArgs) -> Result<()> {
    let weights = if args.weights.is_empty() { vec![1.0; args.adapters.len()] } else { args.weights.clone() };
    if weights.len() != args.adapters.len() || weights.iter().any(|w| !w.is_finite()) {
        return Err(Error::config(
            "command line",
            "--weights",
            format!("expected {} numbers, one for each adapter", args.adapters.len()),
        ));
    }
    let kind = match (args.combination_type.parse()?, args.svd_rank) {
        (CombinationType::Svd(_), rank) => CombinationType::Svd(rank),
        (kind, None) => kind,
        (_, Some(_)) => {
            return Err(Error::config("command line", "--svd-rank", "is for --combination-type svd"));
        }
    };
    let adapters: Vec<(&Path, f64)> = args.adapters.iter().map(|dir| dir.as_path()).zip(weights).collect();
    let modules = lowrank::adapter::combine::combine(&adapters, kind, &args.output)?;
    eprintln!("{modules} modules of {} adapters combined in {}", adapters.len(), args.output.display());
    Ok(())
}

/// What merged models are compared on unless the user says.
const PROMPTS: [&str; 4] = [
    "The capital of France is",
    "Once upon a time, there was a small house at the edge of the forest.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Question: What is 17 + 25?\nAnswer:",
];

pub fn merge(args: &MergeArgs) -> Result<()> {
    let model = &args.model;
    if model.load_format != LoadFormat::Auto {
        return Err(Error::config("command line", "--load-format", "random weights can't be merged into"));
    }
    let onto = match args.onto {
        OntoArg::Original => Onto::Original,
        OntoArg::Dequantized => Onto::Dequantized,
    };
    let quant = quant_config(model)?;
    let options = MergeOptions {
        onto,
        quant,
        gguf_dtype: model.dtype.into(),
        threads: model.threads,
        ..MergeOptions::default()
    };
    let merged = lowrank::adapter::merge::merge(&model.model, &args.adapter, &args.output, &options)?;
    let drift = if args.report { drift(args)? } else { None };
    if args.json {
        let drift = drift.map(|d| {
            json!({
                "tokens": d.tokens, "largest_difference": d.largest, "mean_difference": d.mean,
                "same_top_token": d.same_top_token,
            })
        });
        println!("{}", json!({"adapted": merged.adapted, "tensors": merged.tensors, "logits": drift}));
        return Ok(());
    }
    eprintln!(
        "{} of {} tensors changed; the merged model is in {}",
        merged.adapted,
        merged.tensors,
        args.output.display()
    );
    if let Some(d) = drift {
        println!(
            "logits of {} tokens, base and adapter against merged: largest difference {:.2e}, mean {:.2e}, the same likeliest \
             token for {:.1} %",
            d.tokens,
            d.largest,
            d.mean,
            100.0 * d.same_top_token
        );
    }
    Ok(())
}

/// How far the merged model's logits are from those of the base that the flags name with the adapter; `None` without a
/// tokenizer, unless prompts were given.
fn drift(args: &MergeArgs) -> Result<Option<Drift>> {
    let tokenizer = match Tokenizer::load(&args.model.model) {
        Err(e) if args.prompt.is_empty() => {
            eprintln!("logits are not compared: {e}");
            return Ok(None);
        }
        other => other?,
    };
    let prompts: Vec<&str> = match args.prompt.is_empty() {
        true => PROMPTS.to_vec(),
        false => args.prompt.iter().map(String::as_str).collect(),
    };
    let texts = prompts.iter().map(|text| tokenizer.encode(text, true)).collect::<Result<Vec<_>>>()?;
    let adapted = load_with_adapter(&args.model, Some(&args.adapter))?;
    let merged = Model::load(&args.output, &adapted.backend, adapted.dtype)?;
    compare(&adapted, &merged, &texts).map(Some)
}

pub fn inspect(args: &InspectArgs) -> Result<()> {
    if let Some(dir) = &args.adapter {
        inspect_adapter(dir, args.json)?;
    }
    match &args.model {
        Some(dir) => inspect_model(dir, args.json),
        None => Ok(()),
    }
}

fn inspect_adapter(dir: &Path, as_json: bool) -> Result<()> {
    let method = read_adapter(dir)?;
    let config = to_json(&method.settings());
    let checkpoint = Checkpoint::open_file(&dir.join(method.file()))?;
    let tensors: Vec<_> = checkpoint
        .names()
        .filter_map(|name| checkpoint.info(name).map(|(shape, dtype)| (name, shape, format!("{dtype:?}"))))
        .collect();
    let elements: usize = tensors.iter().map(|(_, shape, _)| shape.iter().product::<usize>()).sum();
    if as_json {
        let list: Vec<_> =
            tensors.iter().map(|(n, s, d)| json!({"name": n, "shape": s, "dtype": d})).collect();
        println!(
            "{}",
            json!({"config": serde_json::from_str::<serde_json::Value>(&config).unwrap_or_default(), "tensors": list, "parameters": elements})
        );
        return Ok(());
    }
    println!("{config}\n");
    for (name, shape, dtype) in &tensors {
        println!("{name} {shape:?} {dtype}");
    }
    println!("{} tensors, {elements} parameters", tensors.len());
    Ok(())
}

fn inspect_model(dir: &Path, as_json: bool) -> Result<()> {
    let model = Model::load(dir, &Cpu::new(None)?, DType::F32)?;
    let modules = model.modules();
    let defaults: Vec<String> = select_targets(&LoraConfig::default(), &modules, &model.config.model_type)
        .map(|targets| targets.into_iter().map(|t| t.path).collect())
        .unwrap_or_default();
    if as_json {
        let list: Vec<_> = modules
            .iter()
            .map(|m| {
                json!({
                    "path": m.path, "kind": format!("{:?}", m.kind), "in_features": m.in_features,
                    "out_features": m.out_features, "bias": m.bias, "default_target": defaults.contains(&m.path),
                })
            })
            .collect();
        println!(
            "{}",
            json!({"model_type": model.config.model_type, "parameters": model.base_elements(), "modules": list})
        );
        return Ok(());
    }
    println!(
        "{}: {} parameters; * marks the default target_modules",
        model.config.model_type,
        model.base_elements()
    );
    for m in &modules {
        let mark = if defaults.contains(&m.path) { "*" } else { " " };
        let bias = if m.bias { " bias" } else { "" };
        println!(
            "{mark} {:<50} {:<9} {} -> {}{bias}",
            m.path,
            format!("{:?}", m.kind),
            m.in_features,
            m.out_features
        );
    }
    Ok(())
}
