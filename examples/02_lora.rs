//! Trains a LoRA adapter with the library alone, on token ids, and saves it as PEFT does:
//! `02_lora MODEL_DIR OUTPUT_DIR`

use lowrank::adapter::{LoraConfig, Method, TargetModules};
use lowrank::backend::cpu::Cpu;
use lowrank::model::{Batch, Model};
use lowrank::optim::{Optimizer, OptimizerArguments, clip_scale};
use lowrank::{DType, Result};
use std::path::Path;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, folder, output] = args.as_slice() else {
        eprintln!("usage: 02_lora MODEL_DIR OUTPUT_DIR");
        std::process::exit(2);
    };
    let backend = Cpu::new(None)?;
    let mut model = Model::load(Path::new(folder), &backend, DType::F32)?;
    let mut config =
        LoraConfig { r: 8, lora_alpha: 16.0, targets: TargetModules::AllLinear.into(), ..Default::default() };
    config.attach(&mut model, 42)?;
    println!("{} trained parameters", model.params.elements());

    // A sequence to learn by heart.
    let ids: Vec<u32> = (1..40).map(|i| i * 7 % 90).collect();
    let labels: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    let mut batch = Batch::new();
    batch.push(&ids, &labels);

    let mut optimizer =
        Optimizer::new(&backend, &model.params, OptimizerArguments::default(), Path::new(output))?;
    for step in 1..=20 {
        model.params.zero_grads()?;
        let losses =
            backend.to_vec::<f32>(&model.train_step(&batch, 1.0 / model.counted(&batch) as f32, None)?)?;
        let norm = match model.params.grads()? {
            Some(grads) => backend.sum_squares(grads)?.sqrt(),
            None => 0.0,
        };
        optimizer.step(&backend, &mut model.params, 5e-3, clip_scale(norm, Some(1.0)))?;
        println!("step {step}: loss {:.4}", losses.iter().sum::<f32>() / losses.len() as f32);
    }
    config.save(&model, Path::new(output))
}
