//! Whole models with CUDA kernels, on the host and on a GPU if there is one: losses, gradients, training and greedy
//! tokens against the CPU and f64; equalities that the numerics law promises, by `==`.
#![cfg(feature = "cuda")]

mod common;

use common::compare::within_twice_naive;
use common::cuda;
use common::golden::path;
use common::training::{EMBEDDING_SETTINGS, Step, Trained, joined, sequences, trainable};
use lowrank::adapter::{LoraConfig, Method};
use lowrank::autograd::Dropout;
use lowrank::backend::Backend;
use lowrank::backend::cpu::Cpu;
use lowrank::backend::cuda::ThreadOrder;
use lowrank::backend::reference::Reference;
use lowrank::generate::{GenerationConfig, generate};
use lowrank::model::{LoadOptions, Model};
use lowrank::optim::{Optim, Optimizer, OptimizerArguments};
use lowrank::quant::{Format, QuantConfig};
use lowrank::{DType, Result};

/// The losses and all gradients of a training step.
fn training_step(family: &str, backend: &Backend, dtype: DType, trained: Trained) -> [Vec<f32>; 2] {
    let mut model = trainable(family, backend, dtype, trained);
    let step = Step::run(&mut model, &[joined(&sequences(&[9, 24, 1]))]);
    let gradients = step.gradients.into_iter().flat_map(|(_, bits)| bits);
    [step.losses, gradients.collect()].map(|bits| bits.into_iter().map(f32::from_bits).collect())
}

#[test]
fn whole_training_steps() {
    let (naive, truth) = (Reference::<f32>::backend(), Reference::<f64>::backend());
    let embeddings = Trained::Method(EMBEDDING_SETTINGS);
    for (family, trained) in [
        ("gpt2", Trained::Lora),
        ("llama", Trained::Lora),
        ("qwen3", Trained::Lora),
        ("gpt2", embeddings),
        ("gemma2", embeddings),
    ] {
        for dtype in [DType::F32, DType::BF16] {
            let on = |backend: &Backend| training_step(family, backend, dtype, trained);
            let (naive, truth) = (on(&naive), on(&truth));
            for device in cuda::one_of_each() {
                let ours = on(&device);
                for i in 0..2 {
                    within_twice_naive(&ours[i], &naive[i], &truth[i], dtype)
                        .unwrap_or_else(|e| panic!("{family} {dtype}, {i}: {e}"));
                }
            }
        }
    }
}

/// Twenty steps of AdamW on one batch; the losses.
fn train(
    backend: &Backend,
    options: LoadOptions,
    checkpointing: usize,
    optim: &str,
    budget: Option<usize>,
) -> Vec<f32> {
    let mut model = Model::load(&path("llama"), backend, options).unwrap();
    LoraConfig { r: 4, ..LoraConfig::default() }.attach(&mut model, 3).unwrap();
    model.gradient_checkpointing = checkpointing;
    let arguments = OptimizerArguments {
        optim: optim.parse::<Optim>().unwrap(),
        optimizer_memory: budget,
        ..OptimizerArguments::default()
    };
    let mut optimizer = Optimizer::new(backend, &model.params, arguments, &std::env::temp_dir()).unwrap();
    let batch = joined(&sequences(&[17, 9]));
    let counted = model.counted(&batch);
    (0..20)
        .map(|step| {
            model.params.zero_grads().unwrap();
            let dropout = Dropout { seed: 1, step, first_row: 0 };
            let losses = model.train_step(&batch, 1.0 / counted as f32, Some(dropout)).unwrap();
            let losses = backend.to_vec::<f32>(&losses).unwrap();
            optimizer.step(backend, &mut model.params, 1e-2, 1.0).unwrap();
            losses.iter().sum::<f32>() / counted as f32
        })
        .collect()
}

fn nf4() -> Option<QuantConfig> {
    Some(QuantConfig::new(Format::by_name("nf4").unwrap()))
}

#[test]
fn training_runs_follow_the_cpu() {
    let cpu = Cpu::new(Some(2)).unwrap();
    for (options, bound) in [
        (LoadOptions { dtype: DType::F32, quant: None }, 1e-5),
        (LoadOptions { dtype: DType::BF16, quant: None }, 3e-2),
        (LoadOptions { dtype: DType::BF16, quant: nf4() }, 3e-2),
    ] {
        let expected = train(&cpu, options, 0, "adamw_torch", None);
        assert!(expected[19] < 0.9 * expected[0], "{expected:?}");
        for device in cuda::one_of_each() {
            let found = train(&device, options, 0, "adamw_torch", None);
            for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(
                    (found - expected).abs() <= bound * expected,
                    "{options:?} step {step}: {found} {expected}"
                );
            }
            let same = train(&device, options, 1, "adamw_torch", None);
            assert_eq!(found, same, "{options:?}: checkpoints change bits");
            let same = train(&device, options, 0, "paged_adamw_32bit", Some(0));
            assert_eq!(found, same, "{options:?}: pages change bits");
        }
    }
}

#[test]
fn greedy_tokens_are_the_cpus() -> Result<()> {
    let cpu = Cpu::new(Some(2))?;
    let tokens = |backend: &Backend, family: &str, options: LoadOptions| -> Result<Vec<u32>> {
        let model = Model::load(&path(family), backend, options)?;
        let config = GenerationConfig { max_new_tokens: 12, ..GenerationConfig::default() };
        Ok(generate(&model, &[5, 17, 42, 8], &config, |_| true)?.tokens)
    };
    for family in ["gpt2", "qwen2"] {
        let options = LoadOptions { dtype: DType::F32, quant: None };
        let expected = tokens(&cpu, family, options)?;
        let device = cuda::one(ThreadOrder::Random(3));
        assert_eq!(tokens(&device, family, options)?, expected, "{family}");
    }
    Ok(())
}
