//! GGUF files: every type's values are those of gguf-py; a model, its tokenizer and its chat template are those of the
//! same model's folder; damaged files are errors.

mod common;

use common::golden::{Golden, path};
use lowrank::DType;
use lowrank::backend::cpu::Cpu;
use lowrank::data::{ChatTemplate, Message, Tokenizer};
use lowrank::model::gguf::Gguf;
use lowrank::model::gguf::dequantize::TYPES;
use lowrank::model::{Model, ModelConfig, Parameter, Weight};
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

/// All layers in Q4_0: they stay in its own bits, as int4 in blocks of 32.
#[test]
fn layers_in_q4_0_are_kept() {
    let file = path("gguf/llama_q4_0.gguf");
    let (gguf, backend) = (Gguf::open(&file).unwrap(), Cpu::new(None).unwrap());
    assert_eq!(gguf.own_quant().unwrap().format.name, "int4");
    let kept = Model::load(&file, &backend, DType::F32).unwrap();
    let config = gguf.config().unwrap();
    for linear in kept.linears() {
        let name = format!("{}.weight", linear.path);
        let Parameter::Frozen(Weight::Quantized(matrix)) = &linear.weight else {
            panic!("{name} is not kept")
        };
        let mut ours = backend.empty(matrix.shape(), DType::F32).unwrap();
        backend.dequantize(&mut ours, matrix).unwrap();
        let expected = gguf.tensor(&name, &config, &backend, DType::F32).unwrap();
        assert!(
            backend.to_vec::<f32>(&ours).unwrap() == backend.to_vec::<f32>(&expected).unwrap(),
            "{name}: values differ"
        );
    }
    assert!(Gguf::open(&path("gguf/llama.gguf")).unwrap().own_quant().is_none());
    let batch = Golden::open("llama/golden.safetensors").batch();
    let losses = backend.to_vec::<f32>(&kept.evaluate(&batch).unwrap()).unwrap();
    assert!(losses.iter().all(|loss| loss.is_finite()));
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
