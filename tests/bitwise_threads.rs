//! The number of threads, and of other rows in the batch, changes no bit.

mod common;

use common::gemm::{Case, Data, SIZES, Values, assert_same_bits, compute, varied};
use lowrank::backend::cpu::{Cpu, Isa};

#[test]
fn products_do_not_depend_on_threads() {
    let isa = Isa::choose().unwrap();
    let backends = [1, 2, 3, 8].map(|threads| Cpu::with_isa(isa, Some(threads)).unwrap());
    // The first ones are so large that they are split over threads, by columns or by rows.
    let large = [(257, 97, 257), (600, 64, 31), (5, 300, 700), (31, 1030, 257)];
    let sizes = large.into_iter().chain(SIZES.map(|s| (s, 257, 33)));
    for (index, (m, k, n)) in sizes.enumerate() {
        for variant in 0..6 {
            let case = varied(m, k, n, (index * 6 + variant) as u64);
            let mut values = Values(index as u64);
            let data = Data::of(&case, || values.value());
            let expected = compute(&backends[0], &case, &data);
            for backend in &backends[1..] {
                assert_same_bits(&compute(backend, &case, &data), &expected, &(backend.name(), &case));
            }
        }
    }
}

/// What lets a key-value cache and packed batches keep the bits of the full forward.
#[test]
fn a_row_does_not_depend_on_other_rows() {
    let backend = Cpu::with_isa(Isa::choose().unwrap(), Some(2)).unwrap();
    for index in 0..16 {
        // The second size is narrow enough to be computed as its transpose, the whole or not its parts.
        let (m, k, n) = if index % 2 == 0 { (45, 331, 70) } else { (45, 331, 9) };
        let mut case = varied(m, k, n, index);
        case.terms.iter_mut().for_each(|(_, a, _)| a.transposed = false);
        case.row_terms.iter_mut().for_each(|(_, _, a, _)| a.transposed = false);
        let mut values = Values(index);
        let data = Data::of(&case, || values.value());
        let all = compute(&backend, &case, &data);
        for (first, rows) in [(0, 1), (44, 1), (7, 2), (3, 14), (13, 29)] {
            let mut part = Case { m: rows, ..case.clone() };
            let cut = |x: &[f32], width: usize| x[first * width..(first + rows) * width].to_vec();
            let terms = case.terms.iter().zip(&data.terms);
            let mut row_terms = Vec::new();
            for ((range, k, ..), (a, b)) in part.row_terms.iter_mut().zip(&data.row_terms) {
                let own = range.start.clamp(first, first + rows)..range.end.clamp(first, first + rows);
                let skipped = own.start.saturating_sub(range.start).min(range.len());
                row_terms.push((a[skipped * *k..][..own.len() * *k].to_vec(), b.clone()));
                *range = own.start - first..own.end - first;
            }
            let part_data = Data {
                terms: terms.map(|(&(k, ..), (a, b))| (cut(a, k), b.clone())).collect(),
                row_terms,
                init: cut(&data.init, n),
                bias: data.bias.clone(),
            };
            let found = compute(&backend, &part, &part_data);
            assert_same_bits(&found, &cut(&all, n), &(first, rows, &case));
        }
    }
}
