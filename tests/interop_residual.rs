//! PiSSA and OLoRA: PEFT's adapters give its numbers; a fresh one leaves the model as it was; a trained one is saved as a
//! plain adapter for the base itself.

mod common;

use common::golden::{Golden, path, worst};
use common::training::{method, move_all};
use lowrank::DType;
use lowrank::adapter::load_adapter;
use lowrank::backend::cpu::Cpu;
use lowrank::model::{LoadOptions, Model};
use lowrank::quant::{Format, QuantConfig};

fn logits(model: &Model, family: &str) -> Vec<f32> {
    let batch = Golden::open(&format!("{family}/golden.safetensors")).batch();
    model.backend.to_vec::<f32>(&model.logits(&batch).unwrap()).unwrap()
}

fn settings(init: &str) -> String {
    format!(
        r#"{{"peft_type": "LORA", "r": 4, "init_lora_weights": "{init}", "target_modules": "all-linear"}}"#
    )
}

#[test]
fn adapters_of_peft_give_its_numbers() {
    let backend = Cpu::new(None).unwrap();
    for init in ["pissa", "olora"] {
        let what = format!("residual/{init}");
        let mut model = Model::load(&path("llama"), &backend, DType::F32).unwrap();
        load_adapter(&mut model, &path(&what)).unwrap_or_else(|e| panic!("{what}: {e}"));
        let golden = Golden::open(&format!("{what}/golden.safetensors"));
        let expected = [golden.f32("logits.0"), golden.f32("logits.1")].concat();
        let difference = worst(&logits(&model, "llama"), &expected);
        assert!(difference < 5e-5, "{what}: logits differ by {difference}");
    }
}

#[test]
fn a_fresh_adapter_leaves_the_model_as_it_was_and_a_trained_one_is_a_plain_one() {
    let backend = Cpu::new(None).unwrap();
    for family in ["llama", "gpt2", "glm4"] {
        for init in ["pissa", "olora"] {
            let what = format!("{family} {init}");
            let load = || Model::load(&path(family), &backend, DType::F32).unwrap();
            let (base, mut model) = (load(), load());
            let mut own = method(&settings(init));
            own.attach(&mut model, 3).unwrap();
            let difference = worst(&logits(&model, family), &logits(&base, family));
            assert!(difference < 2e-5, "{what}: the model starts {difference} away from the base");
            move_all(&mut model);
            let folder = tempfile::tempdir().unwrap();
            own.save(&model, folder.path()).unwrap();
            let mut plain = load();
            load_adapter(&mut plain, folder.path()).unwrap();
            let difference = worst(&logits(&plain, family), &logits(&model, family));
            assert!(difference < 5e-5, "{what}: saved and loaded {difference} apart");
        }
    }
}

#[test]
fn the_start_holds_the_largest_directions() {
    // What PiSSA leaves in four bits is smaller than the weight, so it loses less: QPiSSA's point.
    let backend = Cpu::new(None).unwrap();
    let quant = Some(QuantConfig::new(Format::by_name("nf4").unwrap()));
    let load =
        |quant| Model::load(&path("llama"), &backend, LoadOptions { dtype: DType::F32, quant }).unwrap();
    let exact = logits(&load(None), "llama");
    let plain = worst(&logits(&load(quant), "llama"), &exact);
    let mut model = load(quant);
    method(&settings("pissa")).attach(&mut model, 3).unwrap();
    let with = worst(&logits(&model, "llama"), &exact);
    assert!(with < 1.5 * plain, "{with} from the exact logits, {plain} without");
}

#[test]
fn a_rank_beyond_the_weight_is_named() {
    let mut model = Model::load(&path("llama"), &Cpu::new(None).unwrap(), DType::F32).unwrap();
    let error =
        method(&settings("pissa").replace(": 4", ": 40")).attach(&mut model, 0).unwrap_err().to_string();
    assert!(error.contains("40 directions"), "{error}");
}
