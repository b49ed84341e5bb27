//! A training step: LoRA of rank 16 on all linear layers of a 135M model, one sequence of 512 tokens. Prints
//! tokens/s, and GFLOP/s with their share of the measured peak.

mod common;

use common::{
    adapt, adapt_as, attention_flops, matrix_elements, measure, peak_flops, sequence, slow_group, smollm2,
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lowrank::DType;
use lowrank::autograd::Slot;
use lowrank::backend::cpu::Cpu;
use lowrank::model::{Batch, LoadOptions, Model};
use lowrank::optim::{Optimizer, OptimizerArguments};
use lowrank::quant::{FORMATS, QuantConfig};

const TOKENS: usize = 512;

/// Operations of a step: frozen matrices twice (forward, gradient of the input), adapters three times,
/// attention 3.5 times its forward (its backward makes the scores again).
fn step_flops(model: &Model) -> f64 {
    let matrices = (4 * matrix_elements(model) + 6 * model.params.elements()) as f64;
    TOKENS as f64 * matrices + 3.5 * attention_flops(model, TOKENS)
}

fn train_step(criterion: &mut Criterion) {
    let mut group = slow_group(criterion, "train_step_lora_r16_512_tokens");
    group.throughput(Throughput::Elements(TOKENS as u64));
    for dtype in [DType::F32, DType::BF16] {
        let backend = Cpu::new(None).unwrap();
        let mut model = smollm2(&backend, dtype);
        adapt(&mut model);
        let mut optimizer = {
            let arguments = OptimizerArguments::default();
            Optimizer::new(&backend, &model.params, arguments, &std::env::temp_dir()).unwrap()
        };
        let batch = sequence(TOKENS, model.config.vocab_size);
        let peak = peak_flops(dtype);
        for gradient_checkpointing in [0, 1] {
            model.gradient_checkpointing = gradient_checkpointing;
            let name = format!("{dtype}{}", if gradient_checkpointing > 0 { "_checkpointed" } else { "" });
            let seconds = measure(&mut group, &name, || {
                model.params.zero_grads().unwrap();
                model.train_step(&batch, 1.0 / TOKENS as f32, None).unwrap();
                backend.sum_squares(model.params.grads().unwrap().unwrap()).unwrap();
                optimizer.step(&backend, &mut model.params, 1e-4, 1.0).unwrap();
            });
            let Some(seconds) = seconds else { continue };
            let flops = step_flops(&model) / seconds;
            println!(
                "{name}: {:.0} tokens/s, {:.0} useful GFLOP/s = {:.0}% of the peak {:.0}\n",
                TOKENS as f64 / seconds,
                flops / 1e9,
                100.0 * flops / peak,
                peak / 1e9,
            );
        }
    }
    group.finish();
}

/// Rows of 128 tokens with an adapter of their own each, against as many rows with one: what it costs that they differ.
fn many_adapters(criterion: &mut Criterion) {
    const ROW: usize = 128;
    let mut group = slow_group(criterion, "train_step_adapters_of_4_rows");
    group.throughput(Throughput::Elements(TOKENS as u64));
    let nf4 = Some(QuantConfig::new(&FORMATS[0]));
    for (name, dtype, quant, use_dora) in [
        ("f32", DType::F32, None, false),
        ("bf16", DType::BF16, None, false),
        ("bf16_nf4", DType::BF16, nf4, false),
        ("bf16_dora", DType::BF16, None, true),
    ] {
        let mut times = Vec::new();
        for count in [1, TOKENS / ROW] {
            let backend = Cpu::new(None).unwrap();
            let mut model = smollm2(&backend, LoadOptions { dtype, quant });
            let rows = sequence(ROW, model.config.vocab_size);
            let mut adapters = Vec::new();
            for _ in 0..count {
                let base = model.installed().unwrap();
                adapt_as(&mut model, use_dora);
                let arguments = OptimizerArguments::default();
                let optimizer = Optimizer::new(&backend, &model.params, arguments, &std::env::temp_dir());
                adapters.push((model.exchange(base), optimizer.unwrap()));
            }
            let named: Vec<_> = adapters.iter().map(|(adapter, _)| ("", adapter)).collect();
            let mut all = model.side_by_side(&named).unwrap();
            let mut batch = Batch::new();
            (0..TOKENS / ROW).for_each(|_| batch.append(&rows));
            let share = TOKENS / count;
            let seconds = measure(&mut group, &format!("{count}_{name}"), || {
                for (adapter, _) in &mut adapters {
                    model.swap(adapter);
                    model.params.zero_grads().unwrap();
                    model.swap(adapter);
                }
                let slots = adapters.iter().enumerate().map(|(i, (adapter, _))| Slot {
                    rows: i * share..(i + 1) * share,
                    params: adapter.params(),
                    dropout: None,
                    grad_scale: 1.0 / share as f32,
                });
                let slots: Vec<_> = slots.collect();
                model.swap(&mut all);
                model.train_step_slots(&batch, &slots).unwrap();
                model.swap(&mut all);
                for (adapter, optimizer) in &mut adapters {
                    model.swap(adapter);
                    backend.sum_squares(model.params.grads().unwrap().unwrap()).unwrap();
                    optimizer.step(&backend, &mut model.params, 1e-4, 1.0).unwrap();
                    model.swap(adapter);
                }
            });
            times.extend(seconds);
        }
        if let [one, many] = times[..] {
            println!("{name}: four adapters take {:.3} of one's step\n", many / one);
        }
    }
    group.finish();
}

criterion_group!(benches, train_step, many_adapters);
criterion_main!(benches);
