//! Matrix products, and moving and converting rows.

use super::{Operand, Table};
use lowrank::DType;
use lowrank::backend::{Gemm, GemmTerm, Matrix, RowTerm};

pub fn add(table: &mut Table, dtype: DType) {
    for (m, k, n) in [(1, 1, 1), (1, 97, 257), (7, 1, 97), (97, 257, 7), (30, 515, 65)] {
        for layout in 0..4 {
            product(table, [m, k, n], (layout & 1 == 1, layout & 2 == 2), [dtype; 3]);
            low_rank(table, [m, k, n], (layout & 1 == 1, layout & 2 == 2), [dtype; 3]);
        }
    }
    let other = if dtype == DType::F32 { DType::BF16 } else { DType::F32 };
    for types in [[other, dtype, dtype], [dtype, dtype, other], [dtype, dtype, DType::F16]] {
        product(table, [7, 97, 33], (false, true), types);
        low_rank(table, [7, 97, 33], (false, true), types);
    }
    mixed_terms(table, dtype);
    denormals(table, dtype);
    moves(table, dtype);
}

/// Products of which some rows have more than others.
pub fn add_row_terms(table: &mut Table, dtype: DType) {
    for sizes in [[3, 97, 64], [4, 33, 7], [30, 97, 65], [97, 257, 33]] {
        row_terms(table, sizes, dtype);
    }
}

/// The stored shape of an operand.
fn stored(rows: usize, cols: usize, transposed: bool) -> [usize; 2] {
    if transposed { [cols, rows] } else { [rows, cols] }
}

/// `out = a b`; types of `out`, `a`, `b`.
fn product(table: &mut Table, [m, k, n]: [usize; 3], (at, bt): (bool, bool), [out, a, b]: [DType; 3]) {
    let operands = vec![
        Operand::overwritten(&[m, n], out),
        table.normal(&stored(m, k, at), a),
        table.normal(&stored(k, n, bt), b),
    ];
    let name = format!("gemm {m}x{k}x{n} {out} = {a}{} {b}{}", transposition(at), transposition(bt));
    table.add(name, true, 1, operands, move |backend, t| {
        let [out, a, b] = t else { unreachable!() };
        let a = Matrix::Dense { tensor: a, transposed: at };
        let b = Matrix::Dense { tensor: b, transposed: bt };
        backend.gemm(out, &Gemm::new(&[GemmTerm { a, b }]))
    });
}

/// `out = 0.5 (out + a b + a2 b2) + bias`, the second product of rank 5.
fn low_rank(table: &mut Table, [m, k, n]: [usize; 3], (at, bt): (bool, bool), [out, a, b]: [DType; 3]) {
    let operands = vec![
        table.normal(&[m, n], out),
        table.normal(&stored(m, k, at), a),
        table.normal(&stored(k, n, bt), b),
        table.normal(&[m, 5], a),
        table.normal(&[n, 5], a),
        table.normal(&[n], b),
    ];
    let name = format!("gemm with all {m}x{k}x{n} {out} = {a}{} {b}{}", transposition(at), transposition(bt));
    table.add(name, true, 1, operands, move |backend, t| {
        let [out, a, b, a2, b2, bias] = t else { unreachable!() };
        let first = GemmTerm {
            a: Matrix::Dense { tensor: a, transposed: at },
            b: Matrix::Dense { tensor: b, transposed: bt },
        };
        let second = GemmTerm { a: Matrix::plain(a2), b: Matrix::transposed(b2) };
        let terms = [first, second];
        let gemm = Gemm { scale: 0.5, bias: Some(bias), accumulate: true, ..Gemm::new(&terms) };
        backend.gemm(out, &gemm)
    });
}

/// `out = a b + bias`, and products of ranks 5 and 3 in some rows.
fn row_terms(table: &mut Table, [m, k, n]: [usize; 3], dtype: DType) {
    let (first, second) = (m / 3, m - m / 2);
    let operands = vec![
        Operand::overwritten(&[m, n], dtype),
        table.normal(&[m, k], dtype),
        table.normal(&[n, k], dtype),
        table.normal(&[first, 5], dtype),
        table.normal(&[n, 5], dtype),
        table.normal(&[second, 3], dtype),
        table.normal(&[3, n], dtype),
        table.normal(&[n], dtype),
    ];
    table.add(format!("gemm with row terms {m}x{k}x{n} {dtype}"), true, 1, operands, move |backend, t| {
        let [out, a, b, a2, b2, a3, b3, bias] = t else { unreachable!() };
        let term = |a, b| GemmTerm { a: Matrix::plain(a), b };
        let row_terms = [
            RowTerm { first_row: 0, term: term(a2, Matrix::transposed(b2)) },
            RowTerm { first_row: m / 2, term: term(a3, Matrix::plain(b3)) },
        ];
        let terms = [term(a, Matrix::transposed(b))];
        let gemm = Gemm { row_terms: &row_terms, bias: Some(bias), ..Gemm::new(&terms) };
        backend.gemm(out, &gemm)
    });
}

/// One f32 `a` makes the arithmetic of all terms f32.
fn mixed_terms(table: &mut Table, dtype: DType) {
    let operands = vec![
        Operand::overwritten(&[7, 33], dtype),
        table.normal(&[7, 97], DType::BF16),
        table.normal(&[33, 97], DType::BF16),
        table.normal(&[7, 3], DType::F32),
        table.normal(&[33, 3], dtype),
    ];
    table.add(format!("gemm of bf16 and f32 terms into {dtype}"), true, 1, operands, |backend, t| {
        let [out, a, b, a2, b2] = t else { unreachable!() };
        let term = |a, b| GemmTerm { a: Matrix::plain(a), b: Matrix::transposed(b) };
        backend.gemm(out, &Gemm::new(&[term(a, b), term(a2, b2)]))
    });
}

/// Operands and products around the smallest normal f32.
fn denormals(table: &mut Table, dtype: DType) {
    for (name, a, b) in [("operands", 1e-38, 1.0), ("products", 1e-19, 1e-19)] {
        let operands = vec![
            table.scaled(&[7, 33], DType::F32, 1e-38),
            table.scaled(&[7, 97], dtype, a),
            table.scaled(&[97, 33], dtype, b),
        ];
        table.add(format!("gemm with denormal {name} {dtype}"), true, 1, operands, |backend, t| {
            let [out, a, b] = t else { unreachable!() };
            let terms = [GemmTerm { a: Matrix::plain(a), b: Matrix::plain(b) }];
            backend.gemm(out, &Gemm { accumulate: true, ..Gemm::new(&terms) })
        });
    }
}

fn transposition(transposed: bool) -> &'static str {
    if transposed { "^T" } else { "" }
}

fn moves(table: &mut Table, dtype: DType) {
    for n in [1, 7, 97, 257] {
        let fill = vec![Operand::overwritten(&[n], dtype)];
        table.add(format!("fill {n} {dtype}"), true, 1, fill, |backend, t| backend.fill(&mut t[0], 0.3));
        for to in [DType::F32, DType::BF16, DType::F16] {
            let mut x = table.normal(&[n], dtype);
            // Infinity, overflow in f16 and bf16, a tie, a denormal of bf16 and f16.
            let special = [f32::INFINITY, 3.4e38, 65519.9, 1.003_906_2, 1e-39, 3e-8, -0.0];
            x.values.iter_mut().zip(special).for_each(|(x, s)| *x = super::round(s, dtype));
            let operands = vec![Operand::overwritten(&[n], to), x];
            table.add(format!("cast {n} {dtype} to {to}"), true, 1, operands, |backend, t| {
                let [out, x] = t else { unreachable!() };
                backend.cast(out, x)
            });
        }
    }
    for (rows, cols, n) in [(1, 1, 1), (7, 97, 20), (97, 7, 33), (5, 257, 3)] {
        for from in [DType::F32, DType::BF16, DType::F16] {
            let operands = vec![
                Operand::overwritten(&[n, cols], dtype),
                table.normal(&[rows, cols], from),
                table.below(n, rows),
            ];
            table.add(
                format!("gather {n} of {rows}x{cols} {from} to {dtype}"),
                true,
                1,
                operands,
                |backend, t| {
                    let [out, x, rows] = t else { unreachable!() };
                    backend.gather_rows(out, x, rows)
                },
            );
        }
        for to in [DType::F32, dtype] {
            let operands =
                vec![table.normal(&[rows, cols], to), table.normal(&[n, cols], dtype), table.below(n, rows)];
            table.add(
                format!("scatter {n} to {rows}x{cols} {dtype} to {to}"),
                true,
                1,
                operands,
                |backend, t| {
                    let [out, x, rows] = t else { unreachable!() };
                    backend.scatter_add_rows(out, x, rows)
                },
            );
        }
        for accumulate in [false, true] {
            let operands = vec![table.normal(&[n, cols + 5], dtype), table.normal(&[n, cols + 2], dtype)];
            let name = format!("copy {cols} columns of {n} rows {dtype}, accumulate {accumulate}");
            table.add(name, true, 1, operands, move |backend, t| {
                let [out, x] = t else { unreachable!() };
                backend.copy_columns(out, 4, x, 1, cols, accumulate)
            });
        }
    }
}
