//! The launches of a QLoRA step of a 7B Llama (512 tokens, r 16 on all linear layers, a checkpoint a layer) on an H200, by
//! kernel, without one, and what they should take (docs/cuda_step.md): `cuda_step [TOKENS [LAYERS]]`.

mod predict;

use lowrank::adapter::{LoraConfig, Method, TargetModules};
use lowrank::autograd::Dropout;
use lowrank::backend::cuda::{Cuda, DryExecutor, LaunchCount, LaunchShape, Profile};
use lowrank::model::{Batch, LoadOptions, Model, ModelConfig};
use lowrank::optim::{Optimizer, OptimizerArguments, clip_scale};
use lowrank::quant::{Format, QuantConfig};
use lowrank::{DType, Result};
use std::path::Path;
use std::sync::Arc;

const CONFIG: &str = include_str!("../../tools/gpu_7b_config.json");

fn main() -> Result<()> {
    let mut sizes = std::env::args().skip(1).map(|arg| arg.parse().unwrap_or(1));
    let (tokens, n_layers): (usize, usize) = (sizes.next().unwrap_or(512), sizes.next().unwrap_or(32));
    let profile = Arc::new(Profile::new(Arc::new(DryExecutor::h200())).quiet());
    let backend = Cuda::on(profile.clone())?;

    // All layers are copies of one, whose weights they share: no kernel looks at them.
    let mut config = serde_json::from_str(CONFIG).unwrap_or(serde_json::Value::Null);
    config["num_hidden_layers"] = 1.into();
    let config = ModelConfig::from_json(Path::new("config.json"), &config)?;
    let nf4 = QuantConfig { double_quant: true, ..QuantConfig::new(Format::by_name("nf4")?) };
    let options = LoadOptions { dtype: DType::BF16, quant: Some(nf4) };
    let mut model = Model::random(config, &backend, options, 0)?;
    model.config.num_hidden_layers = n_layers;
    model.layers = vec![model.layers[0].clone(); n_layers];
    let per_layer = model.linears().len() / n_layers;
    for (i, linear) in model.linears_mut().into_iter().enumerate().filter(|(i, _)| *i < per_layer * n_layers)
    {
        linear.path = linear.path.replace(".0.", &format!(".{}.", i / per_layer));
    }
    let mut lora = LoraConfig { r: 16, targets: TargetModules::AllLinear.into(), ..LoraConfig::default() };
    lora.attach(&mut model, 0)?;
    model.gradient_checkpointing = 1;
    let mut optimizer =
        Optimizer::new(&backend, &model.params, OptimizerArguments::default(), &std::env::temp_dir())?;

    let mut batch = Batch::new();
    batch.push(&vec![1; tokens], &vec![1; tokens]);
    for step in 0..2 {
        profile.reset()?;
        model.params.zero_grads()?;
        let dropout = Dropout { seed: 0, step, first_row: 0 };
        let losses = model.train_step(&batch, 1.0 / tokens as f32, Some(dropout))?;
        let (squares, _) = backend.step_report(model.params.grads()?, &[losses])?;
        optimizer.step(&backend, &mut model.params, 1e-4, clip_scale(squares.sqrt(), Some(1.0)))?;
        backend.to_f32(&backend.zeros(&[1], DType::F32)?)?; // what still waits to be started
    }
    print(&profile.counts()?);
    Ok(())
}

/// The tables: by part and by kernel.
fn print(counts: &[(LaunchShape, LaunchCount)]) {
    let mut rows: Vec<_> = counts.iter().map(|(shape, count)| (shape, count.launches as f64)).collect();
    let all = |(shape, launches): &(&LaunchShape, f64)| launches * predict::microseconds(shape) / 1e3;
    rows.sort_by(|a, b| all(b).total_cmp(&all(a)));
    let mut parts: Vec<(&str, f64, f64)> = Vec::new();
    for row in &rows {
        let part = predict::part(row.0);
        match parts.iter_mut().find(|(name, ..)| *name == part) {
            Some((_, launches, ms)) => (*launches, *ms) = (*launches + row.1, *ms + all(row)),
            None => parts.push((part, row.1, all(row))),
        }
    }
    parts.sort_by(|a, b| b.2.total_cmp(&a.2));
    let launches: f64 = parts.iter().map(|part| part.1).sum();
    parts.push(("gaps", launches, launches * predict::GAP / 1e3));
    println!("| part | launches | predicted, ms |\n|---|---|---|");
    parts.iter().for_each(|(name, launches, ms)| println!("| {name} | {launches} | {ms:.2} |"));
    println!("| sum | {launches} | {:.2} |\n", parts.iter().map(|part| part.2).sum::<f64>());
    println!(
        "| kernel | blocks | rows x columns x contraction | launches | each, µs | all, ms |\n|---|---|---|---|---|---|"
    );
    for row in rows {
        let (shape, launches) = row;
        let mut products = String::new();
        for same in shape.products.chunk_by(|a, b| a == b) {
            let [m, n, k] = same[0];
            let times = if same.len() > 1 { format!("{} of ", same.len()) } else { String::new() };
            products += &format!("{}{times}{m}x{n}x{k}", if products.is_empty() { "" } else { ", " });
        }
        let blocks: u32 = shape.grid.iter().product();
        let each = predict::microseconds(shape);
        println!("| {} | {blocks} | {products} | {launches} | {each:.1} | {:.2} |", shape.kernel, all(&row));
    }
}
