//! The loss of a frozen head on CUDA, by parts of the vocabulary, on the host in every order of threads and on a GPU if there
//! is one: within twice a plain computation's error against f64, a row's bits its own, and little memory.
#![cfg(feature = "cuda")]

mod common;

use common::compare::{different_bits, within_twice_naive};
use common::cuda;
use common::gemm::{Values, read_only};
use lowrank::backend::reference::Reference;
use lowrank::backend::{Backend, Gemm, GemmTerm, HeadLoss, Matrix};
use lowrank::quant::{Format, QuantConfig, Quantized, READ_ONLY};
use lowrank::rng::{Philox, PhiloxKey, Stream};
use lowrank::{DType, Result, Tensor};
use std::ops::Range;

/// The head's elements in memory.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Dense(DType),
    Codes(&'static str),
}

/// Operands on the host, rounded to their types.
struct Case {
    dtype: DType,
    kind: Kind,
    vocabulary: usize,
    hidden: usize,
    x: Vec<f32>,
    head: Vec<f32>,
    bias: Option<Vec<f32>>,
    softcap: Option<f32>,
    targets: Vec<i32>,
    rows: Option<Vec<i32>>,
    grad_scales: Vec<(Range<usize>, f32)>,
}

impl Case {
    /// So many hidden states, all counted, whose logits are of this size.
    fn random(dtype: DType, kind: Kind, [m, vocabulary, hidden]: [usize; 3], size: f32) -> Self {
        let mut rng = Philox::new(PhiloxKey::new(11, Stream::Dummy, 0));
        let narrow = |x: f32, dtype: DType| common::gemm::rounded(x, dtype);
        let of_head = if let Kind::Dense(dtype) = kind { dtype } else { DType::BF16 };
        let deviation = size / (hidden as f32).sqrt();
        let targets =
            (0..m).map(|i| [0, vocabulary - 1, rng.below(vocabulary as u32) as usize][i % 3] as i32);
        let targets = targets.collect();
        Case {
            dtype,
            kind,
            vocabulary,
            hidden,
            x: (0..m * hidden).map(|_| narrow(rng.normal(), dtype)).collect(),
            head: (0..vocabulary * hidden).map(|_| narrow(deviation * rng.normal(), of_head)).collect(),
            bias: None,
            softcap: None,
            targets,
            rows: None,
            grad_scales: vec![(0..m, 0.25)],
        }
    }

    fn counted(&self) -> usize {
        self.targets.len()
    }

    fn x(&self, backend: &Backend, dtype: DType) -> Tensor {
        let x = backend.from_slice(&self.x, &[self.x.len() / self.hidden, self.hidden]).unwrap();
        backend.to_dtype(&x, dtype).unwrap()
    }

    fn quantized(&self, backend: &Backend, name: &str) -> Quantized {
        let shape = [self.vocabulary, self.hidden];
        if let Some(format) = READ_ONLY.iter().find(|format| format.name == name) {
            return read_only(backend, format, shape, &mut Values(3), false);
        }
        let head = backend.from_slice(&self.head, &shape).unwrap();
        let head = backend.to_dtype(&head, DType::BF16).unwrap();
        backend.quantize(&head, &QuantConfig::new(Format::by_name(name).unwrap())).unwrap()
    }

    /// Losses, and the gradient of the rows that count if asked for; none where the backend takes whole rows of logits.
    fn run_with(&self, backend: &Backend, gradient: bool) -> Result<Option<[Vec<f32>; 2]>> {
        let (m, shape) = (self.counted(), [self.vocabulary, self.hidden]);
        let (mut dense, mut quantized) = (None, None);
        let head = match self.kind {
            Kind::Dense(dtype) => {
                let head = backend.to_dtype(&backend.from_slice(&self.head, &shape)?, dtype)?;
                Matrix::plain(dense.insert(head))
            }
            Kind::Codes(name) => Matrix::Quantized {
                matrix: quantized.insert(self.quantized(backend, name)),
                transposed: false,
            },
        };
        let x = self.x(backend, self.dtype);
        let rows = self.rows.as_ref().map(|rows| backend.from_slice(rows, &[m])).transpose()?;
        let bias = self.bias.as_ref().map(|bias| backend.from_slice(bias, &[self.vocabulary])).transpose()?;
        let mut losses = backend.empty(&[m], DType::F32)?;
        let mut dx = gradient.then(|| backend.empty(&[m, self.hidden], self.dtype)).transpose()?;
        let loss = HeadLoss {
            x: &x,
            rows: rows.as_ref(),
            head,
            bias: bias.as_ref(),
            softcap: self.softcap,
            targets: &backend.from_slice(&self.targets, &[m])?,
            grad_scales: &self.grad_scales,
        };
        let done = backend.head_loss(&mut losses, dx.as_mut(), &loss)?;
        let dx = dx.map_or(Ok(Vec::new()), |dx| backend.to_f32(&dx))?;
        Ok(if done { Some([backend.to_f32(&losses)?, dx]) } else { None })
    }

    fn run(&self, backend: &Backend) -> [Vec<f32>; 2] {
        self.run_with(backend, true).unwrap().expect("the head is taken in parts")
    }

    /// The same from whole rows of logits, activations in `dtype`.
    fn plain(&self, backend: &Backend, dtype: DType) -> [Vec<f32>; 2] {
        let (m, shape) = (self.counted(), [self.vocabulary, self.hidden]);
        let head = match self.kind {
            Kind::Dense(_) => backend.from_slice(&self.head, &shape).unwrap(),
            Kind::Codes(name) => {
                let mut head = backend.empty(&shape, DType::F32).unwrap();
                backend.dequantize(&mut head, &self.quantized(backend, name)).unwrap();
                head
            }
        };
        let all = self.x(backend, dtype);
        let mut x = backend.empty(&[m, self.hidden], dtype).unwrap();
        let rows = self.rows.clone().unwrap_or_else(|| (0..m as i32).collect());
        backend.gather_rows(&mut x, &all, &backend.from_slice(&rows, &[m]).unwrap()).unwrap();
        let bias = self.bias.as_ref().map(|bias| backend.from_slice(bias, &[self.vocabulary]).unwrap());
        let empty = |columns: usize, dtype| backend.empty(&[m, columns], dtype).unwrap();
        let (mut logits, mut dlogits) = (empty(self.vocabulary, DType::F32), empty(self.vocabulary, dtype));
        let terms = [GemmTerm { a: Matrix::plain(&x), b: Matrix::transposed(&head) }];
        backend.gemm(&mut logits, &Gemm { bias: bias.as_ref(), ..Gemm::new(&terms) }).unwrap();
        if let Some(cap) = self.softcap {
            backend.softcap(&mut logits, cap).unwrap();
        }
        let targets = backend.from_slice(&self.targets, &[m]).unwrap();
        let mut losses = backend.empty(&[m], DType::F32).unwrap();
        for (range, grad_scale) in &self.grad_scales {
            let of = |x: &Tensor| x.slice(range.clone()).unwrap();
            let (losses, dlogits) = (&mut of(&losses), &mut of(&dlogits));
            backend.cross_entropy(losses, Some(dlogits), &of(&logits), &of(&targets), *grad_scale).unwrap();
        }
        if let Some(cap) = self.softcap {
            backend.softcap_backward(&mut dlogits, &logits, cap).unwrap();
        }
        let mut dx = empty(self.hidden, dtype);
        let terms = [GemmTerm { a: Matrix::plain(&dlogits), b: Matrix::plain(&head) }];
        backend.gemm(&mut dx, &Gemm::new(&terms)).unwrap();
        losses = backend.to_dtype(&losses, DType::F32).unwrap();
        [backend.to_f32(&losses).unwrap(), backend.to_f32(&dx).unwrap()]
    }

    /// Fails unless the results are within the bound.
    fn check(&self, ours: &[Vec<f32>; 2], what: &str) {
        let truth = self.plain(&Reference::<f64>::backend(), DType::F32);
        let naive = self.plain(&Reference::<f32>::backend(), self.dtype);
        for (i, dtype) in [DType::F32, self.dtype].into_iter().enumerate() {
            within_twice_naive(&ours[i], &naive[i], &truth[i], dtype)
                .unwrap_or_else(|e| panic!("{what}, {:?} {:?}, {i}: {e}", self.dtype, self.kind));
        }
    }
}

fn same(found: &[Vec<f32>; 2], expected: &[Vec<f32>; 2], what: &str) {
    for (found, expected) in found.iter().zip(expected) {
        let different = different_bits(found, expected);
        assert!(different == 0, "{what}: {different} of {} differ", found.len());
    }
}

/// Three parts of the vocabulary, each kind of head and of activations.
#[test]
fn losses_and_gradients_of_every_head() {
    let dense = [DType::F32, DType::BF16, DType::F16].map(Kind::Dense);
    let codes = ["nf4", "int4-asym", "int8", "int8-block", "fp8", "fp8-block"].map(Kind::Codes);
    let (cudas, minimums) = (cuda::all(), Kind::Codes("int4-minimum"));
    for dtype in [DType::BF16, DType::F32] {
        for (index, kind) in dense.into_iter().chain(codes).chain([minimums]).enumerate() {
            let mut case = Case::random(dtype, kind, [7, 5000, 64], [1.0, 5.0, 12.0][index % 3]);
            if index % 2 == 1 {
                case.bias = Some((0..case.vocabulary).map(|i| (i % 7) as f32 / 4.0).collect());
                case.softcap = Some(9.0);
                (case.rows, case.targets) = (Some(vec![1, 2, 4, 6]), case.targets[1..5].to_vec());
                case.grad_scales = vec![(0..1, 0.5), (1..3, 0.125), (3..4, 2.0)];
            }
            let expected = case.run(&cudas[0]);
            case.check(&expected, "table");
            for cuda in &cudas[1..] {
                same(&case.run(cuda), &expected, &format!("{dtype} {kind:?} on {}", cuda.name()));
            }
        }
    }
}

/// Sizes at the ends of parts, packs and tiles, odd lines of the head among them.
#[test]
fn sizes_of_every_kind() {
    let cuda = cuda::all().pop().unwrap();
    for shape in [[1, 1, 1], [3, 2, 7], [5, 97, 13], [2, 2048, 24], [3, 2049, 16], [2, 4099, 9]] {
        for dtype in [DType::BF16, DType::F32] {
            let case = Case::random(dtype, Kind::Dense(dtype), shape, 4.0);
            case.check(&case.run(&cuda), &format!("{shape:?}"));
        }
    }
    let none = Case::random(DType::BF16, Kind::Dense(DType::BF16), [0, 97, 16], 1.0);
    assert!(none.run(&cuda).iter().all(Vec::is_empty));
}

/// A row has its bits alone and among more rows than are taken at a time, and its loss also without a gradient.
#[test]
fn rows_have_bits_of_their_own() {
    let case = Case::random(DType::BF16, Kind::Dense(DType::BF16), [5300, 2100, 8], 4.0);
    for chip in cuda::chips() {
        let all = case.run(&chip[0]);
        let losses = case.run_with(&chip[0], false).unwrap().unwrap();
        assert_eq!(different_bits(&losses[0], &all[0]), 0, "losses without a gradient");
        for rows in [0..1, 2300..4000, 5290..5300] {
            let part = Case {
                rows: Some(rows.clone().map(|row| row as i32).collect()),
                targets: case.targets[rows.clone()].to_vec(),
                grad_scales: vec![(0..rows.len(), 0.25)],
                x: case.x.clone(),
                head: case.head.clone(),
                bias: None,
                ..case
            };
            let expected = [all[0][rows.clone()].to_vec(), all[1][rows.start * 8..rows.end * 8].to_vec()];
            for cuda in &chip {
                same(&part.run(cuda), &expected, &format!("rows {rows:?} on {}", cuda.name()));
            }
        }
    }
}

/// The largest logit grows by hundreds from part to part, or stays minus infinity for a while; a row that is not a number
/// leaves the others alone; a likely target's gradient is as exact as an unlikely one's.
#[test]
fn logits_of_every_size() {
    let cuda = cuda::all().pop().unwrap();
    let mut case = Case::random(DType::BF16, Kind::Dense(DType::BF16), [6, 6200, 32], 3.0);
    let parts = |values: [f32; 4]| Some((0..6200).map(|i| values[i / 2048]).collect::<Vec<f32>>());
    for values in
        [[0.0, 300.0, 900.0, 1500.0], [1000.0, 0.0, -1000.0, 0.0], [f32::NEG_INFINITY, 2.0, 0.0, 1.0]]
    {
        case.bias = parts(values);
        let targets = if values[0] > 0.0 { 0..6 } else { 6194..6200 };
        case.targets = targets.collect();
        let ours = case.run(&cuda);
        assert!(ours.iter().flatten().all(|x| x.is_finite()), "{values:?}");
        case.check(&ours, &format!("{values:?}"));
    }
    // Targets that have nearly all of the probability.
    for softcap in [None, Some(30.0)] {
        case.targets = vec![5; 6];
        let bias = (0..6200).map(|i| if i == 5 { 24.0 } else { 0.0 }).collect();
        (case.bias, case.softcap) = (Some(bias), softcap);
        case.check(&case.run(&cuda), "likely targets");
    }
    (case.bias, case.softcap) = (None, None);
    let expected = case.run(&cuda);
    case.x[2 * 32 + 5] = f32::NAN;
    let found = case.run(&cuda);
    assert!(found[0][2].is_nan() && found[1][2 * 32..3 * 32].iter().all(|x| x.is_nan()));
    for row in [0, 1, 3, 4, 5] {
        assert_eq!(found[0][row].to_bits(), expected[0][row].to_bits());
        assert_eq!(different_bits(&found[1][row * 32..][..32], &expected[1][row * 32..][..32]), 0);
    }
}

/// Six-bit codes and blocks that parts would cut are left to whole rows of logits; operands that don't fit are errors.
#[test]
fn what_is_not_taken() {
    let cuda = cuda::all().pop().unwrap();
    let shape = [3, 5000, 16];
    assert!(
        Case::random(DType::BF16, Kind::Codes("int6"), shape, 1.0).run_with(&cuda, true).unwrap().is_none()
    );
    let outside = |target: i32| {
        let mut case = Case::random(DType::BF16, Kind::Dense(DType::BF16), shape, 1.0);
        case.targets[1] = target;
        case.run_with(&cuda, true).unwrap_err().to_string()
    };
    for target in [-1, 5000] {
        assert!(outside(target).contains("cross_entropy"), "{target}");
    }
    let mut case = Case::random(DType::BF16, Kind::Dense(DType::BF16), shape, 1.0);
    for grad_scales in [vec![(0..2, 1.0)], vec![(0..1, 1.0), (2..3, 1.0)], vec![(0..4, 1.0)]] {
        case.grad_scales = grad_scales;
        assert!(case.run_with(&cuda, true).is_err());
    }
}

/// Everything that comes and goes is under 64 MB, whatever the model and the number of rows, and enough for large products.
#[test]
fn transients_stay_below_64_megabytes() {
    for (m, vocabulary, hidden) in [
        (512, 32_000, 4096),
        (4096, 32_000, 4096),
        (4096, 128_256, 4096),
        (4096, 152_064, 3584),
        (16_384, 152_064, 8192),
        (32_768, 151_936, 896),
        (4096, 262_144, 2304),
    ] {
        for (dtype, gradient) in [(DType::BF16, true), (DType::F32, true), (DType::BF16, false)] {
            let planner = cuda::one(cuda::ORDERS[0]).planner().unwrap();
            let empty = |shape: &[usize], dtype| planner.empty(shape, dtype).unwrap();
            let (x, head) = (empty(&[m, hidden], dtype), empty(&[vocabulary, hidden], dtype));
            let (mut losses, indices) = (empty(&[m], DType::F32), empty(&[m], DType::I32));
            let mut dx = gradient.then(|| empty(&[m, hidden], dtype));
            let loss = HeadLoss {
                x: &x,
                rows: Some(&indices),
                head: Matrix::plain(&head),
                bias: None,
                softcap: None,
                targets: &indices,
                grad_scales: &[(0..m, 1.0)],
            };
            planner.arena().reset_peak();
            let before = planner.arena().live_bytes();
            assert!(planner.head_loss(&mut losses, dx.as_mut(), &loss).unwrap());
            let bytes = planner.arena().peak_bytes() - before;
            assert!(bytes < 64_000_000, "{m} x {vocabulary} x {hidden} {dtype}: {bytes} bytes");
            if m >= 4096 && dtype == DType::BF16 {
                assert!(bytes > 30_000_000, "{m} x {vocabulary} x {hidden} {dtype}: {bytes} bytes");
            }
        }
    }
}
