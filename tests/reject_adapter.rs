//! Adapter folders that can't be used are refused with one clear line that names the file, key or tensor.

mod common;

use common::golden::path;
use lowrank::DType;
use lowrank::adapter::load_adapter;
use lowrank::adapter::merge::{MergeOptions, merge};
use lowrank::adapter::{LoraConfig, Method, Targeting, from_settings};
use lowrank::backend::cpu::Cpu;
use lowrank::model::Model;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

fn copy(adapter: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(path(adapter).join(name), folder.path().join(name)).unwrap();
    }
    folder
}

fn refusal(family: &str, folder: &Path) -> String {
    let mut model = Model::load(&path(family), &Cpu::new(Some(1)).unwrap(), DType::F32).unwrap();
    let error = load_adapter(&mut model, folder).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    error
}

fn edit(folder: &Path, key: &str, value: Value) {
    let file = folder.join("adapter_config.json");
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
fn settings_that_are_set_but_not_implemented_are_named() {
    for (key, value) in [
        ("use_qalora", json!(true)),
        ("num_virtual_tokens", json!(4)),
        ("layer_replication", json!([[0, 1]])),
        ("megatron_config", json!({"a": 1})),
        ("target_parameters", json!(["x"])),
        ("init_lora_weights", json!("eva")),
        ("a_key_of_the_future", json!(7)),
        ("qalora_group_size", json!(32)),
        ("task_type", json!("SEQ_CLS")),
        ("peft_type", json!("ADAMSS")),
        ("bias", json!("some")),
        ("r", json!(0)),
        ("r", json!("eight")),
        ("lora_dropout", json!(1.5)),
        ("rank_pattern", json!({"q_proj": "x"})),
        ("target_modules", json!(5)),
    ] {
        let folder = copy("llama/plain");
        edit(folder.path(), key, value);
        expect(&refusal("llama", folder.path()), &["adapter_config.json", key]);
    }
}

#[test]
fn unknown_keys_that_do_nothing_are_ignored_and_old_files_load() {
    let folder = copy("llama/plain");
    for (key, value) in [
        ("new_flag", json!(false)),
        ("new_list", json!([])),
        ("new_null", json!(null)),
        ("new_text", json!("")),
    ] {
        edit(folder.path(), key, value);
    }
    let mut model = Model::load(&path("llama"), &Cpu::new(Some(1)).unwrap(), DType::F32).unwrap();
    load_adapter(&mut model, folder.path()).unwrap();
    let old = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
        "enable_lora": null, "merge_weights": false, "task_type": "CAUSAL_LM"}"#;
    fs::write(folder.path().join("adapter_config.json"), old).unwrap();
    load_adapter(&mut model, folder.path()).unwrap();
}

#[test]
fn files_of_other_tools_are_recognised() {
    let folder = copy("llama/plain");
    let file = folder.path().join("adapter_config.json");
    fs::write(&file, r#"{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}"#).unwrap();
    expect(&refusal("llama", folder.path()), &["mlx-lm"]);
    fs::write(&file, r#"{"config": {"architecture": "double_seq_bn"}, "model_class": "X"}"#).unwrap();
    expect(&refusal("llama", folder.path()), &["architecture"]);
    fs::write(&file, "[]").unwrap();
    expect(&refusal("llama", folder.path()), &["expected a JSON object"]);
    fs::remove_file(&file).unwrap();
    expect(&refusal("llama", folder.path()), &["adapter_config.json"]);
}

#[test]
fn tensors_that_are_missing_unused_or_of_another_base() {
    let folder = copy("llama/plain");
    edit(folder.path(), "target_modules", json!(["q_proj", "v_proj", "o_proj"]));
    expect(&refusal("llama", folder.path()), &["o_proj.lora_A.weight", "missing"]);
    let folder = copy("llama/plain");
    edit(folder.path(), "target_modules", json!(["q_proj"]));
    expect(&refusal("llama", folder.path()), &["v_proj.lora_A.weight", "not used"]);
    let folder = copy("llama/plain");
    edit(folder.path(), "r", json!(5));
    expect(&refusal("llama", folder.path()), &["lora_A.weight", "[4, 32]", "[5, 32]"]);
    // mistral's heads are wider: an adapter for another base.
    expect(&refusal("mistral", copy("llama/plain").path()), &["another base"]);
    expect(&refusal("gpt2", copy("llama/plain").path()), &["no module is named", "c_attn"]);
    let folder = copy("llama/plain");
    let file = folder.path().join("adapter_model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    expect(&refusal("llama", folder.path()), &["adapter_model.safetensors", "not a whole safetensors file"]);
    fs::rename(&file, folder.path().join("adapter_model.bin")).unwrap();
    expect(&refusal("llama", folder.path()), &["adapter_model.bin", "pickle"]);
}

#[test]
fn modules_to_save_that_do_not_exist() {
    let mut model = Model::load(&path("llama"), &Cpu::new(Some(1)).unwrap(), DType::F32).unwrap();
    let mut config = LoraConfig {
        targets: Targeting { modules_to_save: vec!["lm_haed".into()], ..Targeting::default() },
        ..LoraConfig::default()
    };
    let error = config.attach(&mut model, 0).unwrap_err().to_string();
    expect(&error, &["modules_to_save", "`lm_haed`", "did you mean `lm_head`?"]);
}

#[test]
fn adapters_that_the_head_can_not_have() {
    for family in ["gpt2", "llama"] {
        for settings in [
            r#"{"peft_type": "LORA", "use_dora": true, "target_modules": ["lm_head"]}"#,
            r#"{"peft_type": "LORA", "init_lora_weights": "pissa", "target_modules": ["lm_head"]}"#,
            r#"{"peft_type": "IA3", "target_modules": ["lm_head"], "feedforward_modules": []}"#,
            r#"{"peft_type": "VERA", "target_modules": ["lm_head"]}"#,
            r#"{"peft_type": "ADALORA", "target_modules": ["lm_head"]}"#,
            r#"{"peft_type": "OFT", "target_modules": ["lm_head"]}"#,
        ] {
            let mut model = Model::load(&path(family), &Cpu::new(Some(1)).unwrap(), DType::F32).unwrap();
            let mut method = from_settings("test", &serde_json::from_str(settings).unwrap()).unwrap();
            let error = method.attach(&mut model, 0).unwrap_err().to_string();
            expect(&error, &["target_modules", "`lm_head`", "modules_to_save"]);
        }
    }
}

#[test]
fn adapters_that_embeddings_can_not_have() {
    for (settings, key) in [
        (r#"{"peft_type": "LORA", "lora_bias": true, "target_modules": ["embed_tokens"]}"#, "lora_bias"),
        (
            r#"{"peft_type": "LORA", "init_lora_weights": "pissa", "target_modules": ["embed_tokens"]}"#,
            "init_lora_weights",
        ),
        (r#"{"peft_type": "VERA", "target_modules": ["embed_tokens"]}"#, "target_modules"),
        (r#"{"peft_type": "ADALORA", "target_modules": ["embed_tokens"]}"#, "target_modules"),
        (
            r#"{"peft_type": "LORA", "ensure_weight_tying": true, "target_modules": ["embed_tokens"]}"#,
            "ensure_weight_tying",
        ),
        (r#"{"peft_type": "LORA", "trainable_token_indices": [3]}"#, "trainable_token_indices"),
    ] {
        let mut model = Model::load(&path("qwen2"), &Cpu::new(Some(1)).unwrap(), DType::F32).unwrap();
        let method = from_settings("test", &serde_json::from_str(settings).unwrap());
        let error = method.and_then(|mut method| method.attach(&mut model, 0)).unwrap_err().to_string();
        expect(&error, &[key]);
        assert!(model.params.elements() == 0, "{settings}");
    }
}

#[test]
fn merging_what_does_not_fit_leaves_nothing_behind() {
    let parent = tempfile::tempdir().unwrap();
    let output = parent.path().join("merged");
    let merge = |base: &str, adapter: &Path| merge(&path(base), adapter, &output, &MergeOptions::default());
    let error = merge("mistral", copy("llama/plain").path()).unwrap_err().to_string();
    expect(&error, &["another base"]);
    let error = merge("gpt2", copy("llama/plain").path()).unwrap_err().to_string();
    expect(&error, &["_proj`", "c_attn"]);
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    fs::create_dir(&output).unwrap();
    let error = merge("llama", copy("llama/plain").path()).unwrap_err().to_string();
    expect(&error, &["exists already"]);
}
