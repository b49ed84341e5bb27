//! Several adapters train at once over one base: each has the bits that it would have had alone, down to the bytes of
//! its files.

mod common;

use common::golden::path;
use common::training::{EMBEDDING_SETTINGS, Step, bits, method, move_all, sequences};
use lowrank::adapter::{Full, Method};
use lowrank::autograd::{Dropout, Slot};
use lowrank::backend::Backend;
use lowrank::backend::cpu::Cpu;
use lowrank::data::Example;
use lowrank::data::loader::{Loader, LoaderConfig};
use lowrank::model::{Batch, Installed, Model};
use lowrank::quant::{Format, QuantConfig};
use lowrank::rng::{Philox, PhiloxKey, Stream};
use lowrank::train::{Event, Interval, ManyTrainer, Trainer, TrainingArguments, latest_checkpoint};
use lowrank::{DType, Error, model::LoadOptions};
use serde_json::Value;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

type Settings = [&'static str; 4];

/// Different ranks, scales, dropouts and targets.
const SETTINGS: Settings = [
    r#"{"peft_type": "LORA", "r": 5, "lora_alpha": 10, "lora_dropout": 0.2, "init_lora_weights": false, "target_modules": "all-linear"}"#,
    r#"{"peft_type": "LORA", "r": 16, "init_lora_weights": false}"#,
    r#"{"peft_type": "LORA", "r": 3, "use_rslora": true, "lora_dropout": 0.1, "init_lora_weights": false, "layers_to_transform": [1]}"#,
    r#"{"peft_type": "LORA", "r": 1, "init_lora_weights": false, "target_modules": "all-linear", "exclude_modules": ["o_proj", "c_proj"]}"#,
];

/// Adapters that change more than a product: magnitudes, biases, modules of their own, the base's own weights.
const APART: [Settings; 4] = [
    [
        r#"{"peft_type": "LORA", "r": 4, "use_dora": true, "lora_dropout": 0.1, "target_modules": "all-linear"}"#,
        r#"{"peft_type": "LORA", "r": 4, "init_lora_weights": false}"#,
        r#"{"peft_type": "LORA", "r": 3, "init_lora_weights": "pissa", "lora_dropout": 0.1, "target_modules": "all-linear"}"#,
        r#"{"peft_type": "LORA", "r": 2, "lora_bias": true, "bias": "all", "init_lora_weights": false,
            "modules_to_save": ["embed_tokens", "lm_head"]}"#,
    ],
    [
        r#"{"peft_type": "LORA", "r": 4, "init_lora_weights": "olora", "target_modules": "all-linear"}"#,
        r#"{"peft_type": "LORA", "r": 4, "lora_dropout": 0.2, "init_lora_weights": false, "modules_to_save": ["lm_head", "norm"]}"#,
        r#"{"peft_type": "IA3"}"#,
        r#"{"peft_type": "LORA", "r": 4, "lora_dropout": 0.1, "init_lora_weights": false, "target_modules": ".*(q_proj|c_attn|qkv_proj|lm_head)"}"#,
    ],
    [
        r#"{"peft_type": "OFT", "oft_block_size": 4, "module_dropout": 0.3, "target_modules": "all-linear"}"#,
        r#"{"peft_type": "VERA", "r": 6, "vera_dropout": 0.1}"#,
        r#"{"peft_type": "LN_TUNING"}"#,
        r#"{"peft_type": "ADALORA", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "lora_dropout": 0.1}"#,
    ],
    [
        EMBEDDING_SETTINGS,
        r#"{"peft_type": "LORA", "r": 4, "use_dora": true, "target_modules": ".*(embed_tokens|wte|wpe|v_proj|c_proj)"}"#,
        SETTINGS[0],
        SETTINGS[2],
    ],
];

fn load(family: &str, backend: &Backend, options: LoadOptions) -> Model {
    Model::load(&path(family), backend, options).unwrap()
}

/// Puts an adapter on the model and takes it off again.
fn installed(model: &mut Model, settings: &str, seed: u64) -> Installed {
    let base = model.installed().unwrap();
    let settings = match model.config.model_type.as_str() {
        "gpt2" => settings.replace("embed_tokens", "wte").replace(r#""norm""#, r#""ln_f""#),
        _ => settings.to_string(),
    };
    method(&settings).attach(model, seed).unwrap();
    move_all(model);
    model.exchange(base)
}

/// The micro-batches of each adapter's step; the third one has fewer.
fn micro_batches() -> Vec<Vec<Batch>> {
    let all = sequences(&[7, 1, 19, 4, 12, 33, 2, 9]);
    [[0, 1, 2].as_slice(), &[3, 4], &[5], &[6, 7, 0]]
        .iter()
        .map(|chosen| chosen.iter().map(|i| all[*i].clone()).collect())
        .collect()
}

/// A step of all adapters over joint micro-batches, with what each alone gives.
fn steps_are_those_of_each_alone(
    family: &str,
    settings: &Settings,
    options: impl Into<LoadOptions>,
    checkpointing: usize,
) {
    let options = options.into();
    let backend = Cpu::new(Some(2)).unwrap();
    let mut model = load(family, &backend, options);
    model.gradient_checkpointing = checkpointing;
    let mut adapters: Vec<Installed> =
        settings.iter().enumerate().map(|(i, s)| installed(&mut model, s, i as u64)).collect();
    let batches = micro_batches();
    let mut alone = Vec::new();
    for (adapter, batches) in adapters.iter_mut().zip(&batches) {
        model.swap(adapter);
        alone.push(Step::run(&mut model, batches));
        model.params.zero_grads().unwrap();
        model.swap(adapter);
    }
    let named: Vec<(&str, &Installed)> = adapters.iter().map(|adapter| ("name", adapter)).collect();
    let together = model.side_by_side(&named).unwrap();
    let base = model.exchange(together);
    let counted: Vec<usize> = batches.iter().map(|b| b.iter().map(Batch::counted).sum()).collect();
    let mut losses = vec![Vec::new(); settings.len()];
    let mut first_rows = [0; 4];
    for pass in 0..3 {
        let (mut batch, mut slots) = (Batch::new(), Vec::new());
        for (i, adapter) in adapters.iter().enumerate() {
            let start = batch.tokens();
            if let Some(own) = batches[i].get(pass) {
                batch.append(own);
            }
            slots.push(Slot {
                rows: start..batch.tokens(),
                params: adapter.params(),
                dropout: Some(Dropout { seed: 1, step: 3, first_row: first_rows[i] }),
                grad_scale: 1.0 / counted[i] as f32,
            });
            first_rows[i] += batch.tokens() - start;
        }
        let all = model.train_step_slots(&batch, &slots).unwrap();
        let all = bits(&backend.to_vec::<f32>(&all).unwrap());
        let mut rest = all.as_slice();
        for (i, losses) in losses.iter_mut().enumerate() {
            let own;
            (own, rest) = rest.split_at(batches[i].get(pass).map_or(0, Batch::counted));
            losses.extend_from_slice(own);
        }
        assert!(rest.is_empty());
    }
    model.exchange(base);
    for (i, (adapter, losses)) in adapters.iter().zip(losses).enumerate() {
        let params = adapter.params();
        let gradients = params.ids().map(|id| {
            let gradient = backend.to_vec::<f32>(&params.grad(id).unwrap()).unwrap();
            (params.info(id).name.clone(), bits(&gradient))
        });
        let found = Step { losses, gradients: gradients.collect() };
        found.assert_same(&alone[i], &format!("{family} {options:?} {checkpointing}, adapter {i}"));
    }
}

#[test]
fn losses_and_gradients_are_those_of_each_alone() {
    for family in ["llama", "gpt2", "qwen2", "glm4"] {
        for dtype in [DType::F32, DType::BF16] {
            steps_are_those_of_each_alone(family, &SETTINGS, dtype, 0);
        }
    }
    steps_are_those_of_each_alone("llama", &SETTINGS, DType::BF16, 1);
    steps_are_those_of_each_alone("llama", &SETTINGS, nf4(), 2);
}

fn nf4() -> LoadOptions {
    LoadOptions { dtype: DType::BF16, quant: Some(QuantConfig::new(Format::by_name("nf4").unwrap())) }
}

#[test]
fn so_they_are_where_adapters_change_more_than_products() {
    for settings in &APART {
        for family in ["llama", "gpt2", "qwen3"] {
            for dtype in [DType::F32, DType::BF16] {
                steps_are_those_of_each_alone(family, settings, dtype, 0);
            }
        }
        steps_are_those_of_each_alone("glm4", settings, DType::BF16, 1);
    }
    let biases = [r#"{"peft_type": "BITFIT"}"#, SETTINGS[0], APART[0][0], APART[0][3]];
    steps_are_those_of_each_alone("gpt2", &biases, DType::BF16, 0);
    // DoRA and the starts that change the base, over quantized weights.
    let quantized = [SETTINGS[0], APART[0][0], APART[0][2], APART[1][0]];
    steps_are_those_of_each_alone("llama", &quantized, nf4(), 2);
}

/// Random sequences, whose number and lengths follow from the seed.
fn examples(seed: u64) -> Vec<Example> {
    let mut rng = Philox::new(PhiloxKey::new(seed, Stream::Shuffle, 9));
    (0..7 + seed as usize)
        .map(|i| {
            let input_ids: Vec<u32> = (0..5 + i % (3 + seed as usize)).map(|_| rng.below(97)).collect();
            let labels = input_ids.iter().map(|id| *id as i32).collect();
            Example { input_ids, labels }
        })
        .collect()
}

/// Jobs that end at different steps, with different data, batches, optimizers and schedules.
fn job(number: usize) -> (TrainingArguments, Loader) {
    let seed = number as u64;
    let mut arguments = TrainingArguments {
        learning_rate: [1e-2, 3e-3, 2e-2, 5e-3][number],
        lr_scheduler_type: ["linear", "cosine", "constant", "linear"][number].parse().unwrap(),
        warmup_steps: seed as f64,
        max_steps: Some([6, 9, 3, 7][number]),
        max_grad_norm: [Some(1.0), None, Some(0.05), Some(1.0)][number],
        save_strategy: Interval::Steps(3),
        seed,
        ..TrainingArguments::default()
    };
    if number == 1 {
        arguments.eval_strategy = Interval::Steps(3);
        arguments.load_best_model_at_end = true;
    }
    arguments.optimizer.optim = ["adamw_torch", "adamw_8bit", "lion_32bit", "sgd"][number].parse().unwrap();
    arguments.optimizer.weight_decay = 0.01 * seed as f64;
    arguments.optimizer.loraplus_lr_ratio = if number == 3 { 4.0 } else { 1.0 };
    let config = LoaderConfig {
        per_device_train_batch_size: [2, 1, 3, 2][number],
        gradient_accumulation_steps: [2, 1, 1, 3][number],
        packing: (number == 3).then_some(16),
        ..LoaderConfig::default()
    };
    (arguments, Loader::new(examples(seed), config, seed + 7).unwrap())
}

const JOBS: [&str; 4] = ["a", "b", "c", "d"];

fn evaluation(number: usize) -> Vec<Example> {
    if number == 1 { examples(5) } else { Vec::new() }
}

fn alone(settings: &Settings, number: usize, output: &Path, dtype: DType) {
    let mut model = load("llama", &Cpu::new(None).unwrap(), dtype.into());
    let mut method = method(settings[number]);
    method.attach(&mut model, number as u64).unwrap();
    let (arguments, loader) = job(number);
    let output = output.join(JOBS[number]);
    Trainer::new(&mut model, method, arguments, loader, evaluation(number), &output)
        .unwrap()
        .run(&AtomicBool::new(false), &mut |_| {})
        .unwrap();
}

/// Adds job `number`, its settings changed by `change`.
fn add(
    trainer: &mut ManyTrainer<'_>,
    settings: &Settings,
    number: usize,
    output: &Path,
    change: impl FnOnce(&mut TrainingArguments),
) {
    let (mut arguments, loader) = job(number);
    change(&mut arguments);
    let attach = |model: &mut Model| {
        let mut method = method(settings[number]);
        method.attach(model, number as u64)?;
        Ok(method)
    };
    let name = JOBS[number];
    trainer.add(name, arguments, loader, evaluation(number), &output.join(name), attach).unwrap();
}

/// All jobs at once; stops once job `stop_after.0` has done so many steps.
fn together(
    settings: &Settings,
    jobs: &[usize],
    output: &Path,
    dtype: DType,
    stop_after: Option<(usize, usize)>,
    resume: bool,
) -> Result<(), Error> {
    let mut model = load("llama", &Cpu::new(None).unwrap(), dtype.into());
    let mut trainer = ManyTrainer::new(&mut model);
    for number in jobs {
        add(&mut trainer, settings, *number, output, |_| {});
        if let Some(checkpoint) = latest_checkpoint(&output.join(JOBS[*number])).filter(|_| resume) {
            trainer.resume(JOBS[*number], &checkpoint)?;
        }
    }
    let stop = AtomicBool::new(false);
    let reports = trainer.run(&stop, &mut |number, event| {
        if let (Event::Step { metrics, .. }, Some((job, step))) = (event, stop_after)
            && (jobs[number], metrics.step) == (job, step)
        {
            stop.store(true, Ordering::Relaxed);
        }
    })?;
    reports.into_iter().try_for_each(|report| report.map(|_| ()))
}

/// What a metrics file says, without the clock.
fn metrics(output: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        value["tokens_per_second"] = Value::Null;
        value["peak_memory_bytes"] = Value::Null;
        value
    };
    text.lines().map(line).collect()
}

fn assert_same_files(number: usize, one: &Path, other: &Path) {
    let (one, other) = (one.join(JOBS[number]), other.join(JOBS[number]));
    assert_eq!(metrics(&one), metrics(&other), "job {number}");
    let mut files = vec!["adapter_config.json".to_string(), "adapter_model.safetensors".to_string()];
    for step in [3, 6, 9].into_iter().filter(|step| *step <= job(number).0.max_steps.unwrap()) {
        for file in ["adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json"] {
            files.push(format!("checkpoint-{step}/{file}"));
        }
    }
    for file in files {
        let read = |folder: &Path| std::fs::read(folder.join(&file)).unwrap();
        assert!(read(&one) == read(&other), "job {number}: {file} differs");
    }
}

#[test]
fn runs_leave_the_bytes_of_separate_runs() {
    for settings in [SETTINGS].iter().chain(&APART) {
        for dtype in [DType::F32, DType::BF16] {
            let (separate, joint) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            (0..JOBS.len()).for_each(|number| alone(settings, number, separate.path(), dtype));
            together(settings, &[0, 1, 2, 3], joint.path(), dtype, None, false).unwrap();
            (0..JOBS.len()).for_each(|number| assert_same_files(number, separate.path(), joint.path()));
        }
    }
}

/// Stopped in the middle of one job's accumulation, gone on with in another company and order.
#[test]
fn a_resumed_run_leaves_the_same_bytes() {
    for settings in &[SETTINGS, APART[0]] {
        let (straight, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let run = |jobs: &[usize], output: &Path, stop, resume| {
            together(settings, jobs, output, DType::F32, stop, resume)
        };
        run(&[0, 1, 2, 3], straight.path(), None, false).unwrap();
        let stopped = run(&[0, 1, 3], parts.path(), Some((1, 4)), false).unwrap_err();
        assert!(matches!(stopped, Error::Interrupted(_)), "{stopped}");
        assert!(latest_checkpoint(&parts.path().join("b")).unwrap().ends_with("checkpoint-4"));
        run(&[3, 2, 0, 1], parts.path(), None, true).unwrap();
        (0..JOBS.len()).for_each(|number| assert_same_files(number, straight.path(), parts.path()));
    }
}

#[test]
fn a_job_that_fails_does_not_touch_the_others() {
    let (separate, joint) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    alone(&SETTINGS, 1, separate.path(), DType::BF16);
    let mut model = load("llama", &Cpu::new(None).unwrap(), DType::BF16.into());
    let mut trainer = ManyTrainer::new(&mut model);
    add(&mut trainer, &SETTINGS, 0, joint.path(), |arguments| arguments.learning_rate = 1e37);
    add(&mut trainer, &SETTINGS, 1, joint.path(), |_| {});
    let reports = trainer.run(&AtomicBool::new(false), &mut |_, _| {}).unwrap();
    let error = reports[0].as_ref().unwrap_err().to_string();
    assert!(error.contains("is not finite"), "{error}");
    assert_eq!(reports[1].as_ref().unwrap().steps, 9);
    assert_same_files(1, separate.path(), joint.path());
    assert_eq!(model.params.elements(), 0);
}

#[test]
fn what_can_not_be_side_by_side_is_refused() {
    let backend = Cpu::new(None).unwrap();
    let mut model = load("llama", &backend, DType::F32.into());
    let output = tempfile::tempdir().unwrap();
    let mut trainer = ManyTrainer::new(&mut model);
    let mut try_to_add = |name: &str, folder: &str, settings: &str| {
        let (arguments, loader) = job(0);
        let attach = |model: &mut Model| {
            let mut method: Box<dyn Method> = match settings {
                "full" => Box::new(Full),
                settings => method(settings),
            };
            method.attach(model, 1)?;
            Ok(method)
        };
        trainer.add(name, arguments, loader, Vec::new(), &output.path().join(folder), attach)
    };
    for (settings, part) in [
        (r#"{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5}"#, "virtual tokens"),
        (r#"{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5}"#, "virtual tokens"),
        (r#"{"peft_type": "P_TUNING", "num_virtual_tokens": 5, "encoder_hidden_size": 6}"#, "virtual tokens"),
        (r#"{"peft_type": "BOTTLENECK", "reduction_factor": 4}"#, "bottleneck adapters"),
        ("full", "nothing to share"),
    ] {
        let error = try_to_add("x", "x", settings).unwrap_err().to_string();
        assert!(error.contains("x") && error.contains(part), "{settings}: {error}");
    }
    try_to_add("a", "a", SETTINGS[0]).unwrap();
    for (name, folder) in [("a", "b"), ("b", "a")] {
        let error = try_to_add(name, folder, SETTINGS[0]).unwrap_err().to_string();
        assert!(error.contains("each job needs its own"), "{error}");
    }
    let error = trainer.resume("z", output.path()).unwrap_err().to_string();
    assert!(error.contains("there are a"), "{error}");
    drop(trainer);
    let none = ManyTrainer::new(&mut model).run(&AtomicBool::new(false), &mut |_, _| {});
    assert!(none.unwrap_err().to_string().contains("at least one"));
}

#[test]
fn slots_that_are_not_whole_sequences_are_refused() {
    let backend = Cpu::new(None).unwrap();
    let mut model = load("llama", &backend, DType::F32.into());
    let adapter = installed(&mut model, SETTINGS[0], 1);
    let together = model.side_by_side(&[("a", &adapter), ("b", &adapter)]).unwrap();
    model.swap(&mut { together });
    let mut batch = Batch::new();
    sequences(&[5, 7]).iter().for_each(|other| batch.append(other));
    for rows in [[0..4, 5..12], [5..12, 0..5], [0..5, 0..12], [0..5, 5..13]] {
        let slot = |rows: &std::ops::Range<usize>| Slot {
            rows: rows.clone(),
            params: adapter.params(),
            dropout: None,
            grad_scale: 1.0,
        };
        let slots: Vec<Slot<'_>> = rows.iter().map(slot).collect();
        let error = model.train_step_slots(&batch, &slots).unwrap_err().to_string();
        assert!(error.contains("whole sequences"), "{error}");
    }
}

/// Four adapters take the base once: what they have together is what four runs have, less three bases.
#[test]
fn the_base_is_there_once() {
    let sizes = serde_json::json!({
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 2000, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": false,
    });
    let config = lowrank::model::ModelConfig::from_json(Path::new("config.json"), &sizes).unwrap();
    let peak = |jobs: &[usize]| {
        let backend = Cpu::new(Some(1)).unwrap();
        let mut model = Model::random(config.clone(), &backend, DType::F32, 1).unwrap();
        let base = backend.arena().live_bytes();
        let output = tempfile::tempdir().unwrap();
        let mut trainer = ManyTrainer::new(&mut model);
        jobs.iter().for_each(|number| add(&mut trainer, &SETTINGS, *number, output.path(), |_| {}));
        trainer.run(&AtomicBool::new(false), &mut |_, _| {}).unwrap();
        (base, backend.arena().peak_bytes())
    };
    let (base, together) = peak(&[0, 1, 2, 3]);
    let separate: usize = (0..4).map(|number| peak(&[number]).1).sum();
    assert!(together <= separate - 3 * base + base / 4, "{together} together, {separate} apart, base {base}");
    assert!(2 * together < separate, "{together} together, {separate} apart");
}
