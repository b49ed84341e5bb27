//! A merged model computes what base and adapter do.

mod common;

use common::golden::{FAMILIES, Golden, path, variants, worst};
use lowrank::DType;
use lowrank::adapter::merge::{MergeOptions, merge};
use lowrank::adapter::{InitLoraWeights, LoraConfig, Method, TargetModules, Targeting, from_settings};
use lowrank::backend::cpu::Cpu;
use lowrank::model::Model;
use std::fs;

#[test]
fn merged_logits_equal_those_with_the_adapter() {
    let backend = Cpu::new(None).unwrap();
    for family in FAMILIES {
        for variant in variants(family) {
            let what = format!("{family}/{variant}");
            let parent = tempfile::tempdir().unwrap();
            let output = parent.path().join("merged");
            if variant.starts_with('p') && variant != "plain" && variant != "patterns" {
                // Virtual tokens are no weights.
                let error = merge(&path(family), &path(&what), &output, &MergeOptions::default())
                    .unwrap_err()
                    .to_string();
                assert!(error.contains("can't be merged"), "{what}: {error}");
                continue;
            }
            merge(&path(family), &path(&what), &output, &MergeOptions::default())
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            let model = Model::load(&output, &backend, DType::F32).unwrap();
            let golden = Golden::open(&format!("{what}/golden.safetensors"));
            let batch = Golden::open(&format!("{family}/golden.safetensors")).batch();
            let ours = backend.to_vec::<f32>(&model.logits(&batch).unwrap()).unwrap();
            let difference = worst(&ours, &[golden.f32("logits.0"), golden.f32("logits.1")].concat());
            assert!(difference < 5e-5, "{what}: merged logits differ by {difference}");
        }
    }
}

/// A golden folder's weights with their header padded, so that the tensors lie at odd offsets.
fn unaligned(family: &str, pad: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(path(family).join("config.json"), folder.path().join("config.json")).unwrap();
    let bytes = fs::read(path(family).join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut odd = ((header + pad) as u64).to_le_bytes().to_vec();
    odd.extend(&bytes[8..8 + header]);
    odd.resize(odd.len() + pad, b' ');
    odd.extend(&bytes[8 + header..]);
    fs::write(folder.path().join("model.safetensors"), odd).unwrap();
    folder
}

/// Tied heads and embeddings with values of their own: the merged model is no longer tied. The bases are
/// as the first safetensors versions wrote them, GPT-2's own file among them: tensors at odd offsets.
#[test]
fn heads_are_untied_where_they_were_trained() {
    let backend = Cpu::new(None).unwrap();
    let batch = Golden::open("gpt2/golden.safetensors").batch();
    for (family, targets, saved) in [
        ("gpt2", vec!["c_attn"], vec!["lm_head"]),
        ("gpt2", vec!["c_proj"], vec!["wte", "ln_f"]),
        ("qwen2", vec!["q_proj"], vec!["embed_tokens", "lm_head"]),
    ] {
        let what = format!("{family} {targets:?} {saved:?}");
        let parent = unaligned(family, 3);
        let mut model = Model::load(parent.path(), &backend, DType::F32).unwrap();
        assert!(model.config.tie_word_embeddings);
        let names = |list: &[&str]| list.iter().map(|n| n.to_string()).collect::<Vec<_>>();
        let mut config = LoraConfig {
            targets: Targeting {
                modules_to_save: names(&saved),
                ..TargetModules::Names(names(&targets)).into()
            },
            init_lora_weights: InitLoraWeights::Random,
            lora_bias: family == "gpt2" && saved.contains(&"wte"),
            ..LoraConfig::default()
        };
        config.attach(&mut model, 3).unwrap();
        for id in model.params.ids() {
            let values = model.params.to_vec(id).unwrap();
            let moved: Vec<f32> =
                values.iter().enumerate().map(|(i, v)| v + 0.1 * (i as f32 * 0.37).sin()).collect();
            model.params.set(id, &moved).unwrap();
        }
        let adapter = parent.path().join("adapter");
        config.save(&model, &adapter).unwrap();
        let output = parent.path().join("merged");
        merge(
            parent.path(),
            &adapter,
            &output,
            &MergeOptions { shard_bytes: 8192, ..MergeOptions::default() },
        )
        .unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(output.join("model.safetensors.index.json").is_file(), "{what}: not sharded");
        let merged = Model::load(&output, &backend, DType::F32).unwrap();
        assert!(!merged.config.tie_word_embeddings, "{what}: still tied");
        let logits = |m: &Model| backend.to_vec::<f32>(&m.logits(&batch).unwrap()).unwrap();
        let difference = worst(&logits(&merged), &logits(&model));
        assert!(difference < 1e-4, "{what}: merged logits differ by {difference}");
    }
}

#[test]
fn an_adapter_that_lacks_modules_is_not_merged() {
    let parent = tempfile::tempdir().unwrap();
    let adapter = parent.path().join("adapter");
    fs::create_dir(&adapter).unwrap();
    let file = fs::read(path("llama/plain/adapter_model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let kept = tensors.iter().filter(|(name, _)| !name.contains("layers.1.self_attn.q_proj"));
    fs::write(adapter.join("adapter_model.safetensors"), safetensors::serialize(kept, None).unwrap())
        .unwrap();
    fs::copy(path("llama/plain/adapter_config.json"), adapter.join("adapter_config.json")).unwrap();
    let error = merge(&path("llama"), &adapter, &parent.path().join("merged"), &MergeOptions::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("layers.1.self_attn.q_proj.lora_A.weight") && error.contains("missing"),
        "{error}"
    );
    assert!(!parent.path().join("merged").exists());
}

/// PEFT has no rotations for GPT-2's weights, which are stored the other way round.
#[test]
fn rotated_weights_that_are_stored_the_other_way_round() {
    let backend = Cpu::new(None).unwrap();
    let batch = Golden::open("gpt2/golden.safetensors").batch();
    let logits = |m: &Model| backend.to_vec::<f32>(&m.logits(&batch).unwrap()).unwrap();
    for more in [r#""r": 4"#, r#""oft_block_size": 16, "block_share": true, "use_cayley_neumann": false"#] {
        let settings = format!(
            r#"{{"peft_type": "OFT", "init_weights": false, "target_modules": "all-linear", {more}}}"#
        );
        let mut method = from_settings("test", &serde_json::from_str(&settings).unwrap()).unwrap();
        let mut model = Model::load(&path("gpt2"), &backend, DType::F32).unwrap();
        let base = logits(&model);
        method.attach(&mut model, 3).unwrap();
        let parent = tempfile::tempdir().unwrap();
        method.save(&model, &parent.path().join("adapter")).unwrap();
        let output = parent.path().join("merged");
        merge(&path("gpt2"), &parent.path().join("adapter"), &output, &MergeOptions::default()).unwrap();
        let merged = Model::load(&output, &backend, DType::F32).unwrap();
        assert!(worst(&logits(&model), &base) > 0.1, "{more}: nothing is rotated");
        let difference = worst(&logits(&merged), &logits(&model));
        assert!(difference < 1e-4, "{more}: merged logits differ by {difference}");
    }
}
