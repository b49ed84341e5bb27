//! Bottleneck adapters that AdapterHub's `adapters` wrote load here, with the same logits, loss, gradients and greedy
//! tokens, and are written as it wrote them.

mod common;

use common::golden::{Golden, assert_greedy, path, worst};
use lowrank::DType;
use lowrank::adapter::load_adapter;
use lowrank::backend::cpu::Cpu;
use lowrank::model::Model;
use serde_json::Value;
use std::collections::BTreeSet;

const FAMILIES: [&str; 3] = ["gpt2", "llama", "mistral"];
const VARIANTS: [&str; 4] = ["seq_bn", "double_seq_bn", "par_bn", "norms"];

fn for_each(check: impl Fn(&str, &str, Model, Golden)) {
    let backend = Cpu::new(None).unwrap();
    for family in FAMILIES {
        for variant in VARIANTS {
            let what = format!("adapterhub/{family}/{variant}");
            let model = Model::load(&path(family), &backend, DType::F32).unwrap();
            check(family, &what, model, Golden::open(&format!("{what}/golden.safetensors")));
        }
    }
}

#[test]
fn adapters_give_its_numbers() {
    for_each(|family, what, mut model, golden| {
        load_adapter(&mut model, &path(what)).unwrap_or_else(|e| panic!("{what}: {e}"));
        let batch = Golden::open(&format!("{family}/golden.safetensors")).batch();
        let ours = model.backend.to_vec::<f32>(&model.logits(&batch).unwrap()).unwrap();
        let difference = worst(&ours, &[golden.f32("logits.0"), golden.f32("logits.1")].concat());
        assert!(difference < 2e-5, "{what}: logits differ by {difference}");
        model.params.zero_grads().unwrap();
        let losses = model.train_step(&batch, 1.0 / batch.counted() as f32, None).unwrap();
        let losses = model.backend.to_vec::<f32>(&losses).unwrap();
        let loss = losses.iter().sum::<f32>() / losses.len() as f32;
        assert!((loss - golden.f32("loss")[0]).abs() < 2e-5, "{what}: loss {loss}");
        let mut expected: Vec<_> =
            golden.names().into_iter().filter(|n| n.starts_with("gradient.")).collect();
        for id in model.params.ids() {
            let name = format!("gradient.{}", model.params.info(id).name);
            let ours = model.backend.to_vec::<f32>(&model.params.grad(id).unwrap()).unwrap();
            let difference = worst(&ours, &golden.f32(&name));
            assert!(difference < 1e-5, "{what}: {name} differs by {difference}");
            expected.retain(|n| *n != name);
        }
        assert!(expected.is_empty(), "{what}: no gradient of {expected:?}");
    });
}

#[test]
fn greedy_tokens() {
    for_each(|_, what, mut model, _| {
        load_adapter(&mut model, &path(what)).unwrap();
        assert_greedy(&model, what);
    });
}

#[test]
fn a_loaded_adapter_is_written_as_it_was() {
    for_each(|_, what, mut model, _| {
        let method = load_adapter(&mut model, &path(what)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        method.save(&model, folder.path()).unwrap();
        let json = |dir: &std::path::Path| -> Value {
            serde_json::from_str(&std::fs::read_to_string(dir.join("adapter_config.json")).unwrap()).unwrap()
        };
        assert_eq!(json(folder.path()), json(&path(what)), "{what}");
        let ours = Golden::read(&folder.path().join("adapter.safetensors"));
        let theirs = Golden::open(&format!("{what}/adapter.safetensors"));
        let sorted = |file: &Golden| file.names().into_iter().collect::<BTreeSet<_>>();
        assert_eq!(sorted(&ours), sorted(&theirs), "{what}");
        for name in ours.names() {
            assert!(ours.f32(&name) == theirs.f32(&name), "{what}: {name} differs");
        }
    });
}
