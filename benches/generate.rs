//! Generation with a 135M model: reading a prompt (bound by arithmetic) and decoding token by token (bound by
//! reading every weight once a token). Prints both beside the machine's measured peaks.

mod common;

use common::{
    attention_flops, matrix_elements, measure, peak_flops, read_bandwidth, slow_group, smollm2, token_ids,
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lowrank::DType;
use lowrank::backend::cpu::Cpu;

const PROMPT: usize = 512;
const NEW: usize = 32;

fn generation(criterion: &mut Criterion) {
    let bandwidth = read_bandwidth();
    let mut group = slow_group(criterion, "generate");
    for dtype in [DType::F32, DType::BF16] {
        let backend = Cpu::new(None).unwrap();
        let model = smollm2(&backend, dtype);
        let prompt = token_ids(PROMPT, model.config.vocab_size);
        let mut cache = model.kv_cache(PROMPT).unwrap();

        let peak = peak_flops(dtype);
        group.throughput(Throughput::Elements(PROMPT as u64));
        let name = format!("prompt_{PROMPT}_{dtype}");
        let seconds = measure(&mut group, &name, || {
            cache.truncate(0);
            model.extend(&prompt, &mut cache).unwrap();
        });
        if let Some(seconds) = seconds {
            // The head sees the last token alone.
            let head = model.config.vocab_size * model.config.hidden_size;
            let matrices = (2 * PROMPT * (matrix_elements(&model) - head)) as f64;
            let rate = (matrices + attention_flops(&model, PROMPT)) / seconds;
            println!(
                "{name}: {:.0} tokens/s, {:.0} GFLOP/s = {:.0}% of the peak {:.0}\n",
                PROMPT as f64 / seconds,
                rate / 1e9,
                100.0 * rate / peak,
                peak / 1e9,
            );
        }

        group.throughput(Throughput::Elements(NEW as u64));
        let name = format!("decode_{NEW}_after_{PROMPT}_{dtype}");
        let mut filled = model.kv_cache(PROMPT + NEW).unwrap();
        model.extend(&prompt, &mut filled).unwrap();
        let seconds = measure(&mut group, &name, || {
            filled.truncate(PROMPT);
            for id in &prompt[..NEW] {
                model.extend(&[*id], &mut filled).unwrap();
            }
        });
        if let Some(seconds) = seconds {
            let c = &model.config;
            let kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim;
            let rate = ((matrix_elements(&model) + kv * PROMPT) * dtype.size() * NEW) as f64 / seconds;
            println!(
                "{name}: {:.0} tokens/s, {:.1} GB/s = {:.0}% of the measured reading speed {:.1}\n",
                NEW as f64 / seconds,
                rate / 1e9,
                100.0 * rate / bandwidth,
                bandwidth / 1e9,
            );
        }
    }
    group.finish();
}

criterion_group!(benches, generation);
criterion_main!(benches);
