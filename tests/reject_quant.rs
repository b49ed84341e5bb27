//! Quantized checkpoints that are missing parts, inconsistent or hostile: one clear error, never a panic.

mod common;

use common::golden::path;
use lowrank::DType;
use lowrank::adapter::merge::{MergeOptions, Onto, merge};
use lowrank::backend::cpu::Cpu;
use lowrank::model::quantize::quantize;
use lowrank::model::{LoadOptions, Model};
use lowrank::quant::{Format, QuantConfig};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

const FOLDER: &str = "quant/llama_nf4_nested";
const WEIGHT: &str = "model.layers.1.mlp.up_proj.weight";

/// A tensor of a file that is being changed.
#[derive(Clone)]
struct Part {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

/// The golden folder with its tensors changed by `edit`.
fn changed(edit: impl FnOnce(&mut Vec<(String, Part)>)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(path(FOLDER).join("config.json"), folder.path().join("config.json")).unwrap();
    let bytes = fs::read(path(FOLDER).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut parts: Vec<(String, Part)> = file
        .iter()
        .map(|(name, view)| {
            let (dtype, shape) = (view.dtype(), view.shape().to_vec());
            (name.to_string(), Part { dtype, shape, data: view.data().to_vec() })
        })
        .collect();
    edit(&mut parts);
    let views: Vec<(&str, TensorView<'_>)> = parts
        .iter()
        .map(|(name, p)| (name.as_str(), TensorView::new(p.dtype, p.shape.clone(), &p.data).unwrap()))
        .collect();
    serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    folder
}

fn refusal(folder: &Path) -> String {
    let backend = Cpu::new(Some(1)).unwrap();
    match Model::load(folder, &backend, DType::F32) {
        Ok(_) => panic!("expected an error"),
        Err(e) => e.to_string(),
    }
}

#[track_caller]
fn expect(error: &str, parts: &[&str]) {
    assert!(!error.contains('\n'), "{error}");
    for part in parts {
        assert!(error.contains(part), "expected {part:?} in: {error}");
    }
}

fn part<'a>(parts: &'a mut [(String, Part)], suffix: &str) -> &'a mut Part {
    let name = format!("{WEIGHT}{suffix}");
    &mut parts.iter_mut().find(|(n, _)| *n == name).unwrap().1
}

const STATE: &str = ".quant_state.bitsandbytes__nf4";

/// The folder with a key of the state replaced (removed, for `null`).
fn with_state(key: &str, value: Value) -> tempfile::TempDir {
    changed(|parts| {
        let state = part(parts, STATE);
        let mut json: Value = serde_json::from_slice(&state.data).unwrap();
        match value {
            Value::Null => drop(json.as_object_mut().unwrap().remove(key)),
            value => json[key] = value,
        }
        state.data = json.to_string().into_bytes();
        state.shape = vec![state.data.len()];
    })
}

#[test]
fn parts_that_are_missing() {
    for suffix in [".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map"] {
        let name = format!("{WEIGHT}{suffix}");
        let folder = changed(|parts| parts.retain(|(n, _)| *n != name));
        expect(&refusal(folder.path()), &[&name, "missing"]);
    }
    let name = format!("{WEIGHT}{STATE}");
    let folder = changed(|parts| parts.retain(|(n, _)| *n != name));
    expect(&refusal(folder.path()), &[WEIGHT, "expected"]);
}

#[test]
fn parts_of_another_size_or_type() {
    for suffix in ["", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map"] {
        let folder = changed(|parts| {
            let part = part(parts, suffix);
            let size = part.data.len() / part.shape.iter().product::<usize>();
            part.data.truncate(part.data.len() - size);
            part.shape = vec![part.data.len() / size];
        });
        expect(&refusal(folder.path()), &[WEIGHT]);
    }
    let folder = changed(|parts| {
        let absmax = part(parts, ".absmax");
        *absmax =
            Part { dtype: Dtype::F32, shape: absmax.shape.clone(), data: vec![0; 4 * absmax.data.len()] };
    });
    expect(&refusal(folder.path()), &[WEIGHT, "expected", "u8", "f32"]);
    let folder = changed(|parts| part(parts, ".quant_map").data[0] ^= 1);
    expect(&refusal(folder.path()), &["quant_map", "levels of nf4"]);
}

#[test]
fn states_that_do_not_fit() {
    for (key, value, expected) in [
        ("blocksize", json!(48), "blocksize"),
        ("blocksize", json!(0), "blocksize"),
        ("blocksize", json!(-64), "blocksize"),
        ("blocksize", json!(128), WEIGHT),
        ("blocksize", Value::Null, "blocksize"),
        ("quant_type", json!("fp4"), "quant_type"),
        ("quant_type", Value::Null, "quant_type"),
        ("shape", json!([56]), "shape"),
        ("shape", json!([32, 56]), "shape"),
        ("shape", json!([1, 2, 3]), "shape"),
        ("shape", json!([u64::MAX, 2]), "too large"),
        ("shape", json!("large"), "shape"),
        ("dtype", json!("float8"), "dtype"),
        ("nested_blocksize", json!(64), "nested_blocksize"),
        ("nested_dtype", json!("float16"), "nested_dtype"),
        ("nested_offset", json!("high"), "nested_offset"),
        ("nested_offset", Value::Null, "nested_offset"),
    ] {
        let folder = with_state(key, value.clone());
        expect(&refusal(folder.path()), &["up_proj", expected]);
    }
}

#[test]
fn settings_that_do_not_fit_the_checkpoint() {
    let backend = Cpu::new(Some(1)).unwrap();
    let quant = |name: &str| Some(QuantConfig::new(Format::by_name(name).unwrap()));
    let load = |folder: &str, name: &str| {
        Model::load(&path(folder), &backend, LoadOptions { dtype: DType::F32, quant: quant(name) })
    };
    expect(&load(FOLDER, "int8").unwrap_err().to_string(), &["nf4 already", "int8"]);
    assert!(load(FOLDER, "nf4").is_ok());
    let output = tempfile::tempdir().unwrap();
    let into = |from: &str, name: &str| {
        let to = output.path().join("q");
        quantize(&path(from), &to, &backend, &quant(name).unwrap(), DType::F32).unwrap_err().to_string()
    };
    expect(&into("llama", "int8"), &["int8", "no form on disk", "nf4 or fp4"]);
    expect(&into(FOLDER, "nf4"), &["quantized already"]);
    assert_eq!(fs::read_dir(output.path()).unwrap().count(), 0);
}

#[test]
fn merging_into_a_quantized_base() {
    let output = tempfile::tempdir().unwrap();
    let adapter = path(&format!("llama/{}", common::golden::variants("llama")[0]));
    let into = |folder: &str, onto: Onto, format: Option<&str>| {
        let quant = format.map(|name| QuantConfig::new(Format::by_name(name).unwrap()));
        let options = MergeOptions { onto, quant, ..MergeOptions::default() };
        merge(&path(folder), &adapter, &output.path().join("merged"), &options).unwrap_err().to_string()
    };
    expect(&into(FOLDER, Onto::Original, None), &["quantized from", "--onto dequantized"]);
    expect(&into(FOLDER, Onto::Dequantized, Some("int8")), &["is in nf4, not int8"]);
    expect(&into("llama", Onto::Dequantized, None), &["--quant nf4"]);
    assert!(!output.path().join("merged").exists());
}

#[test]
fn weights_that_are_not_finite() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(path("llama/config.json"), folder.path().join("config.json")).unwrap();
    let mut bytes = fs::read(path("llama/model.safetensors")).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let (start, _) = metadata.info(WEIGHT).unwrap().data_offsets;
    let at = 8 + header + start + 4 * 100;
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    let backend = Cpu::new(Some(1)).unwrap();
    let quant = Some(QuantConfig::new(Format::by_name("nf4").unwrap()));
    let error = Model::load(folder.path(), &backend, LoadOptions { dtype: DType::F32, quant }).unwrap_err();
    expect(&error.to_string(), &[WEIGHT, "finite"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Any bytes in place of the state: an error or a model, never a panic.
    #[test]
    fn any_state(bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0usize..160, flip in any::<u8>()) {
        let backend = Cpu::new(Some(1)).unwrap();
        let replaced = changed(|parts| {
            let state = part(parts, STATE);
            state.data = bytes;
            state.shape = vec![state.data.len()];
        });
        let _ = Model::load(replaced.path(), &backend, DType::F32);
        let flipped = changed(|parts| part(parts, STATE).data[at] ^= flip);
        let _ = Model::load(flipped.path(), &backend, DType::F32);
    }
}
