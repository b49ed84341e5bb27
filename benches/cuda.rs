//! CUDA kernels over the shapes of Llama 7B and 65B: time, and operations or bytes a second, beside what the device gives
//! (a copy, the largest product), measured in the same run.
//!
//! `cargo bench --bench cuda [-- FILTER]`, on a machine with a GPU; elsewhere it says so. Operands are random; weights
//! take turns so that the second-level cache does not hold them.

use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use lowrank::backend::cuda::{Cuda, Device, Executor, Launch, driver_is_present};
use lowrank::backend::{AttentionShape, Backend, Gemm, GemmTerm, HeadLoss, Matrix, OptimizerStep, Sequence};
use lowrank::quant::{Format, QuantConfig};
use lowrank::rng::{Philox, PhiloxKey, Stream};
use lowrank::{DType, Tensor};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes that weights take together at least: more than any second-level cache.
const ROTATED_BYTES: usize = 256 << 20;

fn random(gpu: &Backend, rows: usize, cols: usize, dtype: DType) -> Tensor {
    // A row of random numbers over and over: the host is slow, and kernels don't look.
    let mut rng = Philox::new(PhiloxKey::new(1, Stream::Dummy, 0));
    let some: Vec<f32> = (0..cols.max(1 << 16)).map(|_| rng.normal()).collect();
    let values: Vec<f32> = (0..rows * cols).map(|i| some[i % some.len()]).collect();
    gpu.to_dtype(&gpu.from_slice(&values, &[rows, cols]).unwrap(), dtype).unwrap()
}

/// Times `run(i)`, the device waited for once at the end of each sample.
fn bench(group: &mut BenchmarkGroup<'_, WallTime>, gpu: &Backend, id: String, mut run: impl FnMut(usize)) {
    let probe = gpu.zeros(&[1], DType::F32).unwrap();
    group.bench_function(id, |bencher| {
        bencher.iter_custom(|n| {
            gpu.to_f32(&probe).unwrap();
            let start = Instant::now();
            (0..n as usize).for_each(&mut run);
            gpu.to_f32(&probe).unwrap();
            start.elapsed()
        });
    });
}

fn copies(criterion: &mut Criterion, gpu: &Backend) {
    let mut group = criterion.benchmark_group("copy");
    let bytes = 1usize << 30;
    let x = gpu.zeros(&[bytes / 4], DType::F32).unwrap();
    let mut y = gpu.zeros(&[bytes / 4], DType::F32).unwrap();
    group.throughput(Throughput::Bytes(2 * bytes as u64));
    bench(&mut group, gpu, "1 GiB".into(), |_| gpu.cast(&mut y, &x).unwrap());
}

/// The rows from which kernels for one chip alone may serve; their portable twins are timed beside them.
const MANY_ROWS: usize = 64;

fn products(criterion: &mut Criterion, gpu: &Backend, portable: &Backend) {
    let mut group = criterion.benchmark_group("gemm bf16");
    for n in [4096, 8192] {
        let (x, w) = (random(gpu, n, n, DType::BF16), random(gpu, n, n, DType::BF16));
        let mut y = gpu.empty(&[n, n], DType::BF16).unwrap();
        group.throughput(Throughput::Elements(2 * (n as u64).pow(3)));
        let terms = [GemmTerm { a: Matrix::plain(&x), b: Matrix::transposed(&w) }];
        for (backend, which) in [(gpu, ""), (portable, " portable")] {
            let id = format!("{n}^3{which}");
            bench(&mut group, backend, id, |_| backend.gemm(&mut y, &Gemm::new(&terms)).unwrap());
        }
    }
}

fn quantized_products(criterion: &mut Criterion, gpu: &Backend, portable: &Backend) {
    let nf4 = QuantConfig::new(Format::by_name("nf4").unwrap());
    for (n, k) in [(4096, 4096), (11_008, 4096), (22_016, 8192)] {
        let w = random(gpu, n, k, DType::BF16);
        let copies = ROTATED_BYTES.div_ceil(nf4.bytes(n, k));
        let weights: Vec<_> = (0..copies).map(|_| gpu.quantize(&w, &nf4).unwrap()).collect();
        drop(w);
        let rank = 16;
        let (a, b) = (random(gpu, rank, k, DType::BF16), random(gpu, n, rank, DType::BF16));
        for transposed in [true, false] {
            let mut group = criterion
                .benchmark_group(format!("gemm nf4 {n}x{k} {}", ["dy W", "x W^T"][usize::from(transposed)]));
            let (k, n) = if transposed { (k, n) } else { (n, k) };
            for rows in [1, 4, 16, 64, 128, 256, 512, 1024, 2048, 8192] {
                let x = random(gpu, rows, k, DType::BF16);
                let mut y = gpu.empty(&[rows, n], DType::BF16).unwrap();
                group.throughput(match rows {
                    0..=32 => Throughput::Bytes(nf4.bytes(n, k) as u64),
                    _ => Throughput::Elements((2 * rows * n * k) as u64),
                });
                for (backend, which) in [(gpu, ""), (portable, " portable")] {
                    if rows < MANY_ROWS && !which.is_empty() {
                        continue;
                    }
                    bench(&mut group, backend, format!("{rows} rows{which}"), |i| {
                        let matrix = &weights[i % copies];
                        let terms =
                            [GemmTerm { a: Matrix::plain(&x), b: Matrix::Quantized { matrix, transposed } }];
                        backend.gemm(&mut y, &Gemm::new(&terms)).unwrap();
                    });
                }
                if transposed {
                    let mut h = gpu.empty(&[rows, rank], DType::BF16).unwrap();
                    bench(&mut group, gpu, format!("{rows} rows with rank {rank}"), |i| {
                        let down = [GemmTerm { a: Matrix::plain(&x), b: Matrix::transposed(&a) }];
                        gpu.gemm(&mut h, &Gemm::new(&down)).unwrap();
                        let matrix = &weights[i % copies];
                        let terms = [
                            GemmTerm { a: Matrix::plain(&x), b: Matrix::Quantized { matrix, transposed } },
                            GemmTerm { a: Matrix::plain(&h), b: Matrix::transposed(&b) },
                        ];
                        gpu.gemm(&mut y, &Gemm::new(&terms)).unwrap();
                    });
                }
            }
        }
    }
}

fn attention(criterion: &mut Criterion, gpu: &Backend) {
    let mut group = criterion.benchmark_group("attention bf16");
    let (heads, head_dim) = (32, 128);
    for length in [512, 4096] {
        let cols = heads * head_dim;
        let [q, k, v, dout] = std::array::from_fn(|_| random(gpu, length, cols, DType::BF16));
        let empty = || gpu.empty(&[length, cols], DType::BF16).unwrap();
        let (mut out, mut dq, mut dk, mut dv) = (empty(), empty(), empty(), empty());
        let mut lse = gpu.empty(&[length, heads], DType::F32).unwrap();
        let shape = AttentionShape {
            n_heads: heads,
            n_kv_heads: heads,
            head_dim,
            scale: (head_dim as f32).sqrt().recip(),
            window: None,
            softcap: None,
            sequences: &[Sequence { q_start: 0, q_len: length, k_start: 0, k_len: length }],
        };
        let forward = (2 * length * length * cols) as u64; // half of the scores are seen
        group.throughput(Throughput::Elements(forward));
        bench(&mut group, gpu, format!("{length} forward"), |_| {
            gpu.attention(&mut out, &mut lse, &q, &k, &v, &shape).unwrap();
        });
        group.throughput(Throughput::Elements(forward * 5 / 2));
        bench(&mut group, gpu, format!("{length} backward"), |_| {
            gpu.attention_backward(&mut dq, &mut dk, &mut dv, &dout, &q, &k, &v, &out, &lse, &shape).unwrap();
        });
    }
}

/// The losses and the gradient of hidden states of a frozen head, whose targets are random.
fn losses(criterion: &mut Criterion, gpu: &Backend, portable: &Backend) {
    let hidden = 4096;
    for vocabulary in [32_000, 128_256, 152_064] {
        let mut group = criterion.benchmark_group(format!("linear cross-entropy {vocabulary}x{hidden}"));
        let head = random(gpu, vocabulary, hidden, DType::BF16);
        for rows in [512, 4096] {
            let x = random(gpu, rows, hidden, DType::BF16);
            let targets: Vec<i32> = (0..rows).map(|i| (i * 7919 % vocabulary) as i32).collect();
            let mut losses = gpu.empty(&[rows], DType::F32).unwrap();
            let mut dx = gpu.empty(&[rows, hidden], DType::BF16).unwrap();
            let loss = HeadLoss {
                x: &x,
                rows: None,
                head: Matrix::plain(&head),
                bias: None,
                softcap: None,
                targets: &gpu.from_slice(&targets, &[rows]).unwrap(),
                grad_scales: &[(0..rows, 1.0 / rows as f32)],
            };
            group.throughput(Throughput::Elements((4 * rows * vocabulary * hidden) as u64));
            for (backend, which) in [(gpu, ""), (portable, " portable")] {
                bench(&mut group, backend, format!("{rows} rows{which}"), |_| {
                    assert!(backend.head_loss(&mut losses, Some(&mut dx), &loss).unwrap());
                });
            }
        }
    }
}

fn optimizer(criterion: &mut Criterion, gpu: &Backend) {
    let mut group = criterion.benchmark_group("adamw");
    let n = 160_000_000; // LoRA of rank 64 on 7B
    let [mut p, g, mut m, mut v] = std::array::from_fn(|_| gpu.zeros(&[n], DType::F32).unwrap());
    let step = OptimizerStep {
        learning_rate: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        grad_scale: 1.0,
        verdict: None,
        bias_correction1: 0.1,
        bias_correction2_sqrt: 0.03,
    };
    group.throughput(Throughput::Bytes(28 * n as u64));
    bench(&mut group, gpu, format!("{n}"), |_| gpu.adamw(&mut p, &g, &mut m, &mut v, &step).unwrap());
}

fn main() {
    if !driver_is_present() {
        println!("there is no CUDA driver here: nothing is measured");
        return;
    }
    let device = Arc::new(Device::open(0).unwrap_or_else(|e| panic!("{e}")));
    let gpu = Cuda::on(device.clone()).unwrap();
    let portable = Cuda::portable(device.clone()).unwrap();
    println!("{}", gpu.name());
    if device.properties().capability == 90 {
        // How much of the chip clusters reach.
        let launch = |cluster| Launch {
            kernel: "gemm_hopper_square_bf16_208_nt",
            grid: [cluster, 1, 1],
            cluster,
            threads: 384,
            shared_bytes: 226 << 10,
            params: &[],
        };
        let [twos, fours] = [2, 4].map(|blocks| device.clusters_at_once(&launch(blocks)).unwrap());
        println!("clusters at a time: {twos} of two, {fours} of four");
    }
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    copies(&mut criterion, &gpu);
    products(&mut criterion, &gpu, &portable);
    quantized_products(&mut criterion, &gpu, &portable);
    attention(&mut criterion, &gpu);
    losses(&mut criterion, &gpu, &portable);
    optimizer(&mut criterion, &gpu);
}
