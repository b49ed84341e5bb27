//! k micro-batches equal one batch, bit for bit: the sums over tokens go on where the micro-batch before
//! stopped, and dropout masks follow the token's number within the step.

mod common;

use common::training::{EMBEDDING_SETTINGS, HEAD_SETTINGS, Step, Trained, joined, sequences, trainable};
use lowrank::DType;
use lowrank::backend::cpu::Cpu;

fn check(family: &str, trained: Trained, lengths: &[usize]) {
    let backend = Cpu::new(None).unwrap();
    let singles = sequences(lengths);
    let half = lengths.len() / 2;
    let pairs = [joined(&singles[..half]), joined(&singles[half..])];
    let whole = [joined(&singles)];
    for dtype in [DType::F32, DType::BF16] {
        let mut model = trainable(family, &backend, dtype, trained);
        let one = Step::run(&mut model, &whole);
        for (batches, name) in [(&pairs[..], "two"), (&singles[..], "single")] {
            let many = Step::run(&mut model, batches);
            one.assert_same(&many, &format!("{family} {trained:?} {dtype}, {name} micro-batches"));
        }
    }
}

#[test]
fn micro_batches_of_a_lora_step() {
    for family in ["gpt2", "llama", "mistral", "qwen2", "qwen3"] {
        check(family, Trained::Lora, &[7, 33, 2, 16, 17]);
    }
}

#[test]
fn micro_batches_of_a_step_with_an_adapter_on_the_head() {
    for family in ["gpt2", "llama", "gemma2"] {
        check(family, Trained::Method(HEAD_SETTINGS), &[7, 33, 2, 16, 17]);
    }
}

#[test]
fn micro_batches_of_a_step_with_adapters_on_embeddings() {
    for family in ["gpt2", "llama", "gemma2"] {
        check(family, Trained::Method(EMBEDDING_SETTINGS), &[7, 33, 2, 16, 17]);
    }
}

/// Not for tied embeddings, where a parameter's two uses take turns by micro-batch.
#[test]
fn micro_batches_of_a_full_step() {
    check("llama", Trained::Full, &[7, 33, 2, 16, 17]);
    check("qwen3", Trained::Full, &[16, 16]);
}

#[test]
fn sequences_longer_than_a_block_of_queries() {
    check("llama_rope_scaling", Trained::Lora, &[257, 1, 130]);
}
