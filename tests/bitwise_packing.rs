//! Sequences that share a batch or a packed row see nothing of each other: same bits as alone.

mod common;

use common::golden::{FAMILIES, path};
use common::training::{bits, joined, sequences};
use lowrank::adapter::{LoraConfig, Method};
use lowrank::backend::cpu::Cpu;
use lowrank::data::Example;
use lowrank::data::loader::{Loader, LoaderConfig};
use lowrank::model::{Batch, Model};
use lowrank::train::{Trainer, TrainingArguments};
use lowrank::{DType, Error};
use std::path::Path;
use std::sync::atomic::AtomicBool;

#[test]
fn logits_and_losses_of_packed_sequences_are_those_of_each_alone() {
    let backend = Cpu::new(None).unwrap();
    for family in FAMILIES {
        let long = family == "llama_rope_scaling";
        let singles = sequences(if long { &[150, 3, 257] } else { &[13, 1, 40, 16] });
        for dtype in [DType::F32, DType::BF16] {
            let model = Model::load(&path(family), &backend, dtype).unwrap();
            let logits = |batch: &Batch| bits(&backend.to_vec(&model.logits(batch).unwrap()).unwrap());
            let losses = |batch: &Batch| bits(&backend.to_vec(&model.evaluate(batch).unwrap()).unwrap());
            let packed = joined(&singles);
            let alone: Vec<u32> = singles.iter().flat_map(logits).collect();
            assert!(logits(&packed) == alone, "{family} {dtype}: logits differ");
            // A sequence of one token predicts nothing.
            let alone: Vec<u32> = singles.iter().filter(|b| b.counted() > 0).flat_map(losses).collect();
            assert!(losses(&packed) == alone, "{family} {dtype}: losses differ");
        }
    }
}

/// Eight sequences whose lengths make packing into rows of 20 pair neighbours.
fn examples() -> Vec<Example> {
    sequences(&[12, 8, 15, 5, 9, 11, 19, 1])
        .into_iter()
        .map(|batch| Example {
            input_ids: batch.input_ids.iter().map(|id| *id as u32).collect(),
            labels: batch.input_ids,
        })
        .collect()
}

/// Six steps of LoRA; the adapter's file.
fn train(dtype: DType, config: LoaderConfig, output: &Path) -> Result<Vec<u8>, Error> {
    let backend = Cpu::new(None)?;
    let mut model = Model::load(&path("llama"), &backend, dtype)?;
    let mut lora = LoraConfig { lora_dropout: 0.1, ..LoraConfig::default() };
    lora.attach(&mut model, 1)?;
    let loader = Loader::new(examples(), LoaderConfig { shuffle: false, ..config }, 7)?;
    let arguments =
        TrainingArguments { learning_rate: 1e-2, max_steps: Some(6), ..TrainingArguments::default() };
    Trainer::new(&mut model, Box::new(lora), arguments, loader, Vec::new(), output)?
        .run(&AtomicBool::new(false), &mut |_| {})?;
    Ok(std::fs::read(output.join("adapter_model.safetensors")).unwrap())
}

#[test]
fn a_packed_run_trains_the_same_adapter() {
    let config = |batch_size: usize, steps: usize, packing: Option<usize>| LoaderConfig {
        per_device_train_batch_size: batch_size,
        gradient_accumulation_steps: steps,
        packing,
        ..LoaderConfig::default()
    };
    for dtype in [DType::F32, DType::BF16] {
        let run = |config| train(dtype, config, tempfile::tempdir().unwrap().path()).unwrap();
        let packed = run(config(2, 1, Some(20)));
        assert!(packed == run(config(4, 1, None)), "{dtype}: one batch");
        assert!(packed == run(config(2, 2, None)), "{dtype}: two micro-batches");
        assert!(packed == run(config(1, 2, Some(20))), "{dtype}: two packed micro-batches");
        assert!(packed != run(config(1, 3, None)), "{dtype}: another number of rows");
    }
}
