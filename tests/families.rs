//! Families that transformers does not have: the same weights under their own names, queries, keys and values in one
//! layer, give the bits of the family that it does have. And architectures that are not known.

mod common;

use common::golden::{Golden, path};
use lowrank::DType;
use lowrank::adapter::load_adapter;
use lowrank::backend::cpu::Cpu;
use lowrank::model::{Model, ModelConfig};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const HIDDEN: usize = 32;

/// A tensor of a family's golden model.
struct Source(Golden);

impl Source {
    fn open(family: &str) -> Self {
        Source(Golden::open(&format!("{family}/model.safetensors")))
    }

    fn get(&self, name: &str) -> Vec<f32> {
        self.0.f32(name)
    }

    /// Rows of several tensors one after the other.
    fn joined(&self, names: [&str; 3], prefix: &str, suffix: &str) -> Vec<f32> {
        names.iter().flat_map(|n| self.get(&format!("{prefix}{n}{suffix}"))).collect()
    }
}

fn write(dir: &Path, config: &Value, tensors: &BTreeMap<String, Vec<f32>>) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fn view<'a>((name, values): (&String, &'a Vec<f32>)) -> (String, TensorView<'a>) {
        let matrix = name.contains("weight") && !name.contains("norm") && !name.contains("ln_");
        let shape = if !matrix {
            vec![values.len()]
        } else if name.ends_with("dense_4h_to_h.weight") || name.ends_with("mlp.c_proj.weight") {
            vec![HIDDEN, values.len() / HIDDEN]
        } else {
            vec![values.len() / HIDDEN, HIDDEN]
        };
        let bytes = bytemuck::cast_slice(values);
        (name.clone(), TensorView::new(Dtype::F32, shape, bytes).unwrap())
    }
    serialize_to_file(tensors.iter().map(view), None, &dir.join("model.safetensors")).unwrap();
}

fn same_logits(dir: &Path, family: &str) {
    let backend = Cpu::new(None).unwrap();
    let batch = Golden::open(&format!("{family}/golden.safetensors")).batch();
    let logits = |dir: &Path| {
        let model = Model::load(dir, &backend, DType::F32).unwrap();
        backend.to_vec::<f32>(&model.logits(&batch).unwrap()).unwrap()
    };
    assert!(logits(dir) == logits(&path(family)), "{family}: logits differ");
}

const PROJECTIONS: [&str; 3] = ["q_proj", "k_proj", "v_proj"];

fn chatglm(dir: &Path) {
    let source = Source::open("glm");
    let mut tensors = BTreeMap::from([
        ("transformer.embedding.word_embeddings.weight".to_string(), source.get("model.embed_tokens.weight")),
        ("transformer.encoder.final_layernorm.weight".into(), source.get("model.norm.weight")),
        ("transformer.output_layer.weight".into(), source.get("lm_head.weight")),
    ]);
    for i in 0..2 {
        let (ours, theirs) = (format!("transformer.encoder.layers.{i}."), format!("model.layers.{i}."));
        for (a, b) in [
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
            ("self_attention.dense", "self_attn.o_proj"),
            ("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
            ("mlp.dense_4h_to_h", "mlp.down_proj"),
        ] {
            tensors.insert(format!("{ours}{a}.weight"), source.get(&format!("{theirs}{b}.weight")));
        }
        for suffix in ["weight", "bias"] {
            let joined = source.joined(PROJECTIONS, &format!("{theirs}self_attn."), &format!(".{suffix}"));
            tensors.insert(format!("{ours}self_attention.query_key_value.{suffix}"), joined);
        }
    }
    let config = json!({
        "model_type": "chatglm", "padded_vocab_size": 97, "hidden_size": HIDDEN, "ffn_hidden_size": 56,
        "num_layers": 2, "num_attention_heads": 4, "kv_channels": 8, "multi_query_attention": true,
        "multi_query_group_num": 2, "seq_length": 64, "layernorm_epsilon": 1.5625e-7, "add_qkv_bias": true,
        "add_bias_linear": false, "rmsnorm": true, "post_layer_norm": true, "original_rope": true,
        "apply_residual_connection_post_layernorm": false, "eos_token_id": 1,
    });
    write(dir, &config, &tensors);
}

#[test]
fn chatglm_has_the_bits_of_glm() {
    let folder = tempfile::tempdir().unwrap();
    chatglm(folder.path());
    same_logits(folder.path(), "glm");
}

#[test]
fn chatglm_trains_peft_default_targets() {
    let folder = tempfile::tempdir().unwrap();
    chatglm(folder.path());
    let backend = Cpu::new(None).unwrap();
    let mut model = Model::load(folder.path(), &backend, DType::F32).unwrap();
    let mut method = common::training::method(r#"{"peft_type": "LORA", "r": 4}"#);
    method.attach(&mut model, 1).unwrap();
    let adapter = tempfile::tempdir().unwrap();
    method.save(&model, adapter.path()).unwrap();
    let key = "base_model.model.transformer.encoder.layers.1.self_attention.query_key_value.lora_A.weight";
    assert!(
        Golden::read(&adapter.path().join("adapter_model.safetensors")).names().contains(&key.to_string())
    );
    let mut fresh = Model::load(folder.path(), &backend, DType::F32).unwrap();
    load_adapter(&mut fresh, adapter.path()).unwrap();
}

#[test]
fn the_first_qwen_has_the_bits_of_qwen2() {
    let folder = tempfile::tempdir().unwrap();
    let source = Source::open("qwen2");
    let embed = source.get("model.embed_tokens.weight");
    let mut tensors = BTreeMap::from([
        ("transformer.wte.weight".to_string(), embed.clone()),
        ("transformer.ln_f.weight".into(), source.get("model.norm.weight")),
        ("lm_head.weight".into(), embed),
    ]);
    for i in 0..2 {
        let (ours, theirs) = (format!("transformer.h.{i}."), format!("model.layers.{i}."));
        for (a, b) in [
            ("ln_1", "input_layernorm"),
            ("ln_2", "post_attention_layernorm"),
            ("attn.c_proj", "self_attn.o_proj"),
            ("mlp.w1", "mlp.up_proj"),
            ("mlp.w2", "mlp.gate_proj"),
            ("mlp.c_proj", "mlp.down_proj"),
        ] {
            tensors.insert(format!("{ours}{a}.weight"), source.get(&format!("{theirs}{b}.weight")));
        }
        for suffix in ["weight", "bias"] {
            // Qwen has as many heads of keys as of queries: each of Qwen2's two serves two.
            let of = |name: &str| source.get(&format!("{theirs}self_attn.{name}.{suffix}"));
            let doubled = |values: Vec<f32>| {
                let half = values.len() / 2;
                [&values[..half], &values[..half], &values[half..], &values[half..]].concat()
            };
            let all = [of("q_proj"), doubled(of("k_proj")), doubled(of("v_proj"))].concat();
            tensors.insert(format!("{ours}attn.c_attn.{suffix}"), all);
        }
    }
    let config = json!({
        "model_type": "qwen", "vocab_size": 97, "hidden_size": HIDDEN, "intermediate_size": 112,
        "num_hidden_layers": 2, "num_attention_heads": 4, "kv_channels": 8, "seq_length": 64,
        "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "rotary_pct": 1.0, "no_bias": true,
        "scale_attn_weights": true, "use_dynamic_ntk": true, "use_logn_attn": true,
    });
    write(folder.path(), &config, &tensors);
    same_logits(folder.path(), "qwen2");
}

#[test]
fn an_unknown_architecture_names_those_that_are_known() {
    let config = json!({"model_type": "mamba"});
    let error = ModelConfig::from_json(Path::new("config.json"), &config).unwrap_err().to_string();
    for word in ["mamba", "chatglm", "glm4", "gpt2", "llama", "mistral", "phi3", "qwen3"] {
        assert!(error.contains(word), "{error}");
    }
    let first = json!({"model_type": "chatglm", "position_encoding_2d": true});
    let error = ModelConfig::from_json(Path::new("config.json"), &first).unwrap_err().to_string();
    assert!(error.contains("position_encoding_2d"), "{error}");
}
