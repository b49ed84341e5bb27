//! The operations around the matrix products, in a 135M model's sizes: attention in GFLOP/s with its share of
//! the measured peak, the others in GB/s of operands read and written once, beside the measured reading
//! speed of memory (operands that stay in cache exceed it).

mod common;

use common::{peak_flops, read_bandwidth};
use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main, measurement::WallTime};
use lowrank::backend::cpu::Cpu;
use lowrank::backend::{
    Activation, AttentionShape, Backend, Moments8bit, OptimizerStep, RopeShape, Sequence,
};
use lowrank::rng::{Philox, PhiloxKey, Stream};
use lowrank::{DType, Tensor};
use std::time::Duration;

const TOKENS: usize = 512;
const HIDDEN: usize = 576;
const INNER: usize = 1536;
const VOCAB: usize = 49152;

/// What the machine gives.
struct Roof {
    flops: f64,
    read: f64,
}

/// One type's benchmarks: where they are reported, what computes, and random operands.
struct Bench<'a, 'c> {
    group: &'a mut BenchmarkGroup<'c, WallTime>,
    backend: Backend,
    dtype: DType,
    roof: Roof,
    rng: Philox,
}

impl Bench<'_, '_> {
    fn tensor(&mut self, shape: &[usize], dtype: DType) -> Tensor {
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| self.rng.normal()).collect();
        let wide = self.backend.from_slice(&values, shape).unwrap();
        self.backend.to_dtype(&wide, dtype).unwrap()
    }

    /// Random activations.
    fn x(&mut self, rows: usize, cols: usize) -> Tensor {
        self.tensor(&[rows, cols], self.dtype)
    }

    fn run(&mut self, name: &str, work: impl FnMut()) -> Option<(String, f64)> {
        let name = format!("{name}_{}", self.dtype);
        Some((name.clone(), common::measure(self.group, &name, work)?))
    }

    fn arithmetic(&mut self, name: &str, flops: f64, work: impl FnMut()) {
        let Some((name, seconds)) = self.run(name, work) else { return };
        let rate = flops / seconds;
        println!("{name}: {:.1} GFLOP/s = {:.0}% of the peak\n", rate / 1e9, 100.0 * rate / self.roof.flops);
    }

    /// `bytes` are those of all operands.
    fn streaming(&mut self, name: &str, bytes: usize, work: impl FnMut()) {
        let Some((name, seconds)) = self.run(name, work) else { return };
        let (rate, read) = (bytes as f64 / seconds / 1e9, self.roof.read / 1e9);
        println!("{name}: {rate:.1} GB/s, memory's reading speed {read:.1}\n");
    }

    fn attention(&mut self, q_len: usize, k_len: usize) {
        let (n_heads, n_kv_heads, head_dim) = (9, 3, 64);
        let sequences = [Sequence { q_start: 0, q_len, k_start: 0, k_len }];
        let shape = AttentionShape {
            n_heads,
            n_kv_heads,
            head_dim,
            scale: 0.125,
            window: None,
            softcap: None,
            sequences: &sequences,
        };
        let q = self.x(q_len, n_heads * head_dim);
        let [k, v] = [(); 2].map(|()| self.x(k_len, n_kv_heads * head_dim));
        let mut out = self.x(q_len, n_heads * head_dim);
        let mut lse = self.tensor(&[q_len, n_heads], DType::F32);
        let backend = self.backend.clone();
        let mut forward = || backend.attention(&mut out, &mut lse, &q, &k, &v, &shape).unwrap();
        if q_len == 1 {
            let bytes = k.bytes() + v.bytes();
            return self.streaming(&format!("attention_decode_{k_len}"), bytes, forward);
        }
        let pairs = (q_len * (k_len - q_len) + q_len * (q_len + 1) / 2) as f64;
        let flops = pairs * (4 * n_heads * head_dim) as f64;
        self.arithmetic(&format!("attention_forward_{q_len}"), flops, &mut forward);
        let dout = self.x(q_len, n_heads * head_dim);
        let mut dq = self.x(q_len, n_heads * head_dim);
        let [mut dk, mut dv] = [(); 2].map(|()| self.x(k_len, n_kv_heads * head_dim));
        // Five products instead of two: the scores are made again.
        self.arithmetic(&format!("attention_backward_{q_len}"), 2.5 * flops, || {
            backend
                .attention_backward(&mut dq, &mut dk, &mut dv, &dout, &q, &k, &v, &out, &lse, &shape)
                .unwrap();
        });
    }

    fn norms(&mut self) {
        let backend = self.backend.clone();
        let [x, dy, mut y] = [(); 3].map(|()| self.x(TOKENS, HIDDEN));
        let weight = self.tensor(&[HIDDEN], self.dtype);
        let mut stats = self.tensor(&[TOKENS, 2], DType::F32);
        let mut rstd = self.tensor(&[TOKENS], DType::F32);
        let bytes = x.bytes();
        self.streaming("rms_norm", 2 * bytes, || {
            backend.rms_norm(&mut y, &mut rstd, &x, &weight, 1e-5).unwrap();
        });
        self.streaming("rms_norm_backward", 3 * bytes, || {
            backend.rms_norm_backward(Some(&mut y), false, None, &dy, &x, &rstd, &weight).unwrap();
        });
        self.streaming("layer_norm", 2 * bytes, || {
            backend.layer_norm(&mut y, &mut stats, &x, &weight, None, 1e-5).unwrap();
        });
    }

    fn elementwise(&mut self) {
        let backend = self.backend.clone();
        let [gate, up, dy, mut y, mut dup] = [(); 5].map(|()| self.x(TOKENS, INNER));
        let bytes = gate.bytes();
        self.streaming("gated_silu", 3 * bytes, || {
            backend.gated(&mut y, &gate, &up, Activation::Silu).unwrap();
        });
        self.streaming("gated_silu_backward", 5 * bytes, || {
            backend.gated_backward(&mut y, &mut dup, &dy, &gate, &up, Activation::Silu).unwrap();
        });
        self.streaming("gelu_tanh", 2 * bytes, || {
            backend.activation(&mut y, &gate, Activation::GeluTanh).unwrap();
        });
        self.streaming("dropout", 2 * bytes, || {
            let key = PhiloxKey::new(1, Stream::Dropout, 0);
            backend.dropout(&mut y, &gate, 0.1, key, 0, false).unwrap();
        });
        let mut q = self.x(TOKENS, HIDDEN);
        let table = self.tensor(&[TOKENS, 64], DType::F32);
        let positions: Vec<i32> = (0..TOKENS as i32).collect();
        let positions = backend.from_slice(&positions, &[TOKENS]).unwrap();
        let shape =
            RopeShape { n_heads: 9, head_dim: 64, rotary_dim: 64, interleaved: false, inverse: false };
        self.streaming("rope", 2 * q.bytes(), || backend.rope(&mut q, &table, &positions, &shape).unwrap());
    }

    fn cross_entropy(&mut self) {
        let backend = self.backend.clone();
        let rows = 160;
        let logits = self.tensor(&[rows, VOCAB], DType::F32);
        let mut losses = self.tensor(&[rows], DType::F32);
        let mut dlogits = backend.empty(&[rows, VOCAB], self.dtype).unwrap();
        let targets = backend.from_slice(&vec![7i32; rows], &[rows]).unwrap();
        let bytes = logits.bytes() + dlogits.bytes();
        self.streaming("cross_entropy", bytes, || {
            backend.cross_entropy(&mut losses, Some(&mut dlogits), &logits, &targets, 1e-3).unwrap();
        });
    }

    fn optimizer(&mut self) {
        let backend = self.backend.clone();
        let n = 4_884_480; // rank 16 on all linear layers
        let [mut p, g, mut m] = [(); 3].map(|()| self.tensor(&[n], DType::F32));
        let mut v = backend.zeros(&[n], DType::F32).unwrap();
        let step = OptimizerStep {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            grad_scale: 0.5,
            verdict: None,
            bias_correction1: 0.5,
            bias_correction2_sqrt: 0.5,
        };
        self.streaming("adamw", 7 * p.bytes(), || {
            backend.adamw(&mut p, &g, &mut m, &mut v, &step).unwrap();
        });
        let codes = || backend.zeros(&[n], DType::U8).unwrap();
        let absmax = || backend.zeros(&[n.div_ceil(256)], DType::F32).unwrap();
        let (mut mc, mut vc, mut m_absmax, mut v_absmax) = (codes(), codes(), absmax(), absmax());
        self.streaming("adamw_8bit", 3 * p.bytes() + 4 * n, || {
            let mut moments =
                Moments8bit { m: &mut mc, v: &mut vc, m_absmax: &mut m_absmax, v_absmax: &mut v_absmax };
            backend.adamw_8bit(&mut p, &g, &mut moments, &step).unwrap();
        });
        self.streaming("lion", 5 * p.bytes(), || backend.lion(&mut p, &g, &mut m, &step).unwrap());
        self.streaming("sum_squares", g.bytes(), || {
            backend.sum_squares(&g).unwrap();
        });
    }
}

fn operations(criterion: &mut Criterion) {
    let read = read_bandwidth();
    let mut group = criterion.benchmark_group("ops");
    group.sample_size(20).warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_secs(1));
    for dtype in [DType::F32, DType::BF16] {
        let mut bench = Bench {
            group: &mut group,
            backend: Cpu::new(None).unwrap(),
            dtype,
            roof: Roof { flops: peak_flops(dtype), read },
            rng: Philox::new(PhiloxKey::new(3, Stream::Dummy, 0)),
        };
        for (q_len, k_len) in [(512, 512), (2048, 2048), (1, 4096)] {
            bench.attention(q_len, k_len);
        }
        bench.norms();
        bench.elementwise();
        bench.cross_entropy();
        // Always in f32.
        if dtype == DType::F32 {
            bench.optimizer();
        }
    }
    group.finish();
}

criterion_group!(benches, operations);
criterion_main!(benches);
