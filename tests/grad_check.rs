//! Every backward pass against exact derivatives: the generic forward pass computed with dual numbers gives
//! the derivative of a weighted sum of its results along a random direction; the gradients' inner product
//! with the direction has to be the same. First the reference in f64, then the CPU.

mod common;

use common::cases::Operand;
use lowrank::backend::cpu::Cpu;
use lowrank::backend::reference::attention::Inputs;
use lowrank::backend::reference::{Dual, Real, Reference, elementwise, norm};
use lowrank::backend::{Activation, AttentionShape, Backend, RopeShape, Sequence};
use lowrank::rng::{Philox, PhiloxKey, Stream};
use lowrank::{DType, Tensor};

/// The forward pass of an operation: results from operands.
type Forward<'a> = &'a dyn Fn(&[Vec<Dual>]) -> Vec<Dual>;

/// The gradients of all operands, for operands and the gradient of the results.
type Backward<'a> = &'a dyn Fn(&Backend, &[Tensor], &Tensor) -> Vec<Tensor>;

/// Checks an operation with f32 operands of these shapes; the last shape is that of its result.
fn check(name: &str, shapes: &[&[usize]], forward: Forward<'_>, backward: Backward<'_>) {
    let mut rng = Philox::new(PhiloxKey::new(9, Stream::Dummy, 0));
    let mut normal = |shape: &[usize]| {
        let values = (0..shape.iter().product()).map(|_| rng.normal()).collect();
        Operand::new(shape, DType::F32, values)
    };
    let (result_shape, operand_shapes) = shapes.split_last().unwrap();
    let operands: Vec<Operand> = operand_shapes.iter().map(|shape| normal(shape)).collect();
    let dy = normal(result_shape);
    for round in 0..4 {
        let directions: Vec<Operand> = operand_shapes.iter().map(|shape| normal(shape)).collect();
        let duals: Vec<Vec<Dual>> = operands.iter().zip(&directions).map(|(x, d)| dual(x, d)).collect();
        let results = forward(&duals);
        assert_eq!(results.len(), dy.values.len(), "{name}");
        let exact: f64 = results.iter().zip(&dy.values).map(|(y, w)| y.derivative * f64::from(*w)).sum();
        // Operands and gradients are stored as f32, also around f64 arithmetic.
        for (backend, tolerance) in [(Reference::<f64>::backend(), 2e-7), (Cpu::new(Some(2)).unwrap(), 2e-6)]
        {
            let upload = |x: &Operand| x.upload(&backend, false).unwrap();
            let tensors: Vec<Tensor> = operands.iter().map(upload).collect();
            let gradients = backward(&backend, &tensors, &upload(&dy));
            assert_eq!(gradients.len(), directions.len(), "{name}");
            let (mut sum, mut size) = (0.0, 0.0);
            for (gradient, direction) in gradients.iter().zip(&directions) {
                let gradient = backend.to_vec::<f32>(gradient).unwrap();
                for (g, d) in gradient.iter().zip(&direction.values) {
                    sum += f64::from(*g) * f64::from(*d);
                    size += (f64::from(*g) * f64::from(*d)).abs();
                }
            }
            assert!(size > 0.0, "{name}: no gradient");
            let error = (sum - exact).abs() / size;
            let computed = backend.name();
            assert!(error < tolerance, "{name}, {computed}, {round}: {sum} but {exact}, off by {error:e}");
        }
    }
}

fn dual(x: &Operand, direction: &Operand) -> Vec<Dual> {
    let pair = |(x, d): (&f32, &f32)| Dual { value: f64::from(*x), derivative: f64::from(*d) };
    x.values.iter().zip(&direction.values).map(pair).collect()
}

fn empty(backend: &Backend, shape: &[usize]) -> Tensor {
    backend.empty(shape, DType::F32).unwrap()
}

fn zeros(backend: &Backend, shape: &[usize]) -> Tensor {
    backend.zeros(shape, DType::F32).unwrap()
}

const ACTIVATIONS: [Activation; 4] =
    [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu];

/// Large enough that forgetting it in a backward pass shows.
const EPS: f32 = 0.1;

#[test]
fn rms_norm() {
    for (rows, cols) in [(1, 1), (3, 7), (5, 97)] {
        let x_shape: &[usize] = &[rows, cols];
        check(
            "rms_norm",
            &[x_shape, &[cols], x_shape],
            &|t| norm::rms_norm(&t[0], &t[1], Dual::from_f64(EPS.into()), DType::F32).0,
            &|backend, t, dy| {
                let (mut y, mut rstd) = (empty(backend, &[rows, cols]), empty(backend, &[rows]));
                backend.rms_norm(&mut y, &mut rstd, &t[0], &t[1], EPS).unwrap();
                let (mut dx, mut dw) = (empty(backend, &[rows, cols]), zeros(backend, &[cols]));
                let (dx_, dw_) = (Some(&mut dx), Some(&mut dw));
                backend.rms_norm_backward(dx_, false, dw_, dy, &t[0], &rstd, &t[1]).unwrap();
                vec![dx, dw]
            },
        );
    }
}

#[test]
fn layer_norm() {
    for (rows, cols) in [(1, 2), (3, 7), (5, 97)] {
        let x_shape: &[usize] = &[rows, cols];
        check(
            "layer_norm",
            &[x_shape, &[cols], &[cols], x_shape],
            &|t| norm::layer_norm(&t[0], &t[1], Some(&t[2]), Dual::from_f64(EPS.into())).0,
            &|backend, t, dy| {
                let (mut y, mut stats) = (empty(backend, &[rows, cols]), empty(backend, &[rows, 2]));
                backend.layer_norm(&mut y, &mut stats, &t[0], &t[1], Some(&t[2]), EPS).unwrap();
                let mut dx = empty(backend, &[rows, cols]);
                let (mut dw, mut db) = (zeros(backend, &[cols]), zeros(backend, &[cols]));
                let (dx_, dw_, db_) = (Some(&mut dx), Some(&mut dw), Some(&mut db));
                backend.layer_norm_backward(dx_, false, dw_, db_, dy, &t[0], &stats, &t[1]).unwrap();
                vec![dx, dw, db]
            },
        );
    }
}

#[test]
fn attention() {
    let whole = [Sequence { q_start: 0, q_len: 7, k_start: 0, k_len: 7 }];
    let packed = [
        Sequence { q_start: 0, q_len: 5, k_start: 0, k_len: 5 },
        Sequence { q_start: 5, q_len: 3, k_start: 5, k_len: 11 },
        Sequence { q_start: 8, q_len: 1, k_start: 16, k_len: 1 },
    ];
    #[allow(clippy::type_complexity)]
    let cases: [(usize, usize, usize, &[Sequence], usize, usize); 3] =
        [(1, 1, 3, &whole, 7, 7), (4, 2, 8, &packed, 9, 17), (6, 2, 33, &packed, 9, 17)];
    let bounds = [(None, None), (Some(3), None), (Some(4), Some(1.5)), (None, Some(0.7))];
    let cases = cases.into_iter().flat_map(|case| bounds.map(|bounds| (case, bounds)));
    for ((n_heads, n_kv_heads, head_dim, sequences, q_rows, k_rows), (window, softcap)) in cases {
        let shape = AttentionShape { n_heads, n_kv_heads, head_dim, scale: 0.4, window, softcap, sequences };
        let q_shape = [q_rows, n_heads * head_dim];
        let k_shape = [k_rows, n_kv_heads * head_dim];
        check(
            "attention",
            &[&q_shape, &k_shape, &k_shape, &q_shape],
            &|t| {
                let mut out = vec![Dual::zero(); t[0].len()];
                let mut lse = vec![Dual::zero(); q_rows * n_heads];
                let (q, k, v) = (&t[0], &t[1], &t[2]);
                Inputs { q, k, v, dtype: DType::F32, shape: &shape }.forward(&mut out, &mut lse);
                out
            },
            &|backend, t, dy| {
                let (mut out, mut lse) = (zeros(backend, &q_shape), zeros(backend, &[q_rows, n_heads]));
                backend.attention(&mut out, &mut lse, &t[0], &t[1], &t[2], &shape).unwrap();
                let mut dq = empty(backend, &q_shape);
                let (mut dk, mut dv) = (empty(backend, &k_shape), empty(backend, &k_shape));
                let (q, k, v) = (&t[0], &t[1], &t[2]);
                backend
                    .attention_backward(&mut dq, &mut dk, &mut dv, dy, q, k, v, &out, &lse, &shape)
                    .unwrap();
                vec![dq, dk, dv]
            },
        );
    }
}

#[test]
fn activations() {
    let shape: &[usize] = &[7, 97];
    for activation in ACTIVATIONS {
        check(
            &format!("{activation:?}"),
            &[shape, shape],
            &|t| t[0].iter().map(|x| elementwise::activate(*x, activation)).collect(),
            &|backend, t, dy| {
                let mut dx = empty(backend, shape);
                backend.activation_backward(&mut dx, dy, &t[0], activation).unwrap();
                vec![dx]
            },
        );
        check(
            &format!("gated {activation:?}"),
            &[shape, shape, shape],
            &|t| {
                let gated = |(g, u): (&Dual, &Dual)| elementwise::activate(*g, activation) * *u;
                t[0].iter().zip(&t[1]).map(gated).collect()
            },
            &|backend, t, dy| {
                let (mut dgate, mut dup) = (empty(backend, shape), empty(backend, shape));
                backend.gated_backward(&mut dgate, &mut dup, dy, &t[0], &t[1], activation).unwrap();
                vec![dgate, dup]
            },
        );
    }
}

#[test]
fn rope() {
    let positions = [3usize, 0, 7, 7, 1];
    let mut rng = Philox::new(PhiloxKey::new(2, Stream::Dummy, 0));
    for (head_dim, rotary_dim, interleaved) in
        [(2, 2, true), (64, 64, false), (37, 14, false), (37, 14, true)]
    {
        // The inverse is the transpose for any table, so also for one of random numbers.
        let values = (0..8 * rotary_dim).map(|_| rng.normal()).collect();
        let table = Operand::new(&[8, rotary_dim], DType::F32, values);
        let indices = Operand::indices(&positions);
        let shape = RopeShape { n_heads: 3, head_dim, rotary_dim, interleaved, inverse: false };
        let x_shape = [positions.len(), 3 * head_dim];
        check(
            "rope",
            &[&x_shape, &x_shape],
            &|t| {
                let mut x = t[0].clone();
                let table: Vec<Dual> = table.values.iter().map(|v| Dual::from_f64((*v).into())).collect();
                elementwise::rope(&mut x, &table, &positions.map(|p| p as i32), &shape);
                x
            },
            &|backend, _, dy| {
                let mut dx = empty(backend, &x_shape);
                backend.cast(&mut dx, dy).unwrap();
                let (table, positions) =
                    (table.upload(backend, false).unwrap(), indices.upload(backend, false).unwrap());
                let inverse = RopeShape { inverse: true, ..shape };
                backend.rope(&mut dx, &table, &positions, &inverse).unwrap();
                vec![dx]
            },
        );
    }
}

#[test]
fn dropout() {
    let shape: &[usize] = &[7, 97];
    let key = PhiloxKey::new(1, Stream::Dropout, 4);
    check(
        "dropout",
        &[shape, shape],
        &|t| elementwise::dropout(&t[0], 0.3, key, 5 * 97),
        &|backend, _, dy| {
            let mut dx = empty(backend, shape);
            backend.dropout(&mut dx, dy, 0.3, key, 5, false).unwrap();
            vec![dx]
        },
    );
}

#[test]
fn embedding() {
    let rows = [4usize, 0, 4, 2, 2, 2, 1];
    let indices = Operand::indices(&rows);
    check(
        "embedding",
        &[&[6, 33], &[rows.len(), 33]],
        &|t| rows.iter().flat_map(|row| t[0][row * 33..][..33].iter().copied()).collect(),
        &|backend, _, dy| {
            let mut dx = zeros(backend, &[6, 33]);
            let indices = indices.upload(backend, false).unwrap();
            backend.scatter_add_rows(&mut dx, dy, &indices).unwrap();
            vec![dx]
        },
    );
}

#[test]
fn cross_entropy() {
    for vocabulary in [2usize, 7, 97, 257] {
        let targets = [0, vocabulary - 1, vocabulary / 2];
        let indices = Operand::indices(&targets);
        // The kernel gives the gradient of the losses' sum times a factor, which is the weight of each row.
        check(
            "cross_entropy",
            &[&[3, vocabulary], &[1]],
            &|t| {
                let rows = t[0].chunks(vocabulary).zip(targets);
                let loss = |(row, target)| elementwise::cross_entropy(row, target, Dual::one()).0;
                vec![rows.map(loss).fold(Dual::zero(), |sum, loss| sum + loss)]
            },
            &|backend, t, dy| {
                let (mut losses, mut dlogits) = (empty(backend, &[3]), empty(backend, &[3, vocabulary]));
                let indices = indices.upload(backend, false).unwrap();
                let factor = backend.to_vec::<f32>(dy).unwrap()[0];
                backend.cross_entropy(&mut losses, Some(&mut dlogits), &t[0], &indices, factor).unwrap();
                vec![dlogits]
            },
        );
    }
}
