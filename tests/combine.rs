//! Weighted combinations of LoRA adapters give PEFT's logits, and rank-stabilized ones keep their scale.

mod common;

use common::golden::{Golden, path, worst};
use lowrank::DType;
use lowrank::adapter::combine::{CombinationType, combine};
use lowrank::adapter::load_adapter;
use lowrank::backend::cpu::Cpu;
use lowrank::model::Model;
use std::path::Path;

fn logits(adapter: &Path) -> Vec<f32> {
    let backend = Cpu::new(None).unwrap();
    let mut model = Model::load(&path("llama"), &backend, DType::F32).unwrap();
    load_adapter(&mut model, adapter).unwrap();
    let batch = Golden::open("llama/golden.safetensors").batch();
    backend.to_vec::<f32>(&model.logits(&batch).unwrap()).unwrap()
}

#[test]
fn combinations_give_the_logits_of_peft() {
    let golden = Golden::open("combine/golden.safetensors");
    for (name, kind, parts) in [
        ("linear", CombinationType::Linear, [("plain", 0.7), ("all_linear", -0.4)]),
        ("cat", CombinationType::Cat, [("plain", 0.6), ("rslora", 1.2)]),
        ("svd", CombinationType::Svd(Some(3)), [("plain", 0.7), ("all_linear", 0.4)]),
        (
            "cat_embedding",
            CombinationType::Cat,
            [("plain", 0.6), ("../training/embedding/final_adapter", 1.2)],
        ),
        (
            "linear_embedding",
            CombinationType::Linear,
            [("plain", 0.6), ("../training/embedding/final_adapter", 1.2)],
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let parts = parts.map(|(part, weight)| (path(&format!("llama/{part}")), weight));
        let parts: Vec<(&Path, f64)> = parts.iter().map(|(dir, weight)| (dir.as_path(), *weight)).collect();
        combine(&parts, kind, folder.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let expected =
            [golden.f32(&format!("{name}.logits.0")), golden.f32(&format!("{name}.logits.1"))].concat();
        let difference = worst(&logits(folder.path()), &expected);
        assert!(difference < 5e-5, "{name}: logits differ by {difference}");
    }
}

#[test]
fn rank_stabilized_and_patterned_adapters_keep_their_scale() {
    for variant in ["rslora", "patterns", "layers", "embedding", "embedding_and_head"] {
        let (folder, own) = (tempfile::tempdir().unwrap(), path(&format!("llama/{variant}")));
        combine(&[(&own, 1.0)], CombinationType::Cat, folder.path()).unwrap();
        let difference = worst(&logits(folder.path()), &logits(&own));
        assert!(difference < 2e-5, "{variant}: logits differ by {difference}");
    }
}

#[test]
fn what_can_not_be_combined_is_named() {
    let refuse = |parts: [&str; 2], kind, words: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let parts = parts.map(|part| path(&format!("llama/{part}")));
        let error =
            combine(&[(&parts[0], 1.0), (&parts[1], 1.0)], kind, folder.path()).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "expected {word:?} in: {error}");
        }
        assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "something was left behind");
    };
    refuse(["plain", "dora"], CombinationType::Cat, &["lora_magnitude_vector"]);
    refuse(["plain", "modules_to_save"], CombinationType::Cat, &["lm_head"]);
    refuse(["plain", "prefix"], CombinationType::Cat, &["peft_type"]);
    refuse(["plain", "patterns"], CombinationType::Linear, &["rank", "cat or svd"]);
}
