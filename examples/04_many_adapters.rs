//! Trains two LoRA adapters at once over one base with the library alone, on token ids: `04_many_adapters MODEL_DIR OUTPUT_DIR`

use lowrank::adapter::{LoraConfig, Method};
use lowrank::backend::cpu::Cpu;
use lowrank::data::{Example, Loader, LoaderConfig};
use lowrank::model::Model;
use lowrank::train::{Event, ManyTrainer, TrainingArguments};
use lowrank::{DType, Result};
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// A sequence to learn by heart.
fn data(factor: u32) -> Vec<Example> {
    let input_ids: Vec<u32> = (1..40).map(|i| i * factor % 90).collect();
    let labels = input_ids.iter().map(|id| *id as i32).collect();
    vec![Example { input_ids, labels }]
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, folder, output] = args.as_slice() else {
        eprintln!("usage: 04_many_adapters MODEL_DIR OUTPUT_DIR");
        std::process::exit(2);
    };
    let backend = Cpu::new(None)?;
    let mut model = Model::load(Path::new(folder), &backend, DType::F32)?;
    let mut trainer = ManyTrainer::new(&mut model);
    for (name, r, learning_rate, factor) in [("sevens", 8, 5e-3, 7), ("elevens", 4, 1e-2, 11)] {
        let arguments =
            TrainingArguments { learning_rate, max_steps: Some(20), ..TrainingArguments::default() };
        let loader = Loader::new(data(factor), LoaderConfig::default(), 42)?;
        trainer.add(name, arguments, loader, Vec::new(), &Path::new(output).join(name), |model| {
            let mut config = LoraConfig { r, ..LoraConfig::default() };
            config.attach(model, 42)?;
            Ok(Box::new(config))
        })?;
    }
    let names: Vec<String> = trainer.names().map(str::to_string).collect();
    let reports = trainer.run(&AtomicBool::new(false), &mut |job, event| {
        if let Event::Step { metrics, .. } = event {
            println!("{} step {}: loss {:.4}", names[job], metrics.step, metrics.loss);
        }
    })?;
    for (name, report) in names.iter().zip(reports) {
        let report = report?;
        println!("{name}: {} steps, loss {:.4}", report.steps, report.loss);
    }
    Ok(())
}
