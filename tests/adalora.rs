//! AdaLoRA's penalty has the gradient of its value, and adapters that lost ranks load, go on and are written again.

mod common;

use common::golden::path;
use common::training::{method, move_all, sequences};
use lowrank::DType;
use lowrank::adapter::load_adapter;
use lowrank::backend::cpu::Cpu;
use lowrank::model::Model;
use std::collections::BTreeMap;

/// The penalty in f64, of factors by name.
fn penalty(factors: &BTreeMap<String, (Vec<f64>, [usize; 2])>, weight: f64) -> f64 {
    let mut sum = 0.0;
    for (name, (values, [rows, cols])) in factors {
        // Ranks as rows.
        let by_columns = name.ends_with("lora_B");
        let (r, n) = if by_columns { (*cols, *rows) } else { (*rows, *cols) };
        let at = |k: usize, i: usize| if by_columns { values[i * r + k] } else { values[k * n + i] };
        let mut square = 0.0;
        for k in 0..r {
            for l in 0..r {
                let product: f64 = (0..n).map(|i| at(k, i) * at(l, i)).sum();
                square += (product - f64::from(u8::from(k == l))).powi(2);
            }
        }
        sum += square.sqrt();
    }
    weight * sum / factors.len() as f64
}

#[test]
fn the_penalty_has_the_gradient_of_its_value() {
    let backend = Cpu::new(None).unwrap();
    let mut model = Model::load(&path("llama"), &backend, DType::F32).unwrap();
    let settings =
        r#"{"peft_type": "ADALORA", "init_r": 3, "orth_reg_weight": 0.3, "target_modules": "all-linear"}"#;
    let mut adalora = method(settings);
    adalora.attach(&mut model, 5).unwrap();
    adalora.begin(&mut model, 10).unwrap();
    move_all(&mut model);
    model.params.zero_grads().unwrap();
    let value = adalora.regularize(&model).unwrap();
    let mut factors = BTreeMap::new();
    for id in model.params.ids() {
        let info = model.params.info(id);
        if !info.name.ends_with("lora_E") {
            let values = model.params.to_vec(id).unwrap().into_iter().map(f64::from).collect();
            factors.insert(info.name.clone(), (values, [info.shape[0], info.shape[1]]));
        }
    }
    assert!((value - penalty(&factors, 0.3)).abs() < 1e-5 * value, "{value}");
    // One step along a direction in all elements at once.
    let along = |sign: f64| {
        let mut moved = factors.clone();
        for (values, _) in moved.values_mut() {
            values.iter_mut().enumerate().for_each(|(i, x)| *x += sign * 1e-5 * (i as f64 * 0.7).cos());
        }
        penalty(&moved, 0.3)
    };
    let exact = (along(1.0) - along(-1.0)) / 2e-5;
    let mut ours = 0.0;
    for id in model.params.ids() {
        let gradient = backend.to_vec::<f32>(&model.params.grad(id).unwrap()).unwrap();
        if model.params.info(id).name.ends_with("lora_E") {
            assert!(gradient.iter().all(|g| *g == 0.0));
            continue;
        }
        ours += gradient.iter().enumerate().map(|(i, g)| f64::from(*g) * (i as f64 * 0.7).cos()).sum::<f64>();
    }
    assert!((ours - exact).abs() < 1e-5 * exact.abs().max(1.0), "{ours}, not {exact}");
}

#[test]
fn an_adapter_that_lost_ranks_goes_on() {
    let backend = Cpu::new(None).unwrap();
    let mut model = Model::load(&path("llama"), &backend, DType::F32).unwrap();
    let mut adalora = load_adapter(&mut model, &path("llama/adalora_pruned")).unwrap();
    adalora.begin(&mut model, 10).unwrap();
    // Six ranks of three layers are left and four layers ask for two each: none is taken away, and none comes back.
    for step in 0..8 {
        model.params.zero_grads().unwrap();
        model.train_step(&sequences(&[9])[0], 0.1, None).unwrap();
        adalora.regularize(&model).unwrap();
        adalora.after_step(&mut model, step, 1.0).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    adalora.save(&model, folder.path()).unwrap();
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        let ours = std::fs::read(folder.path().join(file)).unwrap();
        let theirs = std::fs::read(path("llama/adalora_pruned").join(file)).unwrap();
        assert_eq!(ours.len(), theirs.len(), "{file}");
    }
}

#[test]
fn schedules_without_room_and_malformed_patterns_are_refused() {
    let refuse = |settings: &str| {
        let map = serde_json::from_str(settings).unwrap();
        lowrank::adapter::from_settings("test", &map).unwrap_err().to_string()
    };
    let short = refuse(r#"{"peft_type": "ADALORA", "total_step": 10, "tinit": 4, "tfinal": 6}"#);
    assert!(short.contains("total_step") && short.contains("tinit 4"), "{short}");
    let pattern = refuse(r#"{"peft_type": "ADALORA", "init_r": 3, "rank_pattern": {"a.lora_E": [true]}}"#);
    assert!(pattern.contains("rank_pattern") && pattern.contains("expected init_r, 3"), "{pattern}");
    let numbers = refuse(r#"{"peft_type": "ADALORA", "rank_pattern": {"q_proj": 4}}"#);
    assert!(numbers.contains("true and false"), "{numbers}");
    let beta = refuse(r#"{"peft_type": "ADALORA", "beta1": 1.0}"#);
    assert!(beta.contains("beta1"), "{beta}");
}
