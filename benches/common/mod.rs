//! What several benchmarks share: a model of SmolLM2-135M's shape with random weights, the machine's peaks,
//! and one line per case that says what share of them was reached.
#![allow(dead_code)]

use criterion::{BenchmarkGroup, Criterion, SamplingMode, measurement::WallTime};
use lowrank::DType;
use lowrank::adapter::{LoraConfig, Method, TargetModules};
use lowrank::backend::Backend;
use lowrank::backend::cpu::{Cpu, Isa};
use lowrank::model::{Batch, LoadOptions, Model, ModelConfig, ModuleKind, Parameter};
use lowrank::rng::{Philox, PhiloxKey, Stream};
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

/// `config.json` of SmolLM2-135M.
pub fn smollm2_json() -> serde_json::Value {
    serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": true,
    })
}

/// A model of SmolLM2-135M's shape with random weights.
pub fn smollm2(backend: &Backend, options: impl Into<LoadOptions>) -> Model {
    let config = ModelConfig::from_json(Path::new("config.json"), &smollm2_json()).unwrap();
    Model::random(config, backend, options, 1).unwrap()
}

/// Puts LoRA of rank 16 on all linear layers.
pub fn adapt(model: &mut Model) -> LoraConfig {
    adapt_as(model, false)
}

/// [`adapt`], or DoRA of that rank.
pub fn adapt_as(model: &mut Model, use_dora: bool) -> LoraConfig {
    let mut config = LoraConfig {
        use_dora,
        r: 16,
        lora_alpha: 32.0,
        targets: TargetModules::AllLinear.into(),
        ..LoraConfig::default()
    };
    config.attach(model, 1).unwrap();
    config
}

/// Random token ids.
pub fn token_ids(n: usize, vocab_size: usize) -> Vec<u32> {
    let mut rng = Philox::new(PhiloxKey::new(2, Stream::Dummy, 0));
    (0..n).map(|_| rng.below(vocab_size as u32)).collect()
}

/// One sequence of random tokens, every one predicted.
pub fn sequence(n: usize, vocab_size: usize) -> Batch {
    let ids = token_ids(n, vocab_size);
    let labels: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
    let mut batch = Batch::new();
    batch.push(&ids, &labels);
    batch
}

/// Threads that a backend takes by default.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Arithmetic peak of all threads in operations per second.
pub fn peak_flops(dtype: DType) -> f64 {
    Cpu::measure_peak(Isa::choose().unwrap(), dtype == DType::BF16, threads())
}

/// Bytes per second that all threads together read from memory; the best of five passes.
pub fn read_bandwidth() -> f64 {
    let data = vec![1u64; 32 << 20];
    let part = data.len().div_ceil(threads());
    let pass = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for chunk in data.chunks(part) {
                scope.spawn(|| black_box(chunk.iter().fold(0u64, |a, x| a.wrapping_add(*x))));
            }
        });
        (data.len() * 8) as f64 / start.elapsed().as_secs_f64()
    };
    (0..5).map(|_| pass()).fold(0.0, f64::max)
}

/// Elements of the matrices that every token is multiplied with, the head included.
pub fn matrix_elements(model: &Model) -> usize {
    let linear = |kind| matches!(kind, ModuleKind::Linear | ModuleKind::Conv1d);
    model.modules().iter().filter(|m| linear(m.kind)).map(|m| m.in_features * m.out_features).sum()
}

/// Bytes of the matrices that every token is multiplied with, the head included.
pub fn matrix_bytes(model: &mut Model) -> usize {
    let bytes = |weight: &Parameter| match weight {
        Parameter::Frozen(weight) => weight.bytes(),
        Parameter::Trainable(_) | Parameter::SideBySide(_) => 0,
    };
    model.linears_mut().iter().map(|l| bytes(&l.weight)).sum()
}

/// Scores and weighted sums of causal attention over one sequence, in operations.
pub fn attention_flops(model: &Model, tokens: usize) -> f64 {
    let c = &model.config;
    let pairs = (tokens * (tokens + 1) / 2) as f64;
    4.0 * pairs * (c.num_hidden_layers * c.num_attention_heads * c.head_dim) as f64
}

/// Runs `work` under criterion; the shortest time seen in seconds, if the command line's filter let it run.
pub fn measure(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, mut work: impl FnMut()) -> Option<f64> {
    let mut best = None;
    group.bench_function(name, |b| {
        b.iter_custom(|iterations| {
            let mut total = Duration::ZERO;
            for _ in 0..iterations {
                let start = Instant::now();
                work();
                let elapsed = start.elapsed();
                best = Some(best.map_or(elapsed, |best: Duration| best.min(elapsed)));
                total += elapsed;
            }
            total
        });
    });
    best.map(|best| best.as_secs_f64())
}

/// A group for cases that take long: few samples, each of the same number of iterations.
pub fn slow_group<'c>(criterion: &'c mut Criterion, name: &str) -> BenchmarkGroup<'c, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10).sampling_mode(SamplingMode::Flat).warm_up_time(Duration::from_secs(1));
    group.measurement_time(Duration::from_secs(8));
    group
}
