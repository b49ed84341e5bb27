//! Several adapters on one base: each gives its numbers when it is active, the base its own bits when none is.

mod common;

use common::golden::{FAMILIES, Golden, path, variants, worst};
use half::bf16;
use lowrank::DType;
use lowrank::adapter::AdapterSet;
use lowrank::adapter::merge::{MergeOptions, Onto, merge};
use lowrank::backend::Backend;
use lowrank::backend::cpu::Cpu;
use lowrank::model::{LoadOptions, Model};
use lowrank::quant::{Format, QuantConfig};
use safetensors::{Dtype, SafeTensors};
use std::fs;
use std::path::Path;

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

/// A golden folder with its weights rounded to bf16.
fn in_bf16(family: &str, to: &Path) {
    fs::create_dir_all(to).unwrap();
    fs::copy(path(family).join("config.json"), to.join("config.json")).unwrap();
    for entry in fs::read_dir(path(family)).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if name.ends_with(".json") {
            fs::copy(entry.path(), to.join(&name)).unwrap();
        }
        if !name.starts_with("model") || !name.ends_with(".safetensors") {
            continue;
        }
        let bytes = fs::read(entry.path()).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let narrow: Vec<(String, Vec<usize>, Vec<u8>)> = file
            .iter()
            .map(|(name, t)| {
                let values = t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                let data = values.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect();
                (name.to_string(), t.shape().to_vec(), data)
            })
            .collect();
        let views = narrow.iter().map(|(name, shape, data)| {
            (name, safetensors::tensor::TensorView::new(Dtype::BF16, shape.clone(), data).unwrap())
        });
        fs::write(to.join(&name), safetensors::serialize(views, None).unwrap()).unwrap();
    }
}

/// Logits of merging in memory, of the files that merging writes, and of base and adapter; all checks that unmerging
/// leaves nothing behind.
fn merged_both_ways(base: &Path, adapter: &str, options: LoadOptions, family: &str) -> [Vec<f32>; 3] {
    let backend = Cpu::new(None).unwrap();
    let load = |dir: &Path, options: LoadOptions| Model::load(dir, &backend, options).unwrap();
    let mut set = AdapterSet::new(load(base, options));
    let untouched = logits(&set, family);
    set.load("a", &path(adapter)).unwrap();
    set.set_active(Some("a")).unwrap();
    let beside = logits(&set, family);
    let before = backend.arena().live_bytes();
    let bytes = set.merge().unwrap_or_else(|e| panic!("{adapter}: {e}"));
    assert!(set.is_merged() && bytes > 0 && backend.arena().live_bytes() > before);
    let in_memory = logits(&set, family);
    assert!(in_memory != untouched, "{adapter}: nothing was merged");
    set.load("b", &path(adapter)).unwrap();
    assert!(logits(&set, family) == in_memory, "{adapter}: loading another one changed what is merged");
    set.unload("b").unwrap();
    set.unmerge().unwrap();
    assert!(backend.arena().live_bytes() <= before, "{adapter}: merged weights stayed");
    assert!(!set.is_merged() && logits(&set, family) == beside, "{adapter}: unmerging changed the adapter");
    set.merge().unwrap();
    set.set_active(None).unwrap();
    assert!(logits(&set, family) == untouched, "{adapter}: merging left something in the base");
    set.set_active(Some("a")).unwrap();
    let model = set.into_merged().unwrap();
    assert_eq!(model.params.elements(), 0);

    let output = tempfile::tempdir().unwrap();
    let onto = if options.quant.is_some() { Onto::Dequantized } else { Onto::Original };
    let how = MergeOptions { onto, quant: options.quant, ..MergeOptions::default() };
    merge(base, &path(adapter), &output.path().join("merged"), &how).unwrap();
    let merged = AdapterSet::new(load(&output.path().join("merged"), options.dtype.into()));
    [in_memory, logits(&merged, family), beside]
}

#[test]
fn merging_in_memory_has_the_bits_of_merging_files() {
    for family in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        let narrow = folder.path().join(family);
        in_bf16(family, &narrow);
        for variant in variants(family) {
            // Virtual tokens are no weights.
            if variant.starts_with('p') && variant != "plain" && variant != "patterns" {
                continue;
            }
            let adapter = format!("{family}/{variant}");
            for (base, dtype) in
                [(path(family), DType::F32), (narrow.clone(), DType::F32), (narrow.clone(), DType::BF16)]
            {
                let [memory, files, _] = merged_both_ways(&base, &adapter, dtype.into(), family);
                assert!(memory == files, "{adapter} in {dtype}: not the bits of the files");
            }
        }
    }
}

/// On a quantized base: what changes is dequantized, in memory as in files.
#[test]
fn merging_onto_a_quantized_base() {
    for (family, name) in [("llama", "nf4"), ("gpt2", "int8"), ("qwen2", "int4-asym")] {
        let quant = Some(QuantConfig::new(Format::by_name(name).unwrap()));
        for variant in ["plain", "dora", "ia3", "bias_all"] {
            if !variants(family).iter().any(|v| v == variant) {
                continue;
            }
            let adapter = format!("{family}/{variant}");
            let options = LoadOptions { dtype: DType::F32, quant };
            let [memory, files, beside] = merged_both_ways(&path(family), &adapter, options, family);
            // Layers that no adapter is on are products with codes in one and with floats in the other: the same bits.
            assert!(memory == files, "{adapter} on {name}: not the bits of the files");
            let difference = worst(&memory, &beside);
            assert!(difference < 1e-4, "{adapter} on {name}: merged logits differ by {difference}");
        }
    }
}

#[test]
fn what_cannot_be_merged_is_an_error_and_changes_nothing() {
    let (mut set, _) = set("llama");
    set.load("a", &path("llama/plain")).unwrap();
    set.load("p", &path("llama/prefix")).unwrap();
    assert!(set.merge().unwrap_err().to_string().contains("no adapter is active"));
    set.set_active(Some("p")).unwrap();
    let before = logits(&set, "llama");
    assert!(set.merge().unwrap_err().to_string().contains("can't be merged"));
    assert!(set.unmerge().unwrap_err().to_string().contains("no adapter is merged"));
    assert!(!set.is_merged() && set.active() == Some("p") && logits(&set, "llama") == before);
    set.set_active(Some("a")).unwrap();
    set.merge().unwrap();
    assert!(set.merge().unwrap_err().to_string().contains("merged already"));
}
