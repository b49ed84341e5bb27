//! Every instruction set gives the bits that the numerics law defines.

mod common;

use common::gemm::{Case, Data, Operand, SIZES, Values, assert_same_bits, by_the_law, compute, varied};
use lowrank::DType;
use lowrank::backend::Backend;
use lowrank::backend::cpu::{Cpu, Isa};

/// One backend per instruction set that this processor has, on one thread.
fn backends() -> Vec<Backend> {
    let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    available.map(|isa| Cpu::with_isa(isa, Some(1)).unwrap()).collect()
}

#[test]
fn products_of_all_sizes_follow_the_law() {
    let backends = backends();
    let mut index = 0;
    for m in SIZES {
        for k in SIZES {
            for n in SIZES {
                index += 1;
                let case = varied(m, k, n, index);
                let mut values = Values(index);
                let data = Data::of(&case, || values.value());
                let expected = by_the_law(&case, &data);
                for backend in &backends {
                    assert_same_bits(&compute(backend, &case, &data), &expected, &(backend.name(), &case));
                }
            }
        }
    }
}

fn plain(dtype: DType) -> Operand {
    Operand { dtype, transposed: false, misaligned: false }
}

fn simple(m: usize, k: usize, n: usize, dtype: DType) -> Case {
    let terms = vec![(k, plain(dtype), plain(dtype))];
    Case { m, n, terms, row_terms: Vec::new(), out: DType::F32, accumulate: true, scale: 1.0, bias: None }
}

/// More units of k than a chunk of a packed panel has: accumulators pass through memory.
#[test]
fn long_sums_follow_the_law() {
    for dtype in [DType::F32, DType::BF16] {
        let case = simple(3, 2311, 35, dtype);
        let mut values = Values(5);
        let data = Data::of(&case, || values.value());
        let expected = by_the_law(&case, &data);
        for backend in backends() {
            assert_same_bits(&compute(&backend, &case, &data), &expected, &(backend.name(), &case));
        }
    }
}

/// Infinities, NaN, and results at the edge of the denormal numbers.
#[test]
fn extreme_values_follow_the_law() {
    let extremes = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::MAX,
        f32::MIN_POSITIVE,
        -f32::MIN_POSITIVE,
        f32::from_bits(1),
        f32::from_bits(0x8001_0000),
        2.0f32.powi(-63),
        -2.0f32.powi(-63),
        2.0f32.powi(-75),
        -2.0f32.powi(-75),
        1.0e-30,
        -1.0e30,
    ];
    for dtype in [DType::F32, DType::BF16] {
        for k in [1, 2, 3] {
            let case = simple(64, k, 64, dtype);
            let mut values = Values(k as u64);
            let data = Data::of(&case, || values.pick(&extremes));
            let expected = by_the_law(&case, &data);
            for backend in backends() {
                assert_same_bits(&compute(&backend, &case, &data), &expected, &(backend.name(), &case));
            }
        }
    }
}

/// 2^-126 - 2^-150 is exactly halfway between the smallest normal number and the largest denormal one.
#[test]
fn underflow_at_the_edge_is_one_and_the_same() {
    let case = simple(1, 1, 1, DType::BF16);
    for steps in [150, 151, 152] {
        let data = Data {
            terms: vec![(vec![2.0f32.powi(-75)], vec![-2.0f32.powi(75 - steps)])],
            row_terms: Vec::new(),
            init: vec![f32::MIN_POSITIVE],
            bias: vec![0.0],
        };
        let expected = by_the_law(&case, &data);
        for backend in backends() {
            assert_same_bits(&compute(&backend, &case, &data), &expected, &(backend.name(), steps));
        }
    }
}

/// The error against f64 is that of an f32 sum, so the law's products are also right ones.
#[test]
fn products_are_close_to_f64() {
    let backend = Cpu::with_isa(Isa::choose().unwrap(), None).unwrap();
    let case = Case { accumulate: false, ..simple(33, 576, 65, DType::F32) };
    let mut values = Values(9);
    let data = Data::of(&case, || values.value());
    let found = compute(&backend, &case, &data);
    let (a, b) = &data.terms[0];
    for (i, f) in found.iter().enumerate() {
        let products = (0..576).map(|l| f64::from(a[i / 65 * 576 + l]) * f64::from(b[l * 65 + i % 65]));
        let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
        assert!((f64::from(*f) - sum).abs() <= 1e-6 * size, "element {i}: {f} is far from {sum}");
    }
}
