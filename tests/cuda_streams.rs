//! What happens beside the computations on CUDA, on the host acting a device in every order of its streams: pages of
//! optimizer state, copies, waits and graphs change no bit; a wait or an update that is left out is seen.
#![cfg(feature = "cuda")]

mod common;

use common::cuda::host;
use common::golden::path;
use common::training::{bits, joined, method, sequences};
use common::watched::{Fault, Watched};
use lowrank::adapter::{LoraConfig, Method};
use lowrank::autograd::Dropout;
use lowrank::backend::Backend;
use lowrank::backend::cuda::{Counts, Cuda, HostExecutor, Stream, ThreadOrder};
use lowrank::model::{LoadOptions, Model};
use lowrank::optim::{Optim, Optimizer, OptimizerArguments, clip_scale};
use lowrank::param::{ParamLayout, ParamStore};
use lowrank::rng::{Philox, PhiloxKey, Stream as Random};
use lowrank::train::{PlanArguments, Planner};
use lowrank::{DType, Result};
use std::sync::Arc;

const ORDERS: [ThreadOrder; 3] = [ThreadOrder::Forward, ThreadOrder::Reversed, ThreadOrder::Random(7)];

fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = Philox::new(PhiloxKey::new(seed, Random::Dummy, 0));
    (0..n).map(|_| 0.1 * rng.normal()).collect()
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

/// Two steps, between which the state is saved and loaded: parameters, and the bytes of the saved state.
fn train_paged(backend: &Backend, optim: &str, budget: Option<usize>) -> (Vec<u32>, Vec<Vec<u8>>) {
    let gradients = normal(2_100_000, 100);
    let folder = tempfile::tempdir().unwrap();
    let mut params = store(backend);
    let arguments = OptimizerArguments {
        optim: optim.parse().unwrap(),
        weight_decay: 0.1,
        optimizer_memory: budget,
        ..OptimizerArguments::default()
    };
    let mut optimizer = Optimizer::new(backend, &params, arguments, folder.path()).unwrap();
    assert_eq!(optimizer.paged_bytes() > 0, budget.is_some());
    let mut saved = Vec::new();
    for step in 0..2 {
        for id in params.ids() {
            let mut grad = params.grad(id).unwrap();
            let values = &gradients[step * 100..][..grad.elements()];
            backend.upload(&mut grad, bytemuck::cast_slice(values)).unwrap();
        }
        optimizer.step(backend, &mut params, 1e-2, 0.5).unwrap();
        let mut state = Vec::new();
        for tensor in optimizer.tensors(backend, &params) {
            (tensor.write)(&mut state).unwrap();
        }
        saved.push(state);
    }
    (bits(&backend.to_vec(params.values()).unwrap()), saved)
}

#[test]
fn pages_have_the_bits_of_resident_state() {
    for (resident, paged) in [
        ("adamw_torch", "paged_adamw_32bit"),
        ("adamw_8bit", "paged_adamw_8bit"),
        ("lion_32bit", "paged_lion_32bit"),
    ] {
        let expected = train_paged(&host(ORDERS[0]), resident, None);
        let bytes = resident.parse::<Optim>().unwrap().state_bytes(3_500_000);
        for (order, budget) in ORDERS.into_iter().zip([0, bytes * 3 / 4, 0]) {
            let found = train_paged(&host(order), paged, Some(budget));
            assert!(expected == found, "{paged} {order:?} with {budget} bytes");
        }
    }
}

#[test]
fn waits_that_are_missing_are_seen() {
    let expected = train_paged(&host(ORDERS[0]), "lion_32bit", None);
    for fault in [Fault::Wait(Stream::Compute), Fault::Wait(Stream::In), Fault::Wait(Stream::Out)] {
        let differs = |order: &ThreadOrder| {
            let backend = Cuda::on(Arc::new(Watched::on_host(*order, fault))).unwrap();
            train_paged(&backend, "paged_lion_32bit", Some(0)) != expected
        };
        assert!(ORDERS.iter().any(differs), "{fault:?} changes nothing");
    }
}

/// Steps of a tiny model's training with lengths of sequences that change: what the losses are, and what the executor was
/// asked for in each.
fn train(
    watched: &Arc<Watched<HostExecutor>>,
    with_graphs: bool,
    steps: usize,
) -> Result<(Vec<u32>, Vec<Counts>)> {
    let backend = Cuda::on_with(watched.clone(), with_graphs)?;
    let options = LoadOptions { dtype: DType::BF16, quant: None };
    let mut model = Model::load(&path("llama"), &backend, options)?;
    let mut lora = LoraConfig { r: 4, lora_dropout: 0.1, ..LoraConfig::default() };
    lora.attach(&mut model, 3)?;
    let arguments = OptimizerArguments::default();
    let mut optimizer = Optimizer::new(&backend, &model.params, arguments, &std::env::temp_dir())?;
    let (mut all, mut counts) = (Vec::new(), Vec::new());
    for step in 0..steps {
        let before = watched.counts();
        let batch = joined(&sequences(if step % 2 == 0 { &[13, 9] } else { &[9, 12] }));
        model.params.zero_grads()?;
        let mut losses = Vec::new();
        for first_row in [0, batch.tokens()] {
            let dropout = Dropout { seed: 1, step: step as u64, first_row };
            losses.push(model.train_step(&batch, 0.5 / batch.counted() as f32, Some(dropout))?);
        }
        let (squares, losses) = backend.step_report(model.params.grads(), &losses)?;
        let (learning_rate, grad_scale) = (1e-2 / (1.0 + step as f64), clip_scale(squares.sqrt(), Some(1.0)));
        optimizer.step(&backend, &mut model.params, learning_rate, grad_scale)?;
        all.extend(bits(&losses));
        let after = watched.counts();
        counts.push(Counts {
            waits: after.waits - before.waits,
            launches: after.launches - before.launches,
            graphs: after.graphs - before.graphs,
            copies: after.copies - before.copies,
        });
    }
    all.extend(bits(&backend.to_vec(model.params.values())?));
    Ok((all, counts))
}

#[test]
fn a_step_waits_once() {
    let (_, counts) = train(&Arc::new(Watched::on_host(ORDERS[0], Fault::None)), true, 6).unwrap();
    for counts in &counts[4..] {
        assert_eq!(counts.waits, 1, "{counts:?}");
        // Ids, positions, sequences and targets of two micro-batches; their losses, squares and faults.
        assert!(counts.copies <= 2 * 5 + 4, "{counts:?}");
        assert!(counts.graphs > 0, "{counts:?}");
    }
}

#[test]
fn graphs_have_the_bits_of_launches() {
    let launches = train(&Arc::new(Watched::on_host(ORDERS[0], Fault::None)), false, 6).unwrap();
    assert!(launches.1.iter().all(|counts| counts.graphs == 0));
    for order in ORDERS {
        let graphs = train(&Arc::new(Watched::on_host(order, Fault::None)), true, 6).unwrap();
        assert!(graphs.0 == launches.0, "{order:?}: graphs change bits");
        let [first, .., last] = &graphs.1[..] else { panic!("there are steps") };
        assert!(
            first.graphs == 0 && last.graphs > 0 && last.launches < first.launches / 8,
            "{first:?} {last:?}"
        );
    }
    // Old arguments point to memory that is gone, or lead to other losses.
    let stale = train(&Arc::new(Watched::on_host(ORDERS[0], Fault::Update)), true, 6);
    assert!(stale.is_err() || stale.unwrap().0 != launches.0, "graphs with old arguments go unnoticed");
}

/// Logits and their gradients exist for as many rows as 64 MB hold: what 4096 tokens take more with a vocabulary of 152
/// thousand than with one of 64.
#[test]
fn logits_stay_below_64_megabytes() {
    let backend = host(ORDERS[0]);
    let activations = |vocabulary: usize, dtype: DType| {
        let folder = tempfile::tempdir().unwrap();
        let config = serde_json::json!({
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": vocabulary,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": true, "hidden_act": "silu",
        });
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let attach = |model: &mut Model| -> Result<Box<dyn Method>> {
            let mut method = method(r#"{"peft_type": "LORA", "r": 8}"#);
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
    for dtype in [DType::BF16, DType::F32] {
        let logits = activations(151_936, dtype) - activations(64, dtype);
        assert!((40_000_000..64_000_000).contains(&logits), "{dtype}: {logits} bytes");
    }
}
