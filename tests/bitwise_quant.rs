//! Quantizing and computing with quantized matrices: the same bits on every backend, instruction set and
//! number of rows, and those of dequantizing first.

mod common;

use common::gemm::{Values, configs, read_only};
use half::bf16;
use lowrank::backend::cpu::{Cpu, Isa};
use lowrank::backend::reference::Reference;
use lowrank::backend::{Backend, Gemm, GemmTerm, Matrix};
use lowrank::quant::{Blocks, Codes, Layout, QuantConfig, Quantized, READ_ONLY, Scales};
use lowrank::{DType, Tensor};

fn backends() -> Vec<Backend> {
    let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    available.map(|isa| Cpu::with_isa(isa, Some(2)).unwrap()).collect()
}

fn random(backend: &Backend, shape: [usize; 2], dtype: DType, values: &mut Values) -> Tensor {
    let data: Vec<f32> = (0..shape[0] * shape[1]).map(|_| 0.1 * values.value()).collect();
    backend.to_dtype(&backend.from_slice(&data, &shape).unwrap(), dtype).unwrap()
}

fn bytes(backend: &Backend, x: &Tensor) -> Vec<u8> {
    let mut bytes = vec![0; x.bytes()];
    backend.download(x, &mut bytes).unwrap();
    bytes
}

/// Everything that a quantized matrix is made of.
fn parts(backend: &Backend, x: &Quantized) -> Vec<Vec<u8>> {
    let mut all = vec![bytes(backend, x.codes())];
    match x.scales() {
        Scales::Plain(scales) => all.push(bytes(backend, scales)),
        Scales::Nested { codes, absmax, map, offset } => {
            all.extend([bytes(backend, codes), bytes(backend, absmax), bytes(backend, map)]);
            all.push(offset.to_ne_bytes().to_vec());
        }
        Scales::Products { codes, factors, .. } => {
            all.extend([bytes(backend, codes), bytes(backend, factors)]);
        }
    }
    all.extend(x.zeros().map(|z| bytes(backend, z)));
    all
}

fn dequantized(backend: &Backend, x: &Quantized, dtype: DType) -> Tensor {
    let mut out = backend.empty(x.shape(), dtype).unwrap();
    backend.dequantize(&mut out, x).unwrap();
    out
}

#[test]
fn every_instruction_set_quantizes_as_the_reference() {
    let (reference, mut values) = (Reference::<f32>::backend(), Values(11));
    let backends = backends();
    for config in configs() {
        for shape in [[1, 1], [3, 64], [7, 33], [130, 20], [16, 256], [5, 129]] {
            for dtype in [DType::F32, DType::BF16, DType::F16] {
                let x = random(&reference, shape, dtype, &mut values);
                let expected = reference.quantize(&x, &config).unwrap();
                for backend in &backends {
                    let found = backend.quantize(&x, &config).unwrap();
                    let context = format!("{} {} {shape:?} {dtype}", backend.name(), config.format.name);
                    assert!(parts(backend, &found) == parts(&reference, &expected), "{context}");
                    for out in [DType::F32, DType::BF16, DType::F16] {
                        let (a, b) =
                            (dequantized(backend, &found, out), dequantized(&reference, &expected, out));
                        assert_eq!(bytes(backend, &a), bytes(&reference, &b), "{context} to {out}");
                    }
                }
            }
        }
    }
}

/// Zero blocks, tiny and huge ones.
#[test]
fn extreme_blocks() {
    let reference = Reference::<f32>::backend();
    let scales = [0.0, 1e-45, 1e-39, 1.2e-38, 1e-30, 1e30, 3e38];
    let data: Vec<f32> =
        scales.iter().flat_map(|s| (0..64).map(move |i| s * (i as f32 / 63.0 - 0.4))).collect();
    let x = reference.from_slice(&data, &[scales.len(), 64]).unwrap();
    for config in configs() {
        let expected = reference.quantize(&x, &config).unwrap();
        let values: Vec<f32> = reference.to_vec(&dequantized(&reference, &expected, DType::F32)).unwrap();
        assert!(values.iter().all(|x| x.is_finite()), "{}", config.format.name);
        for backend in backends() {
            let found = backend.quantize(&x, &config).unwrap();
            assert!(parts(&backend, &found) == parts(&reference, &expected), "{}", backend.name());
            let (a, b) =
                (dequantized(&backend, &found, DType::BF16), dequantized(&reference, &expected, DType::BF16));
            assert_eq!(
                bytes(&backend, &a),
                bytes(&reference, &b),
                "{} {}",
                backend.name(),
                config.format.name
            );
        }
    }
}

/// `x W^T` and `dy W` with the bits of dequantizing `W` first, for one row as for many.
#[test]
fn products_equal_those_of_the_dequantized_matrix() {
    let mut values = Values(3);
    let shapes = [[16, 64], [33, 64], [64, 96], [48, 128], [65, 200], [40, 33], [96, 640], [136, 576]];
    for backend in backends() {
        for config in configs() {
            for (index, shape) in shapes.into_iter().enumerate() {
                let dtype = if index % 2 == 0 { DType::BF16 } else { DType::F32 };
                for dtype in [dtype, if index < 4 { DType::F32 } else { dtype }] {
                    let w = random(&backend, shape, DType::F32, &mut values);
                    let w = backend.quantize(&w, &config).unwrap();
                    let plain = dequantized(&backend, &w, dtype);
                    for (rows, transposed) in [(1, true), (17, true), (1, false), (45, false), (300, true)] {
                        let k = if transposed { shape[1] } else { shape[0] };
                        let a = random(&backend, [rows, k], dtype, &mut values);
                        let product = |b: Matrix<'_>| {
                            let n = b.shape().1;
                            let mut out = backend.empty(&[rows, n], DType::F32).unwrap();
                            let terms = [GemmTerm { a: Matrix::plain(&a), b }];
                            backend.gemm(&mut out, &Gemm::new(&terms)).unwrap();
                            bytes(&backend, &out)
                        };
                        assert_eq!(
                            product(Matrix::Quantized { matrix: &w, transposed }),
                            product(Matrix::Dense { tensor: &plain, transposed }),
                            "{} {} {shape:?} {dtype} {rows} rows, transposed {transposed}",
                            backend.name(),
                            config.format.name
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn products_in_formats_that_are_only_read() {
    let mut values = Values(8);
    for backend in backends() {
        for format in &READ_ONLY {
            for (shape, tiny) in [([40, 256], false), ([33, 512], false), ([70, 256], true)] {
                let w = read_only(&backend, format, shape, &mut values, tiny);
                for dtype in [DType::BF16, DType::F32] {
                    let plain = dequantized(&backend, &w, dtype);
                    for (rows, transposed) in [(1, true), (3, true), (45, true), (1, false), (45, false)] {
                        let k = if transposed { shape[1] } else { shape[0] };
                        let a = random(&backend, [rows, k], dtype, &mut values);
                        let product = |b: Matrix<'_>| {
                            let mut out = backend.empty(&[rows, b.shape().1], DType::F32).unwrap();
                            let terms = [GemmTerm { a: Matrix::plain(&a), b }];
                            backend.gemm(&mut out, &Gemm::new(&terms)).unwrap();
                            bytes(&backend, &out)
                        };
                        assert_eq!(
                            product(Matrix::Quantized { matrix: &w, transposed }),
                            product(Matrix::Dense { tensor: &plain, transposed }),
                            "{} {} {shape:?} {dtype} {rows} rows, transposed {transposed}",
                            backend.name(),
                            format.name
                        );
                    }
                }
            }
        }
        let config = QuantConfig::new(&READ_ONLY[0]);
        let x = random(&backend, [1, 64], DType::F32, &mut values);
        assert!(backend.quantize(&x, &config).unwrap_err().to_string().contains("never made"));
    }
}

/// The layout for decoding changes no bits, for few rows and many, either way round, nor what dequantizing gives.
#[test]
fn products_of_matrices_laid_out_for_decoding() {
    let mut values = Values(5);
    let minimums = QuantConfig { blocksize: 32, ..QuantConfig::new(&READ_ONLY[0]) };
    for backend in backends() {
        for config in configs().into_iter().chain([minimums]) {
            for shape in [[32, 64], [64, 96], [96, 640], [160, 1152], [40, 64], [32, 192]] {
                let w = if config.format.minimums() {
                    read_only(&backend, config.format, shape, &mut values, false)
                } else {
                    let w = random(&backend, shape, DType::F32, &mut values);
                    backend.quantize(&w, &config).unwrap()
                };
                let (mut laid_out, mut second) = (w.clone(), w.clone());
                backend.lay_out_for_decoding(&mut [&mut laid_out, &mut second]).unwrap();
                let context = format!("{} {} {shape:?}", backend.name(), config.format.name);
                let flat = config.format.blocks == Blocks::Flat;
                let whole = shape[0] % 32 == 0 && shape[1] % if flat { config.blocksize } else { 32 } == 0;
                let taken = whole && backend.name().contains("avx512bf16");
                assert_eq!(laid_out.layout() == Layout::Panels, taken, "{context}");
                for dtype in [DType::F32, DType::BF16] {
                    let [a, b] = [&w, &laid_out].map(|w| bytes(&backend, &dequantized(&backend, w, dtype)));
                    assert!(a == b, "{context} to {dtype}");
                    assert!(
                        a == bytes(&backend, &dequantized(&backend, &second, dtype)),
                        "{context}, the second"
                    );
                    for (rows, transposed) in [
                        (1, true),
                        (2, true),
                        (3, true),
                        (4, true),
                        (5, true),
                        (45, true),
                        (1, false),
                        (45, false),
                    ] {
                        let k = if transposed { shape[1] } else { shape[0] };
                        let a = random(&backend, [rows, k], dtype, &mut values);
                        let [found, expected] = [&laid_out, &w].map(|matrix| {
                            let b = Matrix::Quantized { matrix, transposed };
                            let mut out = backend.empty(&[rows, b.shape().1], DType::F32).unwrap();
                            let terms = [GemmTerm { a: Matrix::plain(&a), b }];
                            backend.gemm(&mut out, &Gemm::new(&terms)).unwrap();
                            bytes(&backend, &out)
                        });
                        assert!(found == expected, "{context} {dtype} {rows} rows, transposed {transposed}");
                    }
                }
            }
        }
    }
}

/// Scales of small floats so large that they can't take a code's bias too.
#[test]
fn products_with_large_small_floats() {
    let mut values = Values(6);
    for backend in backends() {
        for config in configs().into_iter().filter(|c| matches!(c.format.codes, Codes::Fp8(_))) {
            let large: Vec<f32> = (0..32 * 128).map(|_| 1e9 * values.value()).collect();
            let w = backend.quantize(&backend.from_slice(&large, &[32, 128]).unwrap(), &config).unwrap();
            let mut laid_out = w.clone();
            backend.lay_out_for_decoding(&mut [&mut laid_out]).unwrap();
            assert_eq!(laid_out.layout(), Layout::Rows, "{} {}", backend.name(), config.format.name);
        }
    }
}

/// Scales so small that products are denormal, which the instructions for bf16 would round otherwise.
#[test]
fn products_with_denormal_weights() {
    let mut values = Values(4);
    let config = configs()[0];
    for backend in backends() {
        let tiny: Vec<f32> =
            (0..32 * 128).map(|i| values.value() * if i / 64 % 2 == 0 { 2e-38 } else { 3e-39 }).collect();
        let w = backend.quantize(&backend.from_slice(&tiny, &[32, 128]).unwrap(), &config).unwrap();
        let mut laid_out = w.clone();
        backend.lay_out_for_decoding(&mut [&mut laid_out]).unwrap();
        assert_eq!(laid_out.layout(), Layout::Rows, "{}", backend.name());
        let plain = dequantized(&backend, &w, DType::BF16);
        let a = backend.from_slice(&vec![bf16::from_f32(1e20); 3 * 128], &[3, 128]).unwrap();
        let product = |b: Matrix<'_>| {
            let mut out = backend.empty(&[3, 32], DType::F32).unwrap();
            backend.gemm(&mut out, &Gemm::new(&[GemmTerm { a: Matrix::plain(&a), b }])).unwrap();
            backend.to_vec::<f32>(&out).unwrap()
        };
        let found = product(Matrix::Quantized { matrix: &w, transposed: true });
        assert_eq!(found, product(Matrix::transposed(&plain)), "{}", backend.name());
        assert!(found.iter().any(|x| *x != 0.0));
    }
}

#[test]
fn elements_that_are_not_finite_are_refused() {
    let mut all = backends();
    all.push(Reference::<f32>::backend());
    for backend in all {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut data = vec![0.5f32; 4 * 64];
            data[77] = bad;
            let x = backend.from_slice(&data, &[4, 64]).unwrap();
            for config in configs() {
                let error = backend.quantize(&x, &config).unwrap_err().to_string();
                assert!(error.contains("finite"), "{} {}: {error}", backend.name(), config.format.name);
            }
        }
    }
}
