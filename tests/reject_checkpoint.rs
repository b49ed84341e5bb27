//! Model folders that can't be used are refused with one clear line that names the file, key or tensor.

mod common;

use common::golden::path;
use lowrank::DType;
use lowrank::backend::cpu::Cpu;
use lowrank::model::{Batch, Model};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// A copy of the tiny llama, or of the sharded mistral.
fn copy(family: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(path(family)).unwrap() {
        let entry = entry.unwrap().path();
        if entry.is_file() {
            fs::copy(&entry, folder.path().join(entry.file_name().unwrap())).unwrap();
        }
    }
    folder
}

fn refusal(folder: &Path) -> String {
    let error = Model::load(folder, &Cpu::new(Some(1)).unwrap(), DType::F32).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

fn edit_config(folder: &Path, key: &str, value: Value) {
    let file = folder.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    config[key] = value;
    fs::write(file, config.to_string()).unwrap();
}

#[track_caller]
fn expect(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "expected {part:?} in: {error}");
    }
}

#[test]
fn missing_and_truncated_weights() {
    let folder = copy("llama");
    let file = folder.path().join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    for keep in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&file, &bytes[..keep]).unwrap();
        expect(&refusal(folder.path()), &["model.safetensors", "not a whole safetensors file"]);
    }
    fs::write(&file, [&bytes[..], &[0]].concat()).unwrap();
    expect(&refusal(folder.path()), &["model.safetensors", "not a whole safetensors file"]);
    fs::remove_file(&file).unwrap();
    expect(&refusal(folder.path()), &["expected model.safetensors", "found neither"]);
    fs::write(folder.path().join("pytorch_model.bin"), b"PK").unwrap();
    expect(&refusal(folder.path()), &["pytorch_model.bin", "pickle", "save_pretrained"]);
    expect(&refusal(&folder.path().join("nowhere")), &["nowhere", "expected a model folder"]);
}

#[test]
fn a_header_that_lies() {
    let folder = copy("llama");
    let file = folder.path().join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let write = |header: &Value| {
        let text = header.to_string();
        let whole = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &bytes[8 + length..]].concat();
        fs::write(&file, whole).unwrap();
    };
    let name = "model.norm.weight";
    for (key, value) in [
        ("data_offsets", json!([0, 1u64 << 60])),
        ("data_offsets", json!([64, 0])),
        ("shape", json!([u64::MAX, u64::MAX])),
        ("shape", json!([31])),
        ("dtype", json!("F99")),
    ] {
        let mut lying = header.clone();
        lying[name][key] = value;
        write(&lying);
        expect(&refusal(folder.path()), &["model.safetensors"]);
    }
    fs::write(&file, [&u64::MAX.to_le_bytes()[..], &bytes[8..]].concat()).unwrap();
    expect(&refusal(folder.path()), &["model.safetensors"]);
    let mut integers = header.clone();
    for entry in integers.as_object_mut().unwrap().values_mut() {
        if entry["dtype"] == "F32" {
            entry["dtype"] = json!("I32");
        }
    }
    write(&integers);
    expect(&refusal(folder.path()), &["tensor `", "I32", "expected F32, F16, BF16 or U8"]);
}

#[test]
fn shards_and_their_index() {
    let folder = copy("mistral");
    let index = folder.path().join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).unwrap();
    let original: Value = serde_json::from_str(&text).unwrap();
    let shard = original["weight_map"]["model.norm.weight"].as_str().unwrap().to_string();
    let mut changed = original.clone();
    for outside in ["../model.safetensors", "/etc/passwd", "a/../../b", ""] {
        changed["weight_map"]["model.norm.weight"] = json!(outside);
        fs::write(&index, changed.to_string()).unwrap();
        expect(&refusal(folder.path()), &["model.norm.weight", "not a file inside the folder"]);
    }
    changed["weight_map"]["model.norm.weight"] = json!("model-00009-of-00003.safetensors");
    fs::write(&index, changed.to_string()).unwrap();
    expect(&refusal(folder.path()), &["model-00009-of-00003.safetensors", "missing"]);
    let other = original["weight_map"].as_object().unwrap().values().find(|v| **v != json!(shard)).unwrap();
    changed["weight_map"]["model.norm.weight"] = other.clone();
    fs::write(&index, changed.to_string()).unwrap();
    expect(&refusal(folder.path()), &["model.norm.weight", "should be here"]);
    changed = original.clone();
    changed["weight_map"].as_object_mut().unwrap().remove("model.norm.weight");
    fs::write(&index, changed.to_string()).unwrap();
    expect(&refusal(folder.path()), &["tensor `model.norm.weight`", "missing"]);
    fs::write(&index, "{").unwrap();
    expect(&refusal(folder.path()), &["index.json", "not JSON"]);
    fs::write(&index, &text).unwrap();
    fs::remove_file(folder.path().join(&shard)).unwrap();
    expect(&refusal(folder.path()), &[&shard, "missing"]);
}

#[test]
fn configurations_that_are_not_supported() {
    for (family, key, value, parts) in [
        ("llama", "model_type", json!("bert"), vec!["config.json", "model_type", "`bert`", "gpt2, llama"]),
        ("llama", "model_type", json!(null), vec!["model_type", "found nothing"]),
        ("llama", "hidden_act", json!("mish"), vec!["hidden_act", "`mish`"]),
        ("llama", "num_key_value_heads", json!(3), vec!["num_key_value_heads", "divisor"]),
        ("llama", "hidden_size", json!("32"), vec!["hidden_size", "expected a non-negative integer"]),
        ("llama", "num_hidden_layers", json!(0), vec!["num_hidden_layers"]),
        ("llama", "vocab_size", json!(98), vec!["model.embed_tokens.weight", "[98, 32]", "[97, 32]"]),
        (
            "llama",
            "rope_parameters",
            json!({"rope_type": "dynamic", "factor": 2.0}),
            vec!["rope_type", "`dynamic`"],
        ),
        (
            "llama",
            "rope_parameters",
            json!({"rope_type": "llama3"}),
            vec!["rope_parameters.", "positive number"],
        ),
        ("llama", "quantization_config", json!({"quant_method": "gptq"}), vec!["quantization_config"]),
        ("gpt2", "scale_attn_by_inverse_layer_idx", json!(true), vec!["scale_attn_by_inverse_layer_idx"]),
        ("gpt2", "add_cross_attention", json!(true), vec!["add_cross_attention"]),
    ] {
        let folder = copy(family);
        edit_config(folder.path(), key, value);
        expect(&refusal(folder.path()), &parts);
    }
    let folder = copy("llama");
    fs::write(folder.path().join("config.json"), [0xff, 0xfe]).unwrap();
    expect(&refusal(folder.path()), &["config.json", "UTF-8", "offset 0"]);
    fs::write(folder.path().join("config.json"), "").unwrap();
    expect(&refusal(folder.path()), &["config.json", "not JSON"]);
    fs::remove_file(folder.path().join("config.json")).unwrap();
    expect(&refusal(folder.path()), &["config.json"]);
}

#[test]
fn batches_that_do_not_fit_the_model() {
    let folder = copy("llama");
    edit_config(folder.path(), "max_position_embeddings", json!(8));
    let model = Model::load(folder.path(), &Cpu::new(Some(1)).unwrap(), DType::F32).unwrap();
    let mut long = Batch::new();
    long.push(&[1; 9], &[1; 9]);
    expect(&model.evaluate(&long).unwrap_err().to_string(), &["9 tokens", "--max-length 8"]);
    let mut outside = Batch::new();
    outside.push(&[1, 97], &[1, 2]);
    expect(&model.evaluate(&outside).unwrap_err().to_string(), &["token id 97", "vocabulary of 97"]);
    let mut label = Batch::new();
    label.push(&[1, 2], &[1, 1000]);
    expect(&model.evaluate(&label).unwrap_err().to_string(), &["target 1000"]);
    let mut cache = model.kv_cache(4).unwrap();
    expect(&model.extend(&[1; 5], &mut cache).unwrap_err().to_string(), &["cache of 4"]);
}
