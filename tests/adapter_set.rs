//! Several adapters on one base: each gives its numbers when it is active, the base its own bits when none is.

mod common;

use common::golden::{Golden, path, worst};
use lowrank::DType;
use lowrank::adapter::AdapterSet;
use lowrank::backend::Backend;
use lowrank::backend::cpu::Cpu;
use lowrank::model::Model;

fn set(family: &str) -> (AdapterSet, Backend) {
    let backend = Cpu::new(None).unwrap();
    (AdapterSet::new(Model::load(&path(family), &backend, DType::F32).unwrap()), backend)
}

fn logits(set: &AdapterSet, family: &str) -> Vec<f32> {
    let batch = Golden::open(&format!("{family}/golden.safetensors")).batch();
    set.model().backend.to_vec::<f32>(&set.model().logits(&batch).unwrap()).unwrap()
}

/// A tied head, a whole module, norms in place, virtual tokens, a bottleneck's neighbours: whatever a method changes
/// is changed back.
#[test]
fn switching_gives_each_its_numbers_and_the_base_its_bits() {
    for (family, adapters) in [
        (
            "llama",
            vec![
                "plain",
                "modules_to_save",
                "dora",
                "prefix_projection",
                "ia3",
                "ln_tuning",
                "vera",
                "prompt",
            ],
        ),
        ("qwen2", vec!["plain", "bias_all", "ptuning_lstm", "ln_tuning"]),
        ("gpt2", vec!["bias_lora_only", "prefix", "ia3"]),
    ] {
        let (mut set, _) = set(family);
        let base = logits(&set, family);
        for name in &adapters {
            set.load(name, &path(&format!("{family}/{name}"))).unwrap();
            assert_eq!(set.active(), None);
            assert!(logits(&set, family) == base, "{family}: loading {name} changed the base");
        }
        assert_eq!(set.names().count(), adapters.len());
        // Forwards and backwards, with and without the base between.
        let order = adapters.iter().chain(adapters.iter().rev()).enumerate();
        for (i, name) in order {
            set.set_active(Some(name)).unwrap();
            let golden = Golden::open(&format!("{family}/{name}/golden.safetensors"));
            let expected = [golden.f32("logits.0"), golden.f32("logits.1")].concat();
            let difference = worst(&logits(&set, family), &expected);
            assert!(difference < 2e-5, "{family}/{name}: logits differ by {difference}");
            if i % 2 == 0 {
                set.set_active(None).unwrap();
                assert!(logits(&set, family) == base, "{family}: {name} left something behind");
            }
        }
        let model = set.into_base().unwrap();
        assert_eq!(model.params.elements(), 0);
    }
}

#[test]
fn the_base_is_not_copied_and_unloading_frees() {
    let (mut set, backend) = set("llama");
    let before = backend.arena().live_bytes();
    set.load("a", &path("llama/plain")).unwrap();
    let adapter = backend.arena().live_bytes() - before;
    assert!(adapter > 0);
    set.load("b", &path("llama/plain")).unwrap();
    set.set_active(Some("a")).unwrap();
    set.set_active(Some("b")).unwrap();
    assert!(backend.arena().live_bytes() - before <= 3 * adapter);
    set.unload("b").unwrap();
    set.unload("a").unwrap();
    assert_eq!(set.active(), None);
    assert!(backend.arena().live_bytes() <= before + 1024);
}

#[test]
fn names_and_misfits_are_errors_and_change_nothing() {
    let (mut set, _) = set("llama");
    let base = logits(&set, "llama");
    set.load("a", &path("llama/plain")).unwrap();
    set.set_active(Some("a")).unwrap();
    let active = logits(&set, "llama");
    let error = set.load("a", &path("llama/plain")).unwrap_err().to_string();
    assert!(error.contains("unload it first"), "{error}");
    // An adapter of another family does not fit; what was active still is.
    assert!(set.load("b", &path("gpt2/plain")).is_err());
    assert!(set.load("c", &path("mistral/all_linear")).is_err());
    assert!(logits(&set, "llama") == active);
    let error = set.set_active(Some("z")).unwrap_err().to_string();
    assert!(error.contains("loaded: a"), "{error}");
    set.set_active(None).unwrap();
    assert!(logits(&set, "llama") == base);
}
