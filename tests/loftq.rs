//! LoftQ's start comes as near to the weights as PEFT's own code, from a base that was quantized as it was read, and is
//! saved for the base that it fits.

mod common;

use common::golden::{Golden, path, worst};
use lowrank::adapter::merge::{MergeOptions, merge};
use lowrank::adapter::{Method, from_settings, load_adapter};
use lowrank::backend::Backend;
use lowrank::backend::cpu::Cpu;
use lowrank::model::{LoadOptions, Model, Parameter, Weight};
use lowrank::quant::{Format, QuantConfig};
use lowrank::{DType, Result};
use serde_json::{Value, json};
use std::path::Path;

fn options(format: &str) -> LoadOptions {
    // As PEFT's start: constants are not quantized themselves.
    let quant = QuantConfig { double_quant: false, ..QuantConfig::new(Format::by_name(format).unwrap()) };
    LoadOptions { dtype: DType::F32, quant: Some(quant) }
}

fn start(model: &mut Model, rounds: usize, more: Value) -> Result<Box<dyn Method>> {
    let mut settings = json!({
        "peft_type": "LORA", "r": 4, "lora_alpha": 4, "init_lora_weights": "loftq", "target_modules": "all-linear",
        "loftq_config": {"loftq_bits": 4, "loftq_iter": rounds},
    });
    settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let mut method = from_settings("test", settings.as_object().unwrap())?;
    method.attach(model, 3)?;
    Ok(method)
}

fn logits(model: &Model, backend: &Backend) -> Vec<f32> {
    let batch = Golden::open("llama/golden.safetensors").batch();
    backend.to_vec(&model.logits(&batch).unwrap()).unwrap()
}

/// `|W - Q - scale B A|` of a module.
fn distance(model: &Model, backend: &Backend, module: &str) -> f64 {
    let linear = model.linears().into_iter().find(|l| l.path == module).unwrap();
    let lora = linear.lora().unwrap();
    let Parameter::Frozen(Weight::Quantized(matrix)) = &linear.weight else {
        panic!("{module} is not quantized")
    };
    let mut base = backend.empty(matrix.shape(), DType::F32).unwrap();
    backend.dequantize(&mut base, matrix).unwrap();
    let [base, weight] = [
        backend.to_vec::<f32>(&base).unwrap(),
        Golden::open("llama/model.safetensors").f32(&format!("{module}.weight")),
    ];
    let (a, b) = (model.params.to_vec(lora.a).unwrap(), model.params.to_vec(lora.b).unwrap());
    let (inputs, r) = (linear.in_features, a.len() / linear.in_features);
    let rest = weight.iter().zip(&base).enumerate().map(|(i, (w, q))| {
        let (row, col) = (i / inputs, i % inputs);
        let change: f64 = (0..r).map(|k| f64::from(b[row * r + k]) * f64::from(a[k * inputs + col])).sum();
        f64::from(*w) - f64::from(*q) - f64::from(lora.scale) * change
    });
    rest.map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn starts_come_as_near_as_those_of_peft() {
    let backend = Cpu::new(None).unwrap();
    let text = std::fs::read_to_string(path("loftq.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    for rounds in [1, 2, 5] {
        let mut model = Model::load(&path("llama"), &backend, options("nf4")).unwrap();
        start(&mut model, rounds, json!({})).unwrap();
        for (module, norms) in golden["norms"].as_object().unwrap() {
            let theirs = norms[rounds.to_string()].as_f64().unwrap();
            let ours = distance(&model, &backend, module);
            assert!(
                (ours - theirs).abs() < 2e-3 * theirs,
                "{module}, {rounds} rounds: {ours}, PEFT's {theirs}"
            );
        }
        // A start that is scaled comes as near.
        let mut scaled = Model::load(&path("llama"), &backend, options("nf4")).unwrap();
        start(&mut scaled, rounds, json!({"lora_alpha": 12})).unwrap();
        let module = "model.layers.1.mlp.down_proj";
        let (plain, scaled) = (distance(&model, &backend, module), distance(&scaled, &backend, module));
        assert!((plain - scaled).abs() < 2e-3 * plain, "{rounds} rounds: {plain}, scaled {scaled}");
    }
}

#[test]
fn a_start_brings_the_model_nearer_and_is_saved_for_its_base() {
    let backend = Cpu::new(None).unwrap();
    for family in ["llama", "gpt2"] {
        let load = |options: LoadOptions| Model::load(&path(family), &backend, options).unwrap();
        let exact = logits(&load(LoadOptions::from(DType::F32)), &backend);
        let quantized = logits(&load(options("nf4")), &backend);
        for rounds in [1, 3] {
            let mut model = load(options("nf4"));
            let method = start(&mut model, rounds, json!({})).unwrap();
            let ours = logits(&model, &backend);
            let (before, after) = (worst(&quantized, &exact), worst(&ours, &exact));
            assert!(after < before, "{family}, {rounds} rounds: {after}, without {before}");
            let folder = tempfile::tempdir().unwrap();
            method.save(&model, folder.path()).unwrap();
            let config = std::fs::read_to_string(folder.path().join("adapter_config.json")).unwrap();
            let config: Value = serde_json::from_str(&config).unwrap();
            let plain = rounds == 1;
            assert_eq!(config["init_lora_weights"], if plain { json!(true) } else { json!("loftq") });
            assert_eq!(config["loftq_config"].get("loftq_iter"), (!plain).then_some(&json!(rounds)));
            // After one round the base is the quantized one; after more it is made again.
            let mut again = load(options("nf4"));
            load_adapter(&mut again, folder.path()).unwrap();
            assert!(
                logits(&again, &backend) == ours,
                "{family}, {rounds} rounds: loaded again, it computes something else"
            );
            let merged =
                merge(&path(family), folder.path(), &folder.path().join("merged"), &MergeOptions::default());
            assert_eq!(merged.is_ok(), plain, "{merged:?}");
        }
    }
}

#[test]
fn bases_without_an_original_are_refused() {
    let backend = Cpu::new(None).unwrap();
    let refuse = |folder: &Path, options: LoadOptions, more: Value, expected: &str| {
        let mut model = Model::load(folder, &backend, options).unwrap();
        let error = start(&mut model, 1, more).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let llama = path("llama");
    refuse(&llama, LoadOptions::from(DType::F32), json!({}), "--quant nf4");
    refuse(&llama, options("int8"), json!({}), "loftq_bits is 4");
    refuse(
        &path("quant/llama_nf4_nested"),
        LoadOptions::from(DType::F32),
        json!({}),
        "quantized in its file",
    );
    refuse(&llama, options("nf4"), json!({"loftq_config": {"loftq_iter": 0}}), "from 1 to 100 rounds");
    refuse(&llama, options("nf4"), json!({"r": 33}), "smaller r");
    refuse(&llama, options("nf4"), json!({"target_modules": ["q_proj", "lm_head"]}), "output head");
}
