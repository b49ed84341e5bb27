//! CUDA kernels, on the host and on a GPU if there is one, over the table of cases: the CPU's bits, but for products in
//! bf16 and attention, whose error against f64 is within twice that of a plain computation.
#![cfg(feature = "cuda")]

mod common;

use common::cases::{Case, all};
use common::compare::{different_bits, within_twice_naive};
use common::cuda;
use common::gemm::{Values, read_only};
use lowrank::backend::cpu::Cpu;
use lowrank::backend::reference::Reference;
use lowrank::backend::{Backend, Gemm, GemmTerm, Matrix, Moments8bit, OptimizerStep, SampleRow};
use lowrank::optim::clip_scale;
use lowrank::quant::dynamic_map::SIGNED_ZERO;
use lowrank::quant::{FORMATS, QuantConfig, Quantized, READ_ONLY, Scales};
use lowrank::rng::{Philox, PhiloxKey, Stream};
use lowrank::{DType, Tensor};

/// Whether tensor cores or another order of sums than the CPU's may change bits.
fn is_approximate(case: &Case) -> bool {
    let bf16 = case.operands.iter().any(|x| x.dtype == DType::BF16);
    case.name.starts_with("attention") || case.name.starts_with("gemm") && bf16
}

/// What is wrong with the results of one case, if anything.
fn fault(case: &Case, cuda: &Backend, cpu: &Backend, naive: &Backend) -> Option<String> {
    let (ours, cpus) = (case.run(cuda, false), case.run(cpu, false));
    let misaligned = case.run(cuda, true);
    for (i, ours) in ours.iter().enumerate() {
        let moved = different_bits(ours, &misaligned[i]);
        if moved > 0 {
            return Some(format!("result {i}: {moved} of {} differ with the alignment", ours.len()));
        }
        let different = different_bits(ours, &cpus[i]);
        if !is_approximate(case) && different > 0 {
            return Some(format!("result {i}: {different} of {} differ from the CPU's", ours.len()));
        }
    }
    if is_approximate(case) {
        let (naive, truth) = (case.run(naive, false), case.truth());
        for (i, ours) in ours.iter().enumerate() {
            if let Err(message) = within_twice_naive(ours, &naive[i], &truth[i], case.operands[i].dtype) {
                return Some(format!("result {i}: {message}"));
            }
        }
    }
    None
}

fn check(dtype: DType) {
    let (cpu, naive) = (Cpu::new(Some(1)).unwrap(), Reference::<f32>::backend());
    let cases = all(dtype);
    for cuda in cuda::all() {
        let faults: Vec<String> = cases
            .iter()
            .filter_map(|case| fault(case, &cuda, &cpu, &naive).map(|f| format!("{}: {f}", case.name)))
            .collect();
        assert!(faults.is_empty(), "{}:\n{}", cuda.name(), faults.join("\n"));
    }
}

#[test]
fn f32_operations() {
    check(DType::F32);
}

#[test]
fn bf16_operations() {
    check(DType::BF16);
}

fn random(n: usize) -> Vec<f32> {
    let mut rng = Philox::new(PhiloxKey::new(5, Stream::Dummy, 0));
    (0..n).map(|_| rng.normal()).collect()
}

#[test]
fn sums_of_squares() {
    let cudas = cuda::all();
    let values = random(20_011);
    let cpu = Cpu::new(Some(1)).unwrap();
    for cuda in cudas {
        for n in [0, 1, 7, 97, 4096, 4097, 20_011] {
            let on = |backend: &Backend| {
                backend.sum_squares(&backend.from_slice(&values[..n], &[n]).unwrap()).unwrap()
            };
            assert_eq!(on(&cuda), on(&cpu), "{n} elements");
        }
    }
}

/// All parts of a quantized matrix.
fn parts(backend: &Backend, q: &Quantized) -> (Vec<u8>, Vec<f32>, Vec<u8>, Vec<u8>) {
    let bytes = |x: &Tensor| backend.to_vec::<u8>(x).unwrap();
    let zeros = q.zeros().map(bytes).unwrap_or_default();
    match q.scales() {
        Scales::Plain(scales) => (bytes(q.codes()), backend.to_f32(scales).unwrap(), zeros, Vec::new()),
        Scales::Nested { codes, absmax, offset, .. } => {
            let absmax = [backend.to_f32(absmax).unwrap(), vec![*offset]].concat();
            (bytes(q.codes()), absmax, zeros, bytes(codes))
        }
        Scales::Products { codes, factors, .. } => {
            (bytes(q.codes()), backend.to_f32(factors).unwrap(), zeros, bytes(codes))
        }
    }
}

#[test]
fn quantized_matrices() {
    let cudas = cuda::all();
    let cpu = Cpu::new(Some(1)).unwrap();
    for (rows, cols) in [(6, 128), (3, 257), (130, 150), (1, 1)] {
        let mut values = random(rows * cols);
        values[rows * cols / 2] = 0.0;
        for format in &FORMATS {
            let config = QuantConfig::new(format);
            for double_quant in [false, true] {
                let config = QuantConfig { double_quant: double_quant && config.double_quant, ..config };
                for dtype in [DType::F32, DType::BF16, DType::F16] {
                    let on = |backend: &Backend| {
                        let x = backend.from_slice(&values, &[rows, cols]).unwrap();
                        let q = backend.quantize(&backend.to_dtype(&x, dtype).unwrap(), &config).unwrap();
                        let mut y = backend.empty(&[rows, cols], dtype).unwrap();
                        backend.dequantize(&mut y, &q).unwrap();
                        (parts(backend, &q), backend.to_f32(&y).unwrap())
                    };
                    let expected = on(&cpu);
                    for cuda in &cudas {
                        assert_eq!(on(cuda), expected, "{config:?} {rows}x{cols} {dtype}");
                    }
                }
            }
        }
    }
    for cuda in cudas {
        for bad in [f32::NAN, f32::INFINITY] {
            let x = cuda.from_slice(&[1.0, bad, 2.0, 3.0], &[2, 2]).unwrap();
            let error = cuda.quantize(&x, &QuantConfig::new(&FORMATS[0])).unwrap_err().to_string();
            assert!(error.contains("finite"), "{error}");
        }
    }
}

/// Matrices of GGUF files: decoded to the CPU's bits, and products with those of the decoded matrix.
#[test]
fn formats_that_are_only_read() {
    let cpu = Cpu::new(Some(1)).unwrap();
    for cuda in cuda::all() {
        for format in &READ_ONLY {
            for shape in [[40, 256], [33, 512], [136, 256]] {
                let w = |backend: &Backend| read_only(backend, format, shape, &mut Values(8), false);
                let (w, on_cpu) = (w(&cuda), w(&cpu));
                for dtype in [DType::F32, DType::BF16] {
                    let decoded = |backend: &Backend, w: &Quantized| {
                        let mut out = backend.empty(&shape, dtype).unwrap();
                        backend.dequantize(&mut out, w).unwrap();
                        out
                    };
                    let plain = decoded(&cuda, &w);
                    let expected = cpu.to_f32(&decoded(&cpu, &on_cpu)).unwrap();
                    assert_eq!(cuda.to_f32(&plain).unwrap(), expected, "{} {shape:?} {dtype}", format.name);
                    // The largest shape is for the larger tiles.
                    let large = [(70, true), (130, true), (130, false)];
                    let few = [(1, true), (19, true), (3, false)];
                    for (rows, transposed) in if shape[0] == 136 { large } else { few } {
                        let k = shape[usize::from(transposed)];
                        let a = cuda.from_slice(&random(rows * k), &[rows, k]).unwrap();
                        let a = cuda.to_dtype(&a, dtype).unwrap();
                        let product = |b: Matrix<'_>| {
                            let mut out = cuda.empty(&[rows, b.shape().1], DType::F32).unwrap();
                            let terms = [GemmTerm { a: Matrix::plain(&a), b }];
                            cuda.gemm(&mut out, &Gemm::new(&terms)).unwrap();
                            cuda.to_vec::<f32>(&out).unwrap()
                        };
                        assert_eq!(
                            product(Matrix::Quantized { matrix: &w, transposed }),
                            product(Matrix::Dense { tensor: &plain, transposed }),
                            "{} {shape:?} {dtype} {rows} rows, transposed {transposed}",
                            format.name
                        );
                    }
                }
            }
        }
    }
}

/// Tokens for the same scores, settings and draws, among few and many.
#[test]
fn sampled_tokens() {
    let cpu = Cpu::new(Some(1)).unwrap();
    let mut rng = Philox::new(PhiloxKey::new(5, Stream::Dummy, 1));
    for vocabulary in [1, 63, 300, 9001] {
        let settings = [
            (0.0, 0, 1.0),
            (1.0, 0, 1.0),
            (0.7, 40, 1.0),
            (1.3, 0, 0.9),
            (0.2, 7, 0.5),
            (5.0, 0, 0.999),
            (1.0, 1, 0.1),
        ];
        let ids: Vec<u32> = (0..vocabulary as u32).step_by(17).collect();
        let rows: Vec<SampleRow<'_>> = (0..3 * settings.len())
            .map(|i| {
                let (temperature, top_k, top_p) = settings[i % settings.len()];
                let repetition_penalty = if i % 2 == 0 { 1.3 } else { 1.0 };
                SampleRow {
                    temperature,
                    top_k,
                    top_p,
                    uniform: if i == 1 { 0.999_999_94 } else { rng.uniform() },
                    repetition_penalty,
                    seen: if i % 2 == 0 { &ids } else { &[] },
                    banned: if i % 3 == 0 && vocabulary > 1 { &ids[..1] } else { &[] },
                }
            })
            .collect();
        let n = rows.len() * vocabulary;
        let mut scores: Vec<f32> = random(n).iter().map(|x| 3.0 * x).collect();
        // Equal scores, and zeros of both signs.
        scores.iter_mut().step_by(5).for_each(|x| *x = 2.5);
        scores[..vocabulary]
            .iter_mut()
            .enumerate()
            .for_each(|(i, x)| *x = if i % 2 == 0 { -0.0 } else { 0.0 });
        let tokens = |backend: &Backend, scores: &[f32]| {
            let mut logits = backend.from_slice(scores, &[rows.len(), vocabulary]).unwrap();
            backend.sample(&mut logits, &rows).unwrap()
        };
        let expected = tokens(&cpu, &scores);
        assert!(expected.iter().all(Option::is_some));
        for cuda in cuda::all() {
            assert_eq!(tokens(&cuda, &scores), expected, "{vocabulary} tokens");
            let mut damaged = scores.clone();
            damaged[3 * vocabulary] = f32::NAN;
            let found = tokens(&cuda, &damaged);
            assert_eq!(found, tokens(&cpu, &damaged));
            // Where it was banned it does no harm.
            assert_eq!(found[3].is_some(), vocabulary > 1);
        }
    }
}

#[test]
fn moments_in_eight_bits() {
    let cudas = cuda::all();
    let step = OptimizerStep {
        learning_rate: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        grad_scale: 0.7,
        verdict: None,
        bias_correction1: 0.1,
        bias_correction2_sqrt: 0.03,
    };
    let cpu = Cpu::new(Some(1)).unwrap();
    for n in [1usize, 255, 256, 1000] {
        let on = |backend: &Backend| {
            let blocks = n.div_ceil(256);
            let mut p = backend.from_slice(&random(n), &[n]).unwrap();
            let mut m = backend.from_slice(&vec![SIGNED_ZERO; n], &[n]).unwrap();
            let mut v = backend.from_slice(&vec![0u8; n], &[n]).unwrap();
            let mut m_absmax = backend.zeros(&[blocks], DType::F32).unwrap();
            let mut v_absmax = backend.zeros(&[blocks], DType::F32).unwrap();
            for scale in [1.0, -0.3, 0.01] {
                let g: Vec<f32> = random(n).iter().map(|x| scale * x).collect();
                let g = backend.from_slice(&g, &[n]).unwrap();
                let mut moments =
                    Moments8bit { m: &mut m, v: &mut v, m_absmax: &mut m_absmax, v_absmax: &mut v_absmax };
                backend.adamw_8bit(&mut p, &g, &mut moments, &step).unwrap();
            }
            let codes = [backend.to_vec::<u8>(&m).unwrap(), backend.to_vec::<u8>(&v).unwrap()];
            (codes, [&p, &m_absmax, &v_absmax].map(|x| backend.to_f32(x).unwrap()))
        };
        let expected = on(&cpu);
        for cuda in &cudas {
            assert_eq!(on(cuda), expected, "{n} elements");
        }
    }
}

/// What the device finds out about steps: the host's factor bit for bit, and the first step that is not finite.
#[test]
fn steps_are_judged_as_by_the_host() {
    for cuda in cuda::all() {
        let tensor = |x: &[f32]| cuda.from_slice(x, &[x.len()]).unwrap();
        let losses = [tensor(&[1.0; 300]), tensor(&[2.5])];
        for (n, factor) in [(1, 1e-9), (5000, 1.0), (70_003, 1e-4), (1_100_000, 3e3)] {
            let gradients = tensor(&random(n).iter().map(|x| factor * x).collect::<Vec<_>>());
            let norm = cuda.sum_squares(&gradients).unwrap().sqrt();
            for bound in [None, Some(1e-3), Some(0.3), Some(1e30)] {
                let mut verdict = cuda.verdict().unwrap().unwrap();
                cuda.judge(&mut verdict, 7, Some(&gradients), &losses, bound).unwrap();
                let found = cuda.to_vec::<f32>(&verdict).unwrap();
                assert_eq!(found, [0.0, 0.0, clip_scale(norm, bound)], "{n} {bound:?}");
            }
        }
        let fine = tensor(&[0.5; 5000]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
            let mut some = vec![0.5; 5000];
            some[4321] = bad;
            let some = tensor(&some);
            let mut verdict = cuda.verdict().unwrap().unwrap();
            cuda.judge(&mut verdict, 1, Some(&fine), &losses, Some(1.0)).unwrap();
            cuda.judge(&mut verdict, 2, Some(&some), &losses, Some(1.0)).unwrap();
            cuda.judge(&mut verdict, 3, Some(&some), std::slice::from_ref(&some), Some(1.0)).unwrap();
            assert_eq!(cuda.to_vec::<f32>(&verdict).unwrap()[..2], [2.0, 0.0], "{bad}");
            let mut verdict = cuda.verdict().unwrap().unwrap();
            cuda.judge(&mut verdict, 3, Some(&some), &[fine.clone(), some.clone()], Some(1.0)).unwrap();
            cuda.judge(&mut verdict, 4, Some(&fine), &losses, Some(1.0)).unwrap();
            let is_loss = f32::from(!bad.is_finite());
            assert_eq!(cuda.to_vec::<f32>(&verdict).unwrap()[..2], [3.0, is_loss], "{bad}");
        }
    }
}

#[test]
fn indices_outside_are_errors_of_the_next_wait() {
    for cuda in cuda::all() {
        let floats = |shape: &[usize]| cuda.zeros(shape, DType::F32).unwrap();
        for row in [-1, 5] {
            let rows = cuda.from_slice(&[0, 1, row], &[3]).unwrap();
            let (mut y, table) = (floats(&[3, 4]), floats(&[5, 4]));
            let expect = |operation: &str| {
                let error = cuda.to_f32(&table).unwrap_err().to_string();
                assert!(error.contains(operation) && error.contains("outside"), "{error}");
                cuda.to_f32(&table).unwrap();
            };
            cuda.gather_rows(&mut y, &table, &rows).unwrap();
            expect("gather_rows");
            cuda.scatter_add_rows(&mut floats(&[5, 4]), &y, &rows).unwrap();
            expect("scatter_add_rows");
            cuda.cross_entropy(&mut floats(&[3]), None, &floats(&[3, 5]), &rows, 1.0).unwrap();
            expect("cross_entropy");
        }
        let mut y = floats(&[3, 4]);
        assert!(cuda.add(&mut y, &floats(&[3, 5]), &floats(&[3, 5])).is_err());
        let on_host = Cpu::new(Some(1)).unwrap().zeros(&[3, 4], DType::F32).unwrap();
        let error = cuda.add(&mut y, &on_host, &on_host).unwrap_err().to_string();
        assert!(error.contains("device"), "{error}");
        cuda.add(&mut y, &cuda.place(&on_host).unwrap(), &cuda.place(&on_host).unwrap()).unwrap();
    }
}
