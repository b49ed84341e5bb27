//! Matrix products in GFLOP/s and GB/s, as shares of the arithmetic peak and the read bandwidth that this
//! process measures first, beside the plain triple loop.
//!
//! `cargo bench --bench kernels [-- FILTER]`; `LOWRANK_ISA` chooses the instruction set, `THREADS` their number.

use criterion::Criterion;
use lowrank::backend::cpu::{Cpu, Isa};
use lowrank::backend::{Backend, Gemm, GemmTerm, Matrix};
use lowrank::{DType, Tensor};
use std::cell::Cell;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// A product `[m, k] [k, n]` and how its operands are stored.
struct Case {
    name: &'static str,
    m: usize,
    k: usize,
    n: usize,
    a_transposed: bool,
    b_transposed: bool,
    /// Rank of a second term on the same accumulators, or 0.
    low_rank: usize,
}

const fn case(name: &'static str, m: usize, k: usize, n: usize) -> Case {
    Case { name, m, k, n, a_transposed: false, b_transposed: true, low_rank: 0 }
}

const CASES: [Case; 9] = [
    case("x_wt", 512, 576, 1536),
    case("x_wt", 1024, 1024, 1024),
    Case { low_rank: 16, ..case("x_wt_lora", 512, 576, 1536) },
    Case { b_transposed: false, ..case("dy_w", 512, 1536, 576) },
    case("lora_h", 512, 576, 16),
    Case { a_transposed: true, b_transposed: false, ..case("lora_da", 16, 512, 576) },
    Case { a_transposed: true, b_transposed: false, ..case("lora_db", 1536, 512, 16) },
    case("decode", 1, 4096, 8192),
    case("decode", 4, 4096, 8192),
];

/// What the machine gives, measured by this process.
struct Roof {
    flops: [f64; 2], // f32, bf16
    read: f64,
}

fn read_bandwidth(threads: usize) -> f64 {
    let data: Vec<u64> = vec![1; 32 << 20]; // 256 MiB
    let pass = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in data.chunks(data.len().div_ceil(threads)) {
                scope.spawn(move || black_box(part.iter().fold(0u64, |sum, x| sum.wrapping_add(*x))));
            }
        });
        (data.len() * 8) as f64 / start.elapsed().as_secs_f64()
    };
    (0..5).map(|_| pass()).fold(0.0, f64::max)
}

fn matrix(backend: &Backend, rows: usize, cols: usize, dtype: DType, seed: u32) -> Tensor {
    let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32;
    let data: Vec<f32> = (0..rows * cols).map(|i| value(i) / (1 << 23) as f32 - 1.0).collect();
    let wide = backend.from_slice(&data, &[rows, cols]).expect("memory for a matrix");
    backend.to_dtype(&wide, dtype).expect("a float type")
}

fn operand(tensor: &Tensor, transposed: bool) -> Matrix<'_> {
    Matrix::Dense { tensor, transposed }
}

fn stored(rows: usize, cols: usize, transposed: bool) -> (usize, usize) {
    if transposed { (cols, rows) } else { (rows, cols) }
}

/// Times `run` under criterion and returns the best iteration's seconds.
fn seconds(criterion: &mut Criterion, id: &str, mut run: impl FnMut()) -> Option<f64> {
    let best = Cell::new(f64::INFINITY);
    criterion.bench_function(id, |bencher| {
        bencher.iter_custom(|iterations| {
            let mut total = Duration::ZERO;
            for _ in 0..iterations {
                let start = Instant::now();
                run();
                let elapsed = start.elapsed();
                best.set(best.get().min(elapsed.as_secs_f64()));
                total += elapsed;
            }
            total
        });
    });
    best.get().is_finite().then(|| best.get())
}

fn bench_case(criterion: &mut Criterion, backend: &Backend, roof: &Roof, case: &Case, dtype: DType) {
    let &Case { name, m, k, n, a_transposed, b_transposed, low_rank } = case;
    let (a_rows, a_cols) = stored(m, k, a_transposed);
    let (b_rows, b_cols) = stored(k, n, b_transposed);
    let a = matrix(backend, a_rows, a_cols, dtype, 1);
    let b = matrix(backend, b_rows, b_cols, dtype, 2);
    let h = matrix(backend, m, low_rank.max(1), dtype, 3);
    let up = matrix(backend, n, low_rank.max(1), dtype, 4);
    let mut terms = vec![GemmTerm { a: operand(&a, a_transposed), b: operand(&b, b_transposed) }];
    if low_rank > 0 {
        terms.push(GemmTerm { a: Matrix::plain(&h), b: Matrix::transposed(&up) });
    }
    let mut out = backend.empty(&[m, n], dtype).expect("memory for a result");
    let id = format!("gemm/{name}/{dtype}/{m}x{k}x{n}");
    let best = seconds(criterion, &id, || {
        backend.gemm(&mut out, &Gemm::new(&terms)).expect("operands fit");
    });
    let Some(best) = best else { return };
    let flops = 2.0 * (m * n * (k + low_rank)) as f64 / best;
    let bytes = ((m * k + k * n + m * n) * dtype.size()) as f64 / best;
    let peak = roof.flops[usize::from(dtype == DType::BF16)];
    println!(
        "{id:<34} {:>8.1} GFLOP/s = {:>4.1}% of peak  {:>6.1} GB/s = {:>4.1}% of read bandwidth",
        flops / 1e9,
        100.0 * flops / peak,
        bytes / 1e9,
        100.0 * bytes / roof.read
    );
}

/// The plain loop: a row times a row, one multiplication and addition after the other.
fn bench_baseline(criterion: &mut Criterion, (m, k, n): (usize, usize, usize)) {
    let (a, b) = (vec![0.5f32; m * k], vec![0.25f32; n * k]);
    let mut out = vec![0.0f32; m * n];
    let id = format!("gemm/plain_loop/f32/{m}x{k}x{n}");
    let best = seconds(criterion, &id, || {
        for (row, x) in out.chunks_exact_mut(n).zip(a.chunks_exact(k)) {
            for (y, w) in row.iter_mut().zip(b.chunks_exact(k)) {
                *y = x.iter().zip(w).fold(0.0, |sum, (x, w)| sum + x * w);
            }
        }
        black_box(&mut out);
    });
    if let Some(best) = best {
        println!("{id:<34} {:>8.1} GFLOP/s", 2.0 * (m * n * k) as f64 / best / 1e9);
    }
}

fn main() {
    let threads = std::env::var("THREADS").ok().and_then(|t| t.parse().ok());
    let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    let isa = Isa::choose().expect("LOWRANK_ISA names an available instruction set");
    let backend = Cpu::with_isa(isa, Some(threads)).expect("an available instruction set");
    let roof = Roof {
        flops: [false, true].map(|bf16| Cpu::measure_peak(isa, bf16, threads)),
        read: read_bandwidth(threads),
    };
    println!(
        "{}: peak {:.0} GFLOP/s in f32, {:.0} in bf16; read {:.1} GB/s",
        backend.name(),
        roof.flops[0] / 1e9,
        roof.flops[1] / 1e9,
        roof.read / 1e9
    );
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20)
        .configure_from_args();
    bench_baseline(&mut criterion, (512, 576, 1536));
    for dtype in [DType::F32, DType::BF16] {
        for case in &CASES {
            bench_case(&mut criterion, &backend, &roof, case, dtype);
        }
    }
    criterion.final_summary();
}
