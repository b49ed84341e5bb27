//! Logits, losses, gradients and greedy tokens of tiny models equal those of transformers.

mod common;

use common::golden::{FAMILIES, Golden, assert_greedy, path, worst};
use lowrank::DType;
use lowrank::adapter::{Full, Method};
use lowrank::backend::cpu::Cpu;
use lowrank::model::Model;

#[test]
fn logits_and_loss_of_every_family() {
    let backend = Cpu::new(None).unwrap();
    for family in FAMILIES {
        let model = Model::load(&path(family), &backend, DType::F32).unwrap();
        let golden = Golden::open(&format!("{family}/golden.safetensors"));
        let batch = golden.batch();
        let ours = backend.to_vec::<f32>(&model.logits(&batch).unwrap()).unwrap();
        let difference = worst(&ours, &[golden.f32("logits.0"), golden.f32("logits.1")].concat());
        assert!(difference < 2e-5, "{family}: logits differ by {difference}");
        let losses = backend.to_vec::<f32>(&model.evaluate(&batch).unwrap()).unwrap();
        let loss = losses.iter().sum::<f32>() / losses.len() as f32;
        let expected = golden.f32("loss")[0];
        assert!((loss - expected).abs() < 2e-5, "{family}: loss {loss}, transformers' {expected}");
    }
}

#[test]
fn greedy_continuation_with_the_cache() {
    let backend = Cpu::new(None).unwrap();
    for family in FAMILIES {
        let model = Model::load(&path(family), &backend, DType::F32).unwrap();
        assert_greedy(&model, family);
    }
}

#[test]
fn gradients_of_all_parameters() {
    let backend = Cpu::new(None).unwrap();
    for family in ["gpt2", "llama", "qwen3", "glm4", "gemma2", "gemma3_text"] {
        for gradient_checkpointing in [0, 1] {
            let mut model = Model::load(&path(family), &backend, DType::F32).unwrap();
            model.gradient_checkpointing = gradient_checkpointing;
            Full.attach(&mut model, 0).unwrap();
            model.params.zero_grads().unwrap();
            let golden = Golden::open(&format!("{family}/golden.safetensors"));
            let batch = golden.batch();
            model.train_step(&batch, 1.0 / batch.counted() as f32, None).unwrap();
            let mut expected =
                golden.names().into_iter().filter(|n| n.starts_with("gradient.")).collect::<Vec<_>>();
            for id in model.params.ids() {
                let name = format!("gradient.{}", model.params.info(id).name);
                let ours = backend.to_vec::<f32>(&model.params.grad(id).unwrap()).unwrap();
                let difference = worst(&ours, &golden.f32(&name));
                assert!(difference < 1e-5, "{family}: {name} differs by {difference}");
                expected.retain(|n| *n != name);
            }
            assert!(expected.is_empty(), "{family}: no gradient of {expected:?}");
        }
    }
}
