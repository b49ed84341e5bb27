//! Attention reads what a query sees and nothing else: values that are not finite stay where they are.

use half::bf16;
use lowrank::DType;
use lowrank::backend::cpu::{Cpu, Isa};
use lowrank::backend::reference::Reference;
use lowrank::backend::{AttentionShape, Backend, Sequence};
use lowrank::rng::{Philox, PhiloxKey, Stream};

const HEAD_DIM: usize = 24;

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
    let mut backends: Vec<Backend> = Isa::ALL
        .into_iter()
        .filter(|isa| isa.is_available())
        .map(|isa| Cpu::with_isa(isa, Some(1)).unwrap())
        .collect();
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
