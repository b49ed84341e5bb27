//! N + N steps equal 2N steps bit for bit: parameters, moments, metrics and files; a stopped or killed run
//! leaves nothing half-written.

mod common;

use common::golden::path;
use common::training::METHOD_SETTINGS;
use lowrank::adapter::{Full, LoraConfig, Method};
use lowrank::backend::cpu::Cpu;
use lowrank::data::Example;
use lowrank::data::loader::{Loader, LoaderConfig};
use lowrank::model::Model;
use lowrank::rng::{Philox, PhiloxKey, Stream};
use lowrank::train::{Event, Interval, Trainer, TrainingArguments, latest_checkpoint};
use lowrank::{DType, Error};
use serde_json::Value;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

fn examples() -> Vec<Example> {
    let mut rng = Philox::new(PhiloxKey::new(3, Stream::Shuffle, 9));
    (0..11)
        .map(|i| {
            let input_ids: Vec<u32> = (0..5 + i % 4).map(|_| rng.below(97)).collect();
            let labels = input_ids.iter().map(|id| *id as i32).collect();
            Example { input_ids, labels }
        })
        .collect()
}

fn arguments() -> TrainingArguments {
    TrainingArguments {
        learning_rate: 1e-2,
        warmup_steps: 2.0,
        max_steps: Some(10),
        save_strategy: Interval::Steps(5),
        ..TrainingArguments::default()
    }
}

/// A run of ten steps with dropout, accumulation and shuffling; `stop_after` asks it to stop there.
fn run(
    method: &str,
    optim: &str,
    dtype: DType,
    output: &Path,
    resume: Option<&Path>,
    stop_after: Option<usize>,
) -> Result<(), Error> {
    let backend = Cpu::new(None)?;
    let mut model = Model::load(&path("llama"), &backend, dtype)?;
    let mut method: Box<dyn Method> =
        if method == "full" { Box::new(Full) } else { common::training::method(method) };
    method.attach(&mut model, 1)?;
    let loader_config = LoaderConfig {
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 2,
        ..LoaderConfig::default()
    };
    let loader = Loader::new(examples(), loader_config, 7)?;
    let mut arguments = arguments();
    arguments.optimizer.optim = optim.parse()?;
    arguments.optimizer.optimizer_memory = optim.starts_with("paged").then_some(0);
    let mut trainer = Trainer::new(&mut model, method, arguments, loader, Vec::new(), output)?;
    if let Some(checkpoint) = resume {
        trainer.resume(checkpoint)?;
    }
    let stop = AtomicBool::new(false);
    trainer.run(&stop, &mut |event| {
        if let Event::Step { metrics, .. } = event
            && Some(metrics.step) == stop_after
        {
            stop.store(true, Ordering::Relaxed);
        }
    })?;
    Ok(())
}

/// What a metrics file says, without the clock.
fn metrics(output: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| {
            let mut value: Value = serde_json::from_str(line).unwrap();
            value["tokens_per_second"] = Value::Null;
            value["peak_memory_bytes"] = Value::Null;
            value
        })
        .collect()
}

#[test]
fn a_resumed_run_has_the_bits_of_an_uninterrupted_one() {
    let lora = METHOD_SETTINGS[0];
    let runs = [
        (lora, "adamw_torch", DType::F32),
        (lora, "adamw_torch", DType::BF16),
        ("full", "adamw_torch", DType::F32),
        ("full", "paged_adamw_32bit", DType::BF16),
        ("full", "paged_adamw_8bit", DType::F32),
        (lora, "adamw_8bit", DType::BF16),
        (lora, "lion_32bit", DType::F32),
        (lora, "sgd", DType::F32),
    ];
    let others = METHOD_SETTINGS[1..].iter().map(|settings| (*settings, "adamw_torch", DType::F32));
    for (method, optim, dtype) in runs.into_iter().chain(others) {
        let straight = tempfile::tempdir().unwrap();
        run(method, optim, dtype, straight.path(), None, None).unwrap();
        let parts = tempfile::tempdir().unwrap();
        let stopped = run(method, optim, dtype, parts.path(), None, Some(3)).unwrap_err();
        assert!(matches!(stopped, Error::Interrupted(_)), "{stopped}");
        let checkpoint = latest_checkpoint(parts.path()).unwrap();
        assert!(checkpoint.ends_with("checkpoint-3"));
        run(method, optim, dtype, parts.path(), Some(&checkpoint), None).unwrap();
        assert_eq!(metrics(straight.path()), metrics(parts.path()), "{method} {optim} {dtype}");
        let trained = match method {
            "full" => "model.safetensors",
            bottleneck if bottleneck.contains("BOTTLENECK") => "adapter.safetensors",
            _ => "adapter_model.safetensors",
        };
        for file in [trained, "checkpoint-10/optimizer.safetensors", "checkpoint-10/trainer_state.json"] {
            let (a, b) = (straight.path().join(file), parts.path().join(file));
            assert!(
                std::fs::read(a).unwrap() == std::fs::read(b).unwrap(),
                "{method} {optim} {dtype}: {file} differs"
            );
        }
    }
}

#[test]
fn where_the_optimizer_keeps_its_state_changes_no_bits() {
    let adapter = |optim: &str, from: Option<&Path>| {
        let output = tempfile::tempdir().unwrap();
        run(METHOD_SETTINGS[0], optim, DType::F32, output.path(), from, None).unwrap();
        (std::fs::read(output.path().join("adapter_model.safetensors")).unwrap(), output)
    };
    let (resident, output) = adapter("adamw_torch", None);
    let (paged, _) = adapter("paged_adamw_32bit", None);
    let (resumed, _) = adapter("paged_adamw_32bit", Some(&output.path().join("checkpoint-5")));
    let (other, _) = adapter("adamw_8bit", None);
    assert!(resident == paged && resident == resumed);
    assert!(resident != other, "eight bits change something");
    let refused = run(
        METHOD_SETTINGS[0],
        "lion",
        DType::F32,
        output.path(),
        Some(&output.path().join("checkpoint-5")),
        None,
    );
    assert!(refused.unwrap_err().to_string().contains("optim"));
}

#[test]
fn lines_and_folders_of_a_killed_run_do_not_survive_resuming() {
    let output = tempfile::tempdir().unwrap();
    run(METHOD_SETTINGS[0], "adamw_torch", DType::F32, output.path(), None, Some(5)).unwrap_err();
    let metrics_file = output.path().join("metrics.jsonl");
    let whole = std::fs::read_to_string(&metrics_file).unwrap();
    std::fs::write(&metrics_file, format!("{whole}{{\"step\":6,\"loss\":1.0}}\n{{\"step\":7,\"lo")).unwrap();
    std::fs::create_dir_all(output.path().join(".checkpoint-8.1.tmp")).unwrap();
    std::fs::create_dir_all(output.path().join("checkpoint-9")).unwrap();
    let checkpoint = latest_checkpoint(output.path()).unwrap();
    assert!(checkpoint.ends_with("checkpoint-5"), "{}", checkpoint.display());
    run(METHOD_SETTINGS[0], "adamw_torch", DType::F32, output.path(), Some(&checkpoint), None).unwrap();
    let steps: Vec<u64> = metrics(output.path()).iter().map(|v| v["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=10).collect::<Vec<_>>());
}

#[test]
fn a_checkpoint_of_another_run_is_refused() {
    let output = tempfile::tempdir().unwrap();
    run(METHOD_SETTINGS[0], "adamw_torch", DType::F32, output.path(), None, None).unwrap();
    let state = output.path().join("checkpoint-5/trainer_state.json");
    let text = std::fs::read_to_string(&state).unwrap();
    std::fs::write(&state, text.replace("\"learning_rate\": 0.01", "\"learning_rate\": 0.02")).unwrap();
    let error = run(
        METHOD_SETTINGS[0],
        "adamw_torch",
        DType::F32,
        output.path(),
        Some(&output.path().join("checkpoint-5")),
        None,
    )
    .unwrap_err();
    assert!(error.to_string().contains("learning_rate"), "{error}");
    let error = run(
        METHOD_SETTINGS[0],
        "adamw_torch",
        DType::F32,
        output.path(),
        Some(&output.path().join("checkpoint-7")),
        None,
    )
    .unwrap_err();
    assert!(error.to_string().contains("checkpoint-7"), "{error}");
}

#[test]
fn a_loss_that_is_not_finite_names_step_and_checkpoint() {
    let output = tempfile::tempdir().unwrap();
    run(METHOD_SETTINGS[0], "adamw_torch", DType::F32, output.path(), None, Some(5)).unwrap_err();
    let backend = Cpu::new(None).unwrap();
    let mut model = Model::load(&path("llama"), &backend, DType::F32).unwrap();
    let mut config = LoraConfig::default();
    config.attach(&mut model, 1).unwrap();
    let id = model.params.ids().next().unwrap();
    let n = model.params.info(id).range.len();
    model.params.set(id, &vec![f32::INFINITY; n]).unwrap();
    let loader = Loader::new(examples(), LoaderConfig::default(), 7).unwrap();
    let error = Trainer::new(&mut model, Box::new(config), arguments(), loader, Vec::new(), output.path())
        .unwrap()
        .run(&AtomicBool::new(false), &mut |_| {})
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("step 1: loss is not finite") && text.contains("checkpoint-5"), "{text}");
}
