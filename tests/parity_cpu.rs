//! The CPU's kernels against the scalar reference, every case of the table: equal bits where the numerics
//! law fixes them, else an error against f64 within twice that of a plain computation.

mod common;

use common::cases::{Case, all};
use common::compare::{different_bits, within_twice_naive};
use common::training::{Step, Trained, joined, sequences, trainable};
use lowrank::DType;
use lowrank::backend::cpu::{Cpu, Isa};
use lowrank::backend::reference::Reference;
use lowrank::backend::{AttentionShape, Backend, Gemm, GemmTerm, Matrix, Sequence};
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

/// The losses and all gradients of a training step.
fn training_step(family: &str, backend: &Backend, dtype: DType, trained: Trained) -> [Vec<f32>; 2] {
    let mut model = trainable(family, backend, dtype, trained);
    let step = Step::run(&mut model, &[joined(&sequences(&[9, 24, 1]))]);
    let gradients = step.gradients.into_iter().flat_map(|(_, bits)| bits);
    [step.losses, gradients.collect()].map(|bits| bits.into_iter().map(f32::from_bits).collect())
}

#[test]
fn whole_training_steps() {
    let cpu = Cpu::new(Some(2)).unwrap();
    let (naive, truth) = (Reference::<f32>::backend(), Reference::<f64>::backend());
    for family in ["gpt2", "llama", "qwen3"] {
        for trained in [Trained::Lora, Trained::Full] {
            for dtype in [DType::F32, DType::BF16] {
                let on = |backend: &Backend| training_step(family, backend, dtype, trained);
                let (ours, naive, truth) = (on(&cpu), on(&naive), on(&truth));
                for i in 0..2 {
                    within_twice_naive(&ours[i], &naive[i], &truth[i], dtype)
                        .unwrap_or_else(|e| panic!("{family} {trained:?} {dtype}, {i}: {e}"));
                }
            }
        }
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    for backend in [Cpu::new(None).unwrap(), Reference::<f32>::backend()] {
        let floats = |shape: &[usize]| backend.zeros(shape, DType::F32).unwrap();
        let (mut y, x, halves) =
            (floats(&[3, 4]), floats(&[3, 5]), backend.zeros(&[3, 4], DType::BF16).unwrap());
        assert!(backend.add(&mut y, &x, &x).is_err());
        assert!(backend.add_assign(&mut y, &halves).is_err());
        assert!(backend.add_column_sums(&mut y, &x).is_err());
        assert!(backend.copy_columns(&mut y, 1, &x, 0, 4, false).is_err());
        let product = [GemmTerm { a: Matrix::plain(&x), b: Matrix::plain(&x) }];
        assert!(backend.gemm(&mut y, &Gemm::new(&product)).is_err());
        let mut rstd = floats(&[2]);
        let weight = floats(&[4]);
        assert!(backend.rms_norm(&mut y, &mut rstd, &floats(&[3, 4]), &weight, 1e-5).is_err());
        assert!(backend.dropout(&mut y, &floats(&[3, 4]), 1.0, PhiloxKey([0, 0]), 0, false).is_err());
        for row in [-1, 5] {
            let rows = backend.from_slice(&[0, 1, row], &[3]).unwrap();
            assert!(backend.gather_rows(&mut y, &floats(&[5, 4]), &rows).is_err(), "row {row}");
            assert!(backend.scatter_add_rows(&mut floats(&[5, 4]), &y, &rows).is_err(), "row {row}");
            let (mut losses, logits) = (floats(&[3]), floats(&[3, 5]));
            assert!(backend.cross_entropy(&mut losses, None, &logits, &rows, 1.0).is_err(), "row {row}");
        }
        let inside = Sequence { q_start: 1, q_len: 2, k_start: 0, k_len: 3 };
        let q = floats(&[3, 4]);
        for bad in [
            Sequence { q_start: 2, ..inside },
            Sequence { k_start: 1, ..inside },
            Sequence { k_len: 1, ..inside },
        ] {
            let sequences = &[bad];
            let shape = AttentionShape {
                n_heads: 2,
                n_kv_heads: 2,
                head_dim: 2,
                scale: 1.0,
                window: None,
                softcap: None,
                sequences,
            };
            let mut lse = floats(&[3, 2]);
            assert!(backend.attention(&mut y, &mut lse, &q, &q, &q, &shape).is_err(), "{bad:?}");
        }
        assert!(backend.to_f32(&y).unwrap().iter().all(|y| *y == 0.0), "a refused operation wrote");
    }
}
