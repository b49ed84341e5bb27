//! The CPU's kernels against the scalar reference, every case of the table: equal bits where the numerics
//! law fixes them, else an error against f64 within twice that of a plain computation.

mod common;

use common::cases::{Case, all};
use common::compare::{different_bits, within_twice_naive};
use lowrank::DType;
use lowrank::backend::Backend;
use lowrank::backend::cpu::{Cpu, Isa};
use lowrank::backend::reference::Reference;
use lowrank::rng::{Philox, PhiloxKey, Stream};

/// What is wrong with the results of one case, if anything.
fn fault(case: &Case, cpu: &Backend, reference: &Backend) -> Option<String> {
    let (ours, naive) = (case.run(cpu, false), case.run(reference, false));
    let misaligned = case.run(cpu, true);
    let truth = case.truth();
    for (i, ours) in ours.iter().enumerate() {
        let moved = different_bits(ours, &misaligned[i]);
        if moved > 0 {
            return Some(format!("result {i}: {moved} of {} differ with the alignment", ours.len()));
        }
        let different = different_bits(ours, &naive[i]);
        if case.bitwise && different > 0 {
            return Some(format!("result {i}: {different} of {} differ", ours.len()));
        }
        if let Err(message) = within_twice_naive(ours, &naive[i], &truth[i], case.operands[i].dtype) {
            return Some(format!("result {i}: {message}"));
        }
    }
    None
}

fn check(cpu: &Backend, dtype: DType) {
    let reference = Reference::<f32>::backend();
    let faults: Vec<String> = all(dtype)
        .iter()
        .filter_map(|case| fault(case, cpu, &reference).map(|fault| format!("{}: {fault}", case.name)))
        .collect();
    assert!(faults.is_empty(), "{}:\n{}", cpu.name(), faults.join("\n"));
}

#[test]
fn f32_operations() {
    check(&Cpu::new(Some(3)).unwrap(), DType::F32);
}

#[test]
fn bf16_operations() {
    check(&Cpu::new(Some(3)).unwrap(), DType::BF16);
}

#[test]
fn every_instruction_set() {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let cpu = Cpu::with_isa(isa, Some(2)).unwrap();
        check(&cpu, DType::BF16);
        check(&cpu, DType::F32);
    }
}

#[test]
fn sums_of_squares() {
    let mut rng = Philox::new(PhiloxKey::new(1, Stream::Dummy, 0));
    let values: Vec<f32> = (0..20_011).map(|_| rng.normal()).collect();
    let (cpu, reference) = (Cpu::new(None).unwrap(), Reference::<f32>::backend());
    let exact = Reference::<f64>::backend();
    for n in [0, 1, 7, 97, 4096, 4097, 20_011] {
        let on = |backend: &Backend| {
            backend.sum_squares(&backend.from_slice(&values[..n], &[n]).unwrap()).unwrap()
        };
        assert_eq!(on(&cpu), on(&reference), "{n} elements");
        assert!((on(&cpu) - on(&exact)).abs() <= 1e-6 * on(&exact), "{n} elements");
    }
    for bad in [f32::INFINITY, f32::NAN, 3e38] {
        let x = cpu.from_slice(&[1.0, bad, 2.0], &[3]).unwrap();
        assert!(!cpu.sum_squares(&x).unwrap().is_finite());
    }
}
