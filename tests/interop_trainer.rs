//! A training run equals that of Hugging Face's Trainer from the same initial adapter, and schedules equal
//! transformers'.

mod common;

use common::golden::{path, worst};
use lowrank::DType;
use lowrank::adapter::load_adapter;
use lowrank::backend::cpu::Cpu;
use lowrank::data::Example;
use lowrank::data::loader::{Loader, LoaderConfig};
use lowrank::model::{Checkpoint, Model};
use lowrank::optim::{OptimizerArguments, Schedule};
use lowrank::train::{Event, Interval, Trainer, TrainingArguments};
use serde_json::Value;
use std::sync::atomic::AtomicBool;

fn json(relative: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path(relative)).unwrap()).unwrap()
}

fn examples() -> Vec<Example> {
    let text = std::fs::read_to_string(path("training/data.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let row: Value = serde_json::from_str(line).unwrap();
            let numbers = |key: &str| {
                row[key].as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect::<Vec<_>>()
            };
            Example {
                input_ids: numbers("input_ids").into_iter().map(|id| id as u32).collect(),
                labels: numbers("labels").into_iter().map(|id| id as i32).collect(),
            }
        })
        .collect()
}

#[test]
fn ten_steps_equal_the_trainer_of_transformers() {
    for method in ["lora", "dora", "embedding", "prefix", "prompt", "loraplus", "loraplus_embedding"] {
        train_as(method);
    }
}

/// PEFT's `update_and_allocate` after each of twenty steps takes the same ranks away.
#[test]
fn adalora_takes_away_the_ranks_that_peft_does() {
    let output = train_as("adalora");
    let settings = json("training/adalora/settings.json");
    let mut allocated = 0;
    for (i, expected) in settings["ranks"].as_array().unwrap().iter().enumerate() {
        let file = output.path().join(format!("checkpoint-{}/adapter_config.json", i + 1));
        let config: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        let mut ours = serde_json::Map::new();
        for (name, kept) in config["rank_pattern"].as_object().into_iter().flatten() {
            let bits = kept.as_array().unwrap().iter().map(|k| if k.as_bool().unwrap() { '1' } else { '0' });
            ours.insert(name.strip_suffix(".lora_E").unwrap().to_string(), bits.collect::<String>().into());
        }
        allocated += usize::from(!ours.is_empty());
        assert_eq!(Value::Object(ours), *expected, "step {}", i + 1);
    }
    assert_eq!(allocated, 16);
}

/// A run as the Trainer's of this golden folder; the folder that it wrote.
fn train_as(method: &str) -> tempfile::TempDir {
    let at = |file: &str| format!("training/{method}/{file}");
    let settings = json(&at("settings.json"));
    let backend = Cpu::new(None).unwrap();
    let mut model = Model::load(&path("llama"), &backend, DType::F32).unwrap();
    let config = load_adapter(&mut model, &path(&at("init_adapter"))).unwrap();
    let number = |key: &str| settings[key].as_f64().unwrap();
    let loader_config = LoaderConfig {
        per_device_train_batch_size: number("per_device_train_batch_size") as usize,
        gradient_accumulation_steps: number("gradient_accumulation_steps") as usize,
        shuffle: false,
        ..LoaderConfig::default()
    };
    let arguments = TrainingArguments {
        learning_rate: number("learning_rate"),
        lr_scheduler_type: settings["lr_scheduler_type"].as_str().unwrap().parse().unwrap(),
        warmup_steps: number("warmup_steps"),
        optimizer: OptimizerArguments {
            adam_beta1: number("adam_beta1"),
            adam_beta2: number("adam_beta2"),
            adam_epsilon: number("adam_epsilon"),
            weight_decay: number("weight_decay"),
            loraplus_lr_ratio: settings["loraplus_lr_ratio"].as_f64().unwrap_or(1.0),
            ..OptimizerArguments::default()
        },
        max_grad_norm: Some(number("max_grad_norm")),
        max_steps: Some(number("max_steps") as usize),
        save_strategy: if method == "adalora" { Interval::Steps(1) } else { Interval::No },
        ..TrainingArguments::default()
    };
    let loader = Loader::new(examples(), loader_config, 0).unwrap();
    let output = tempfile::tempdir().unwrap();
    let mut steps = Vec::new();
    Trainer::new(&mut model, config, arguments, loader, Vec::new(), output.path())
        .unwrap()
        .run(&AtomicBool::new(false), &mut |event| {
            if let Event::Step { metrics, .. } = event {
                steps.push(*metrics);
            }
        })
        .unwrap();
    let expected = settings["steps"].as_array().unwrap();
    assert_eq!(steps.len(), expected.len());
    for (ours, theirs) in steps.iter().zip(expected) {
        for (key, value) in
            [("loss", ours.loss), ("grad_norm", ours.grad_norm), ("learning_rate", ours.learning_rate)]
        {
            let want = theirs[key].as_f64().unwrap();
            assert!(
                (value - want).abs() < 1e-4,
                "{method}, step {}: {key} {value}, the Trainer's {want}",
                ours.step
            );
        }
    }
    let final_adapter = Checkpoint::open_file(&path(&at("final_adapter/adapter_model.safetensors"))).unwrap();
    let written = Checkpoint::open_file(&output.path().join("adapter_model.safetensors")).unwrap();
    // PEFT adds copies of an adapted embedding's and head's own weights.
    let trained = || final_adapter.names().filter(|name| !name.ends_with(".base_layer.weight"));
    assert!(trained().eq(written.names()));
    for name in trained() {
        let theirs = backend.to_vec::<f32>(&final_adapter.tensor(name).unwrap()).unwrap();
        let ours = backend.to_vec::<f32>(&written.tensor(name).unwrap()).unwrap();
        let difference = worst(&ours, &theirs);
        assert!(difference < 1e-4, "{method}: {name} differs by {difference}");
    }
    output
}

#[test]
fn schedules_equal_those_of_transformers() {
    let cases = json("schedules.json");
    for case in cases.as_array().unwrap() {
        let schedule = Schedule::new(
            case["lr_scheduler_type"].as_str().unwrap().parse().unwrap(),
            case["learning_rate"].as_f64().unwrap(),
            case["warmup_steps"].as_f64().unwrap(),
            case["num_training_steps"].as_u64().unwrap() as usize,
        );
        for (step, rate) in case["rates"].as_array().unwrap().iter().enumerate() {
            let (ours, theirs) = (schedule.learning_rate(step), rate.as_f64().unwrap());
            assert!((ours - theirs).abs() <= 1e-15, "{case:?} step {step}: {ours}, not {theirs}");
        }
    }
}
