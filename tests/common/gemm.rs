//! Matrix products by the numerics law, element by element: what every backend must give bit for bit.

use lowrank::backend::{Backend, Gemm, GemmTerm, Matrix, RowTerm};
use lowrank::quant::{Blocks, FORMATS, Format, QuantConfig, Quantized, Scales};
use lowrank::{DType, Tensor};
use std::ops::Range;

/// Sizes on both sides of vectors, tiles, panels and chunks.
pub const SIZES: [usize; 8] = [1, 7, 16, 17, 31, 33, 97, 257];

/// One operand of one term: its type, layout, and whether it lies at an odd address.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    pub dtype: DType,
    pub transposed: bool,
    pub misaligned: bool,
}

/// `out[m, n]` of one or two terms, and more of some rows.
#[derive(Clone, Debug)]
pub struct Case {
    pub m: usize,
    pub n: usize,
    pub terms: Vec<(usize, Operand, Operand)>, // k, a, b
    pub row_terms: Vec<(Range<usize>, usize, Operand, Operand)>,
    pub out: DType,
    pub accumulate: bool,
    pub scale: f32,
    pub bias: Option<DType>,
}

/// A stream of values of all kinds that a training run sees, and of a few that it should not.
pub struct Values(pub u64);

impl Values {
    pub fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// Uniform in [-1, 1), now and then a signed zero or a tiny number.
    pub fn value(&mut self) -> f32 {
        let word = self.next();
        match word % 64 {
            0 => -0.0,
            1 => 0.0,
            2 => (word >> 8) as f32 * 2.0f32.powi(-88),
            _ => (word >> 8) as f32 / (1 << 23) as f32 - 1.0,
        }
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.next() as usize % from.len()]
    }
}

/// The `index`-th way of combining types, layouts and options for a product of this size.
pub fn varied(m: usize, k: usize, n: usize, index: u64) -> Case {
    let mut choose = Values(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let flag = |choose: &mut Values| choose.pick(&[false, true]);
    let bf16 = flag(&mut choose);
    let operand = |choose: &mut Values, types: &[DType]| Operand {
        dtype: choose.pick(types),
        transposed: flag(choose),
        misaligned: flag(choose),
    };
    let floats = [DType::F32, DType::BF16, DType::F16];
    let a_types: &[DType] = if bf16 { &[DType::BF16] } else { &floats };
    let term = |choose: &mut Values, k| (k, operand(choose, a_types), operand(choose, &floats));
    let mut terms = vec![term(&mut choose, k)];
    if flag(&mut choose) {
        let rank = choose.pick(&[1, 4, 9, 16]);
        terms.push(term(&mut choose, rank));
    }
    let mut row_terms = Vec::new();
    for _ in 0..choose.pick(&[0, 0, 1, 3]) {
        let (one, other) = (choose.next() as usize % (m + 1), choose.next() as usize % (m + 1));
        let rank = choose.pick(&[1, 4, 9, 16]);
        let (k, a, b) = term(&mut choose, rank);
        row_terms.push((one.min(other)..one.max(other), k, a, b));
    }
    Case {
        m,
        n,
        terms,
        row_terms,
        out: choose.pick(&[DType::F32, DType::BF16]),
        accumulate: flag(&mut choose),
        scale: choose.pick(&[1.0, 0.25, 1.7]),
        bias: choose.pick(&[None, None, Some(DType::F32), Some(DType::BF16), Some(DType::F16)]),
    }
}

/// The values of a case: logical matrices, already rounded to their storage types.
#[derive(Debug)]
pub struct Data {
    pub terms: Vec<(Vec<f32>, Vec<f32>)>, // [m, k], [k, n]
    pub row_terms: Vec<(Vec<f32>, Vec<f32>)>,
    pub init: Vec<f32>, // [m, n]
    pub bias: Vec<f32>, // [n]
}

/// Rounded to a storage type and back.
pub fn rounded(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => half::bf16::from_f32(x).to_f32(),
        DType::F16 => half::f16::from_f32(x).to_f32(),
        _ => x,
    }
}

impl Data {
    pub fn of(case: &Case, mut value: impl FnMut() -> f32) -> Self {
        let mut make =
            |len: usize, dtype| -> Vec<f32> { (0..len).map(|_| rounded(value(), dtype)).collect() };
        Data {
            terms: case
                .terms
                .iter()
                .map(|(k, a, b)| (make(case.m * k, a.dtype), make(k * case.n, b.dtype)))
                .collect(),
            row_terms: case
                .row_terms
                .iter()
                .map(|(rows, k, a, b)| (make(rows.len() * k, a.dtype), make(k * case.n, b.dtype)))
                .collect(),
            init: make(case.m * case.n, case.out),
            bias: make(case.n, case.bias.unwrap_or(DType::F32)),
        }
    }
}

fn stored(backend: &Backend, x: &[f32], rows: usize, cols: usize, how: Operand) -> Tensor {
    let (rows_stored, cols_stored) = if how.transposed { (cols, rows) } else { (rows, cols) };
    let pad = usize::from(how.misaligned);
    // One more element in front, and enough behind it, puts the matrix at an odd address.
    let mut data = vec![f32::NAN; pad];
    for i in 0..rows_stored * cols_stored {
        let (r, c) = (i / cols_stored, i % cols_stored);
        data.push(if how.transposed { x[c * cols + r] } else { x[i] });
    }
    let wide = backend.from_slice(&data, &[data.len()]).unwrap();
    let narrow = backend.to_dtype(&wide, how.dtype).unwrap();
    narrow.slice(pad..data.len()).unwrap().reshape(&[rows_stored, cols_stored]).unwrap()
}

/// The backend's result, widened.
pub fn compute(backend: &Backend, case: &Case, data: &Data) -> Vec<f32> {
    let plain = |dtype| Operand { dtype, transposed: false, misaligned: true };
    let of_all = case.terms.iter().zip(&data.terms).map(|(&(k, a, b), data)| (case.m, k, a, b, data));
    let of_some = case
        .row_terms
        .iter()
        .zip(&data.row_terms)
        .map(|((rows, k, a, b), data)| (rows.len(), *k, *a, *b, data));
    let operands: Vec<(Tensor, Tensor)> = of_all
        .chain(of_some)
        .map(|(m, k, a, b, (x, w))| (stored(backend, x, m, k, a), stored(backend, w, k, case.n, b)))
        .collect();
    let term = |(x, w), a: &Operand, b: &Operand| GemmTerm {
        a: Matrix::Dense { tensor: x, transposed: a.transposed },
        b: Matrix::Dense { tensor: w, transposed: b.transposed },
    };
    let (of_all, of_some) = operands.split_at(case.terms.len());
    let terms: Vec<GemmTerm<'_>> =
        case.terms.iter().zip(of_all).map(|((_, a, b), (x, w))| term((x, w), a, b)).collect();
    let row_terms: Vec<RowTerm<'_>> = case
        .row_terms
        .iter()
        .zip(of_some)
        .map(|((rows, _, a, b), (x, w))| RowTerm { first_row: rows.start, term: term((x, w), a, b) })
        .collect();
    let bias = case
        .bias
        .map(|dtype| stored(backend, &data.bias, 1, case.n, plain(dtype)).reshape(&[case.n]).unwrap());
    let mut out = stored(backend, &data.init, case.m, case.n, plain(case.out));
    let gemm = Gemm {
        terms: &terms,
        row_terms: &row_terms,
        scale: case.scale,
        bias: bias.as_ref(),
        accumulate: case.accumulate,
    };
    backend.gemm(&mut out, &gemm).unwrap();
    backend.to_f32(&out).unwrap()
}

/// What bf16 arithmetic makes of a denormal number.
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

/// A fused multiply-add of bf16 arithmetic. A result is denormal if it is below 2^-126 once rounded to 24 bits
/// with no least exponent; the sum of f64 is exact where that matters.
fn fma_flushed(x: f32, y: f32, sum: f32) -> f32 {
    let (x, y, sum) = (flushed(x), flushed(y), flushed(sum));
    let fused = x.mul_add(y, sum);
    let exact = f64::from(x) * f64::from(y) + f64::from(sum);
    let edge = 2.0f64.powi(-126) - 2.0f64.powi(-151);
    if exact.abs() < edge { 0.0f32.copysign(fused) } else { fused }
}

/// The law: one accumulator, k ascending, fused; in bf16 with flushing, and an odd k padded with a zero.
pub fn by_the_law(case: &Case, data: &Data) -> Vec<f32> {
    let mut left = case.terms.iter().map(|(_, a, _)| a).chain(case.row_terms.iter().map(|(_, _, a, _)| a));
    let bf16 = left.all(|a| a.dtype == DType::BF16);
    let mut out = Vec::with_capacity(case.m * case.n);
    for i in 0..case.m {
        for j in 0..case.n {
            let mut sum = if case.accumulate { data.init[i * case.n + j] } else { 0.0 };
            let of_all = case.terms.iter().zip(&data.terms).map(|(&(k, ..), data)| (i, k, data));
            let of_some = case.row_terms.iter().zip(&data.row_terms);
            let own = of_some.filter(|((rows, ..), _)| rows.contains(&i));
            for (i, k, (a, b)) in of_all.chain(own.map(|((rows, k, ..), data)| (i - rows.start, *k, data))) {
                for l in 0..if bf16 { k.next_multiple_of(2) } else { k } {
                    let (x, y) = if l < k { (a[i * k + l], b[l * case.n + j]) } else { (0.0, 0.0) };
                    sum = if bf16 { fma_flushed(x, rounded(y, DType::BF16), sum) } else { x.mul_add(y, sum) };
                }
            }
            if case.scale != 1.0 {
                sum *= case.scale;
            }
            if case.bias.is_some() {
                sum += data.bias[j];
            }
            out.push(rounded(sum, case.out));
        }
    }
    out
}

/// Fails at the first element whose bits differ; any NaN equals any other.
pub fn assert_same_bits(found: &[f32], expected: &[f32], what: &dyn std::fmt::Debug) {
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let same = f.to_bits() == e.to_bits() || (f.is_nan() && e.is_nan());
        assert!(
            same,
            "element {i}: found {f:e} ({:#x}), expected {e:e} ({:#x}) in {what:?}",
            f.to_bits(),
            e.to_bits()
        );
    }
}

/// Every format with its block sizes and ways of keeping scales.
pub fn configs() -> Vec<QuantConfig> {
    let mut all = Vec::new();
    for format in &FORMATS {
        let plain = QuantConfig { double_quant: false, ..QuantConfig::new(format) };
        all.push(plain);
        if format.blocks == Blocks::Flat {
            all.push(QuantConfig { blocksize: 32, ..plain });
            all.push(QuantConfig { blocksize: 128, ..plain });
        }
        if format.double_quant {
            all.push(QuantConfig { double_quant: true, ..plain });
        }
    }
    all
}

/// A random matrix in a format that is only read.
pub fn read_only(
    backend: &Backend,
    format: &'static Format,
    shape: [usize; 2],
    values: &mut Values,
    tiny: bool,
) -> Quantized {
    let elements = shape[0] * shape[1];
    let blocksize = if format.minimums() { 32 } else { 16 };
    let (config, blocks) = (QuantConfig { blocksize, ..QuantConfig::new(format) }, elements / blocksize);
    let mut random = |n: usize| -> Vec<u8> { (0..n).map(|_| values.next() as u8).collect() };
    let codes = random(elements * format.bits() / 8);
    let mut products = |signed: bool| {
        let per_factor = 256 / blocksize;
        let codes: Vec<u8> = random(blocks).iter().map(|x| if signed { *x } else { x & 63 }).collect();
        let factors = random(blocks.div_ceil(per_factor));
        let size = if tiny { 1e-39 } else { 1e-3 };
        let factors: Vec<f32> = factors.iter().map(|x| size * (f32::from(*x) - 100.0)).collect();
        Scales::Products {
            codes: backend.from_slice(&codes, &[blocks]).unwrap(),
            factors: backend.from_slice(&factors, &[factors.len()]).unwrap(),
            per_factor,
        }
    };
    let scales = products(!format.minimums());
    let minimums = format.minimums().then(|| products(false));
    let codes = backend.from_slice(&codes, &[codes.len()]).unwrap();
    Quantized::with_minimums(config, shape, codes, scales, None, minimums, DType::F32).unwrap()
}
