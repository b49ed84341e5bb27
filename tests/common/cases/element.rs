//! Operations on elements by themselves.

use super::{Operand, Table};
use lowrank::DType;
use lowrank::backend::{Activation, OptimizerStep, RopeShape};
use lowrank::rng::{PhiloxKey, Stream};

pub const ACTIVATIONS: [Activation; 6] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Tanh,
    Activation::Sigmoid,
];

pub fn add(table: &mut Table, dtype: DType) {
    // The last is shared out to several threads.
    for shape in [[1, 1], [7, 97], [97, 257]] {
        sums(table, &shape, dtype);
        columns(table, &shape, dtype);
        for activation in ACTIVATIONS {
            activate(table, &shape, dtype, activation);
        }
        for (p, accumulate) in [(0.0, false), (0.3, false), (0.3, true), (0.9, true)] {
            dropout(table, shape, dtype, p, accumulate);
        }
    }
    for n in [1, 7, 97, 20_011] {
        optimizers(table, n);
    }
    for flags in 0..4 {
        let (interleaved, inverse) = (flags & 1 == 1, flags & 2 == 2);
        for (n_heads, head_dim, rotary_dim) in [(1, 2, 2), (3, 64, 64), (2, 37, 14)] {
            rope(table, dtype, RopeShape { n_heads, head_dim, rotary_dim, interleaved, inverse });
        }
    }
}

fn sums(table: &mut Table, shape: &[usize], dtype: DType) {
    let operands =
        vec![Operand::overwritten(shape, dtype), table.normal(shape, dtype), table.normal(shape, dtype)];
    table.add(format!("add {shape:?} {dtype}"), true, 1, operands, |backend, t| {
        let [out, a, b] = t else { unreachable!() };
        backend.add(out, a, b)
    });
    let operands = vec![table.normal(shape, dtype), table.normal(shape, dtype)];
    table.add(format!("add_assign and scale {shape:?} {dtype}"), true, 1, operands, |backend, t| {
        let [out, x] = t else { unreachable!() };
        backend.add_assign(out, x)?;
        backend.scale(out, 0.7)
    });
}

fn columns(table: &mut Table, shape: &[usize], dtype: DType) {
    let factors = table.normal(&shape[1..], DType::F32);
    let bias = table.normal(&shape[1..], DType::F32);
    let operands = vec![Operand::overwritten(shape, dtype), table.normal(shape, dtype), factors, bias];
    for with_bias in [false, true] {
        let name = format!("scale_columns {shape:?} {dtype}, bias {with_bias}");
        table.add(name, true, 1, operands.clone(), move |backend, t| {
            let [out, x, factors, bias] = t else { unreachable!() };
            backend.scale_columns(out, x, factors, with_bias.then_some(&*bias))
        });
    }
    let sums = table.normal(&shape[1..], DType::F32);
    let operands = vec![sums, table.normal(shape, dtype), table.normal(shape, dtype)];
    table.add(format!("add_column_products {shape:?} {dtype}"), true, 1, operands, |backend, t| {
        let [out, a, b] = t else { unreachable!() };
        backend.add_column_products(out, a, b)
    });
    if dtype == DType::F32 {
        let mut x = table.normal(shape, dtype);
        x.values.iter_mut().for_each(|x| *x = *x * *x + 1e-3);
        let operands = vec![Operand::overwritten(shape, dtype), x];
        table.add(format!("rsqrt {shape:?}"), true, 1, operands, |backend, t| {
            let [out, x] = t else { unreachable!() };
            backend.rsqrt(out, x)
        });
    }
}

fn activate(table: &mut Table, shape: &[usize], dtype: DType, activation: Activation) {
    let exact = activation == Activation::Relu;
    let name = format!("{activation:?} {shape:?} {dtype}");
    let overwritten = Operand::overwritten(shape, dtype);
    let x = [(); 3].map(|()| table.scaled(shape, dtype, 3.0));
    let [dy, gate, up] = x.clone();
    let operands = vec![overwritten.clone(), gate.clone()];
    table.add(name.clone(), exact, 1, operands, move |backend, t| {
        let [y, x] = t else { unreachable!() };
        backend.activation(y, x, activation)
    });
    let operands = vec![overwritten.clone(), dy.clone(), gate.clone()];
    table.add(format!("{name}, backward"), exact, 1, operands, move |backend, t| {
        let [dx, dy, x] = t else { unreachable!() };
        backend.activation_backward(dx, dy, x, activation)
    });
    let operands = vec![overwritten.clone(), gate.clone(), up.clone()];
    table.add(format!("gated {name}"), exact, 1, operands, move |backend, t| {
        let [y, gate, up] = t else { unreachable!() };
        backend.gated(y, gate, up, activation)
    });
    let operands = vec![overwritten.clone(), overwritten, dy, gate, up];
    table.add(format!("gated {name}, backward"), exact, 2, operands, move |backend, t| {
        let [dgate, dup, dy, gate, up] = t else { unreachable!() };
        backend.gated_backward(dgate, dup, dy, gate, up, activation)
    });
}

fn dropout(table: &mut Table, shape: [usize; 2], dtype: DType, p: f32, accumulate: bool) {
    let y = if accumulate { table.normal(&shape, dtype) } else { Operand::overwritten(&shape, dtype) };
    let operands = vec![y, table.normal(&shape, dtype)];
    let name = format!("dropout {p} {shape:?} {dtype}, accumulate {accumulate}");
    table.add(name, true, 1, operands, move |backend, t| {
        let [y, x] = t else { unreachable!() };
        // A first row whose element index does not fit 32 bits.
        backend.dropout(y, x, p, PhiloxKey::new(3, Stream::Dropout, 7), (1 << 33) + 5, accumulate)
    });
}

/// Settings of a third step.
pub fn third_step() -> OptimizerStep {
    OptimizerStep {
        learning_rate: 3e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.1,
        grad_scale: 0.6,
        verdict: None,
        bias_correction1: 1.0 - 0.9f64.powi(3),
        bias_correction2_sqrt: (1.0 - 0.999f64.powi(3)).sqrt(),
    }
}

fn optimizers(table: &mut Table, n: usize) {
    let mut operands = vec![table.normal(&[n], DType::F32), table.scaled(&[n], DType::F32, 0.1)];
    let mut v = table.scaled(&[n], DType::F32, 0.1);
    v.values.iter_mut().for_each(|v| *v *= *v);
    operands.extend([v, table.scaled(&[n], DType::F32, 0.3)]);
    table.add(format!("adamw {n}"), true, 3, operands, |backend, t| {
        let [p, m, v, g] = t else { unreachable!() };
        backend.adamw(p, g, m, v, &third_step())
    });
    let operands = [table.cases.last().unwrap().operands[0].clone(), table.scaled(&[n], DType::F32, 0.1)];
    let gradient = table.scaled(&[n], DType::F32, 0.3);
    let lion = [&operands[..], std::slice::from_ref(&gradient)].concat();
    table.add(format!("lion {n}"), true, 2, lion, |backend, t| {
        let [p, m, g] = t else { unreachable!() };
        backend.lion(p, g, m, &third_step())
    });
    let sgd = vec![operands[0].clone(), gradient];
    table.add(format!("sgd {n}"), true, 1, sgd, |backend, t| {
        let [p, g] = t else { unreachable!() };
        backend.sgd(p, g, &third_step())
    });
}

fn rope(table: &mut Table, dtype: DType, shape: RopeShape) {
    let (rows, positions) = (33, 20);
    let operands = vec![
        table.normal(&[rows, shape.n_heads * shape.head_dim], dtype),
        table.normal(&[positions, shape.rotary_dim], DType::F32),
        table.below(rows, positions),
    ];
    table.add(format!("rope {dtype} {shape:?}"), true, 1, operands, move |backend, t| {
        let [x, table, positions] = t else { unreachable!() };
        backend.rope(x, table, positions, &shape)
    });
    // Queries, keys and another one at once, of which the second has other heads and the third lies otherwise.
    let fewer = RopeShape { n_heads: 1, ..shape };
    let shapes = [shape, fewer, RopeShape { interleaved: !shape.interleaved, ..fewer }];
    for n in [2, 3] {
        let shapes = shapes[..n].to_vec();
        let xs = shapes.iter().map(|shape| table.normal(&[rows, shape.n_heads * shape.head_dim], dtype));
        let mut operands: Vec<_> = xs.collect();
        operands.push(table.normal(&[positions, shape.rotary_dim], DType::F32));
        operands.push(table.below(rows, positions));
        table.add(format!("{n} ropes {dtype} {shape:?}"), true, n, operands, move |backend, t| {
            let (xs, rest) = t.split_at_mut(n);
            let mut all: Vec<_> = xs.iter_mut().zip(shapes.iter().copied()).collect();
            backend.rope_all(&mut all, &rest[0], &rest[1])
        });
    }
}
