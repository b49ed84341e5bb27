//! Every operation of the table has the same bits on every instruction set, whatever the number of threads.

mod common;

use common::cases::{Case, all};
use common::compare::different_bits;
use lowrank::DType;
use lowrank::backend::Backend;
use lowrank::backend::cpu::{Cpu, Isa};

/// Where the backends' results differ from those of the first.
fn faults(backends: &[Backend], case: &Case) -> Vec<String> {
    let expected = case.run(&backends[0], false);
    let mut faults = Vec::new();
    for backend in &backends[1..] {
        for (i, (found, expected)) in case.run(backend, false).iter().zip(&expected).enumerate() {
            let different = different_bits(found, expected);
            if different > 0 {
                faults.push(format!(
                    "{}, {}: {different} of {} elements of result {i} differ",
                    case.name,
                    backend.name(),
                    found.len()
                ));
            }
        }
    }
    faults
}

fn check(backends: &[Backend]) {
    for dtype in [DType::F32, DType::BF16] {
        let faults: Vec<String> = all(dtype).iter().flat_map(|case| faults(backends, case)).collect();
        assert!(faults.is_empty(), "{dtype}:\n{}", faults.join("\n"));
    }
}

#[test]
fn instruction_sets() {
    let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    check(&available.map(|isa| Cpu::with_isa(isa, Some(1)).unwrap()).collect::<Vec<_>>());
}

#[test]
fn numbers_of_threads() {
    check(&[1, 2, 3, 8].map(|threads| Cpu::new(Some(threads)).unwrap()));
}
