//! Generation with a 135M model: reading a prompt (bound by arithmetic) and decoding token by token (bound by
//! reading every weight once a token). Prints both beside the machine's measured peaks.

mod common;

use common::{
    attention_flops, matrix_bytes, matrix_elements, measure, peak_flops, read_bandwidth, slow_group, smollm2,
    token_ids,
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lowrank::DType;
use lowrank::backend::cpu::Cpu;
use lowrank::model::LoadOptions;
use lowrank::quant::{FORMATS, QuantConfig};

const PROMPT: usize = 512;
const NEW: usize = 32;

fn generation(criterion: &mut Criterion) {
    let bandwidth = read_bandwidth();
    let mut group = slow_group(criterion, "generate");
    let nf4 = Some(QuantConfig::new(&FORMATS[0]));
    let nf4_head = nf4.map(|q| QuantConfig { head: true, ..q });
    for (name, dtype, quant) in [
        ("f32", DType::F32, None),
        ("bf16", DType::BF16, None),
        ("bf16_nf4", DType::BF16, nf4),
        ("bf16_nf4_head", DType::BF16, nf4_head),
    ] {
        let backend = Cpu::new(None).unwrap();
        let mut model = smollm2(&backend, LoadOptions { dtype, quant });
        let prompt = token_ids(PROMPT, model.config.vocab_size);
        let mut cache = model.kv_cache(PROMPT).unwrap();

        let peak = peak_flops(dtype);
        group.throughput(Throughput::Elements(PROMPT as u64));
        let prompt_name = format!("prompt_{PROMPT}_{name}");
        let seconds = measure(&mut group, &prompt_name, || {
            cache.truncate(0);
            model.extend(&prompt, &mut cache).unwrap();
        });
        if let Some(seconds) = seconds {
            // The head sees the last token alone.
            let head = model.config.vocab_size * model.config.hidden_size;
            let matrices = (2 * PROMPT * (matrix_elements(&model) - head)) as f64;
            let rate = (matrices + attention_flops(&model, PROMPT)) / seconds;
            println!(
                "{prompt_name}: {:.0} tokens/s, {:.0} GFLOP/s = {:.0}% of the peak {:.0}\n",
                PROMPT as f64 / seconds,
                rate / 1e9,
                100.0 * rate / peak,
                peak / 1e9,
            );
        }

        group.throughput(Throughput::Elements(NEW as u64));
        let name = format!("decode_{NEW}_after_{PROMPT}_{name}");
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
            let read = matrix_bytes(&mut model) + kv * PROMPT * dtype.size();
            let rate = (read * NEW) as f64 / seconds;
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
