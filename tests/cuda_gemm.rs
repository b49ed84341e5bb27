//! Matrix products of the CUDA backend, on the host in every order of threads and on a GPU if there is one.
//!
//! In f32 arithmetic they have the CPU's bits. In bf16 an element's bits depend on its row, its column and the
//! contraction alone: not on how many rows there are, on which kernel computes them, or on whether the weight is
//! decoded before or in the kernel; and its error is within twice that of plain arithmetic.
#![cfg(feature = "cuda")]

mod common;

use common::compare::{different_bits, within_twice_naive};
use common::cuda::{self, Recorder};
use common::gemm::{Values, configs, read_only};
use lowrank::backend::cpu::Cpu;
use lowrank::backend::cuda::Cuda;
use lowrank::backend::reference::Reference;
use lowrank::backend::{Backend, Gemm, GemmTerm, Matrix, RowTerm};
use lowrank::quant::{Format, QuantConfig, Quantized, READ_ONLY, Scales};
use lowrank::{DType, Tensor};
use std::collections::BTreeSet;

/// A matrix of values that are exact in bf16.
struct Host {
    values: Vec<f32>,
    shape: [usize; 2],
}

impl Host {
    fn random(shape: [usize; 2], values: &mut Values) -> Self {
        let next = |values: &mut Values| half::bf16::from_f32(values.value()).to_f32();
        Host { values: (0..shape[0] * shape[1]).map(|_| next(values)).collect(), shape }
    }

    /// On a device, one element behind an aligned address if `misaligned`.
    fn upload(&self, backend: &Backend, dtype: DType, misaligned: bool) -> Tensor {
        let front = usize::from(misaligned);
        let data = [vec![0.0; front], self.values.clone()].concat();
        // The CPU rounds; the bytes go over as they are.
        let cpu = Cpu::new(Some(1)).unwrap();
        let narrow = cpu.to_dtype(&cpu.from_slice(&data, &[data.len()]).unwrap(), dtype).unwrap();
        let there = backend.place(&narrow).unwrap();
        there.slice(front..data.len()).unwrap().reshape(&self.shape).unwrap()
    }
}

/// The result's bits as f32.
fn product(backend: &Backend, gemm: &Gemm<'_>, shape: [usize; 2], out: DType) -> Vec<f32> {
    let mut y = backend.empty(&shape, out).unwrap();
    backend.gemm(&mut y, gemm).unwrap();
    backend.to_f32(&y).unwrap()
}

/// For what the order of threads has little to do with.
fn one() -> Backend {
    cuda::all().pop().unwrap()
}

fn same(a: &[f32], b: &[f32], what: &str) {
    let different = different_bits(a, b);
    assert!(different == 0, "{what}: {different} of {} differ", a.len());
}

/// Products of every layout and kernel: a base of depth 200 and a low-rank part of depth 16 or 5 are within the bound, a
/// row of few has the bits of the same row of many, and so have operands at odd addresses, which another kernel takes.
#[test]
fn rows_have_bits_of_their_own() {
    let mut values = Values(5);
    let cpu = Cpu::new(Some(1)).unwrap();
    let exact = Reference::<f64>::backend();
    let chips = cuda::chips();
    for (index, (at, bt)) in LAYOUTS.into_iter().enumerate() {
        let (n, k, r) = (136, [200, 328, 64][index], [16, 8, 24][index]);
        let rows_of = |m| if at { vec![m] } else { vec![1, 7, 64, m] };
        let m = 248;
        let stored = |rows, cols, transposed| if transposed { [cols, rows] } else { [rows, cols] };
        let operands: Vec<(Host, Host)> = [k, r]
            .iter()
            .map(|k| {
                let a = Host::random(stored(m, *k, at), &mut values);
                (a, Host::random(stored(*k, n, bt), &mut values))
            })
            .collect();
        let bias = Host::random([1, n], &mut values);
        let run = |backend: &Backend, rows: usize, misaligned: bool, dtype: DType, out: DType| {
            let tensors: Vec<_> = operands
                .iter()
                .map(|(a, b)| (a.upload(backend, dtype, misaligned), b.upload(backend, dtype, misaligned)))
                .collect();
            let first: Vec<_> =
                tensors.iter().map(|(a, _)| if at { a.clone() } else { a.slice(0..rows).unwrap() }).collect();
            let terms: Vec<_> = first
                .iter()
                .zip(&tensors)
                .map(|(a, (_, b))| GemmTerm {
                    a: Matrix::Dense { tensor: a, transposed: at },
                    b: Matrix::Dense { tensor: b, transposed: bt },
                })
                .collect();
            let bias = bias.upload(backend, dtype, misaligned);
            let gemm = Gemm { bias: Some(&bias), scale: 0.5, ..Gemm::new(&terms) };
            product(backend, &gemm, [rows, n], out)
        };
        let naive = run(&cpu, m, false, DType::BF16, DType::F32);
        let truth = run(&exact, m, false, DType::F32, DType::F32);
        for chip in &chips {
            let all = run(&chip[0], m, false, DType::BF16, DType::F32);
            within_twice_naive(&all, &naive, &truth, DType::F32).unwrap();
            for (i, cuda) in chip.iter().enumerate() {
                for rows in rows_of(m) {
                    let what = format!("{} {i}, layout {at} {bt}, {rows} rows", cuda.name());
                    same(&run(cuda, rows, false, DType::BF16, DType::F32), &all[..rows * n], &what);
                    if rows < m {
                        same(&run(cuda, rows, true, DType::BF16, DType::F32), &all[..rows * n], &what);
                    }
                }
            }
            let rounded = run(chip.last().unwrap(), m, false, DType::BF16, DType::BF16);
            let expected: Vec<f32> = all.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect();
            same(&rounded, &expected, "bf16 results");
        }
    }
}

fn placed(backend: &Backend, x: &Quantized) -> Quantized {
    let place = |x: &Tensor| backend.place(x).unwrap();
    let scales = match x.scales() {
        Scales::Plain(scales) => Scales::Plain(place(scales)),
        Scales::Nested { codes, absmax, map, offset } => {
            Scales::Nested { codes: place(codes), absmax: place(absmax), map: place(map), offset: *offset }
        }
        Scales::Products { .. } => unreachable!("no format that matrices are quantized to has them"),
    };
    Quantized::new(x.config(), *x.shape(), place(x.codes()), scales, x.zeros().map(place), x.dtype()).unwrap()
}

/// A quantized weight on the CPU, and its elements in a type.
fn quantized(
    cpu: &Backend,
    config: &QuantConfig,
    shape: [usize; 2],
    dtype: DType,
    values: &mut Values,
) -> (Quantized, Tensor) {
    let w: Vec<f32> = (0..shape[0] * shape[1]).map(|_| 0.1 * values.value()).collect();
    let w = cpu.quantize(&cpu.from_slice(&w, &shape).unwrap(), config).unwrap();
    let mut plain = cpu.empty(&shape, dtype).unwrap();
    cpu.dequantize(&mut plain, &w).unwrap();
    (w, plain)
}

/// `x W^T` and `dy W` have the bits of decoding `W` first, for every format, by every kernel.
#[test]
fn quantized_products_equal_those_of_the_decoded_matrix() {
    let mut values = Values(3);
    let cpu = Cpu::new(Some(1)).unwrap();
    let shapes = [[64, 96], [40, 160], [65, 200], [33, 64], [136, 224], [40, 1280], [24, 1344]];
    let chips = cuda::chips();
    let turns = configs().into_iter().enumerate().flat_map(|turn| chips.iter().map(move |chip| (turn, chip)));
    for ((turn, config), chip) in turns {
        let cuda = &chip[turn % chip.len()];
        for (index, shape) in shapes.into_iter().enumerate() {
            let (w, plain) = quantized(&cpu, &config, shape, DType::BF16, &mut values);
            let (w, plain) = (placed(cuda, &w), cuda.place(&plain).unwrap());
            // The widest shape is for the largest tile, the longest ones for parts of several tiles.
            let sizes = match index {
                4 => [(130, true), (130, false)],
                5 => [(1, true), (29, true)],
                6 => [(8, true), (12, true)],
                1 | 3 => [(29, true), (3, false)],
                _ => [(1, true), (45, false)],
            };
            for (rows, transposed) in sizes {
                let (n, k) = if transposed { (shape[0], shape[1]) } else { (shape[1], shape[0]) };
                let x = Host::random([rows, k], &mut values).upload(cuda, DType::BF16, false);
                let h = Host::random([rows, 16], &mut values).upload(cuda, DType::BF16, false);
                let up = if transposed { [n, 16] } else { [16, n] };
                let up = Host::random(up, &mut values).upload(cuda, DType::BF16, false);
                let run = |b: Matrix<'_>| {
                    let low_rank = Matrix::Dense { tensor: &up, transposed };
                    let terms = [
                        GemmTerm { a: Matrix::plain(&x), b },
                        GemmTerm { a: Matrix::plain(&h), b: low_rank },
                    ];
                    product(cuda, &Gemm::new(&terms), [rows, n], DType::F32)
                };
                same(
                    &run(Matrix::Quantized { matrix: &w, transposed }),
                    &run(Matrix::Dense { tensor: &plain, transposed }),
                    &format!("{config:?} {shape:?}, {rows} rows, transposed {transposed}"),
                );
            }
        }
    }
}

/// Matrices of GGUF files are decoded in runs, by the portable kernels on every chip.
#[test]
fn formats_that_are_only_read_have_kernels() {
    for capability in [80, 90] {
        let recorder = Recorder::here(capability);
        let backend = Cuda::on(recorder.clone()).unwrap();
        for (format, (rows, transposed)) in READ_ONLY
            .iter()
            .flat_map(|format| [(format, (1, true)), (format, (200, true)), (format, (5, false))])
        {
            let w = read_only(&backend, format, [64, 256], &mut Values(8), false);
            let (n, k) = if transposed { (64, 256) } else { (256, 64) };
            let x = Host::random([rows, k], &mut Values(2)).upload(&backend, DType::BF16, false);
            let b = Matrix::Quantized { matrix: &w, transposed };
            recorder.take();
            product(&backend, &Gemm::new(&[GemmTerm { a: Matrix::plain(&x), b }]), [rows, n], DType::F32);
            let kernel = recorder.take().1;
            let few = format.bits() == 4 && rows == 1;
            assert!(
                kernel.starts_with(if few { "gemv" } else { "gemm_decoded" }),
                "{}: {kernel}",
                format.name
            );
        }
    }
}

/// Weights of f16 and f32 are rounded to bf16 as they are used.
#[test]
fn products_of_other_floats_equal_those_of_the_rounded_matrix() {
    let mut values = Values(21);
    let (cpu, cuda) = (Cpu::new(Some(1)).unwrap(), one());
    for (shape, rows) in [([40, 88], 5), ([72, 64], 70), ([136, 136], 130), ([33, 13], 9)] {
        for dtype in [DType::F16, DType::F32] {
            let w: Vec<f32> = (0..shape[0] * shape[1]).map(|_| values.value()).collect();
            let w = cpu.to_dtype(&cpu.from_slice(&w, &shape).unwrap(), dtype).unwrap();
            let rounded = cpu.to_dtype(&cpu.to_dtype(&w, DType::F32).unwrap(), DType::BF16).unwrap();
            let (w, rounded) = (cuda.place(&w).unwrap(), cuda.place(&rounded).unwrap());
            for transposed in [true, false] {
                let (n, k) = if transposed { (shape[0], shape[1]) } else { (shape[1], shape[0]) };
                let x = Host::random([rows, k], &mut values).upload(&cuda, DType::BF16, false);
                let run = |w| {
                    let b = Matrix::Dense { tensor: w, transposed };
                    let terms = [GemmTerm { a: Matrix::plain(&x), b }];
                    product(&cuda, &Gemm::new(&terms), [rows, n], DType::F32)
                };
                same(&run(&w), &run(&rounded), &format!("{dtype} {shape:?}, transposed {transposed}"));
            }
        }
    }
}

/// Small results of long contractions have blocks for the parts of a sum, whichever comes last, again and again; the bits are
/// those of operands at odd addresses, which one block sums.
#[test]
fn parts_in_blocks_of_their_own_have_the_bits_of_one_block() {
    let recorder = Recorder::here(80);
    let mut backends = vec![Cuda::on(recorder.clone()).unwrap()];
    backends.extend(cuda::all());
    for (backend, bt) in backends.iter().flat_map(|backend| [(backend, true), (backend, false)]) {
        let (m, n, depths) = (13, 16, [8000, 40]);
        let term = |k: usize, misaligned: bool| {
            let mut values = Values(k as u64);
            let a = Host::random([m, k], &mut values).upload(backend, DType::BF16, misaligned);
            let b = if bt { [n, k] } else { [k, n] };
            (a, Host::random(b, &mut values).upload(backend, DType::BF16, misaligned))
        };
        let run = |misaligned: bool| -> Vec<f32> {
            let operands = depths.map(|k| term(k, misaligned));
            let terms = operands.each_ref().map(|(a, b)| GemmTerm {
                a: Matrix::plain(a),
                b: Matrix::Dense { tensor: b, transposed: bt },
            });
            let gemm = Gemm { scale: 0.5, ..Gemm::new(&terms) };
            let mut outputs: Vec<_> = (0..2).map(|_| backend.empty(&[m, n], DType::F32).unwrap()).collect();
            let mut products: Vec<_> = outputs.iter_mut().map(|y| (y, gemm)).collect();
            backend.gemm_all(&mut products).unwrap();
            outputs.iter().flat_map(|y| backend.to_f32(y).unwrap()).collect()
        };
        recorder.take();
        let expected = run(true);
        for _ in 0..2 {
            same(&run(false), &expected, &format!("{}, transposed {bt}", backend.name()));
        }
        let (kernels, _) = recorder.take();
        let parted = kernels.iter().filter(|kernel| kernel.starts_with("gemm_parts_16x32")).count();
        assert!(kernels.is_empty() || parted == 2, "{kernels:?}");
    }
}

/// In f32 arithmetic a quantized weight gives the CPU's bits.
#[test]
fn quantized_products_in_f32_have_the_bits_of_the_cpu() {
    let mut values = Values(9);
    let (cpu, cuda) = (Cpu::new(Some(1)).unwrap(), one());
    for config in configs() {
        for (shape, transposed) in [([40, 96], true), ([33, 57], false)] {
            let (w, _) = quantized(&cpu, &config, shape, DType::F32, &mut values);
            let there = placed(&cuda, &w);
            let (n, k) = if transposed { (shape[0], shape[1]) } else { (shape[1], shape[0]) };
            let x = Host::random([5, k], &mut values);
            let run = |backend: &Backend, matrix: &Quantized| {
                let x = x.upload(backend, DType::F32, false);
                let terms = [GemmTerm { a: Matrix::plain(&x), b: Matrix::Quantized { matrix, transposed } }];
                product(backend, &Gemm::new(&terms), [5, n], DType::F32)
            };
            same(&run(&cuda, &there), &run(&cpu, &w), &format!("{config:?} {shape:?}"));
        }
    }
}

/// Query, key and value at once, of different widths, give what they give one by one; more than a launch takes, too.
#[test]
fn products_at_once_equal_those_one_by_one() {
    let mut values = Values(13);
    let (cpu, cuda) = (Cpu::new(Some(1)).unwrap(), one());
    let nf4 = QuantConfig::new(Format::by_name("nf4").unwrap());
    for rows in [3, 70] {
        let x = Host::random([rows, 128], &mut values).upload(&cuda, DType::BF16, false);
        let weights: Vec<_> = [96, 32, 40, 8, 64, 0]
            .map(|n| placed(&cuda, &quantized(&cpu, &nf4, [n, 128], DType::BF16, &mut values).0))
            .into();
        let plain = Host::random([24, 128], &mut values).upload(&cuda, DType::BF16, true);
        let mut operands: Vec<_> =
            weights.iter().map(|matrix| Matrix::Quantized { matrix, transposed: true }).collect();
        operands.insert(2, Matrix::transposed(&plain));
        let terms: Vec<_> = operands.iter().map(|b| [GemmTerm { a: Matrix::plain(&x), b: *b }]).collect();
        let mut outputs: Vec<_> =
            operands.iter().map(|b| cuda.empty(&[rows, b.shape().1], DType::BF16).unwrap()).collect();
        let mut products: Vec<_> = outputs.iter_mut().zip(&terms).map(|(y, t)| (y, Gemm::new(t))).collect();
        cuda.gemm_all(&mut products).unwrap();
        for (y, terms) in outputs.iter().zip(&terms) {
            let alone = product(&cuda, &Gemm::new(terms), [rows, y.cols()], DType::BF16);
            same(&cuda.to_f32(y).unwrap(), &alone, &format!("{rows} rows, {} columns", y.cols()));
        }
    }
}

/// Rows with low-rank parts of different adapters have the bits that they have with their adapter alone, and rows
/// without one those of the base.
#[test]
fn rows_of_several_adapters_have_the_bits_they_have_alone() {
    let mut values = Values(17);
    let (cpu, cuda) = (Cpu::new(Some(1)).unwrap(), one());
    let nf4 = QuantConfig::new(Format::by_name("nf4").unwrap());
    let (k, n) = (192, 40);
    let w = placed(&cuda, &quantized(&cpu, &nf4, [n, k], DType::BF16, &mut values).0);
    for ranges in [vec![0..1, 1..2, 3..5], vec![2..40, 40..57], vec![3..6, 0..9]] {
        let rows = 60;
        let mut random = |shape| Host::random(shape, &mut values).upload(&cuda, DType::BF16, false);
        let x = random([rows, k]);
        let parts: Vec<_> =
            ranges.iter().map(|range| (range.clone(), random([range.len(), 8]), random([n, 8]))).collect();
        let base = [GemmTerm { a: Matrix::plain(&x), b: Matrix::Quantized { matrix: &w, transposed: true } }];
        let row_terms: Vec<_> = parts
            .iter()
            .map(|(range, h, up)| RowTerm {
                first_row: range.start,
                term: GemmTerm { a: Matrix::plain(h), b: Matrix::transposed(up) },
            })
            .collect();
        let together =
            product(&cuda, &Gemm { row_terms: &row_terms, ..Gemm::new(&base) }, [rows, n], DType::F32);
        for row in 0..rows {
            let x = x.slice(row..row + 1).unwrap();
            let mut own = vec![];
            for (range, h, up) in parts.iter().filter(|(range, ..)| range.contains(&row)) {
                own.push((h.slice(row - range.start..row - range.start + 1).unwrap(), up));
            }
            let mut terms = vec![GemmTerm { a: Matrix::plain(&x), ..base[0] }];
            terms.extend(
                own.iter().map(|(h, up)| GemmTerm { a: Matrix::plain(h), b: Matrix::transposed(up) }),
            );
            let alone = product(&cuda, &Gemm::new(&terms), [1, n], DType::F32);
            same(&together[row * n..][..n], &alone, &format!("row {row} with {ranges:?}"));
        }
    }
}

/// Sums without terms, of no depth, and on what is there.
#[test]
fn degenerate_products() {
    let cuda = one();
    for dtype in [DType::F32, DType::BF16] {
        let bias = cuda.to_dtype(&cuda.from_slice(&[1.5f32; 9], &[9]).unwrap(), dtype).unwrap();
        let mut y = cuda.to_dtype(&cuda.from_slice(&[2.0f32; 27], &[3, 9]).unwrap(), dtype).unwrap();
        let gemm = Gemm { scale: 0.5, bias: Some(&bias), accumulate: true, ..Gemm::new(&[]) };
        cuda.gemm(&mut y, &gemm).unwrap();
        assert_eq!(cuda.to_f32(&y).unwrap(), [2.5; 27]);
        let (a, b) = (cuda.empty(&[3, 0], dtype).unwrap(), cuda.empty(&[9, 0], dtype).unwrap());
        let terms = [GemmTerm { a: Matrix::plain(&a), b: Matrix::transposed(&b) }];
        cuda.gemm(&mut y, &Gemm { terms: &terms, ..gemm }).unwrap();
        assert_eq!(cuda.to_f32(&y).unwrap(), [2.75; 27]);
        let (a, b) = (cuda.zeros(&[3, 1], dtype).unwrap(), cuda.zeros(&[9, 1], dtype).unwrap());
        let five = [GemmTerm { a: Matrix::plain(&a), b: Matrix::transposed(&b) }; 5];
        let error = cuda.gemm(&mut y, &Gemm::new(&five)).unwrap_err().to_string();
        assert!(error.contains("at most 4 terms of a row, found 5"), "{error}");
    }
}

/// Products of many rows with each kind of weight, one or two at once with tables of their own, have the bits of the
/// portable kernels; Hopper's kernels have several tiles to go through, some partly or wholly outside.
#[test]
fn many_rows_have_the_bits_of_the_portable_kernels() {
    let mut values = Values(29);
    let chips = cuda::chips();
    let formats = [None, Some(["nf4", "fp4"]), Some(["int4-asym", "int4"]), Some(["int8-block", "fp8-e5m2"])];
    let mut turn = 0;
    for (m, n, k) in LARGE.into_iter().chain(LARGE_BF16) {
        for ((at, bt), formats) in
            LAYOUTS.into_iter().flat_map(|layout| formats.map(|formats| (layout, formats)))
        {
            if formats.is_some() && (at || LARGE_BF16.contains(&(m, n, k))) {
                continue;
            }
            let mut operand = |rows, columns, transposed| {
                Host::random(if transposed { [columns, rows] } else { [rows, columns] }, &mut values)
            };
            let (x, h) = (operand(m, k, at), operand(m, 40, at));
            let widths = [n, 64];
            let weights = widths.map(|n| (operand(k, n, bt), operand(40, n, bt)));
            let bias = operand(1, n, false);
            let run = |cuda: &Backend, count: usize| -> Vec<Vec<f32>> {
                let up = |x: &Host| x.upload(cuda, DType::BF16, false);
                let (x, h, bias) = (up(&x), up(&h), up(&bias));
                let weights: Vec<_> = weights.iter().map(|(w, low)| (up(w), up(low))).collect();
                let codes = formats.map(|names| {
                    let config = |name| QuantConfig::new(Format::by_name(name).unwrap());
                    let quantize = |i: usize| cuda.quantize(&weights[i].0, &config(names[i])).unwrap();
                    [quantize(0), quantize(1)]
                });
                let dense = |tensor, transposed| Matrix::Dense { tensor, transposed };
                let terms: Vec<_> = (0..count)
                    .map(|i| {
                        let b = match &codes {
                            Some(codes) => Matrix::Quantized { matrix: &codes[i], transposed: bt },
                            None => dense(&weights[i].0, bt),
                        };
                        let low = GemmTerm { a: dense(&h, at), b: dense(&weights[i].1, bt) };
                        [GemmTerm { a: dense(&x, at), b }, low]
                    })
                    .collect();
                let mut outputs: Vec<_> =
                    widths[..count].iter().map(|n| cuda.zeros(&[m, *n], DType::F32).unwrap()).collect();
                let with_bias =
                    |i: usize| Gemm { bias: (i == 0).then_some(&bias), scale: 0.5, ..Gemm::new(&terms[i]) };
                let mut products: Vec<_> =
                    outputs.iter_mut().enumerate().map(|(i, y)| (y, with_bias(i))).collect();
                cuda.gemm_all(&mut products).unwrap();
                outputs.iter().map(|y| cuda.to_f32(y).unwrap()).collect()
            };
            for (chip, count) in chips.iter().flat_map(|chip| [(chip, 1), (chip, 2)]) {
                turn += 1;
                let cuda = &chip[1 + turn % (chip.len() - 1)];
                for (found, expected) in run(cuda, count).iter().zip(run(&chip[0], count)) {
                    let what =
                        format!("{}: {m}x{n}x{k}, {at} {bt}, {formats:?}, {count} at once", cuda.name());
                    same(found, &expected, &what);
                }
            }
        }
    }
}

/// Products that reach every kernel for Hopper, those of codes with the first ones alone.
const LARGE: [(usize, usize, usize); 3] = [(376, 288, 352), (256, 160, 608), (104, 96, 1600)];
const LARGE_BF16: [(usize, usize, usize); 3] = [(408, 160, 352), (184, 480, 352), (120, 480, 352)];

const LAYOUTS: [(bool, bool); 3] = [(false, true), (false, false), (true, false)];

/// The names of the kernels that a chip of this capability takes for products of many sizes.
fn kernels_of(capability: u32) -> BTreeSet<String> {
    let recorder = Recorder::here(capability);
    let (backend, cpu) = (Cuda::on(recorder.clone()).unwrap(), Cpu::new(Some(1)).unwrap());
    let mut values = Values(1);
    let mut found = BTreeSet::new();
    let configs = ["nf4", "int8"].map(|name| QuantConfig::new(Format::by_name(name).unwrap()));
    let small = [(1, 136), (7, 136), (16, 136), (48, 64), (64, 160), (130, 224), (248, 136)];
    let large = LARGE.into_iter().chain(LARGE_BF16).filter(|_| capability >= 90);
    let sizes = small.map(|(m, n)| (m, n, 64)).into_iter().chain(large);
    for (m, n, k) in sizes {
        for (at, bt) in LAYOUTS {
            let stored = |rows, cols, transposed| if transposed { [cols, rows] } else { [rows, cols] };
            let x = Host::random(stored(m, k, at), &mut values);
            let [nf4, int8] = &configs;
            let (w, plain) = quantized(&cpu, nf4, stored(k, n, bt), DType::BF16, &mut values);
            let (w, plain) = (placed(&backend, &w), backend.place(&plain).unwrap());
            let (bytes, _) = quantized(&cpu, int8, stored(k, n, bt), DType::BF16, &mut values);
            let bytes = placed(&backend, &bytes);
            for dtype in if k == 64 { &[DType::BF16, DType::F32][..] } else { &[DType::BF16] } {
                let x = x.upload(&backend, *dtype, false);
                let a = Matrix::Dense { tensor: &x, transposed: at };
                let b = [
                    Matrix::Quantized { matrix: &w, transposed: bt },
                    Matrix::Dense { tensor: &plain, transposed: bt },
                    Matrix::Quantized { matrix: &bytes, transposed: bt },
                ];
                for b in &b {
                    recorder.take();
                    product(&backend, &Gemm::new(&[GemmTerm { a, b: *b }]), [m, n], DType::F32);
                    found.insert(recorder.take().1);
                }
            }
        }
    }
    found
}

/// The sizes of the other tests reach every kernel.
#[test]
fn sizes_choose_among_all_kernels() {
    let demand = |expected: &[String], found: &BTreeSet<String>| {
        let missing: Vec<_> = expected.iter().filter(|kernel| !found.contains(*kernel)).collect();
        assert!(missing.is_empty(), "{missing:?} not among {found:?}");
    };
    let others = ["gemm_any_bf16", "gemm_f32", "gemv_8x32", "gemv_16x32", "gemv_32x32"];
    let mut expected = others.map(String::from).to_vec();
    for tile in ["16x32", "64x64", "128x128"] {
        expected.extend(["nn", "nt", "tn"].map(|layout| format!("gemm_bf16_{tile}_{layout}")));
        expected.extend(["nn", "nt"].map(|layout| format!("gemm_decoded_{tile}_{layout}")));
    }
    let found = kernels_of(80);
    demand(&expected, &found);
    assert!(!found.iter().any(|kernel| kernel.contains("hopper")), "{found:?}");
    if Recorder::here(90).capability_of_chip() != 90 {
        return;
    }
    let mut expected = ["nn", "nt"].map(|layout| format!("gemm_hopper_square_bf16_208_{layout}")).to_vec();
    for rows in [128, 192] {
        expected.extend(["nn", "nt", "tn"].map(|l| format!("gemm_hopper_square_bf16_{rows}_{l}")));
    }
    for tile in ["128", "192", "split_128"] {
        let (split, rows) =
            if let Some(rows) = tile.strip_prefix("split_") { ("split_", rows) } else { ("", tile) };
        expected.extend(["nn", "nt", "tn"].map(|layout| format!("gemm_hopper_{split}bf16_{rows}_{layout}")));
        for codes in ["codes4", "codes8"] {
            let name = |layout| format!("gemm_hopper_{split}{codes}_{rows}_{layout}");
            expected.extend(["nn", "nt"].map(name));
        }
    }
    demand(&expected, &kernels_of(90));
}
