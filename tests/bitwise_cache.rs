//! Decoding with a key-value cache gives the bits of the full forward, however the tokens are cut.

mod common;

use common::golden::FAMILIES;
use common::training::{Trained, bits, sequences, trainable};
use lowrank::DType;
use lowrank::backend::cpu::Cpu;
use lowrank::generate::{GenerationConfig, generate};
use lowrank::model::{Batch, KvCache, Model};

/// The logits of the last token after feeding `ids`.
fn extend(model: &Model, ids: &[u32], cache: &mut KvCache) -> Vec<u32> {
    bits(&model.backend.to_vec(&model.extend(ids, cache).unwrap()).unwrap())
}

fn check(family: &str, dtype: DType, tokens: usize) {
    let backend = Cpu::new(None).unwrap();
    let model = trainable(family, &backend, dtype, Trained::Lora);
    let batch = &sequences(&[tokens])[0];
    let ids: Vec<u32> = batch.input_ids.iter().map(|id| *id as u32).collect();
    let full = bits(&backend.to_vec(&model.logits(batch).unwrap()).unwrap());
    let row = |token: usize| &full[token * 97..(token + 1) * 97];
    for cut in [1, 2, 7, 16, tokens] {
        let mut cache = model.kv_cache(tokens).unwrap();
        for part in ids.chunks(cut) {
            let logits = extend(&model, part, &mut cache);
            assert!(logits == row(cache.len() - 1), "{family} {dtype}: token {} by {cut}", cache.len());
        }
        // What was fed after the place to go back to leaves nothing.
        let back = tokens / 2;
        cache.truncate(back);
        let logits = extend(&model, &ids[back..back + 1], &mut cache);
        assert!(logits == row(back), "{family} {dtype}: back to {back}");
    }
}

#[test]
fn cached_logits_of_every_family() {
    for family in FAMILIES {
        for dtype in [DType::F32, DType::BF16] {
            check(family, dtype, 41);
        }
    }
}

#[test]
fn cached_logits_of_a_long_sequence() {
    for dtype in [DType::F32, DType::BF16] {
        check("llama_rope_scaling", dtype, 260);
    }
}

#[test]
fn greedy_generation_follows_the_full_forward() {
    let backend = Cpu::new(None).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let model = trainable("llama", &backend, dtype, Trained::Lora);
        let mut ids: Vec<u32> = vec![3, 14, 15, 92];
        let config = GenerationConfig { max_new_tokens: 20, ..GenerationConfig::default() };
        let generated = generate(&model, &ids, &config, |_| true).unwrap().tokens;
        assert_eq!(generated.len(), 20);
        for token in generated {
            let mut batch = Batch::new();
            batch.push(&ids, &vec![-100; ids.len()]);
            let logits = backend.to_vec::<f32>(&model.logits(&batch).unwrap()).unwrap();
            let last = &logits[logits.len() - 97..];
            let best = (0..97).rev().max_by(|a, b| last[*a].total_cmp(&last[*b])).unwrap();
            assert_eq!(best as u32, token, "{dtype}: token {}", ids.len());
            ids.push(token);
        }
    }
}
