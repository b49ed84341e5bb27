//! Operations over rows: norms, cross-entropy, attention, sums over rows.

use super::{Operand, Table};
use lowrank::DType;
use lowrank::backend::{AttentionShape, Sequence};

pub fn add(table: &mut Table, dtype: DType) {
    for (rows, cols) in [(1, 1), (7, 97), (97, 7), (3, 257), (2, 1304), (5, 64)] {
        column_sums(table, rows, cols, dtype);
        for weight in [dtype, DType::F16] {
            rms_norm(table, rows, cols, dtype, weight);
            layer_norm(table, rows, cols, dtype, weight);
        }
        cross_entropy(table, rows, cols, dtype);
        softcap(table, rows, cols, dtype);
    }
    let one = |q_len, k_len| vec![Sequence { q_start: 0, q_len, k_start: 0, k_len }];
    attention(table, [1, 1, 1], one(1, 1), [1, 1], dtype);
    attention(table, [3, 1, 7], one(7, 7), [7, 7], dtype);
    attention(table, [4, 2, 16], one(97, 97), [97, 97], dtype);
    attention(table, [2, 2, 33], one(131, 257), [131, 257], dtype);
    attention(table, [6, 3, 64], one(1, 97), [1, 97], dtype);
    attention(table, [2, 1, 64], one(70, 70), [70, 70], dtype);
    attention(table, [2, 2, 96], one(33, 65), [33, 65], dtype);
    attention(table, [8, 1, 128], one(2, 150), [2, 150], dtype);
    attention(table, [2, 1, 256], one(20, 50), [20, 50], dtype);
    attention(table, [1, 1, 201], one(9, 40), [9, 40], dtype);
    // Keys that no query sees.
    bounded_attention(table, [2, 1, 128], one(40, 100), [40, 100], dtype, (Some(30), Some(4.0)));
    // Packed sequences, one with cached keys, and rows that belong to none.
    let packed = vec![
        Sequence { q_start: 2, q_len: 17, k_start: 0, k_len: 17 },
        Sequence { q_start: 19, q_len: 1, k_start: 20, k_len: 1 },
        Sequence { q_start: 20, q_len: 30, k_start: 21, k_len: 49 },
    ];
    attention(table, [4, 2, 20], packed.clone(), [53, 71], dtype);
    for (window, softcap) in [(Some(1), None), (Some(9), None), (Some(20), Some(1.5)), (None, Some(0.7))] {
        bounded_attention(table, [4, 2, 20], packed.clone(), [53, 71], dtype, (window, softcap));
    }
}

fn column_sums(table: &mut Table, rows: usize, cols: usize, dtype: DType) {
    let operands = vec![table.normal(&[cols], DType::F32), table.normal(&[rows, cols], dtype)];
    table.add(format!("column sums {rows}x{cols} {dtype}"), true, 1, operands, |backend, t| {
        let [out, x] = t else { unreachable!() };
        backend.add_column_sums(out, x)
    });
}

fn rms_norm(table: &mut Table, rows: usize, cols: usize, dtype: DType, weight: DType) {
    let name = format!("rms_norm {rows}x{cols} {dtype}, weight {weight}");
    let (x, w) = (table.normal(&[rows, cols], dtype), table.normal(&[cols], weight));
    let [y, rstd] = [Operand::overwritten(&[rows, cols], dtype), Operand::overwritten(&[rows], DType::F32)];
    let forward = vec![y.clone(), rstd, x.clone(), w.clone()];
    let saved = table.add(name.clone(), true, 2, forward.clone(), |backend, t| {
        let [y, rstd, x, w] = t else { unreachable!() };
        backend.rms_norm(y, rstd, x, w, 1e-5)
    });
    let added = [&[y.clone()][..], &forward, &[table.normal(&[rows, cols], dtype)]].concat();
    table.add(format!("add_{name}"), true, 3, added, |backend, t| {
        let [sum, y, rstd, a, w, b] = t else { unreachable!() };
        backend.add_rms_norm([sum, y, rstd], [a, b], w, 1e-5)
    });
    for accumulate in [false, true] {
        let dx = if accumulate { table.normal(&[rows, cols], dtype) } else { y.clone() };
        let dweight = table.normal(&[cols], DType::F32);
        let dy = table.normal(&[rows, cols], dtype);
        let operands = vec![dx, dweight, dy, x.clone(), saved[1].clone(), w.clone()];
        let name = format!("{name}, backward, accumulate {accumulate}");
        table.add(name, false, 2, operands, move |backend, t| {
            let [dx, dweight, dy, x, rstd, w] = t else { unreachable!() };
            backend.rms_norm_backward(Some(dx), accumulate, Some(dweight), dy, x, rstd, w)
        });
    }
}

fn layer_norm(table: &mut Table, rows: usize, cols: usize, dtype: DType, weight: DType) {
    let name = format!("layer_norm {rows}x{cols} {dtype}, weight {weight}");
    let (x, w) = (table.normal(&[rows, cols], dtype), table.normal(&[cols], weight));
    let y = Operand::overwritten(&[rows, cols], dtype);
    let stats = Operand::overwritten(&[rows, 2], DType::F32);
    let forward = vec![y.clone(), stats.clone(), x.clone(), w.clone()];
    table.add(format!("{name}, no bias"), true, 2, forward.clone(), |backend, t| {
        let [y, stats, x, w] = t else { unreachable!() };
        backend.layer_norm(y, stats, x, w, None, 1e-5)
    });
    let biased = [forward, vec![table.normal(&[cols], weight)]].concat();
    let saved = table.add(name.clone(), true, 2, biased, |backend, t| {
        let [y, stats, x, w, bias] = t else { unreachable!() };
        backend.layer_norm(y, stats, x, w, Some(bias), 1e-5)
    });
    for accumulate in [false, true] {
        let dx = if accumulate { table.normal(&[rows, cols], dtype) } else { y.clone() };
        let sums = [table.normal(&[cols], DType::F32), table.normal(&[cols], DType::F32)];
        let dy = table.normal(&[rows, cols], dtype);
        let [dweight, dbias] = sums;
        let operands = vec![dx, dweight, dbias, dy, x.clone(), saved[1].clone(), w.clone()];
        let name = format!("{name}, backward, accumulate {accumulate}");
        table.add(name, false, 3, operands, move |backend, t| {
            let [dx, dweight, dbias, dy, x, stats, w] = t else { unreachable!() };
            backend.layer_norm_backward(Some(dx), accumulate, Some(dweight), Some(dbias), dy, x, stats, w)
        });
    }
}

fn softcap(table: &mut Table, rows: usize, cols: usize, dtype: DType) {
    let logits = table.scaled(&[rows, cols], DType::F32, 3.0);
    let capped = table.add(format!("softcap {rows}x{cols}"), false, 1, vec![logits], |backend, t| {
        let [x] = t else { unreachable!() };
        backend.softcap(x, 2.5)
    });
    let operands = [vec![table.normal(&[rows, cols], dtype)], capped].concat();
    table.add(format!("softcap {rows}x{cols} {dtype}, backward"), true, 1, operands, |backend, t| {
        let [dx, y] = t else { unreachable!() };
        backend.softcap_backward(dx, y, 2.5)
    });
}

fn cross_entropy(table: &mut Table, rows: usize, vocabulary: usize, dtype: DType) {
    let operands = vec![
        Operand::overwritten(&[rows], DType::F32),
        Operand::overwritten(&[rows, vocabulary], dtype),
        table.scaled(&[rows, vocabulary], DType::F32, 5.0),
        table.below(rows, vocabulary),
    ];
    table.add(format!("cross_entropy {rows}x{vocabulary} {dtype}"), false, 2, operands, |backend, t| {
        let [losses, dlogits, logits, targets] = t else { unreachable!() };
        backend.cross_entropy(losses, Some(dlogits), logits, targets, 0.37)
    });
}

fn attention(table: &mut Table, heads: [usize; 3], sequences: Vec<Sequence>, rows: [usize; 2], dtype: DType) {
    bounded_attention(table, heads, sequences, rows, dtype, (None, None));
}

/// `heads`: query heads, key heads, head size; `rows`: of queries and of keys; and the window and the cap of scores.
fn bounded_attention(
    table: &mut Table,
    heads: [usize; 3],
    sequences: Vec<Sequence>,
    rows: [usize; 2],
    dtype: DType,
    (window, softcap): (Option<usize>, Option<f32>),
) {
    let [n_heads, n_kv_heads, head_dim] = heads;
    let count = sequences.len();
    let bounds = format!("window {window:?}, softcap {softcap:?}");
    let name = format!("attention {heads:?} {count} sequences, {rows:?} rows {dtype}, {bounds}");
    let q_shape = [rows[0], n_heads * head_dim];
    let k_shape = [rows[1], n_kv_heads * head_dim];
    let inputs = [&q_shape, &k_shape, &k_shape].map(|shape| table.normal(shape, dtype));
    // Rows of no sequence keep what they hold.
    let outputs = [table.normal(&q_shape, dtype), table.normal(&[rows[0], n_heads], DType::F32)];
    let scale = (head_dim as f32).sqrt().recip();
    let shared = sequences.clone();
    let forward = [outputs.to_vec(), inputs.to_vec()].concat();
    let saved = table.add(name.clone(), false, 2, forward, move |backend, t| {
        let [out, lse, q, k, v] = t else { unreachable!() };
        let shape =
            AttentionShape { n_heads, n_kv_heads, head_dim, scale, window, softcap, sequences: &shared };
        backend.attention(out, lse, q, k, v, &shape)
    });
    let gradients = vec![
        table.normal(&q_shape, dtype),
        Operand::overwritten(&k_shape, dtype),
        Operand::overwritten(&k_shape, dtype),
        table.normal(&q_shape, dtype),
    ];
    let operands = [gradients, inputs.to_vec(), saved].concat();
    table.add(format!("{name}, backward"), false, 3, operands, move |backend, t| {
        let [dq, dk, dv, dout, q, k, v, out, lse] = t else { unreachable!() };
        let shape =
            AttentionShape { n_heads, n_kv_heads, head_dim, scale, window, softcap, sequences: &sequences };
        backend.attention_backward(dq, dk, dv, dout, q, k, v, out, lse, &shape)
    });
}
