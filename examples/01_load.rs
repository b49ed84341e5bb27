//! Loads a Hugging Face model folder and shows its next-token predictions: `01_load MODEL_DIR TOKEN_ID...`

use lowrank::backend::cpu::Cpu;
use lowrank::model::{Batch, Model};
use lowrank::{DType, Result};
use std::path::Path;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let Some(folder) = args.next() else {
        eprintln!("usage: 01_load MODEL_DIR TOKEN_ID...");
        std::process::exit(2);
    };
    let ids: Vec<u32> = args.filter_map(|id| id.parse().ok()).collect();
    let ids = if ids.is_empty() { vec![1, 2, 3] } else { ids };

    let backend = Cpu::new(None)?;
    let model = Model::load(Path::new(&folder), &backend, DType::F32)?;
    println!("{} with {} parameters on {}", model.config.model_type, model.base_elements(), backend.name());

    let mut batch = Batch::new();
    batch.push(&ids, &vec![lowrank::backend::IGNORE_INDEX; ids.len()]);
    let logits = backend.to_vec::<f32>(&model.logits(&batch)?)?;
    for (id, row) in ids.iter().zip(logits.chunks_exact(model.config.vocab_size)) {
        let best = (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap_or(0);
        println!("after token {id}: token {best} (logit {:.3})", row[best]);
    }
    Ok(())
}
