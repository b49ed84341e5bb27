//! A training step, with the optimizer's, has the same bits on every instruction set and any number of
//! threads.

mod common;

use common::training::{Step, Trained, bits, joined, sequences, trainable};
use lowrank::DType;
use lowrank::backend::Backend;
use lowrank::backend::cpu::{Cpu, Isa};
use lowrank::optim::{Optimizer, OptimizerArguments, clip_scale};

/// Two steps, the second on the parameters that the first left.
fn train(family: &str, backend: &Backend, dtype: DType, trained: Trained) -> (Step, Step, Vec<u32>) {
    let mut model = trainable(family, backend, dtype, trained);
    let lengths: &[usize] = if family == "llama_rope_scaling" { &[131, 20] } else { &[9, 24, 1, 17] };
    let batch = [joined(&sequences(lengths))];
    let arguments = OptimizerArguments { weight_decay: 0.1, ..OptimizerArguments::default() };
    let mut optimizer = Optimizer::new(backend, &model.params, arguments, &std::env::temp_dir()).unwrap();
    let first = Step::run(&mut model, &batch);
    let norm = backend.sum_squares(model.params.grads().unwrap().unwrap()).unwrap().sqrt();
    let scale = clip_scale(norm, Some(0.5));
    optimizer.step(backend, &mut model.params, 1e-2, scale).unwrap();
    let values = bits(&backend.to_vec(model.params.values().unwrap()).unwrap());
    (first, Step::run(&mut model, &batch), values)
}

fn check(backends: &[(String, Backend)], families: &[&str]) {
    for family in families {
        for trained in [Trained::Lora, Trained::Full] {
            for dtype in [DType::F32, DType::BF16] {
                let expected = train(family, &backends[0].1, dtype, trained);
                for (name, backend) in &backends[1..] {
                    let what = format!("{family} {trained:?} {dtype}, {name}");
                    let found = train(family, backend, dtype, trained);
                    expected.0.assert_same(&found.0, &what);
                    assert!(expected.2 == found.2, "{what}: updated parameters differ");
                    expected.1.assert_same(&found.1, &format!("{what}, second step"));
                }
            }
        }
    }
}

#[test]
fn instruction_sets() {
    let backends: Vec<_> = Isa::ALL
        .into_iter()
        .filter(|isa| isa.is_available())
        .map(|isa| (isa.name().to_string(), Cpu::with_isa(isa, Some(2)).unwrap()))
        .collect();
    check(&backends, &["gpt2", "qwen3", "llama_rope_scaling"]);
}

#[test]
fn numbers_of_threads() {
    let backends: Vec<_> =
        [1, 2, 3, 7].map(|n| (format!("{n} threads"), Cpu::new(Some(n)).unwrap())).into_iter().collect();
    check(&backends, &["gpt2", "qwen3", "llama_rope_scaling"]);
}
