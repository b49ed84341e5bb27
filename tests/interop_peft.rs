//! Adapters that PEFT wrote load here, with the same logits, loss, gradients and greedy tokens; adapters
//! written here have PEFT's names and bytes.

mod common;

use common::golden::{FAMILIES, Golden, assert_greedy, path, variants, worst};
use lowrank::DType;
use lowrank::adapter::load_adapter;
use lowrank::backend::cpu::Cpu;
use lowrank::model::Model;
use serde_json::Value;

#[test]
fn adapters_of_peft_give_its_numbers() {
    let backend = Cpu::new(None).unwrap();
    let mut seen = 0;
    for family in FAMILIES {
        for variant in variants(family) {
            let what = format!("{family}/{variant}");
            let mut model = Model::load(&path(family), &backend, DType::F32).unwrap();
            let method = load_adapter(&mut model, &path(&what)).unwrap_or_else(|e| panic!("{what}: {e}"));
            let golden = Golden::open(&format!("{what}/golden.safetensors"));
            let base = Golden::open(&format!("{family}/golden.safetensors"));
            let batch = base.batch();
            let ours = backend.to_vec::<f32>(&model.logits(&batch).unwrap()).unwrap();
            let difference = worst(&ours, &[golden.f32("logits.0"), golden.f32("logits.1")].concat());
            assert!(difference < 2e-5, "{what}: logits differ by {difference}");
            model.params.zero_grads().unwrap();
            let losses = model.train_step(&batch, 1.0 / batch.counted() as f32, None).unwrap();
            let losses = backend.to_vec::<f32>(&losses).unwrap();
            let loss = losses.iter().sum::<f32>() / losses.len() as f32;
            assert!((loss - golden.f32("loss")[0]).abs() < 2e-5, "{what}: loss {loss}");
            let mut expected: Vec<_> =
                golden.names().into_iter().filter(|n| n.starts_with("gradient.")).collect();
            for id in model.params.ids() {
                let info = model.params.info(id);
                let name = format!("gradient.{}", method.key(&model.params, &info.name));
                let grad = model.params.grad(id).unwrap();
                let grad = if info.transposed { backend.transposed(&grad).unwrap() } else { grad };
                let ours = backend.to_vec::<f32>(&grad).unwrap();
                let difference = worst(&ours, &golden.f32(&name));
                assert!(difference < 1e-5, "{what}: {name} differs by {difference}");
                expected.retain(|n| *n != name);
            }
            assert!(expected.is_empty(), "{what}: no gradient of {expected:?}");
            seen += 1;
        }
    }
    assert!(seen >= 100, "only {seen} adapters were found");
}

#[test]
fn greedy_tokens_with_an_adapter() {
    let backend = Cpu::new(None).unwrap();
    for family in FAMILIES {
        for variant in variants(family) {
            let what = format!("{family}/{variant}");
            let mut model = Model::load(&path(family), &backend, DType::F32).unwrap();
            load_adapter(&mut model, &path(&what)).unwrap();
            assert_greedy(&model, &what);
        }
    }
}

/// Every method of the guides on every family: loss and greedy tokens.
#[test]
fn pairs_of_families_and_methods() {
    // Llama 3's rope is that of `llama_rope_parameters`; no method is the base alone.
    let families = ["gpt2", "llama", "llama_rope_parameters", "mistral", "qwen2", "qwen3", "glm", "glm4"];
    let methods =
        ["", "plain", "rslora", "dora", "layers", "prefix", "prefix_projection", "prompt", "ptuning"];
    let config = std::fs::read_to_string(path("llama_rope_parameters/config.json")).unwrap();
    assert!(config.contains(r#""rope_type": "llama3""#), "{config}");
    let backend = Cpu::new(None).unwrap();
    let mut seen = 0;
    for family in families {
        let batch = Golden::open(&format!("{family}/golden.safetensors")).batch();
        for method in methods {
            let what = format!("{family}/{method}");
            let mut model = Model::load(&path(family), &backend, DType::F32).unwrap();
            if !method.is_empty() {
                load_adapter(&mut model, &path(&what)).unwrap_or_else(|e| panic!("{what}: {e}"));
            }
            let losses = backend.to_vec::<f32>(&model.evaluate(&batch).unwrap()).unwrap();
            let loss = losses.iter().sum::<f32>() / losses.len() as f32;
            let expected = Golden::open(&format!("{what}/golden.safetensors")).f32("loss")[0];
            assert!((loss - expected).abs() < 2e-5, "{what}: loss {loss}, not {expected}");
            assert_greedy(&model, &what);
            seen += 1;
        }
    }
    assert_eq!(seen, 72);
}

/// The same JSON with sets sorted, as this crate writes them.
fn with_sorted_sets(text: &str) -> Value {
    let mut value: Value = serde_json::from_str(text).unwrap();
    for key in ["target_modules", "exclude_modules", "feedforward_modules"] {
        if let Some(list) = value.get_mut(key).and_then(Value::as_array_mut) {
            list.sort_by_key(|v| v.as_str().unwrap().to_string());
        }
    }
    value
}

#[test]
fn a_loaded_adapter_is_written_as_peft_wrote_it() {
    let backend = Cpu::new(None).unwrap();
    for family in FAMILIES {
        for variant in variants(family) {
            let what = format!("{family}/{variant}");
            let mut model = Model::load(&path(family), &backend, DType::F32).unwrap();
            let config = load_adapter(&mut model, &path(&what)).unwrap();
            let folder = tempfile::tempdir().unwrap();
            config.save(&model, folder.path()).unwrap();
            let ours = std::fs::read_to_string(folder.path().join("adapter_config.json")).unwrap();
            let theirs = std::fs::read_to_string(path(&what).join("adapter_config.json")).unwrap();
            let expected = serde_json::to_string_pretty(&with_sorted_sets(&theirs)).unwrap();
            assert_eq!(ours, expected, "{what}");
            if path(&what).join("prompt_encoder.safetensors").is_file() {
                // What the encoder makes is computed, not copied.
                let file = Golden::read(&folder.path().join("adapter_model.safetensors"));
                let theirs = Golden::open(&format!("{what}/adapter_model.safetensors"));
                assert_eq!(file.names(), theirs.names(), "{what}");
                let name = "prompt_embeddings";
                assert!(worst(&file.f32(name), &theirs.f32(name)) < 1e-6, "{what}: {name} differs");
                continue;
            }
            if variant == "lm_head" || variant.starts_with("embedding") {
                // PEFT adds copies of the modules' own weights, which aren't needed.
                let file = Golden::read(&folder.path().join("adapter_model.safetensors"));
                let theirs = Golden::open(&format!("{what}/adapter_model.safetensors"));
                let (mut names, mut own) = (theirs.names(), file.names());
                names.retain(|name| !name.ends_with(".base_layer.weight"));
                names.sort();
                own.sort();
                assert_eq!(own, names, "{what}");
                assert!(names.iter().all(|name| file.f32(name) == theirs.f32(name)), "{what}");
                continue;
            }
            let ours = std::fs::read(folder.path().join("adapter_model.safetensors")).unwrap();
            let theirs = std::fs::read(path(&what).join("adapter_model.safetensors")).unwrap();
            assert!(ours == theirs, "{what}: adapter_model.safetensors differs");
        }
    }
}
