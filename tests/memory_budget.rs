//! The memory plan, made from config.json alone, against what the allocator counted in a run; and plans that are made
//! to fit.

mod common;

use common::golden::path;
use common::training::{METHOD_SETTINGS, method};
use lowrank::adapter::{Full, Method};
use lowrank::backend::Backend;
use lowrank::backend::cpu::Cpu;
use lowrank::data::{Example, Loader, LoaderConfig};
use lowrank::model::{Batch, LoadOptions, Model, ModelConfig};
use lowrank::optim::{Optimizer, OptimizerArguments};
use lowrank::quant::{Format, QuantConfig};
use lowrank::train::{Interval, ManyPlanner, ManyTrainer, PlanArguments, Planner, TrainingArguments};
use lowrank::{DType, Result};
use serde_json::json;
use std::path::Path;
use std::sync::atomic::AtomicBool;

const LENGTH: usize = 96;

/// A model that is large enough to have blocks of all kinds, as a folder.
fn make_model(folder: &Path) {
    let config = json!({
        "model_type": "llama", "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 8001, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": true,
        "dtype": "float32",
    });
    let source = folder.join("source");
    std::fs::create_dir_all(&source).unwrap();
    std::fs::write(source.join("config.json"), config.to_string()).unwrap();
    let backend = Cpu::new(None).unwrap();
    let mut model = Model::random(ModelConfig::load(&source).unwrap(), &backend, DType::F32, 1).unwrap();
    Full.attach(&mut model, 0).unwrap();
    lowrank::model::save::save_model(&model, &source, folder).unwrap();
}

fn batch(rows: usize) -> Batch {
    let mut batch = Batch::new();
    for row in 0..rows {
        let ids: Vec<u32> = (0..LENGTH as u32).map(|i| (i * 37 + row as u32) % 8001).collect();
        batch.push(&ids, &ids.iter().map(|id| *id as i32).collect::<Vec<_>>());
    }
    batch
}

const LORA: &str = r#"{"peft_type": "LORA", "r": 8, "lora_dropout": 0.1}"#;

const LOFTQ: &str =
    r#"{"peft_type": "LORA", "r": 8, "init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}}"#;

fn adapt(model: &mut Model, settings: &str) -> Result<Box<dyn Method>> {
    let mut method: Box<dyn Method> = if settings == "full" { Box::new(Full) } else { method(settings) };
    method.attach(model, 3)?;
    Ok(method)
}

/// What a run of two steps takes: the arena's peak, the mapped weights and the threads' scratch memory.
fn measure(
    folder: &Path,
    options: LoadOptions,
    dummy: bool,
    settings: &str,
    arguments: &PlanArguments,
) -> usize {
    let backend = Cpu::new(None).unwrap();
    let mut model = if dummy {
        Model::random(ModelConfig::load(folder).unwrap(), &backend, options, 1).unwrap()
    } else {
        Model::load(folder, &backend, options).unwrap()
    };
    let mut method = adapt(&mut model, settings).unwrap();
    method.begin(&mut model, 10).unwrap();
    model.gradient_checkpointing = arguments.gradient_checkpointing;
    let temporary = tempfile::tempdir().unwrap();
    let mut optimizer =
        Optimizer::new(&backend, &model.params, arguments.optimizer.clone(), temporary.path()).unwrap();
    for step in 0..2 {
        model.params.zero_grads().unwrap();
        let dropout = lowrank::autograd::Dropout { seed: 1, step, first_row: 0 };
        model.train_step(&batch(arguments.rows), 1.0, Some(dropout)).unwrap();
        method.regularize(&model).unwrap();
        optimizer.step(&backend, &mut model.params, 1e-3, 1.0).unwrap();
        method.after_step(&mut model, step as usize, 1.0).unwrap();
    }
    if let Some(rows) = arguments.eval_rows {
        model.evaluate(&batch(rows)).unwrap();
    }
    let params = model.parameters_mut();
    let frozen = params.iter().filter_map(|(_, parameter)| match parameter {
        lowrank::model::Parameter::Frozen(lowrank::model::Weight::Dense(tensor)) if tensor.is_mapped() => {
            Some(tensor.bytes())
        }
        _ => None,
    });
    let mapped: usize = frozen.sum();
    backend.arena().peak_bytes() + backend.scratch_bytes() + mapped
}

fn planner(folder: &Path, backend: &Backend, options: LoadOptions, dummy: bool, settings: &str) -> Planner {
    Planner::new(folder, backend, options, dummy, |model| adapt(model, settings)).unwrap()
}

fn arguments(rows: usize, gradient_checkpointing: usize, optim: &str) -> PlanArguments {
    let optimizer = OptimizerArguments { optim: optim.parse().unwrap(), ..OptimizerArguments::default() };
    PlanArguments { rows, length: LENGTH, gradient_checkpointing, optimizer, eval_rows: None }
}

#[test]
fn plans_meet_measurements() {
    let folder = tempfile::tempdir().unwrap();
    make_model(folder.path());
    let backend = Cpu::new(None).unwrap();
    let quant = |name: &str| (name != "none").then(|| QuantConfig::new(Format::by_name(name).unwrap()));
    let mut worst = 0f64;
    for (quantized, dtype, dummy, settings) in [
        ("none", DType::F32, false, LORA),
        ("none", DType::BF16, false, LORA),
        ("nf4", DType::F32, false, LORA),
        ("nf4", DType::BF16, false, LORA),
        ("nf4", DType::BF16, false, LOFTQ),
        ("int8", DType::BF16, false, LORA),
        ("int4-asym", DType::BF16, true, LORA),
        ("none", DType::F32, false, "full"),
        ("none", DType::BF16, false, "full"),
    ] {
        let options = LoadOptions { dtype, quant: quant(quantized) };
        let mut planner = planner(folder.path(), &backend, options, dummy, settings);
        for (rows, checkpointing, optim, eval_rows) in [
            (1, 0, "adamw_torch", None),
            (4, 0, "adamw_8bit", None),
            (1, 1, "lion", None),
            (4, 1, "sgd", Some(8)),
            (4, 2, "paged_adamw_32bit", None),
        ] {
            let wanted = PlanArguments { eval_rows, ..arguments(rows, checkpointing, optim) };
            let plan = planner.plan(&wanted).unwrap();
            let planned = plan.total() - plan.process;
            let measured = measure(folder.path(), options, dummy, settings, &wanted);
            let ratio = planned as f64 / measured as f64;
            worst = worst.max((ratio - 1.0).abs());
            assert!(
                (0.95..1.05).contains(&ratio),
                "{quantized} {dtype} dummy {dummy} {settings}: planned {planned}, measured {measured}, {wanted:?} {plan:?}"
            );
        }
    }
    println!("worst deviation: {:.2}%", 100.0 * worst);
}

#[test]
fn every_method_is_planned() {
    let folder = tempfile::tempdir().unwrap();
    make_model(folder.path());
    let backend = Cpu::new(None).unwrap();
    for settings in METHOD_SETTINGS {
        for (dtype, checkpointing) in [(DType::F32, 0), (DType::BF16, 1)] {
            let options = LoadOptions { dtype, quant: None };
            let wanted = arguments(4, checkpointing, "adamw_torch");
            let plan = planner(folder.path(), &backend, options, false, settings).plan(&wanted).unwrap();
            let measured = measure(folder.path(), options, false, settings, &wanted);
            let ratio = (plan.total() - plan.process) as f64 / measured as f64;
            assert!((0.95..1.05).contains(&ratio), "{settings} {dtype}: {ratio} of {measured}, {plan:?}");
        }
    }
}

/// Four adapters at once: plain, with magnitudes, with a base of its own, with a head of its own.
const MANY: [&str; 4] = [
    LORA,
    r#"{"peft_type": "LORA", "r": 8, "use_dora": true}"#,
    r#"{"peft_type": "LORA", "r": 8, "init_lora_weights": "pissa"}"#,
    r#"{"peft_type": "LORA", "r": 8, "lora_bias": true, "modules_to_save": ["lm_head"]}"#,
];

/// What two steps of several adapters take.
fn measure_many(folder: &Path, options: LoadOptions, jobs: &[PlanArguments]) -> usize {
    let backend = Cpu::new(None).unwrap();
    let mut model = Model::load(folder, &backend, options).unwrap();
    model.gradient_checkpointing = jobs[0].gradient_checkpointing;
    let params = model.parameters_mut();
    let mapped = params.iter().filter_map(|(_, parameter)| match parameter {
        lowrank::model::Parameter::Frozen(lowrank::model::Weight::Dense(tensor)) if tensor.is_mapped() => {
            Some(tensor.bytes())
        }
        _ => None,
    });
    let mapped: usize = mapped.sum();
    let temporary = tempfile::tempdir().unwrap();
    let mut trainer = ManyTrainer::new(&mut model);
    for (number, (job, settings)) in jobs.iter().zip(MANY).enumerate() {
        let name = number.to_string();
        let example = |i: u32| {
            let input_ids: Vec<u32> = (0..job.length as u32).map(|k| (k * 37 + i) % 8001).collect();
            let labels = input_ids.iter().map(|id| *id as i32).collect();
            Example { input_ids, labels }
        };
        let examples: Vec<Example> = (0..2 * job.rows as u32).map(example).collect();
        let eval_rows = job.eval_rows.unwrap_or(0);
        let evaluation = examples.iter().cycle().take(eval_rows).cloned().collect();
        let arguments = TrainingArguments {
            max_steps: Some(2),
            optimizer: job.optimizer.clone(),
            eval_strategy: if eval_rows > 0 { Interval::Steps(1) } else { Interval::No },
            per_device_eval_batch_size: eval_rows.max(1),
            save_strategy: Interval::No,
            ..TrainingArguments::default()
        };
        let config = LoaderConfig { per_device_train_batch_size: job.rows, ..LoaderConfig::default() };
        let loader = Loader::new(examples, config, 1).unwrap();
        let output = temporary.path().join(&name);
        trainer.add(&name, arguments, loader, evaluation, &output, |model| adapt(model, settings)).unwrap();
    }
    for report in trainer.run(&AtomicBool::new(false), &mut |_, _| {}).unwrap() {
        report.unwrap();
    }
    backend.arena().peak_bytes() + backend.scratch_bytes() + mapped
}

#[test]
fn runs_of_several_adapters_are_planned() {
    let folder = tempfile::tempdir().unwrap();
    make_model(folder.path());
    let backend = Cpu::new(None).unwrap();
    for (quantized, dtype) in [("none", DType::F32), ("none", DType::BF16), ("nf4", DType::BF16)] {
        let quant = (quantized != "none").then(|| QuantConfig::new(Format::by_name(quantized).unwrap()));
        let options = LoadOptions { dtype, quant };
        let mut planner = ManyPlanner::new(folder.path(), &backend, options, false).unwrap();
        for (number, settings) in MANY.iter().enumerate() {
            planner.add(&number.to_string(), |model| adapt(model, settings)).unwrap();
        }
        for checkpointing in [0, 1] {
            let wanted = [
                arguments(4, checkpointing, "adamw_torch"),
                arguments(1, checkpointing, "adamw_8bit"),
                PlanArguments { eval_rows: Some(4), ..arguments(2, checkpointing, "lion") },
                arguments(3, checkpointing, "paged_adamw_32bit"),
            ];
            let plan = planner.plan(&wanted).unwrap();
            let measured = measure_many(folder.path(), options, &wanted);
            let ratio = (plan.total() - plan.process) as f64 / measured as f64;
            assert!((0.95..1.05).contains(&ratio), "{quantized} {dtype}: {ratio} of {measured}, {plan:?}");
            let (same, _) = planner.fit(&wanted, plan.total()).unwrap();
            assert_eq!(same, wanted);
            let (smaller, less) = planner.fit(&wanted, plan.total() - 1).unwrap();
            let rows: Vec<usize> = smaller.iter().map(|job| job.rows).collect();
            assert!(rows == [2, 1, 2, 3] || rows == [2, 1, 2, 1], "{rows:?}");
            assert!(less.total() < plan.total());
        }
        let refused = planner.fit(&MANY.map(|_| arguments(1, 1, "lion")), 1 << 20).unwrap_err().to_string();
        assert!(refused.contains("is too little") && refused.contains("96 tokens"), "{refused}");
        assert!(
            planner
                .plan(&[arguments(1, 0, "lion")])
                .unwrap_err()
                .to_string()
                .contains("expected settings of 4")
        );
    }
}

#[test]
fn plans_of_quantized_checkpoints_and_every_family() {
    let backend = Cpu::new(None).unwrap();
    for family in ["gpt2", "llama", "mistral", "qwen2", "qwen3", "quant/llama_nf4_nested"] {
        let folder = path(family);
        let options = LoadOptions::from(DType::BF16);
        let wanted = PlanArguments { length: 32, ..arguments(2, 0, "adamw_torch") };
        let plan = planner(&folder, &backend, options, false, LORA).plan(&wanted).unwrap();
        assert!(plan.base > 0 && plan.activations > 0 && plan.trainables > 0, "{family}: {plan:?}");
    }
}

#[test]
fn runs_are_made_to_fit_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    make_model(folder.path());
    let backend = Cpu::new(None).unwrap();
    let options = LoadOptions::from(DType::BF16);
    let mut planner = planner(folder.path(), &backend, options, false, LORA);
    let wanted = arguments(4, 0, "paged_adamw_32bit");
    let whole = planner.plan(&wanted).unwrap();
    let (same, _) = planner.fit(&wanted, whole.total()).unwrap();
    assert_eq!(same, wanted);
    let (smaller, plan) = planner.fit(&wanted, whole.total() - 1).unwrap();
    assert_eq!((smaller.rows, smaller.gradient_checkpointing), (2, 0));
    assert!(plan.total() < whole.total());
    let measured = measure(folder.path(), options, false, LORA, &smaller);
    assert!(measured + plan.process < whole.total(), "{measured} {plan:?}");
    let least = planner.plan(&arguments(1, 1, "adamw_torch")).unwrap();
    let (checkpointed, _) = planner.fit(&arguments(4, 0, "adamw_torch"), least.total()).unwrap();
    assert_eq!((checkpointed.rows, checkpointed.gradient_checkpointing), (1, 1));
    let refused = planner.fit(&arguments(4, 0, "adamw_torch"), least.total() - 1).unwrap_err().to_string();
    assert!(refused.contains("memory_limit") && refused.contains("--max-length 48 fits"), "{refused}");
    let refused = planner.fit(&wanted, 1 << 20).unwrap_err().to_string();
    assert!(refused.contains("--quant nf4"), "{refused}");
}
