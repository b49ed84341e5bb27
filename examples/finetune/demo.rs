//! The built-in demo: LoRA on a small model of the project's own, with held-out questions before and after.

use crate::generate::answer;
use crate::progress::Progress;
use crate::train::stop_on_ctrl_c;
use lowrank::adapter::lora::attach;
use lowrank::adapter::{LoraConfig, TargetModules};
use lowrank::backend::cpu::Cpu;
use lowrank::data::{
    ChatTemplate, Dataset, DatasetOptions, Example, Loader, LoaderConfig, Record, Tokenizer, jsonl,
};
use lowrank::fs::write_atomic_bytes;
use lowrank::model::Model;
use lowrank::train::{Interval, Method, Trainer, TrainingArguments, evaluate};
use lowrank::{DType, Error, Result};
use std::path::Path;
use std::time::Instant;

/// Where the demo puts its files, in the present folder.
const OUTPUT: &str = "finetune-demo";

/// The built-in files. tools/make_demo.md says how they were made.
const FILES: [(&str, &[u8]); 8] = [
    ("model/config.json", include_bytes!("demo/model/config.json")),
    ("model/generation_config.json", include_bytes!("demo/model/generation_config.json")),
    ("model/tokenizer.json", include_bytes!("demo/model/tokenizer.json")),
    ("model/tokenizer_config.json", include_bytes!("demo/model/tokenizer_config.json")),
    ("model/chat_template.jinja", include_bytes!("demo/model/chat_template.jinja")),
    ("model/model.safetensors", include_bytes!("demo/model/model.safetensors")),
    ("train.jsonl", include_bytes!("demo/data/train.jsonl")),
    ("held_out.jsonl", include_bytes!("demo/data/held_out.jsonl")),
];

/// Held-out questions whose answers are shown.
const SHOWN: usize = 4;

pub fn run() -> Result<()> {
    let output = Path::new(OUTPUT);
    for (name, bytes) in FILES {
        write_atomic_bytes(&output.join(name), bytes)?;
    }
    let model_dir = output.join("model");
    let backend = Cpu::new(None)?;
    let tokenizer = Tokenizer::load(&model_dir)?;
    let mut model = Model::load(&model_dir, &backend, DType::F32)?;
    let train = load(&output.join("train.jsonl"), &model_dir, &tokenizer, &model)?;
    let held_out = load(&output.join("held_out.jsonl"), &model_dir, &tokenizer, &model)?;
    let questions = questions(&output.join("held_out.jsonl"))?;

    eprintln!(
        "A small Llama-type language model ({} parameters) has read a dictionary, but was",
        model.base_elements()
    );
    eprintln!(
        "never asked about it. {} questions with answers teach it to answer; {} more, about",
        train.len(),
        held_out.len()
    );
    eprintln!("other nouns that it has read of, are held out. Computing on {}.\n", backend.name());

    let before = answers(&model, &model_dir, &tokenizer, &questions)?;
    let mut config = LoraConfig {
        r: 16,
        lora_alpha: 32.0,
        target_modules: Some(TargetModules::AllLinear),
        base_model_name_or_path: Some(model_dir.display().to_string()),
        ..LoraConfig::default()
    };
    let base = model.base_elements();
    attach(&mut model, &mut config, 42)?;
    let trainable = model.params.elements();
    eprintln!(
        "LoRA on all linear layers: {trainable} trained parameters, {:.1}% of the model's.",
        100.0 * trainable as f64 / base as f64
    );
    let losses = |model: &Model| {
        Ok::<_, lowrank::Error>((evaluate(model, &train, 16)?.0, evaluate(model, &held_out, 16)?.0))
    };
    let (train_before, held_out_before) = losses(&model)?;

    let started = Instant::now();
    train_adapter(&mut model, config, train.clone(), held_out.clone(), output)?;
    let seconds = started.elapsed().as_secs_f64();
    let (train_after, held_out_after) = losses(&model)?;
    let after = answers(&model, &model_dir, &tokenizer, &questions)?;

    println!("loss on the training rows: {train_before:.3} -> {train_after:.3}");
    println!("loss on held-out rows:     {held_out_before:.3} -> {held_out_after:.3}");
    println!("training took {seconds:.0} seconds\n");
    for (i, (question, expected)) in questions.iter().enumerate() {
        println!(
            "{question}\n  before:     {}\n  after:      {}\n  dictionary: {expected}\n",
            before[i], after[i]
        );
    }
    println!("The adapter is in {OUTPUT}/ (adapter_config.json, adapter_model.safetensors: PEFT loads it).");
    println!("Next:");
    println!(
        "  cargo run --release --example finetune -- generate --model {OUTPUT}/model --adapter {OUTPUT} --chat \"What is a hammer?\""
    );
    println!(
        "  cargo run --release --example finetune -- train --model DIR --data FILE --output DIR   (your model, your data)"
    );
    println!("  cargo run --release --example finetune -- --help");
    Ok(())
}

fn train_adapter(
    model: &mut Model,
    config: LoraConfig,
    train: Vec<Example>,
    held_out: Vec<Example>,
    output: &Path,
) -> Result<()> {
    let loader_config = LoaderConfig { per_device_train_batch_size: 16, ..LoaderConfig::default() };
    let loader = Loader::new(train, loader_config, 42)?;
    let arguments = TrainingArguments {
        learning_rate: 2e-3,
        warmup_steps: 0.05,
        num_train_epochs: 3.0,
        eval_strategy: Interval::Epoch,
        ..TrainingArguments::default()
    };
    let stop = stop_on_ctrl_c()?;
    let mut trainer = Trainer::new(model, Method::Lora(config), arguments, loader, held_out, output)?;
    let mut progress = Progress::new(trainer.total_steps(), 0);
    let finished = trainer.run(&stop, &mut |event| progress.show(event));
    progress.finish();
    finished.map_err(|error| match error {
        Error::Interrupted(_) => {
            Error::Interrupted(format!("what was trained so far is in {OUTPUT}/checkpoint-*"))
        }
        other => other,
    })?;
    eprintln!();
    Ok(())
}

fn load(path: &Path, model_dir: &Path, tokenizer: &Tokenizer, model: &Model) -> Result<Vec<Example>> {
    let template = ChatTemplate::load(model_dir, tokenizer)?;
    let options = DatasetOptions {
        max_length: None,
        model_max_length: model.config.max_sequence(),
        append_eos: true,
        train_on_prompt: false,
    };
    Ok(Dataset::load(path, tokenizer, &template, &options)?.examples)
}

/// The first held-out questions with their answers.
fn questions(path: &Path) -> Result<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    jsonl::read(path, |_, record| {
        if let Record::Chat(messages) = record
            && let [question, answer] = messages.as_slice()
            && pairs.len() < SHOWN
        {
            pairs.push((question.content.clone(), answer.content.clone()));
        }
        Ok(())
    })?;
    Ok(pairs)
}

fn answers(
    model: &Model,
    model_dir: &Path,
    tokenizer: &Tokenizer,
    questions: &[(String, String)],
) -> Result<Vec<String>> {
    questions
        .iter()
        .map(|(question, _)| Ok(answer(model, model_dir, tokenizer, question, 40)?.replace('\n', " ")))
        .collect()
}
