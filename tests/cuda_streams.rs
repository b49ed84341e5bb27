//! What happens beside the computations on CUDA, on the host acting a device in every order of its streams and on a GPU if
//! there is one: pages of optimizer state, copies, waits, graphs and checkpoints change no bit; a wait or an update that is
//! left out is seen.
#![cfg(feature = "cuda")]

mod common;

use common::cuda::{ORDERS, device_only, executors, one};
use common::golden::path;
use common::training::{bits, joined, method, sequences};
use common::watched::{Counts, Fault, Watched};
use lowrank::adapter::{LoraConfig, Method, TargetModules};
use lowrank::autograd::Dropout;
use lowrank::backend::Backend;
use lowrank::backend::cuda::{Cuda, Executor, Stream, ThreadOrder};
use lowrank::data::Example;
use lowrank::data::loader::{Loader, LoaderConfig};
use lowrank::model::save::write_streamed;
use lowrank::model::{Checkpoint, LoadOptions, Model};
use lowrank::optim::{Optim, Optimizer, OptimizerArguments, clip_scale};
use lowrank::param::{ParamLayout, ParamStore};
use lowrank::rng::{Philox, PhiloxKey, Stream as Random};
use lowrank::train::{Interval, PlanArguments, Planner, Trainer, TrainingArguments};
use lowrank::{DType, Result};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = Philox::new(PhiloxKey::new(seed, Random::Dummy, 0));
    (0..n).map(|_| 0.1 * rng.normal()).collect()
}

/// Executors of both kinds, the host's in every order.
fn everywhere(fault: Fault) -> Vec<Arc<Watched<dyn Executor>>> {
    let watched = |inner: Arc<dyn Executor>| {
        let properties = inner.properties().clone();
        Arc::new(Watched::of(inner, properties, fault))
    };
    executors(&ORDERS).into_iter().map(watched).collect()
}

fn first(fault: Fault) -> Arc<Watched<dyn Executor>> {
    everywhere(fault).remove(0)
}

/// Parameters of four pages.
fn store(backend: &Backend) -> ParamStore {
    let mut layout = ParamLayout::default();
    layout.add("a", &[1001, 1500], true);
    layout.add("bias", &[777], false);
    layout.add("b", &[999, 2003], true);
    let mut params = layout.build(backend, DType::F32).unwrap();
    for id in params.ids().collect::<Vec<_>>() {
        let n = params.info(id).range.len();
        params.set(id, &(0..n).map(|i| (i % 1009) as f32 * 1e-3 - 0.5).collect::<Vec<_>>()).unwrap();
    }
    params.zero_grads().unwrap();
    params
}

fn paged(optim: &str, budget: Option<usize>) -> OptimizerArguments {
    let optim = optim.parse().unwrap();
    OptimizerArguments { optim, weight_decay: 0.1, optimizer_memory: budget, ..OptimizerArguments::default() }
}

/// Three steps; before the last one the state of the first is loaded again: parameters, and the bytes of the saved states.
fn train_paged(backend: &Backend, optim: &str, budget: Option<usize>) -> (Vec<u32>, Vec<Vec<u8>>) {
    let gradients = normal(2_100_000, 100);
    let folder = tempfile::tempdir().unwrap();
    let mut params = store(backend);
    let mut optimizer = Optimizer::new(backend, &params, paged(optim, budget), folder.path()).unwrap();
    assert_eq!(optimizer.paged_bytes() > 0, budget.is_some());
    let mut saved = Vec::new();
    for step in 0..3 {
        params.zero_grads().unwrap();
        for id in params.ids() {
            let mut grad = params.grad(id).unwrap();
            let values = &gradients[step * 100..][..grad.elements()];
            backend.upload(&mut grad, bytemuck::cast_slice(values)).unwrap();
        }
        optimizer.step(backend, &mut params, 1e-2, 0.5).unwrap();
        let file = folder.path().join(format!("{step}.safetensors"));
        write_streamed(&file, optimizer.tensors(backend, &params).unwrap()).unwrap();
        saved.push(std::fs::read(&file).unwrap());
        if step == 1 {
            let file = Checkpoint::open_file(&folder.path().join("0.safetensors")).unwrap();
            optimizer.load(backend, &params, &file, 1).unwrap();
        }
    }
    (bits(&backend.to_vec(params.values().unwrap()).unwrap()), saved)
}

#[test]
fn pages_have_the_bits_of_resident_state() {
    for (resident, paged) in [
        ("adamw_torch", "paged_adamw_32bit"),
        ("adamw_8bit", "paged_adamw_8bit"),
        ("lion_32bit", "paged_lion_32bit"),
    ] {
        let expected = train_paged(&one(ORDERS[0]), resident, None);
        let bytes = resident.parse::<Optim>().unwrap().state_bytes(3_500_000);
        for (executor, budget) in everywhere(Fault::None).into_iter().zip([0, bytes * 3 / 4, 0, 0]) {
            let found = train_paged(&Cuda::on(executor).unwrap(), paged, Some(budget));
            assert!(expected == found, "{paged} with {budget} bytes");
        }
    }
}

/// How a tiny model is trained.
#[derive(Clone, Copy)]
struct Run {
    with_graphs: bool,
    steps: usize,
    r: usize,
    gradient_checkpointing: usize,
    optimizer_memory: Option<usize>,
}

const RUN: Run = Run { with_graphs: true, steps: 6, r: 4, gradient_checkpointing: 0, optimizer_memory: None };

/// Steps with lengths of sequences that change: what the losses are, that of an evaluation, parameters and the optimizer's
/// state; and what the executor was asked for in each step.
fn train(watched: &Arc<Watched<dyn Executor>>, run: Run) -> Result<(Vec<u32>, Vec<Counts>)> {
    let backend = Cuda::on_with(watched.clone(), run.with_graphs)?;
    let options = LoadOptions { dtype: DType::BF16, quant: None };
    let mut model = Model::load(&path("llama"), &backend, options)?;
    let targets = TargetModules::AllLinear.into();
    let mut lora = LoraConfig { r: run.r, lora_dropout: 0.1, targets, ..LoraConfig::default() };
    lora.attach(&mut model, 3)?;
    model.gradient_checkpointing = run.gradient_checkpointing;
    let folder = tempfile::tempdir().unwrap();
    let arguments = OptimizerArguments {
        loraplus_lr_ratio: 4.0,
        ..paged(run.optimizer_memory.map_or("adamw_torch", |_| "paged_adamw_32bit"), run.optimizer_memory)
    };
    let mut optimizer = Optimizer::new(&backend, &model.params, arguments, folder.path())?;
    let (mut all, mut counts) = (Vec::new(), Vec::new());
    for step in 0..run.steps {
        let before = watched.counts();
        let batch = joined(&sequences(if step % 2 == 0 { &[13, 9] } else { &[9, 12] }));
        model.params.zero_grads()?;
        let mut losses = Vec::new();
        for first_row in [0, batch.tokens()] {
            let dropout = Dropout { seed: 1, step: step as u64, first_row };
            losses.push(model.train_step(&batch, 0.5 / batch.counted() as f32, Some(dropout))?);
        }
        let (squares, losses) = backend.step_report(model.params.grads()?, &losses)?;
        let (learning_rate, grad_scale) = (1e-2 / (1.0 + step as f64), clip_scale(squares.sqrt(), Some(1.0)));
        optimizer.step(&backend, &mut model.params, learning_rate, grad_scale)?;
        all.extend(bits(&losses));
        counts.push(watched.counts() - before);
    }
    all.extend(bits(&backend.to_vec(&model.evaluate(&sequences(&[7])[0])?)?));
    all.extend(bits(&backend.to_vec(model.params.values()?)?));
    let mut state = Vec::new();
    for tensor in optimizer.tensors(&backend, &model.params)? {
        (tensor.write)(&mut state).unwrap();
    }
    all.extend(state.chunks_exact(4).map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap())));
    Ok((all, counts))
}

#[test]
fn a_step_waits_once() {
    let (_, counts) = train(&first(Fault::None), RUN).unwrap();
    for counts in &counts[4..] {
        assert_eq!(counts.waits, 1, "{counts:?}");
        // Ids, positions, sequences and targets of two micro-batches; their losses, squares and faults.
        assert!(counts.copies <= 2 * 5 + 4, "{counts:?}");
        assert!(counts.graphs > 0, "{counts:?}");
    }
}

#[test]
fn graphs_have_the_bits_of_launches() {
    let launches = train(&first(Fault::None), Run { with_graphs: false, ..RUN }).unwrap();
    assert!(launches.1.iter().all(|counts| counts.graphs == 0));
    for watched in everywhere(Fault::None) {
        let graphs = train(&watched, RUN).unwrap();
        assert!(graphs.0 == launches.0, "{watched:?}: graphs change bits");
        let [first, .., last] = &graphs.1[..] else { panic!("there are steps") };
        assert!(
            first.graphs == 0 && last.graphs > 0 && last.launches < first.launches / 8,
            "{first:?} {last:?}"
        );
    }
    // Old arguments point to memory that is gone, or lead to other losses. A GPU may not get over that.
    if !device_only() {
        let stale = train(&first(Fault::Update), RUN);
        assert!(stale.is_err() || stale.unwrap().0 != launches.0, "graphs with old arguments go unnoticed");
    }
}

#[test]
fn checkpoints_have_the_bits_of_kept_activations() {
    let kept = train(&first(Fault::None), RUN).unwrap();
    for watched in everywhere(Fault::None) {
        let again = train(&watched, Run { gradient_checkpointing: 1, ..RUN }).unwrap();
        assert!(again.0 == kept.0, "{watched:?}: checkpoints change bits");
    }
}

/// Adapters of three pages.
const LARGE: Run = Run { r: 2200, steps: 2, ..RUN };

/// The forward pass waits for pages when it comes to their parameters, and the host waits for none.
#[test]
fn pages_stream_while_the_model_works() {
    let resident = train(&first(Fault::None), LARGE).unwrap();
    for watched in &everywhere(Fault::None) {
        let streamed = train(watched, Run { optimizer_memory: Some(0), ..LARGE }).unwrap();
        assert!(streamed.0 == resident.0, "{watched:?}: pages change bits");
        let last = streamed.1.last().unwrap();
        assert!(last.waits == 1 && last.joins >= 3, "{last:?}");
    }
}

#[test]
fn waits_that_are_missing_are_seen() {
    if device_only() {
        return; // a GPU may be too fast, or too slow, to show it
    }
    let run = Run { optimizer_memory: Some(0), ..LARGE };
    let model = |watched| train(&watched, run).map(|run| (run.0, Vec::new())).ok();
    let pages = |watched| Some(train_paged(&Cuda::on(watched).unwrap(), "paged_lion_32bit", Some(0)));
    let expected = [model(first(Fault::None)), pages(first(Fault::None))];
    for (of, on) in [
        (Stream::Compute, Stream::Beside),
        (Stream::Beside, Stream::Compute),
        (Stream::Beside, Stream::In),
        (Stream::In, Stream::Out),
        (Stream::Out, Stream::Beside),
    ] {
        let fault = Fault::Wait(of, on);
        let differs = |order: &ThreadOrder| {
            let executor: Arc<dyn Executor> = executors(&[*order]).remove(0);
            let properties = executor.properties().clone();
            let watched: Arc<Watched<dyn Executor>> = Arc::new(Watched::of(executor, properties, fault));
            match of {
                Stream::Compute => model(watched) != expected[0],
                _ => pages(watched) != expected[1],
            }
        };
        assert!(ORDERS.iter().any(differs), "{fault:?} changes nothing");
    }
}

/// A run of nine steps that are logged every so many: its files and the parameters, what it failed with, and what the
/// executor was asked for.
fn logged(
    watched: &Arc<Watched<dyn Executor>>,
    every: usize,
    change: impl FnOnce(&mut TrainingArguments),
) -> (Vec<Vec<u8>>, Vec<u32>, String, Counts) {
    let backend = Cuda::on(watched.clone()).unwrap();
    let mut model = Model::load(&path("llama"), &backend, DType::BF16).unwrap();
    let mut method = method(r#"{"peft_type": "LORA", "r": 4, "lora_dropout": 0.1}"#);
    method.attach(&mut model, 3).unwrap();
    let examples = (0..6).map(|i| Example {
        input_ids: (0..5 + i % 3).map(|t| 7 * i + 9 * t).collect(),
        labels: (0..5 + i % 3).map(|t| (7 * i + 9 * t) as i32).collect(),
    });
    let loader = Loader::new(examples.collect(), LoaderConfig::default(), 7).unwrap();
    let output = tempfile::tempdir().unwrap();
    let mut arguments = TrainingArguments {
        learning_rate: 1e-2,
        max_steps: Some(9),
        save_strategy: Interval::No,
        logging_steps: every,
        ..TrainingArguments::default()
    };
    change(&mut arguments);
    let mut trainer = Trainer::new(&mut model, method, arguments, loader, Vec::new(), output.path()).unwrap();
    let before = watched.counts();
    let result = trainer.run(&AtomicBool::new(false), &mut |_| {});
    let counts = watched.counts() - before;
    let name =
        |entry: std::io::Result<std::fs::DirEntry>| Some(entry.unwrap().path()).filter(|p| p.is_file());
    let mut files: Vec<_> = std::fs::read_dir(output.path()).unwrap().filter_map(name).collect();
    files.sort();
    files.retain(|file| !file.ends_with("metrics.jsonl"));
    let values = bits(&backend.to_vec(model.params.values().unwrap()).unwrap());
    let files = files.into_iter().map(|file| std::fs::read(file).unwrap()).collect();
    (files, values, result.err().map_or(String::new(), |e| e.to_string()), counts)
}

/// The host waits at steps that are logged alone; nothing else changes, but that a step that is not finite is told of
/// later.
#[test]
fn steps_that_are_not_logged_do_not_wait() {
    for watched in everywhere(Fault::None) {
        for (optim, memory) in [("adamw_torch", None), ("paged_adamw_8bit", Some(0))] {
            let change = |arguments: &mut TrainingArguments| {
                arguments.optimizer = paged(optim, memory);
                arguments.max_grad_norm = Some(0.1);
            };
            let all = logged(&watched, 1, change);
            assert!(all.0.len() > 1 && all.2.is_empty(), "{}", all.2);
            let some = logged(&watched, 4, change);
            assert!((&all.0, &all.1, &all.2) == (&some.0, &some.1, &some.2), "{watched:?} {optim}");
            // Steps 4, 8 and 9 are logged.
            assert_eq!(all.3.waits - some.3.waits, 6, "{watched:?} {optim}");
            assert!(some.3.graphs >= all.3.graphs / 2, "{all:?} {some:?}", all = all.3, some = some.3);
        }
        // The first step makes parameters huge, the second one's loss is not finite.
        let diverge = |arguments: &mut TrainingArguments| {
            arguments.learning_rate = 1e37;
            arguments.optimizer = paged("adamw_torch", None);
        };
        let (all, some) = (logged(&watched, 1, diverge), logged(&watched, 4, diverge));
        assert!(all.2.starts_with("step 2: loss is not finite"), "{}", all.2);
        assert_eq!(all.2, some.2);
        assert!(all.1 == some.1, "{watched:?}: a step that is not finite changes parameters");
    }
}

/// Logits and their gradients exist for as many rows and columns as 64 MB hold, whether the head is trained or not: what 4096
/// tokens take more with a vocabulary of 152 thousand than with one of 64.
#[test]
fn logits_stay_below_64_megabytes() {
    let backend = one(ORDERS[0]);
    let activations = |vocabulary: usize, dtype: DType, targets: &str| {
        let settings = format!(r#"{{"peft_type": "LORA", "r": 8, "target_modules": [{targets}]}}"#);
        let folder = tempfile::tempdir().unwrap();
        let config = serde_json::json!({
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": vocabulary,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": true, "hidden_act": "silu",
        });
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let attach = |model: &mut Model| -> Result<Box<dyn Method>> {
            let mut method = method(&settings);
            method.attach(model, 0)?;
            Ok(method)
        };
        let options = LoadOptions::from(dtype);
        let mut planner = Planner::new(folder.path(), &backend, options, true, attach).unwrap();
        let wanted = PlanArguments {
            rows: 1,
            length: 4096,
            gradient_checkpointing: 1,
            optimizer: OptimizerArguments::default(),
            eval_rows: None,
        };
        planner.plan(&wanted).unwrap().activations
    };
    let of_each = |dtype| [(dtype, r#""q_proj""#), (dtype, r#""q_proj", "lm_head""#)];
    for (dtype, targets) in [DType::BF16, DType::F32].into_iter().flat_map(of_each) {
        let logits = activations(151_936, dtype, targets) - activations(64, dtype, targets);
        assert!((40_000_000..64_000_000).contains(&logits), "{dtype}, {targets}: {logits} bytes");
    }
}
