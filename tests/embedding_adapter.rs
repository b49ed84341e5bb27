//! LoRA on embeddings, beyond PEFT's numbers (`interop_peft.rs`): cached decoding, padding, quantized bases, several on one
//! base, merging into tied tables.

mod common;

use common::golden::{path, worst};
use common::training::{
    EMBEDDING_SETTINGS, Step, Trained, bits, joined, method, move_all, sequences, trainable,
};
use lowrank::DType;
use lowrank::adapter::AdapterSet;
use lowrank::adapter::merge::{MergeOptions, Onto, merge};
use lowrank::backend::Backend;
use lowrank::backend::cpu::Cpu;
use lowrank::generate::{GenerationConfig, Prompt, generate, generate_batch};
use lowrank::model::{Batch, LoadOptions, Model};
use lowrank::quant::{Format, QuantConfig};
use serde_json::Value;
use std::fs;
use std::path::Path;

const EMBEDDINGS: Trained = Trained::Method(EMBEDDING_SETTINGS);
const DORA: &str = r#"{"peft_type": "LORA", "r": 4, "use_dora": true, "target_modules": ".*(embed_tokens|wte|wpe|v_proj|c_proj)"}"#;

fn logits(model: &Model, batch: &Batch) -> Vec<f32> {
    model.backend.to_vec(&model.logits(batch).unwrap()).unwrap()
}

/// A token's logits don't depend on the others of its pass.
#[test]
fn cached_decoding_has_the_bits_of_the_full_pass() {
    let backend = Cpu::new(None).unwrap();
    let batch = &sequences(&[23])[0];
    for family in ["gpt2", "llama", "gemma2"] {
        for (dtype, settings) in
            [(DType::F32, EMBEDDING_SETTINGS), (DType::BF16, EMBEDDING_SETTINGS), (DType::BF16, DORA)]
        {
            let model = trainable(family, &backend, dtype, Trained::Method(settings));
            let full = bits(&logits(&model, batch));
            let mut cache = model.kv_cache(23).unwrap();
            for (token, id) in batch.input_ids.iter().enumerate() {
                let row = backend.to_vec::<f32>(&model.extend(&[*id as u32], &mut cache).unwrap()).unwrap();
                assert!(bits(&row) == full[token * 97..][..97], "{family} {dtype}: token {token}");
            }
        }
    }
}

/// The llama of the golden files whose embedding pads with `token`.
fn padded(token: i64) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(path("llama/config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["pad_token_id"] = token.into();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    fs::copy(path("llama/model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    folder
}

/// The gradients of a step by parameter, and rows of the table that `name` ends in.
fn gradients(
    folder: &Path,
    backend: &Backend,
    settings: Option<&str>,
    batch: &Batch,
) -> Vec<(String, Vec<u32>)> {
    let mut model = Model::load(folder, backend, DType::F32).unwrap();
    match settings {
        Some(settings) => method(settings).attach(&mut model, 11).unwrap(),
        None => {
            use lowrank::adapter::Method;
            lowrank::adapter::Full.attach(&mut model, 0).unwrap();
        }
    }
    move_all(&mut model);
    Step::run(&mut model, std::slice::from_ref(batch)).gradients
}

/// As in transformers: the entry that pads has no gradient, everything else has the one that it would have.
#[test]
fn the_entry_that_pads_is_not_trained() {
    let backend = Cpu::new(None).unwrap();
    let mut batch = Batch::new();
    let ids = [5u32, 9, 96, 7, 9, 9, 30, 5];
    batch.push(&ids, &ids.map(|id| id as i32));
    for (settings, table, cols) in
        [(Some(EMBEDDING_SETTINGS), "embed_tokens.lora_embedding_A", 4), (None, "embed_tokens.weight", 32)]
    {
        let plain = gradients(&path("llama"), &backend, settings, &batch);
        for (padding, token) in [(9, 9), (-1, 96)] {
            let ours = gradients(padded(padding).path(), &backend, settings, &batch);
            for ((name, ours), (_, plain)) in ours.iter().zip(&plain) {
                let mut expected = plain.clone();
                if name.ends_with(table) {
                    let row = &mut expected[token * cols..][..cols];
                    assert!(row.iter().any(|x| *x != 0), "{name}: no gradient without padding");
                    row.fill(0);
                }
                assert!(*ours == expected, "{name}, padding {padding}");
            }
        }
    }
    // Nothing but padding.
    let mut batch = Batch::new();
    batch.push(&[9; 5], &[9; 5]);
    let mut model = Model::load(padded(9).path(), &backend, DType::F32).unwrap();
    method(EMBEDDING_SETTINGS).attach(&mut model, 11).unwrap();
    model.params.zero_grads().unwrap();
    model.train_step(&batch, 1.0, None).unwrap();
    let a = model.params.ids().find(|id| model.params.info(*id).name.ends_with("lora_embedding_A")).unwrap();
    assert!(backend.to_vec::<f32>(&model.params.grad(a).unwrap()).unwrap().iter().all(|x| *x == 0.0));
}

fn nf4() -> LoadOptions {
    LoadOptions { dtype: DType::F32, quant: Some(QuantConfig::new(Format::by_name("nf4").unwrap())) }
}

/// The table itself stays as it is in its file.
#[test]
fn quantized_bases() {
    let backend = Cpu::new(None).unwrap();
    let batch = joined(&sequences(&[9, 14]));
    for family in ["gpt2", "llama", "qwen2"] {
        let mut model = Model::load(&path(family), &backend, nf4()).unwrap();
        let mut adapter = method(EMBEDDING_SETTINGS);
        adapter.attach(&mut model, 11).unwrap();
        move_all(&mut model);
        let step = Step::run(&mut model, std::slice::from_ref(&batch));
        let a = step.gradients.iter().find(|(name, _)| name.ends_with("lora_embedding_A")).unwrap();
        assert!(a.1.iter().any(|x| *x != 0), "{family}: no gradient");
        let folder = tempfile::tempdir().unwrap();
        adapter.save(&model, &folder.path().join("adapter")).unwrap();
        let options = MergeOptions { onto: Onto::Dequantized, quant: nf4().quant, ..MergeOptions::default() };
        let output = folder.path().join("merged");
        merge(&path(family), &folder.path().join("adapter"), &output, &options).unwrap();
        let merged = Model::load(&output, &backend, DType::F32).unwrap();
        assert!(!merged.config.tie_word_embeddings, "{family}: the head would change with the embedding");
        let difference = worst(&logits(&model, &batch), &logits(&merged, &batch));
        assert!(difference < 1e-4, "{family}: merged logits differ by {difference}");
    }
}

/// Switching, merging in memory and back, and together in one pass.
#[test]
fn several_on_one_base() {
    let backend = Cpu::new(None).unwrap();
    let batch = joined(&sequences(&[9, 14]));
    for family in ["gpt2", "llama", "qwen2", "gemma2"] {
        let mut set = AdapterSet::new(Model::load(&path(family), &backend, DType::F32).unwrap());
        let base = logits(set.model(), &batch);
        let folder = path(&format!("{family}/embedding"));
        set.load("embedding", &folder).unwrap();
        set.load("plain", &path(&format!("{family}/plain"))).unwrap();
        assert!(logits(set.model(), &batch) == base, "{family}: loading changed the base");
        set.set_active(Some("embedding")).unwrap();
        let adapted = logits(set.model(), &batch);
        assert!(worst(&adapted, &base) > 0.01, "{family}: nothing is adapted");
        set.set_active(Some("plain")).unwrap();
        set.set_active(Some("embedding")).unwrap();
        assert!(logits(set.model(), &batch) == adapted, "{family}: switching changed the adapter");
        set.merge().unwrap();
        assert!(worst(&logits(set.model(), &batch), &adapted) < 5e-5, "{family}: merged");
        set.unmerge().unwrap();
        assert!(logits(set.model(), &batch) == adapted, "{family}: unmerged");
        set.set_active(None).unwrap();
        assert!(logits(set.model(), &batch) == base, "{family}: the base");
        // Together in one pass, with the base.
        let config = GenerationConfig { max_new_tokens: 9, ..GenerationConfig::default() };
        let rows = [Some("embedding"), Some("plain"), None, Some("embedding")];
        let tokens: [&[u32]; 4] = [&[5, 9, 30], &[7], &[5, 9, 30], &[96, 2]];
        let prompt = |(adapter, tokens)| Prompt { adapter, tokens, config: config.clone() };
        let prompts: Vec<Prompt<'_>> = rows.into_iter().zip(tokens).map(prompt).collect();
        let together = generate_batch(&mut set, &prompts, |_, _| true).unwrap();
        for (prompt, found) in prompts.iter().zip(together) {
            set.set_active(prompt.adapter).unwrap();
            let alone = generate(set.model(), prompt.tokens, &config, |_| true).unwrap();
            assert_eq!(found.tokens, alone.tokens, "{family}: {:?}", prompt.adapter);
        }
    }
}

/// PEFT's files hold a copy of an adapted table; another one than the base's is taken, by a tied head too.
#[test]
fn a_copy_of_the_table_that_differs_is_taken() {
    let backend = Cpu::new(None).unwrap();
    let batch = joined(&sequences(&[9, 14]));
    for family in ["llama", "qwen2"] {
        let folder = tempfile::tempdir().unwrap();
        let source = path(&format!("{family}/embedding"));
        fs::copy(source.join("adapter_config.json"), folder.path().join("adapter_config.json")).unwrap();
        let bytes = fs::read(source.join("adapter_model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors: Vec<_> = file
            .iter()
            .map(|(name, t)| (name.to_string(), t.dtype(), t.shape().to_vec(), t.data().to_vec()))
            .collect();
        for (name, _, _, data) in &mut tensors {
            if name.ends_with("base_layer.weight") {
                let halved = |b: &[u8]| (f32::from_le_bytes(b.try_into().unwrap()) / 2.0).to_le_bytes();
                *data = data.chunks_exact(4).flat_map(halved).collect();
            }
        }
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            (name.as_str(), safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        let bytes = safetensors::serialize(views, None).unwrap();
        fs::write(folder.path().join("adapter_model.safetensors"), bytes).unwrap();
        let mut set = AdapterSet::new(Model::load(&path(family), &backend, DType::F32).unwrap());
        set.load("own", folder.path()).unwrap();
        set.load("plain", &source).unwrap();
        set.set_active(Some("plain")).unwrap();
        let plain = logits(set.model(), &batch);
        set.set_active(Some("own")).unwrap();
        let own = logits(set.model(), &batch);
        assert!(worst(&own, &plain) > 0.01, "{family}: the copy is not taken");
        set.merge().unwrap();
        assert!(worst(&logits(set.model(), &batch), &own) < 5e-5, "{family}: merged in memory");
        let output = folder.path().join("merged");
        merge(&path(family), folder.path(), &output, &MergeOptions::default()).unwrap();
        let merged = Model::load(&output, &backend, DType::F32).unwrap();
        assert!(worst(&logits(&merged, &batch), &own) < 5e-5, "{family}: merged into files");
    }
}

/// The same bits on one thread and two, with and without checkpoints.
#[test]
fn threads_do_not_change_bits() {
    let batches = [joined(&sequences(&[9, 24, 1]))];
    for family in ["gpt2", "llama", "gemma2"] {
        let on = |threads| {
            Step::run(
                &mut trainable(family, &Cpu::new(Some(threads)).unwrap(), DType::BF16, EMBEDDINGS),
                &batches,
            )
        };
        on(1).assert_same(&on(2), family);
    }
}
