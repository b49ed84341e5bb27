//! Attention of the CUDA backend: bits that depend on nothing but the row and what it sees. Its errors are those that
//! the table of cases allows, see `parity_cuda.rs`.
#![cfg(feature = "cuda")]

mod common;

use common::compare::different_bits;
use common::cuda;
use half::bf16;
use lowrank::DType;
use lowrank::backend::cuda::ThreadOrder;
use lowrank::backend::{AttentionShape, Backend, Sequence};
use lowrank::rng::{Philox, PhiloxKey, Stream};
use std::ops::Range;

/// Operands of one attention, rows of queries and of keys alike.
#[derive(Clone)]
struct Operands {
    /// Query heads, key heads, head size.
    heads: [usize; 3],
    window: Option<usize>,
    softcap: Option<f32>,
    rows: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dout: Vec<f32>,
}

/// Results, in f32.
struct Results {
    out: Vec<f32>,
    lse: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Operands {
    fn new(heads: [usize; 3], rows: usize, window: Option<usize>, softcap: Option<f32>) -> Self {
        let mut rng = Philox::new(PhiloxKey::new(11, Stream::Dummy, 0));
        let [n_heads, n_kv_heads, head_dim] = heads;
        let mut normal = |heads: usize| (0..rows * heads * head_dim).map(|_| rng.normal()).collect();
        let (q, dout) = (normal(n_heads), normal(n_heads));
        Operands { heads, window, softcap, rows, q, k: normal(n_kv_heads), v: normal(n_kv_heads), dout }
    }

    /// Forward and backward on sequences of the rows.
    fn run(&self, backend: &Backend, dtype: DType, sequences: &[Sequence]) -> Results {
        let [n_heads, n_kv_heads, head_dim] = self.heads;
        let tensor = |x: &[f32]| {
            let shape = [self.rows, x.len() / self.rows];
            match dtype {
                DType::F32 => backend.from_slice(x, &shape).unwrap(),
                _ => backend
                    .from_slice(&x.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>(), &shape)
                    .unwrap(),
            }
        };
        let [q, k, v, dout] = [&self.q, &self.k, &self.v, &self.dout].map(|x| tensor(x));
        let empty = |like: &[f32]| tensor(&vec![7.0; like.len()]);
        let (mut out, mut dq, mut dk, mut dv) =
            (empty(&self.q), empty(&self.q), empty(&self.k), empty(&self.v));
        let mut lse = backend.from_slice(&vec![7.0f32; self.rows * n_heads], &[self.rows, n_heads]).unwrap();
        let shape = AttentionShape {
            n_heads,
            n_kv_heads,
            head_dim,
            scale: (head_dim as f32).sqrt().recip(),
            window: self.window,
            softcap: self.softcap,
            sequences,
        };
        backend.attention(&mut out, &mut lse, &q, &k, &v, &shape).unwrap();
        backend.attention_backward(&mut dq, &mut dk, &mut dv, &dout, &q, &k, &v, &out, &lse, &shape).unwrap();
        let [out, lse, dq, dk, dv] = [out, lse, dq, dk, dv].map(|x| backend.to_f32(&x).unwrap());
        Results { out, lse, dq, dk, dv }
    }
}

/// All rows as one sequence, its queries cut into parts of this size, each with the keys up to its last query's own.
fn cut(rows: usize, size: usize) -> Vec<Sequence> {
    let parts = (0..rows).step_by(size).map(|start| (start, size.min(rows - start)));
    parts.map(|(q_start, q_len)| Sequence { q_start, q_len, k_start: 0, k_len: q_start + q_len }).collect()
}

/// Heads of every kernel, windows and caps.
fn variants() -> Vec<Operands> {
    vec![
        Operands::new([2, 1, 64], 150, None, None),
        Operands::new([4, 2, 128], 140, Some(70), None),
        Operands::new([1, 1, 96], 139, None, Some(2.0)),
        Operands::new([2, 1, 33], 150, Some(67), Some(3.0)),
        Operands::new([1, 1, 256], 70, None, None),
    ]
}

#[test]
fn rows_of_a_cache_have_the_bits_of_the_full_forward() {
    let backend = cuda::one(ThreadOrder::Forward);
    for operands in variants() {
        for dtype in [DType::F32, DType::BF16] {
            let full = operands.run(&backend, dtype, &cut(operands.rows, operands.rows));
            // The last is on both sides of a tile, the others have a block for each tile of keys.
            for size in [1, 7, 75] {
                let parts = operands.run(&backend, dtype, &cut(operands.rows, size));
                for (what, full, parts) in [
                    ("out", &full.out, &parts.out),
                    ("lse", &full.lse, &parts.lse),
                    ("dq", &full.dq, &parts.dq),
                ] {
                    let different = different_bits(full, parts);
                    assert_eq!(
                        different, 0,
                        "{what} of {:?} {dtype}, {size} queries at a time",
                        operands.heads
                    );
                }
            }
        }
    }
}

/// Kernels for one chip alone have the bits of the portable ones, which serve for it elsewhere.
#[test]
fn every_kernel_of_a_chip_has_the_same_bits() {
    let long = [Sequence { q_start: 0, q_len: 200, k_start: 0, k_len: 200 }];
    let packed = [
        Sequence { q_start: 0, q_len: 70, k_start: 0, k_len: 70 },
        Sequence { q_start: 73, q_len: 90, k_start: 72, k_len: 128 },
    ];
    for backends in cuda::chips() {
        for (heads, window, softcap) in [
            ([2, 1, 64], None, None),
            ([2, 2, 64], Some(67), Some(3.0)),
            ([1, 1, 128], Some(100), None),
            ([4, 2, 128], None, Some(2.0)),
        ] {
            let mut operands = Operands::new(heads, 200, window, softcap);
            for bad in [None, Some(f32::NAN), Some(f32::INFINITY)] {
                if let Some(bad) = bad {
                    let rows = operands.rows;
                    for x in [&mut operands.v, &mut operands.q, &mut operands.dout] {
                        let cols = x.len() / rows;
                        (x[130 * cols + 3], x[199 * cols + 9]) = (bad, bad);
                    }
                    let cols = operands.k.len() / rows;
                    operands.k[71 * cols + 33] = bad;
                }
                for sequences in [&long[..], &packed] {
                    let mut expected = None;
                    for (i, backend) in backends.iter().enumerate() {
                        let found = operands.run(backend, DType::BF16, sequences);
                        let context =
                            format!("{heads:?}, window {window:?}, {bad:?}, {sequences:?}, backend {i}");
                        let found = [found.out, found.lse, found.dq, found.dk, found.dv];
                        let expected = expected.get_or_insert_with(|| found.clone());
                        for (what, (expected, found)) in
                            ["out", "lse", "dq", "dk", "dv"].iter().zip(expected.iter().zip(&found))
                        {
                            assert_eq!(different_bits(expected, found), 0, "{what} of {context}");
                        }
                    }
                }
            }
        }
    }
}

/// What is said of Hopper's kernels is of these, not of others that took their place.
#[test]
fn many_queries_choose_hoppers_kernels() {
    for head_dim in [64, 128] {
        let recorder = cuda::Recorder::here(90);
        if recorder.capability_of_chip() != 90 {
            return;
        }
        let backend = lowrank::backend::cuda::Cuda::on(recorder.clone()).unwrap();
        let operands = Operands::new([1, 1, head_dim], 100, None, None);
        operands.run(&backend, DType::BF16, &cut(100, 100));
        let kernels = recorder.take().0;
        for name in
            ["attention_hopper", "attention_backward_keys_hopper", "attention_backward_queries_hopper"]
        {
            let name = format!("{name}_{head_dim}");
            assert!(kernels.iter().filter(|kernel| **kernel == name).count() > 2, "{kernels:?}");
        }
        assert!(recorder.errors().is_empty());
    }
}

#[test]
fn rows_have_the_same_bits_wherever_their_sequence_lies() {
    let backend = cuda::one(ThreadOrder::Random(3));
    let operands = Operands::new([4, 2, 64], 130, Some(90), None);
    let sequence = |start, len| Sequence { q_start: start, q_len: len, k_start: start, k_len: len };
    for dtype in [DType::F32, DType::BF16] {
        let packed = operands.run(&backend, dtype, &[sequence(0, 11), sequence(11, 100), sequence(114, 3)]);
        let alone = operands.run(&backend, dtype, &[sequence(11, 100)]);
        let same = |what: &str, packed: &[f32], alone: &[f32]| {
            let cols = packed.len() / operands.rows;
            let rows = 11 * cols..111 * cols;
            assert_eq!(different_bits(&packed[rows.clone()], &alone[rows]), 0, "{what} {dtype}");
        };
        same("out", &packed.out, &alone.out);
        same("lse", &packed.lse, &alone.lse);
        same("dq", &packed.dq, &alone.dq);
        same("dk", &packed.dk, &alone.dk);
        same("dv", &packed.dv, &alone.dv);
        // Rows of no sequence: results keep what they have, gradients of keys and values are zero.
        assert!(packed.out[112 * 256..114 * 256].iter().all(|x| *x == 7.0));
        assert!(packed.dk[112 * 128..114 * 128].iter().chain(&packed.dv[117 * 128..]).all(|x| *x == 0.0));
    }
}

/// Rows whose bits differ, NaN from any number.
fn changed_rows(clean: &[f32], other: &[f32], rows: usize) -> Vec<usize> {
    let cols = clean.len() / rows;
    (0..rows)
        .filter(|row| different_bits(&clean[row * cols..][..cols], &other[row * cols..][..cols]) > 0)
        .collect()
}

#[test]
fn what_is_not_finite_stays_with_the_rows_that_see_it() {
    const ROWS: usize = 150;
    let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    for (i, backend) in cuda::all().iter().enumerate() {
        for (dtype, window) in
            [(DType::F32, None), (DType::BF16, None), (DType::F32, Some(50)), (DType::BF16, Some(50))]
        {
            let clean = Operands::new([2, 1, 64], ROWS, window, None);
            let whole = cut(ROWS, ROWS);
            let expected = clean.run(backend, dtype, &whole);
            let at = 90;
            let sees =
                |query: usize, key: usize| key <= query && window.is_none_or(|window| key + window > query);
            let queries: Vec<usize> = (0..ROWS).filter(|query| sees(*query, at)).collect();
            let keys: Vec<usize> = (0..ROWS).filter(|key| sees(at, *key)).collect();
            let check = |what: &str, clean: &[f32], other: &[f32], rows: &[usize]| {
                assert_eq!(changed_rows(clean, other, ROWS), rows, "{what}, {dtype}, window {window:?}, {i}");
            };

            // A value: one column of out, and dq.
            let mut operands = clean.clone();
            operands.v[at * 64 + 5] = bad[i % 3];
            for size in [ROWS, 1] {
                let found = operands.run(backend, dtype, &cut(ROWS, size));
                check("out", &expected.out, &found.out, &queries);
                let finite = |x: &f32| x.is_finite();
                assert!(
                    found.out.iter().enumerate().all(|(i, x)| finite(x) || i % 64 == 5),
                    "another column"
                );
                check("lse", &expected.lse, &found.lse, &[]);
                check("dq", &expected.dq, &found.dq, &queries);
            }
            // A key, in both heads' scores.
            let mut operands = clean.clone();
            operands.k[at * 64 + 9] = bad[i % 3];
            let found = operands.run(backend, dtype, &whole);
            check("out", &expected.out, &found.out, &queries);
            check("dq", &expected.dq, &found.dq, &queries);
            // A query, and the gradient of a result.
            let mut operands = clean.clone();
            operands.q[at * 128 + 70] = bad[i % 3];
            let found = operands.run(backend, dtype, &whole);
            check("out", &expected.out, &found.out, &[at]);
            check("dk", &expected.dk, &found.dk, &keys);
            check("dv", &expected.dv, &found.dv, &keys);
            let mut operands = clean.clone();
            operands.dout[at * 128 + 3] = bad[i % 3];
            let found = operands.run(backend, dtype, &whole);
            check("dq", &expected.dq, &found.dq, &[at]);
            check("dk", &expected.dk, &found.dk, &keys);
            check("dv", &expected.dv, &found.dv, &keys);
        }
    }
}

#[test]
fn bad_shapes_are_refused() {
    let backend = cuda::one(ThreadOrder::Forward);
    let operands = Operands::new([2, 1, 8], 4, None, None);
    let x = backend.from_slice(&operands.q, &[4, 16]).unwrap();
    let k = backend.from_slice(&operands.k, &[4, 8]).unwrap();
    let attention = |heads: [usize; 3], len: Range<usize>| {
        let sequences =
            &[Sequence { q_start: len.start, q_len: len.len(), k_start: len.start, k_len: len.len() }];
        let [n_heads, n_kv_heads, head_dim] = heads;
        let shape = AttentionShape {
            n_heads,
            n_kv_heads,
            head_dim,
            scale: 1.0,
            window: None,
            softcap: None,
            sequences,
        };
        let (mut out, mut lse) = (x.clone(), backend.zeros(&[4, n_heads], DType::F32).unwrap());
        backend.attention(&mut out, &mut lse, &x, &k, &k, &shape).is_ok()
    };
    assert!(attention([2, 1, 8], 0..4) && attention([2, 1, 8], 2..2));
    assert!(!attention([2, 1, 8], 1..5) && !attention([3, 2, 8], 0..4) && !attention([1, 1, 257], 0..4));
    assert!(!attention([2, 1, 9], 0..4));
}
