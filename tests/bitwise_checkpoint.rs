//! Activation checkpointing changes no bit: layers computed again, with their dropout, leave the same losses
//! and gradients.

mod common;

use common::training::{METHOD_SETTINGS, Step, Trained, joined, sequences, trainable};
use lowrank::DType;
use lowrank::backend::cpu::Cpu;

#[test]
fn a_checkpointed_step_has_the_bits_of_a_plain_one() {
    let backend = Cpu::new(None).unwrap();
    let batch = [joined(&sequences(&[9, 1, 24, 17]))];
    for family in ["gpt2", "llama", "qwen3"] {
        for trained in [Trained::Lora, Trained::Full].into_iter().chain(METHOD_SETTINGS.map(Trained::Method))
        {
            for dtype in [DType::F32, DType::BF16] {
                let mut model = trainable(family, &backend, dtype, trained);
                let plain = Step::run(&mut model, &batch);
                for layers in 1..=3 {
                    model.gradient_checkpointing = layers;
                    let checkpointed = Step::run(&mut model, &batch);
                    plain.assert_same(
                        &checkpointed,
                        &format!("{family} {trained:?} {dtype}, {layers} layers"),
                    );
                }
            }
        }
    }
}
