//! The built-in demo: LoRA and QLoRA on a small model of the project's own, with held-out questions before and after.

use crate::generate::answer;
use crate::progress::Progress;
use crate::train::stop_on_ctrl_c;
use lowrank::adapter::{LoraConfig, Method, Origin, TargetModules};
use lowrank::backend::cpu::Cpu;
use lowrank::data::{
    ChatTemplate, Dataset, DatasetOptions, Example, Loader, LoaderConfig, Record, Tokenizer, jsonl,
};
use lowrank::fs::write_atomic_bytes;
use lowrank::model::{LoadOptions, Model, Parameter};
use lowrank::quant::{Format, QuantConfig};
use lowrank::train::{Interval, Trainer, TrainingArguments, evaluate};
use lowrank::{DType, Error, Result};
use std::path::Path;
use std::sync::atomic::AtomicBool;
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

/// One way to hold the frozen base.
struct Variant {
    name: &'static str,
    folder: &'static str,
    what: &'static str,
    quant: Option<&'static str>,
}

const VARIANTS: [Variant; 2] = [
    Variant { name: "LoRA", folder: "lora", what: "the base in bf16, as it is stored", quant: None },
    Variant {
        name: "QLoRA",
        folder: "qlora",
        what: "the base's linear layers in 4-bit NF4",
        quant: Some("nf4"),
    },
];

/// What a variant came to.
struct Outcome {
    linear_bytes: usize,
    losses: [(f64, f64); 2], // training and held-out rows, before and after
    answers: [Vec<String>; 2],
    seconds: f64,
}

pub fn run() -> Result<()> {
    let output = Path::new(OUTPUT);
    for (name, bytes) in FILES {
        write_atomic_bytes(&output.join(name), bytes)?;
    }
    let model_dir = output.join("model");
    let tokenizer = Tokenizer::load(&model_dir)?;
    let questions = questions(&output.join("held_out.jsonl"))?;
    let stop = stop_on_ctrl_c()?;
    let outcomes = VARIANTS
        .iter()
        .map(|variant| learn(variant, output, &model_dir, &tokenizer, &questions, &stop))
        .collect::<Result<Vec<_>>>()?;

    println!(
        "{:13} {:>10} {:>22} {:>22} {:>9}",
        "", "base", "loss on training rows", "loss on held-out rows", "training"
    );
    for (variant, outcome) in VARIANTS.iter().zip(&outcomes) {
        let arrow = |(before, after): (f64, f64)| format!("{before:.3} -> {after:.3}");
        let [before, after] = outcome.losses;
        println!(
            "{:13} {:>7.2} MB {:>22} {:>22} {:>7.0} s",
            format!("{}, {}", variant.name, variant.quant.unwrap_or("bf16")),
            outcome.linear_bytes as f64 / 1e6,
            arrow((before.0, after.0)),
            arrow((before.1, after.1)),
            outcome.seconds
        );
    }
    println!();
    for (i, (question, expected)) in questions.iter().enumerate() {
        println!("{question}\n  before:     {}", outcomes[0].answers[0][i]);
        for (variant, outcome) in VARIANTS.iter().zip(&outcomes) {
            println!("  {:11} {}", format!("{}:", variant.name), outcome.answers[1][i]);
        }
        println!("  dictionary: {expected}\n");
    }
    let command = "cargo run --release --example finetune --";
    println!(
        "The adapters are in {OUTPUT}/lora and {OUTPUT}/qlora (adapter_config.json, adapter_model.safetensors: PEFT"
    );
    println!("loads them). Next:");
    println!(
        "  {command} generate --model {OUTPUT}/model --adapter {OUTPUT}/lora --chat \"What is a hammer?\""
    );
    println!("  {command} train --model DIR --data FILE --output DIR --quant nf4   (your model, your data)");
    println!("  {command} --help");
    Ok(())
}

/// Trains an adapter on one variant of the base.
fn learn(
    variant: &Variant,
    output: &Path,
    model_dir: &Path,
    tokenizer: &Tokenizer,
    questions: &[(String, String)],
    stop: &AtomicBool,
) -> Result<Outcome> {
    let backend = Cpu::new(None)?;
    let quant = variant.quant.map(Format::by_name).transpose()?.map(QuantConfig::new);
    let mut model = Model::load(model_dir, &backend, LoadOptions { dtype: DType::F32, quant })?;
    let train = load(&output.join("train.jsonl"), model_dir, tokenizer, &model)?;
    let held_out = load(&output.join("held_out.jsonl"), model_dir, tokenizer, &model)?;
    if variant.quant.is_none() {
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
    }
    let before = answers(&model, model_dir, tokenizer, questions)?;
    let mut config = LoraConfig {
        r: 16,
        lora_alpha: 32.0,
        targets: TargetModules::AllLinear.into(),
        origin: Origin {
            base_model_name_or_path: Some(model_dir.display().to_string()),
            ..Origin::default()
        },
        ..LoraConfig::default()
    };
    let base = model.base_elements();
    config.attach(&mut model, 42)?;
    let trainable = model.params.elements();
    eprintln!(
        "{}, {}: {trainable} trained parameters, {:.1}% of the model's.",
        variant.name,
        variant.what,
        100.0 * trainable as f64 / base as f64
    );
    let losses = |model: &Model| {
        Ok::<_, lowrank::Error>((evaluate(model, &train, 16)?.0, evaluate(model, &held_out, 16)?.0))
    };
    let losses_before = losses(&model)?;
    let started = Instant::now();
    let folder = output.join(variant.folder);
    train_adapter(&mut model, config, train.clone(), held_out.clone(), &folder, stop)?;
    let seconds = started.elapsed().as_secs_f64();
    let head = model.head.path.clone();
    let linears = model.linears_mut().into_iter().filter(|linear| linear.path != head);
    let bytes = linears.filter_map(|linear| match &linear.weight {
        Parameter::Frozen(weight) => Some(weight.bytes()),
        Parameter::Trainable(_) | Parameter::SideBySide(_) => None,
    });
    Ok(Outcome {
        linear_bytes: bytes.sum(),
        losses: [losses_before, losses(&model)?],
        answers: [before, answers(&model, model_dir, tokenizer, questions)?],
        seconds,
    })
}

fn train_adapter(
    model: &mut Model,
    config: LoraConfig,
    train: Vec<Example>,
    held_out: Vec<Example>,
    output: &Path,
    stop: &AtomicBool,
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
    let mut trainer = Trainer::new(model, Box::new(config), arguments, loader, held_out, output)?;
    let mut progress = Progress::new(trainer.total_steps(), 0);
    let finished = trainer.run(stop, &mut |event| progress.show(event));
    progress.finish();
    finished.map_err(|error| match error {
        Error::Interrupted(_) => {
            Error::Interrupted(format!("what was trained so far is in {}/checkpoint-*", output.display()))
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
