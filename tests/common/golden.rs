//! Files under tests/golden, made by tools/make_golden.py from transformers and PEFT.

use lowrank::model::{Batch, Model};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};

/// Families with a base model.
pub const FAMILIES: [&str; 17] = [
    "gpt2",
    "llama",
    "llama_bias",
    "llama_rope_parameters",
    "llama_rope_scaling",
    "mistral",
    "qwen2",
    "qwen3",
    "glm",
    "glm4",
    "phi3",
    "mistral_window",
    "llama_yarn",
    "llama_linear",
    "gemma",
    "gemma2",
    "gemma3_text",
];

/// The repository, or the folder that stands for it where tests run without one: `LOWRANK_TEST_ROOT`.
pub fn root() -> PathBuf {
    std::env::var_os("LOWRANK_TEST_ROOT").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// The folder of golden files.
pub fn path(relative: &str) -> PathBuf {
    root().join("tests/golden").join(relative)
}

/// The LoRA variants of a family, by folder name.
pub fn variants(family: &str) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(path(family))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("adapter_config.json").is_file())
        .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// A safetensors file of expected values.
pub struct Golden(Vec<u8>);

impl Golden {
    pub fn open(relative: &str) -> Self {
        Self::read(&path(relative))
    }

    pub fn read(path: &Path) -> Self {
        Golden(std::fs::read(path).unwrap())
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.0).unwrap()
    }

    pub fn names(&self) -> Vec<String> {
        self.tensors().names().into_iter().map(|n| n.to_string()).collect()
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        let tensors = self.tensors();
        let view = tensors.tensor(name).unwrap_or_else(|_| panic!("golden tensor {name}"));
        view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    pub fn u8(&self, name: &str) -> Vec<u8> {
        let tensors = self.tensors();
        tensors.tensor(name).unwrap_or_else(|_| panic!("golden tensor {name}")).data().to_vec()
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        let tensors = self.tensors();
        let view = tensors.tensor(name).unwrap_or_else(|_| panic!("golden tensor {name}"));
        view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
    }

    /// The two sequences of this file, every token predicted.
    pub fn batch(&self) -> Batch {
        let mut batch = Batch::new();
        for name in ["input_ids.0", "input_ids.1"] {
            let ids = self.ids(name);
            // Nothing but virtual embeddings could predict the first.
            let labels: Vec<i32> =
                ids.iter().enumerate().map(|(i, id)| if i == 0 { -100 } else { *id as i32 }).collect();
            batch.push(&ids, &labels);
        }
        batch
    }
}

/// The largest difference.
pub fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Fails unless the likeliest tokens, with the cache, are those of the folder's golden file.
pub fn assert_greedy(model: &Model, what: &str) {
    let golden = Golden::open(&format!("{what}/golden.safetensors"));
    let (prompt, expected) = (golden.ids("greedy.prompt"), golden.ids("greedy.tokens"));
    let mut cache = model.kv_cache(prompt.len() + expected.len()).unwrap();
    let mut logits = model.extend(&prompt, &mut cache).unwrap();
    for (i, want) in expected.iter().enumerate() {
        let row = model.backend.to_vec::<f32>(&logits).unwrap();
        let best = (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
        assert_eq!(best as u32, *want, "{what}: token {i}");
        logits = model.extend(&[*want], &mut cache).unwrap();
    }
}
