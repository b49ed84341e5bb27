//! Merging holds little in memory however large the base is. Alone in its process, whose peak it measures.

use lowrank::adapter::merge::{MergeOptions, merge};
use lowrank::train::metrics::peak_memory_bytes;
use serde_json::json;
use std::fs;
use std::io::Write;

/// A safetensors file whose data is a hole: large to read, nothing on disk.
fn sparse(path: &std::path::Path, tensors: &[(&str, Vec<usize>)]) {
    let mut header = serde_json::Map::new();
    let mut offset = 0;
    for (name, shape) in tensors {
        let end = offset + 2 * shape.iter().product::<usize>();
        header.insert(
            name.to_string(),
            json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut text = serde_json::Value::Object(header).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.set_len((8 + text.len() + offset) as u64).unwrap();
}

/// Tensors of 256 MiB each: merging must never hold even one of them.
#[test]
fn memory_does_not_grow_with_the_base() {
    let parent = tempfile::tempdir().unwrap();
    let (base, adapter) = (parent.path().join("base"), parent.path().join("adapter"));
    fs::create_dir(&base).unwrap();
    fs::create_dir(&adapter).unwrap();
    let (hidden, vocabulary, inner) = (4096, 32_768, 32_768);
    let config = json!({
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": true,
    });
    fs::write(base.join("config.json"), config.to_string()).unwrap();
    sparse(
        &base.join("model.safetensors"),
        &[
            ("model.embed_tokens.weight", vec![vocabulary, hidden]),
            ("model.layers.0.mlp.up_proj.weight", vec![inner, hidden]),
            ("model.layers.0.mlp.down_proj.weight", vec![hidden, inner]),
        ],
    );
    fs::write(
        adapter.join("adapter_config.json"),
        r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}"#,
    )
    .unwrap();
    sparse(
        &adapter.join("adapter_model.safetensors"),
        &[
            ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", vec![2, hidden]),
            ("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight", vec![inner, 2]),
        ],
    );
    let before = peak_memory_bytes();
    merge(&base, &adapter, &parent.path().join("merged"), &MergeOptions::default()).unwrap();
    let grown = peak_memory_bytes().saturating_sub(before);
    assert!(grown < 160 << 20, "merging 768 MiB took {} MiB more", grown >> 20);
    let merged = fs::metadata(parent.path().join("merged/model.safetensors")).unwrap().len();
    assert!(merged >= 768 << 20);
}
