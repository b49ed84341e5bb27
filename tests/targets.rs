//! Which modules an adapter sits on: PEFT's choice on tiny models of every family, and errors where PEFT is
//! silent.

mod common;

use common::golden::path;
use lowrank::DType;
use lowrank::adapter::reader::Reader;
use lowrank::adapter::{LoraConfig, Method, TargetModules, Targeting, select_targets};
use lowrank::backend::cpu::Cpu;
use lowrank::model::{Model, ModelConfig, ModuleInfo};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;

fn modules(family: &str) -> (Vec<ModuleInfo>, String) {
    let model = Model::load(&path(family), &Cpu::new(Some(1)).unwrap(), DType::F32).unwrap();
    (model.modules(), model.config.model_type.clone())
}

/// The settings of a golden case.
fn config(overrides: &Value) -> LoraConfig {
    let mut json: serde_json::Map<String, Value> =
        serde_json::from_str(r#"{"peft_type": "LORA", "r": 8, "lora_alpha": 16}"#).unwrap();
    json.extend(overrides.as_object().unwrap().clone());
    LoraConfig::read(&Reader::new("test", &json)).unwrap()
}

#[test]
fn the_same_modules_ranks_and_scales_as_peft() {
    let cases: Value = serde_json::from_str(&std::fs::read_to_string(path("targets.json")).unwrap()).unwrap();
    let mut families: BTreeMap<String, (Vec<ModuleInfo>, String)> = BTreeMap::new();
    let (mut chosen, mut refused) = (0, 0);
    for case in cases.as_array().unwrap() {
        let family = case["model"].as_str().unwrap();
        let (modules, model_type) = families.entry(family.to_string()).or_insert_with(|| modules(family));
        let ours = select_targets(&config(&case["config"]), modules, model_type);
        match case["modules"].as_object() {
            Some(expected) => {
                let ours = ours.unwrap_or_else(|e| panic!("{case}: {e}"));
                assert_eq!(ours.len(), expected.len(), "{case}: {ours:?}");
                for target in ours {
                    let theirs = &expected[&target.path];
                    assert_eq!(target.r as u64, theirs["r"].as_u64().unwrap(), "{case}");
                    assert!((target.scale - theirs["scaling"].as_f64().unwrap()).abs() < 1e-12, "{case}");
                }
                chosen += 1;
            }
            None => {
                assert!(ours.is_err(), "{case}: {ours:?}");
                refused += 1;
            }
        }
    }
    assert!(chosen > 80 && refused > 20, "{chosen} chosen, {refused} refused");
}

#[test]
fn a_name_that_matches_nothing_is_an_error_even_when_others_match() {
    let (modules, model_type) = modules("llama");
    let names = |names: &[&str]| LoraConfig {
        targets: TargetModules::Names(names.iter().map(|n| n.to_string()).collect()).into(),
        ..LoraConfig::default()
    };
    let error = select_targets(&names(&["q_proj", "v_prjo"]), &modules, &model_type).unwrap_err().to_string();
    assert!(error.contains("`v_prjo`") && error.contains("did you mean `v_proj`?"), "{error}");
    assert!(error.contains("gate_proj") && !error.contains('\n'), "{error}");
    let error = select_targets(&names(&["input_layernorm"]), &modules, &model_type).unwrap_err().to_string();
    assert!(error.contains("0.input_layernorm") && error.contains("neither a linear layer"), "{error}");
    let broken = LoraConfig { targets: TargetModules::Pattern("(".into()).into(), ..LoraConfig::default() };
    let error = select_targets(&broken, &modules, &model_type).unwrap_err().to_string();
    assert!(error.contains("target_modules") && error.contains("regular expression"), "{error}");
    let unknown = select_targets(&LoraConfig::default(), &modules, "novel").unwrap_err().to_string();
    assert!(unknown.contains("`novel`"), "{unknown}");
}

/// PEFT's `target_modules` of such a configuration once the model is known, by its own code.
#[test]
fn targets_are_spelled_out_as_peft_writes_them() {
    let model = |family: &str| Model::load(&path(family), &Cpu::new(None).unwrap(), DType::F32).unwrap();
    let written = |model: &mut Model, targets: Option<TargetModules>| {
        let mut config = LoraConfig {
            targets: Targeting { target_modules: targets, ..Targeting::default() },
            ..LoraConfig::default()
        };
        config.attach(model, 0).unwrap();
        config.settings()["target_modules"].clone()
    };
    assert_eq!(written(&mut model("llama"), None), json!(["q_proj", "v_proj"]));
    assert_eq!(written(&mut model("gpt2"), None), json!(["c_attn"]));
    for family in ["gpt2", "llama", "mistral", "qwen3"] {
        let file = fs::read_to_string(path(family).join("all_linear/adapter_config.json")).unwrap();
        let theirs: Value = serde_json::from_str(&file).unwrap();
        let mut theirs: Vec<String> = serde_json::from_value(theirs["target_modules"].clone()).unwrap();
        theirs.sort();
        assert_eq!(written(&mut model(family), Some(TargetModules::AllLinear)), json!(theirs), "{family}");
    }
    // From 20 names on, suffixes.
    let deep = |family: &str, key: &str| {
        let file = path(family).join("config.json");
        let mut json: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        json[key] = json!(5);
        json.as_object_mut().unwrap().remove("layer_types");
        let config = ModelConfig::from_json(&file, &json).unwrap();
        Model::random(config, &Cpu::new(None).unwrap(), DType::F32, 1).unwrap()
    };
    assert_eq!(
        written(&mut deep("llama", "num_hidden_layers"), Some(TargetModules::AllLinear)),
        json!(["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"])
    );
    assert_eq!(
        written(&mut deep("gpt2", "n_layer"), Some(TargetModules::AllLinear)),
        json!(["c_attn", "c_fc", "c_proj"])
    );
    // All but one query projection: the suffix must not take it in.
    let mut some: Vec<String> = (0..5)
        .flat_map(|i| ["q", "k", "v", "o"].map(|p| format!("model.layers.{i}.self_attn.{p}_proj")))
        .collect();
    some.retain(|name| name != "model.layers.3.self_attn.q_proj");
    some.push("model.layers.0.mlp.up_proj".into());
    assert_eq!(
        written(&mut deep("llama", "num_hidden_layers"), Some(TargetModules::Names(some))),
        json!([
            "0.mlp.up_proj",
            "0.self_attn.q_proj",
            "1.self_attn.q_proj",
            "2.self_attn.q_proj",
            "4.self_attn.q_proj",
            "k_proj",
            "o_proj",
            "v_proj"
        ])
    );
}
