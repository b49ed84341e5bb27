//! GGUF files: every type's values are those of gguf-py; a model, its tokenizer and its chat template are those of the
//! same model's folder; damaged files are errors.

mod common;

use common::golden::{Golden, path, worst};
use lowrank::DType;
use lowrank::adapter::AdapterSet;
use lowrank::adapter::merge::{MergeOptions, Onto, merge};
use lowrank::backend::Backend;
use lowrank::backend::cpu::{Cpu, Isa};
use lowrank::backend::reference::Reference;
use lowrank::data::{ChatTemplate, Message, Tokenizer};
use lowrank::model::gguf::Gguf;
use lowrank::model::gguf::dequantize::TYPES;
use lowrank::model::{Model, ModelConfig, Parameter, Weight};
use lowrank::quant::{Format, QuantConfig};
use lowrank::rng::{Philox, PhiloxKey, Stream};
use serde_json::Value;

/// The bytes of a tensor of the golden file, found by what they decode to.
#[test]
fn every_type_decodes_as_gguf_py_does() {
    let file = path("gguf/types.gguf");
    let bytes = std::fs::read(&file).unwrap();
    let (gguf, expected) = (Gguf::open(&file).unwrap(), Golden::open("gguf/types.safetensors"));
    assert_eq!(gguf.names().count(), TYPES.len());
    for kind in TYPES {
        let (shape, name) = gguf.info(kind.name).unwrap();
        assert_eq!(name, kind.name);
        let expected = expected.f32(kind.name);
        let length = expected.len() / kind.block * kind.bytes;
        let range = gguf.range(kind.name).unwrap();
        assert_eq!((shape, range.len()), (&[3usize, 512][..], length));
        let mut ours = vec![0.0; expected.len()];
        kind.dequantize(&bytes[range], &mut ours);
        assert!(ours == expected, "{}: values differ", kind.name);
    }
}

/// Every type of codes as a quantized matrix: the same values on every backend, in about the file's memory.
#[test]
fn every_type_of_codes_is_kept_in_its_own_bits() {
    let file = path("gguf/types.gguf");
    let (gguf, expected) = (Gguf::open(&file).unwrap(), Golden::open("gguf/types.safetensors"));
    let isas = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    let mut backends: Vec<Backend> = isas.map(|isa| Cpu::with_isa(isa, Some(1)).unwrap()).collect();
    backends.push(Reference::<f32>::backend());
    for (name, format, bits) in [
        ("Q4_0", "int4", 5.0),
        ("Q4_1", "int4-minimum", 6.0),
        ("Q8_0", "int8-block", 9.0),
        ("Q4_K", "int4-minimum", 4.75),
        ("Q6_K", "int6", 6.625),
    ] {
        for backend in &backends {
            let matrix = gguf.matrix(name, backend, DType::F32).unwrap().unwrap();
            assert_eq!((matrix.config().format.name, *matrix.shape()), (format, [3, 512]));
            assert_eq!(matrix.bytes() as f64 * 8.0 / 1536.0, bits, "{name}");
            let mut ours = backend.empty(matrix.shape(), DType::F32).unwrap();
            backend.dequantize(&mut ours, &matrix).unwrap();
            let ours = backend.to_vec::<f32>(&ours).unwrap();
            assert!(ours == expected.f32(name), "{name} on {}: values differ", backend.name());
        }
    }
    assert!(gguf.matrix("F16", &backends[0], DType::F32).unwrap().is_none());
}

/// Layers of several types: each stays in its own bits, and the model computes what the dequantized one does.
#[test]
fn layers_are_kept_each_in_its_type() {
    let backend = Cpu::new(None).unwrap();
    for (name, formats) in
        [("llama_q4_0", vec!["int4"]), ("llama_mixed", vec!["int4-minimum", "int8-block", "int4"])]
    {
        let file = path(&format!("gguf/{name}.gguf"));
        let gguf = Gguf::open(&file).unwrap();
        let mut kept = Model::load(&file, &backend, DType::F32).unwrap();
        let config = gguf.config().unwrap();
        let mut found = Vec::new();
        for linear in kept.linears_mut() {
            let name = format!("{}.weight", linear.path);
            let expected = gguf.tensor(&name, &config, &backend, DType::F32).unwrap();
            if let Parameter::Frozen(Weight::Quantized(matrix)) = &linear.weight {
                found.push(matrix.config().format.name);
                let mut ours = backend.empty(matrix.shape(), DType::F32).unwrap();
                backend.dequantize(&mut ours, matrix).unwrap();
                let (ours, expected) = (backend.to_vec::<f32>(&ours), backend.to_vec::<f32>(&expected));
                assert!(ours.unwrap() == expected.unwrap(), "{name}: values differ");
            }
        }
        assert!(formats.iter().all(|f| found.contains(f)), "{name}: found {found:?}");
        let batch = Golden::open("llama/golden.safetensors").batch();
        let of_kept = backend.to_vec::<f32>(&kept.logits(&batch).unwrap()).unwrap();
        for linear in kept.linears_mut() {
            let name = format!("{}.weight", linear.path);
            let dense = gguf.tensor(&name, &config, &backend, DType::F32).unwrap();
            linear.weight = Parameter::Frozen(Weight::Dense(dense));
        }
        assert!(
            of_kept == backend.to_vec::<f32>(&kept.logits(&batch).unwrap()).unwrap(),
            "{name}: logits differ"
        );
    }
}

#[test]
fn a_model_has_the_bits_of_its_folder() {
    let backend = Cpu::new(None).unwrap();
    let batch = Golden::open("llama/golden.safetensors").batch();
    let logits = |name: &str| {
        let model = Model::load(&path(name), &backend, DType::F32).unwrap();
        backend.to_vec::<f32>(&model.logits(&batch).unwrap()).unwrap()
    };
    assert!(logits("gguf/llama.gguf") == logits("llama"));
    let (ours, theirs) =
        (ModelConfig::load(&path("gguf/llama.gguf")).unwrap(), ModelConfig::load(&path("llama")).unwrap());
    assert_eq!(ours.names, theirs.names);
    assert_eq!(ours.max_position_embeddings, theirs.max_position_embeddings);
}

#[test]
fn its_tokenizer_and_template_are_those_inside() {
    let file = path("gguf/llama.gguf");
    let tokenizer = Tokenizer::load(&file).unwrap();
    let folder = Tokenizer::load(&path("tokenizer")).unwrap();
    let cases: Value =
        serde_json::from_str(&std::fs::read_to_string(path("tokenizer.json")).unwrap()).unwrap();
    let mut texts = Vec::new();
    collect_texts(&cases, &mut texts);
    assert!(texts.len() > 10);
    for text in texts {
        for special in [false, true] {
            let ids = tokenizer.encode(&text, special).unwrap();
            assert_eq!(ids, folder.encode(&text, special).unwrap(), "{text:?}");
        }
    }
    let template = ChatTemplate::load(&file, &tokenizer).unwrap();
    let message = Message { role: "user".into(), content: "hi".into(), extra: Default::default() };
    assert_eq!(template.render(&[message], false).unwrap(), "<user>hi");
}

/// Sentencepiece vocabularies of the kinds that transformers tells apart by architecture.
#[test]
fn sentencepiece_tokenizers_are_those_of_transformers() {
    let cases: Value =
        serde_json::from_str(&std::fs::read_to_string(path("gguf/spm.json")).unwrap()).unwrap();
    for (architecture, cases) in cases.as_object().unwrap() {
        let tokenizer = Tokenizer::load(&path(&format!("gguf/spm_{architecture}.gguf"))).unwrap();
        for case in cases.as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let expected: Vec<u32> =
                case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
            assert_eq!(tokenizer.encode(text, false).unwrap(), expected, "{architecture}: {text:?}");
            let with_bos = [&[1], &expected[..]].concat();
            assert_eq!(tokenizer.encode(text, true).unwrap(), with_bos, "{architecture}: {text:?}");
        }
    }
}

/// A GGUF base merged into: what merging into the folder that it was made of gives, as a folder of its own.
#[test]
fn an_adapter_is_merged_into_a_gguf_file() {
    let backend = Cpu::new(None).unwrap();
    let batch = Golden::open("llama/golden.safetensors").batch();
    let logits = |model: &Model| backend.to_vec::<f32>(&model.logits(&batch).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let merged = |base: &str, options: &MergeOptions| {
        let output = folder.path().join("merged");
        let _ = std::fs::remove_dir_all(&output);
        merge(&path(base), &path("llama/plain"), &output, options).unwrap();
        let model = Model::load(&output, &backend, DType::F32).unwrap();
        (model, Tokenizer::load(&output))
    };
    let plain = MergeOptions::default();
    let (of_file, tokenizer) = merged("gguf/llama.gguf", &plain);
    assert!(logits(&of_file) == logits(&merged("llama", &plain).0));
    let inside = Tokenizer::load(&path("gguf/llama.gguf")).unwrap();
    let text = "hello there";
    assert_eq!(tokenizer.unwrap().encode(text, true).unwrap(), inside.encode(text, true).unwrap());
    // Codes become floats; in memory the same ones.
    let (of_codes, _) = merged("gguf/llama_mixed.gguf", &plain);
    let kept = Model::load(&path("gguf/llama_mixed.gguf"), &backend, DType::F32).unwrap();
    let mut set = AdapterSet::new(kept);
    set.load("a", &path("llama/plain")).unwrap();
    set.set_active(Some("a")).unwrap();
    set.merge().unwrap();
    assert!(logits(&of_codes) == logits(set.model()));
    let quant = Some(QuantConfig::new(Format::by_name("nf4").unwrap()));
    let narrow =
        MergeOptions { onto: Onto::Dequantized, quant, gguf_dtype: DType::BF16, ..MergeOptions::default() };
    let (mut of_nf4, _) = merged("gguf/llama.gguf", &narrow);
    let narrow = |weight: &Parameter| matches!(weight, Parameter::Frozen(Weight::Dense(tensor)) if tensor.dtype() == DType::BF16);
    assert!(of_nf4.linears_mut().iter().all(|linear| narrow(&linear.weight)));
    assert!(worst(&logits(&of_nf4), &logits(&of_file)) > 0.0);
}

fn collect_texts(value: &Value, texts: &mut Vec<String>) {
    match value {
        Value::Array(list) => list.iter().for_each(|v| collect_texts(v, texts)),
        Value::Object(map) => {
            for (key, v) in map {
                match v {
                    Value::String(text) if key == "text" => texts.push(text.clone()),
                    other => collect_texts(other, texts),
                }
            }
        }
        _ => {}
    }
}

/// Opens bytes as a file; neither may panic, and what opens has every tensor inside.
fn open(bytes: &[u8]) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.gguf");
    std::fs::write(&file, bytes).unwrap();
    let gguf = Gguf::open(&file).map_err(|e| e.to_string())?;
    for name in gguf.names() {
        assert!(gguf.range(name).unwrap().end <= bytes.len());
    }
    let config = gguf.config().map_err(|e| e.to_string())?;
    drop((gguf, config));
    Tokenizer::load(&file).map(|_| ()).map_err(|e| e.to_string())
}

#[test]
fn damaged_files_are_errors() {
    let whole = std::fs::read(path("gguf/llama.gguf")).unwrap();
    open(&whole).unwrap();
    // Cut anywhere: the end of the data is needed, too.
    for len in (0..whole.len()).step_by(whole.len() / 97) {
        assert!(open(&whole[..len]).is_err(), "cut at {len}");
    }
    let mut rng = Philox::new(PhiloxKey::new(9, Stream::Dummy, 3));
    let header = 24_000.min(whole.len());
    for _ in 0..400 {
        let mut bytes = whole.clone();
        for _ in 0..1 + rng.below(3) {
            let at = rng.below(header as u32) as usize;
            bytes[at] = rng.below(256) as u8;
        }
        let _ = open(&bytes);
    }
    for (at, value, word) in [(0, 0u64, "GGUF"), (8, u64::MAX, "tensors"), (16, 1 << 60, "keys")] {
        let mut bytes = whole.clone();
        let len = if at == 0 { 4 } else { 8 };
        bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        let error = open(&bytes).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
}
