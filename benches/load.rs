//! Loading a 135M model: f32 weights stay in the mapped file; for bf16 training weights of another type are
//! converted. Adapters are read and written whole.

mod common;

use common::{adapt, measure, slow_group, smollm2, smollm2_json};
use criterion::{Criterion, criterion_group, criterion_main};
use half::bf16;
use lowrank::DType;
use lowrank::adapter::{Method, load_adapter};
use lowrank::backend::cpu::Cpu;
use lowrank::model::{Model, Parameter, Weight};
use safetensors::tensor::{Dtype, TensorView};
use std::path::Path;

/// Writes a model's folder in f32 or bf16.
fn write_model(model: &mut Model, dtype: DType, dir: &Path) {
    std::fs::write(dir.join("config.json"), smollm2_json().to_string()).unwrap();
    let backend = model.backend.clone();
    let mut tensors = Vec::new();
    for (name, parameter) in model.parameters_mut() {
        let Parameter::Frozen(Weight::Dense(tensor)) = parameter else { continue };
        let values = backend.to_f32(tensor).unwrap();
        let bytes: Vec<u8> = match dtype {
            DType::F32 => bytemuck::cast_slice(&values).to_vec(),
            _ => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        };
        tensors.push((name, tensor.shape().to_vec(), bytes));
    }
    let stored = if dtype == DType::F32 { Dtype::F32 } else { Dtype::BF16 };
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(stored, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

fn load(criterion: &mut Criterion) {
    let backend = Cpu::new(None).unwrap();
    let mut group = slow_group(criterion, "load");
    let mut model = smollm2(&backend, DType::F32);
    for stored in [DType::F32, DType::BF16] {
        let dir = tempfile::tempdir().unwrap();
        write_model(&mut model, stored, dir.path());
        let bytes = dir.path().join("model.safetensors").metadata().unwrap().len();
        for dtype in [DType::F32, DType::BF16] {
            let name = format!("{stored}_file_as_{dtype}");
            let seconds = measure(&mut group, &name, || {
                Model::load(dir.path(), &backend, dtype).unwrap();
            });
            if let Some(seconds) = seconds {
                println!("{name}: {:.1} ms for {:.0} MB\n", 1e3 * seconds, bytes as f64 / 1e6);
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    write_model(&mut model, DType::BF16, dir.path());
    let config = adapt(&mut model);
    let adapter = tempfile::tempdir().unwrap();
    measure(&mut group, "save_adapter", || config.save(&model, adapter.path()).unwrap());
    let mut fresh = Model::load(dir.path(), &backend, DType::F32).unwrap();
    measure(&mut group, "load_adapter", || {
        load_adapter(&mut fresh, adapter.path()).unwrap();
    });
    group.finish();
}

criterion_group!(benches, load);
criterion_main!(benches);
