//! Attention reads what a query sees and nothing else: values that are not finite stay where they are, and a query's bits
//! depend neither on how many are computed with it nor on the instruction set.

use half::bf16;
use lowrank::DType;
use lowrank::backend::cpu::{Cpu, Isa};
use lowrank::backend::reference::Reference;
use lowrank::backend::{AttentionShape, Backend, Sequence};
use lowrank::rng::{Philox, PhiloxKey, Stream};

const HEAD_DIM: usize = 24;

fn all_isas() -> Vec<Backend> {
    let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    available.map(|isa| Cpu::with_isa(isa, Some(1)).unwrap()).collect()
}

/// The rows of one head over `k_len` keys, as bits.
fn rows(
    backend: &Backend,
    dtype: DType,
    values: &[Vec<f32>; 3],
    q_len: usize,
    window: Option<usize>,
) -> Vec<Vec<u32>> {
    let [q, k, v] = values;
    let tensor = |x: &[f32]| {
        let wide = backend.from_slice(x, &[x.len() / HEAD_DIM, HEAD_DIM]).unwrap();
        backend.to_dtype(&wide, dtype).unwrap()
    };
    let k_len = k.len() / HEAD_DIM;
    let sequences = [Sequence { q_start: 0, q_len, k_start: 0, k_len }];
    let shape = AttentionShape {
        sequences: &sequences,
        n_heads: 1,
        n_kv_heads: 1,
        head_dim: HEAD_DIM,
        scale: 0.3,
        softcap: None,
        window,
    };
    let mut out = backend.empty(&[q_len, HEAD_DIM], dtype).unwrap();
    let mut lse = backend.empty(&[q_len, 1], DType::F32).unwrap();
    backend.attention(&mut out, &mut lse, &tensor(q), &tensor(k), &tensor(v), &shape).unwrap();
    let out = backend.to_f32(&out).unwrap();
    out.chunks(HEAD_DIM).map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

#[test]
fn values_that_are_not_finite_stay_with_the_queries_that_see_them() {
    let mut backends = all_isas();
    backends.push(Reference::<f32>::backend());
    let mut rng = Philox::new(PhiloxKey::new(5, Stream::Dummy, 0));
    let mut random = |rows: usize| -> Vec<f32> {
        (0..rows * HEAD_DIM).map(|_| bf16::from_f32(rng.normal()).to_f32()).collect()
    };
    for (q_len, past) in [(45, 0), (9, 40), (1, 37)] {
        let k_len = q_len + past;
        let clean = [random(q_len), random(k_len), random(k_len)];
        for (at, bad) in
            [(k_len - 1, f32::NAN), (k_len - 1 - q_len / 2, f32::INFINITY), (3, f32::NEG_INFINITY)]
        {
            let mut values = clean.clone();
            values[2][at * HEAD_DIM + 5] = bad;
            for backend in &backends {
                for dtype in [DType::F32, DType::BF16] {
                    for window in [None, Some(5), Some(33)] {
                        let expected = rows(backend, dtype, &clean, q_len, window);
                        let found = rows(backend, dtype, &values, q_len, window);
                        for i in 0..q_len {
                            let own = i + past;
                            let sees = at <= own && window.is_none_or(|window| at + window > own);
                            let context =
                                format!("{} {dtype} query {i} of {q_len}, window {window:?}", backend.name());
                            if sees {
                                assert!(!f32::from_bits(found[i][5]).is_finite(), "{context}: {bad} is lost");
                            } else {
                                assert!(found[i] == expected[i], "{context}: {bad} of key {at} came through");
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Outputs of the last `count` of the queries that follow each other in one sequence, as bits by query.
fn last_queries(
    backend: &Backend,
    [q, k, v]: &[Vec<f32>; 3],
    count: usize,
    (n_heads, n_kv_heads, head_dim): (usize, usize, usize),
    window: Option<usize>,
    dtype: DType,
) -> Vec<Vec<u32>> {
    let tensor = |x: &[f32], cols: usize| {
        let wide = backend.from_slice(x, &[x.len() / cols, cols]).unwrap();
        backend.to_dtype(&wide, dtype).unwrap()
    };
    let (q_cols, k_cols) = (n_heads * head_dim, n_kv_heads * head_dim);
    let (k, v) = (tensor(k, k_cols), tensor(v, k_cols));
    let sequences = [Sequence { q_start: 0, q_len: count, k_start: 0, k_len: k.rows() }];
    let shape = AttentionShape {
        sequences: &sequences,
        n_heads,
        n_kv_heads,
        head_dim,
        scale: 0.3,
        softcap: None,
        window,
    };
    let mut out = backend.empty(&[count, q_cols], dtype).unwrap();
    let mut lse = backend.empty(&[count, n_heads], DType::F32).unwrap();
    let q = tensor(&q[q.len() - count * q_cols..], q_cols);
    backend.attention(&mut out, &mut lse, &q, &k, &v, &shape).unwrap();
    let out = backend.to_f32(&out).unwrap();
    out.chunks(q_cols).map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

#[test]
fn a_querys_bits_depend_neither_on_its_neighbours_nor_on_the_instruction_set() {
    let mut rng = Philox::new(PhiloxKey::new(6, Stream::Dummy, 0));
    for heads in [(1, 1, 64), (3, 1, 64), (4, 2, 32), (7, 1, 96), (9, 1, 128), (2, 2, 24)] {
        for keys in [1, 2, 31, 33, 64, 97] {
            let (q_cols, k_cols) = (heads.0 * heads.2, heads.1 * heads.2);
            let mut random = |n: usize| -> Vec<f32> { (0..n).map(|_| rng.normal()).collect() };
            let values = [random(keys * q_cols), random(keys * k_cols), random(keys * k_cols)];
            for (dtype, window) in [DType::F32, DType::BF16].iter().flat_map(|d| [(*d, None), (*d, Some(40))])
            {
                let mut expected = None;
                for backend in all_isas() {
                    for count in [keys, 1, 2, 3, 4, 5, 8, 9, 16] {
                        if count > keys {
                            continue;
                        }
                        let found = last_queries(&backend, &values, count, heads, window, dtype);
                        let all = expected.get_or_insert_with(|| found.clone());
                        assert!(
                            found == all[keys - count..],
                            "{} {dtype} heads {heads:?}, {count} of {keys} queries, window {window:?}",
                            backend.name()
                        );
                    }
                }
            }
        }
    }
}
