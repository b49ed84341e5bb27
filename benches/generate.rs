//! Generation with a 135M model: reading a prompt (bound by arithmetic) and decoding token by token (bound by
//! reading every weight once a token). Prints both beside the machine's measured peaks.

mod common;

use common::{
    attention_flops, matrix_elements, measure, peak_flops, read_bandwidth, slow_group, smollm2, token_ids,
};
use criterion::{Criterion, criterion_group, criterion_main};
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
        let mut cache = model.kv_cache(PROMPT + NEW).unwrap();

        let name = format!("prompt_{PROMPT}_{dtype}");
        let time = measure(&mut group, &name, PROMPT, || {
            cache.truncate(0);
            model.extend(&prompt, &mut cache).unwrap();
        });
        // The head sees the last token alone.
        let head = model.config.vocab_size * model.config.hidden_size;
        let matrices = (2 * PROMPT * (matrix_elements(&model) - head)) as f64;
        let flops = (matrices + attention_flops(&model, PROMPT)) / time.as_secs_f64();
        let peak = peak_flops(dtype);
        println!(
            "{name}: {:.0} tokens/s, {:.0} GFLOP/s = {:.0}% of the peak {:.0}\n",
            PROMPT as f64 / time.as_secs_f64(),
            flops / 1e9,
            100.0 * flops / peak,
            peak / 1e9,
        );

        let name = format!("decode_{NEW}_after_{PROMPT}_{dtype}");
        let time = measure(&mut group, &name, NEW, || {
            cache.truncate(PROMPT);
            for id in &prompt[..NEW] {
                model.extend(&[*id], &mut cache).unwrap();
            }
        });
        let kv =
            2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim;
        let bytes = (matrix_elements(&model) + kv * PROMPT) * dtype.size() * NEW;
        let rate = bytes as f64 / time.as_secs_f64();
        println!(
            "{name}: {:.0} tokens/s, {:.1} GB/s = {:.0}% of the measured reading speed {:.1}\n",
            NEW as f64 / time.as_secs_f64(),
            rate / 1e9,
            100.0 * rate / bandwidth,
            bandwidth / 1e9,
        );
    }
    group.finish();
}

criterion_group!(benches, generation);
criterion_main!(benches);
