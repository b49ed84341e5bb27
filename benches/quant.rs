//! Quantized matrices: quantizing and dequantizing in GB/s of bf16, and products as shares of the arithmetic
//! peak (many rows) or of the read bandwidth for the bytes of the codes and constants (one row).
//!
//! `cargo bench --bench quant [-- FILTER]`

mod common;

use common::{measure, peak_flops, read_bandwidth, threads};
use criterion::{Criterion, criterion_group, criterion_main};
use lowrank::backend::cpu::Cpu;
use lowrank::backend::{Backend, Gemm, GemmTerm, Matrix};
use lowrank::quant::{FORMATS, QuantConfig};
use lowrank::rng::{Philox, PhiloxKey, Stream};
use lowrank::{DType, Tensor};
use std::time::Duration;

fn random(backend: &Backend, shape: [usize; 2]) -> Tensor {
    let mut rng = Philox::new(PhiloxKey::new(3, Stream::Dummy, 0));
    let data: Vec<f32> = (0..shape[0] * shape[1]).map(|_| 0.02 * rng.normal()).collect();
    let wide = backend.from_slice(&data, &shape).unwrap();
    backend.to_dtype(&wide, DType::BF16).unwrap()
}

/// nf4 plain and with double quantization, then every other format.
fn configs() -> Vec<(String, QuantConfig)> {
    let nf4 = QuantConfig { double_quant: false, ..QuantConfig::new(&FORMATS[0]) };
    let mut all = vec![("nf4-plain".to_string(), nf4)];
    all.extend(FORMATS.iter().map(|format| (format.name.to_string(), QuantConfig::new(format))));
    all
}

fn quantized(criterion: &mut Criterion) {
    let backend = Cpu::new(None).unwrap();
    let (peak, bandwidth) = (peak_flops(DType::BF16), read_bandwidth());
    println!("{} threads: bf16 peak {:.0} GFLOP/s, read {:.1} GB/s", threads(), peak / 1e9, bandwidth / 1e9);
    let mut group = criterion.benchmark_group("quant");
    group.sample_size(20).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    let large = random(&backend, [8192, 4096]);
    let small = random(&backend, [1536, 576]);
    let mut values = backend.empty(large.shape(), DType::BF16).unwrap();
    for (name, config) in configs() {
        if let Some(s) = measure(&mut group, &format!("quantize/{name}"), || {
            backend.quantize(&large, &config).unwrap();
        }) {
            println!("quantize/{name}: {:.2} GB/s of bf16", large.bytes() as f64 / s / 1e9);
        }
        let matrix = backend.quantize(&large, &config).unwrap();
        if let Some(s) = measure(&mut group, &format!("dequantize/{name}"), || {
            backend.dequantize(&mut values, &matrix).unwrap();
        }) {
            println!("dequantize/{name}: {:.2} GB/s of bf16", large.bytes() as f64 / s / 1e9);
        }
        let x = random(&backend, [1, 4096]);
        let mut y = backend.empty(&[1, 8192], DType::BF16).unwrap();
        if let Some(s) = measure(&mut group, &format!("one_row/{name}"), || {
            let b = Matrix::Quantized { matrix: &matrix, transposed: true };
            backend.gemm(&mut y, &Gemm::new(&[GemmTerm { a: Matrix::plain(&x), b }])).unwrap();
        }) {
            let rate = matrix.bytes() as f64 / s;
            println!("one_row/{name}: {:.1} GB/s = {:.0}% of reading", rate / 1e9, 100.0 * rate / bandwidth);
        }
        let small = backend.quantize(&small, &config).unwrap();
        for (what, transposed) in [("x_wt", true), ("dy_w", false)] {
            let b = Matrix::Quantized { matrix: &small, transposed };
            let (k, n) = b.shape();
            let x = random(&backend, [512, k]);
            let mut y = backend.empty(&[512, n], DType::BF16).unwrap();
            if let Some(s) = measure(&mut group, &format!("{what}/512x{k}x{n}/{name}"), || {
                backend.gemm(&mut y, &Gemm::new(&[GemmTerm { a: Matrix::plain(&x), b }])).unwrap();
            }) {
                let rate = (2 * 512 * k * n) as f64 / s;
                println!("{what}/{name}: {:.0} GFLOP/s = {:.0}% of peak", rate / 1e9, 100.0 * rate / peak);
            }
        }
    }
    group.finish();
}

criterion_group!(benches, quantized);
criterion_main!(benches);
