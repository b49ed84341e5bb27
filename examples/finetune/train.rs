//! `train`.

use crate::args::{ModelArgs, Strategy, TextArgs, TrainArgs};
use crate::commands::{load_model, open_backend};
use crate::compare::Summary;
use crate::estimate::fit;
use crate::progress::Progress;
use lowrank::adapter::{Method, load_adapter};
use lowrank::arena::release_free_memory;
use lowrank::data::{
    ChatTemplate, Dataset, DatasetOptions, Example, Loader, LoaderConfig, Marking, Tokenizer, preview,
};
use lowrank::model::{Model, ModelConfig};
use lowrank::optim::{Optim, OptimizerArguments};
use lowrank::train::metrics::peak_memory_bytes;
use lowrank::train::{Interval, Trainer, TrainingArguments, latest_checkpoint};
use lowrank::{Error, Result};
use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

pub fn run(mut args: Box<TrainArgs>) -> Result<()> {
    open_backend(&args.model)?;
    args.optim.parse::<Optim>()?;
    let tokenizer = Tokenizer::load(&args.model.model)?;
    let config = ModelConfig::load(&args.model.model)?;
    let Some(data_file) = &args.data else {
        return Err(Error::config("train", "--data", "expected a file, found none"));
    };
    let data = load_data(data_file, &args.model, &args.text, &tokenizer, &config)?;
    if let Some(n) = args.preview {
        let marking = if std::io::stdout().is_terminal() { Marking::Colour } else { Marking::Quotes };
        for example in data.examples.iter().take(n) {
            println!("{}\n", preview(&tokenizer, example, marking)?);
        }
        return Ok(());
    }
    let Some(output) = args.output.clone() else {
        return Err(Error::config("train", "--output", "expected a folder, found none"));
    };
    eprintln!("data: {}", data.report);
    let eval_examples = load_eval_data(&args, &tokenizer, &config)?;
    drop(tokenizer);
    let longest = data.examples.iter().chain(&eval_examples).map(|e| e.input_ids.len()).max().unwrap_or(1);
    let packed = packed_length(&args, &config);
    let has_eval = !eval_examples.is_empty();
    fit(&mut args, packed.unwrap_or(longest), has_eval)?;
    release_free_memory();
    let mut model = load_model(&args.model)?;
    model.gradient_checkpointing = args.gradient_checkpointing;
    let method = attach_method(&args, &mut model)?;
    describe(&model);

    let loader = loader(&args, data.examples, packed)?;
    let arguments = training_arguments(&args, has_eval)?;
    let resume = checkpoint_to_resume(&args, &output)?;
    let stop = stop_on_ctrl_c()?;
    let full = method.settings().is_empty();
    let mut trainer = Trainer::new(&mut model, method, arguments, loader, eval_examples, &output)?;
    if let Some(checkpoint) = &resume {
        trainer.resume(checkpoint)?;
        eprintln!("resuming from {}", checkpoint.display());
    }
    let mut progress = Progress::new(trainer.total_steps(), trainer.steps_done());
    let started = (Instant::now(), trainer.tokens());
    let report = trainer.run(&stop, &mut |event| progress.show(event))?;
    progress.finish();
    let (seconds, tokens) = (started.0.elapsed().as_secs_f64(), trainer.tokens() - started.1);
    if args.json {
        let summary = Summary {
            trainable_parameters: model.params.elements(),
            parameters: model.base_elements().max(model.params.elements()),
            adapter_bytes: adapter_bytes(&output),
            peak_memory_bytes: peak_memory_bytes(),
            tokens,
            seconds,
            steps: report.steps,
            eval_loss: report.eval_loss,
        };
        println!("{}", serde_json::to_string(&summary).unwrap_or_default());
    }
    if full {
        lowrank::model::save::save_model(&model, &args.model.model, &output)?;
    }
    eprintln!(
        "done: {} steps, last loss {:.4}; {} is in {}",
        report.steps,
        report.loss,
        if full { "the model" } else { "the adapter" },
        output.display()
    );
    let with = if full {
        format!("--model {}", output.display())
    } else {
        format!("--model {} --adapter {}", args.model.model.display(), output.display())
    };
    eprintln!("try it: finetune generate {with} --chat \"...\"");
    Ok(())
}

/// The evaluation data, if there are any.
pub fn load_eval_data(args: &TrainArgs, tokenizer: &Tokenizer, config: &ModelConfig) -> Result<Vec<Example>> {
    let Some(path) = &args.eval_data else { return Ok(Vec::new()) };
    let eval = load_data(path, &args.model, &args.text, tokenizer, config)?;
    eprintln!("evaluation data: {}", eval.report);
    Ok(eval.examples)
}

/// Tokens of a packed row, if rows are packed.
pub fn packed_length(args: &TrainArgs, config: &ModelConfig) -> Option<usize> {
    args.packing.then(|| args.text.max_length.unwrap_or(config.max_sequence().min(2048)))
}

/// The order of the training data.
pub fn loader(args: &TrainArgs, examples: Vec<Example>, packing: Option<usize>) -> Result<Loader> {
    let config = LoaderConfig {
        per_device_train_batch_size: args.per_device_train_batch_size,
        gradient_accumulation_steps: args.gradient_accumulation_steps,
        shuffle: !args.no_shuffle,
        group_by_length: args.group_by_length,
        packing,
    };
    Loader::new(examples, config, args.model.seed)
}

/// Bytes of what was trained on disk.
pub fn adapter_bytes(output: &Path) -> u64 {
    let files = ["adapter_model.safetensors", "adapter.safetensors", "model.safetensors"];
    files.iter().filter_map(|file| output.join(file).metadata().ok()).map(|m| m.len()).sum()
}

/// Reads and tokenizes a data file as the flags say.
pub fn load_data(
    path: &Path,
    model: &ModelArgs,
    text: &TextArgs,
    tokenizer: &Tokenizer,
    config: &ModelConfig,
) -> Result<Dataset> {
    let template = ChatTemplate::load(&model.model, tokenizer)?;
    let options = DatasetOptions {
        max_length: text.max_length,
        model_max_length: config.max_sequence(),
        append_eos: text.append_eos,
        train_on_prompt: text.train_on_prompt,
    };
    Dataset::load(path, tokenizer, &template, &options)
}

/// Puts what is trained on the model.
pub fn attach_method(args: &TrainArgs, model: &mut Model) -> Result<Box<dyn Method>> {
    if let Some(dir) = &args.init_adapter {
        return load_adapter(model, dir);
    }
    let mut method = args.settings.method(&args.method, &args.model.model)?;
    method.attach(model, args.model.seed)?;
    Ok(method)
}

fn describe(model: &Model) {
    let trainable = model.params.elements();
    let total = model.base_elements().max(trainable);
    eprintln!(
        "model: {} with {} parameters, {} trained ({:.2}%), on {}",
        model.config.model_type,
        total,
        trainable,
        100.0 * trainable as f64 / total as f64,
        model.backend.name()
    );
}

fn interval(strategy: Strategy, steps: usize) -> Interval {
    match strategy {
        Strategy::No => Interval::No,
        Strategy::Steps => Interval::Steps(steps),
        Strategy::Epoch => Interval::Epoch,
    }
}

pub fn training_arguments(args: &TrainArgs, has_eval: bool) -> Result<TrainingArguments> {
    let eval_default = if has_eval { Strategy::Epoch } else { Strategy::No };
    Ok(TrainingArguments {
        learning_rate: args.learning_rate,
        lr_scheduler_type: args.lr_scheduler_type.parse()?,
        warmup_steps: args.warmup_steps,
        optimizer: optimizer_arguments(args)?,
        max_grad_norm: (args.max_grad_norm > 0.0).then_some(args.max_grad_norm),
        num_train_epochs: args.num_train_epochs,
        max_steps: args.max_steps,
        seed: args.model.seed,
        logging_steps: args.logging_steps,
        eval_strategy: interval(args.eval_strategy.unwrap_or(eval_default), args.eval_steps),
        per_device_eval_batch_size: args.per_device_eval_batch_size,
        save_strategy: interval(args.save_strategy, args.save_steps),
        save_total_limit: args.save_total_limit,
        load_best_model_at_end: args.load_best_model_at_end,
        early_stopping_patience: args.early_stopping_patience,
    })
}

pub fn optimizer_arguments(args: &TrainArgs) -> Result<OptimizerArguments> {
    Ok(OptimizerArguments {
        optim: args.optim.parse()?,
        adam_beta1: args.adam_beta1,
        adam_beta2: args.adam_beta2,
        adam_epsilon: args.adam_epsilon,
        weight_decay: args.weight_decay,
        loraplus_lr_ratio: args.loraplus_lr_ratio,
        loraplus_lr_embedding: args.loraplus_lr_embedding,
        optimizer_memory: args.optimizer_memory.map(|bytes| bytes.as_u64() as usize),
    })
}

fn checkpoint_to_resume(args: &TrainArgs, output: &Path) -> Result<Option<std::path::PathBuf>> {
    match args.resume.as_deref() {
        None => Ok(None),
        Some("latest") => match latest_checkpoint(output) {
            Some(path) => Ok(Some(path)),
            None => Err(Error::config(
                "train",
                "--resume",
                format!("there is no checkpoint in {}", output.display()),
            )),
        },
        Some(dir) => Ok(Some(dir.into())),
    }
}

/// A flag that Ctrl-C (or a termination signal) sets; a second one ends the process at once.
pub fn stop_on_ctrl_c() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("stopping after this step; press Ctrl-C again to stop at once");
    })
    .map_err(|e| Error::Unsupported(format!("Ctrl-C can't be handled: {e}")))?;
    Ok(stop)
}
