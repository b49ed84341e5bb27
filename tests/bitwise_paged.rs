//! Optimizers: on every instruction set and in pages the bits of the reference; their numbers those of PyTorch
//! and bitsandbytes.

mod common;

use common::golden::Golden;
use lowrank::DType;
use lowrank::backend::cpu::{Cpu, Isa};
use lowrank::backend::reference::Reference;
use lowrank::backend::{Backend, Moments8bit, OptimizerStep};
use lowrank::optim::{Optim, Optimizer, OptimizerArguments};
use lowrank::param::{ParamLayout, ParamStore};
use lowrank::quant::dynamic_map::{DynamicMap, SIGNED_ZERO};
use lowrank::rng::{Philox, PhiloxKey, Stream};

fn normal(n: usize, seed: u64, deviation: f32) -> Vec<f32> {
    let mut rng = Philox::new(PhiloxKey::new(seed, Stream::Dummy, 0));
    (0..n).map(|_| deviation * rng.normal()).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Steps of AdamW in eight bits: parameters, codes and constants.
fn adamw_8bit(backend: &Backend, n: usize) -> ([Vec<u32>; 3], [Vec<u8>; 2]) {
    let mut p = backend.from_slice(&normal(n, 1, 1.0), &[n]).unwrap();
    let codes = || backend.zeros(&[n], DType::U8).unwrap();
    let absmax = || backend.zeros(&[n.div_ceil(256)], DType::F32).unwrap();
    let (mut m, mut v, mut m_absmax, mut v_absmax) = (codes(), codes(), absmax(), absmax());
    for step in 1..=3 {
        let mut gradient = normal(n, 1 + step, 0.1);
        gradient[..n / 4].fill(0.0);
        let g = backend.from_slice(&gradient, &[n]).unwrap();
        let step = OptimizerStep {
            learning_rate: 1e-2,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
            grad_scale: 0.7,
            verdict: None,
            bias_correction1: 1.0 - 0.9f64.powi(step as i32),
            bias_correction2_sqrt: (1.0 - 0.999f64.powi(step as i32)).sqrt(),
        };
        let mut moments =
            Moments8bit { m: &mut m, v: &mut v, m_absmax: &mut m_absmax, v_absmax: &mut v_absmax };
        backend.adamw_8bit(&mut p, &g, &mut moments, &step).unwrap();
    }
    let floats = |x| bits(&backend.to_vec(x).unwrap());
    let bytes = |x| backend.to_vec::<u8>(x).unwrap();
    ([floats(&p), floats(&m_absmax), floats(&v_absmax)], [bytes(&m), bytes(&v)])
}

#[test]
fn eight_bit_moments_on_every_instruction_set() {
    for n in [1, 17, 256, 1000, 70_003] {
        let expected = adamw_8bit(&Reference::<f32>::backend(), n);
        assert!(expected.1[0].iter().any(|code| *code != expected.1[0][0]) || n == 1, "all codes are alike");
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            for threads in [1, 3] {
                let found = adamw_8bit(&Cpu::with_isa(isa, Some(threads)).unwrap(), n);
                assert!(expected == found, "{} {threads} threads, {n} elements", isa.name());
            }
        }
    }
}

/// Three parameters of several pages in all, one of them without decay, at odd sizes.
fn store(backend: &Backend) -> ParamStore {
    let mut layout = ParamLayout::default();
    layout.add("a", &[1001, 1500], true);
    layout.add("bias", &[777], false);
    layout.add("b", &[999, 2003], true);
    let mut params = layout.build(backend, DType::BF16).unwrap();
    for id in params.ids().collect::<Vec<_>>() {
        let n = params.info(id).range.len();
        params.set(id, &(0..n).map(|i| (i % 1009) as f32 * 1e-3 - 0.5).collect::<Vec<_>>()).unwrap();
    }
    params.zero_grads().unwrap();
    params
}

/// Three steps: parameters in both types, and the bytes of the saved state.
fn train(optim: &str, optimizer_memory: Option<usize>, gradients: &[f32]) -> (Vec<u32>, Vec<u8>, usize) {
    let backend = Cpu::new(None).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut params = store(&backend);
    let arguments = OptimizerArguments {
        optim: optim.parse().unwrap(),
        weight_decay: 0.1,
        optimizer_memory,
        ..OptimizerArguments::default()
    };
    let mut optimizer = Optimizer::new(&backend, &params, arguments, folder.path()).unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the file of pages has no name");
    for step in 0..3 {
        for id in params.ids() {
            let mut grad = params.grad(id).unwrap();
            let values = &gradients[step * 1000..][..grad.elements()];
            backend.upload(&mut grad, bytemuck::cast_slice(values)).unwrap();
        }
        optimizer.step(&backend, &mut params, 1e-2, 0.5).unwrap();
    }
    let mut state = Vec::new();
    for tensor in optimizer.tensors(&backend, &params).unwrap() {
        let before = state.len();
        (tensor.write)(&mut state).unwrap();
        assert_eq!(state.len() - before, tensor.bytes(), "{}", tensor.name);
    }
    (bits(&backend.to_vec(params.values().unwrap()).unwrap()), state, optimizer.paged_bytes())
}

#[test]
fn paged_optimizers_have_the_bits_of_resident_ones() {
    let gradients = normal(2_100_000, 100, 0.1);
    for (resident, paged) in [
        ("adamw_torch", "paged_adamw_32bit"),
        ("adamw_8bit", "paged_adamw_8bit"),
        ("lion", "paged_lion_32bit"),
    ] {
        let expected = train(resident, None, &gradients);
        assert_eq!(expected.2, 0);
        let bytes = resident.parse::<Optim>().unwrap().state_bytes(3_500_000);
        for budget in [0, bytes * 3 / 4] {
            let found = train(paged, Some(budget), &gradients);
            assert!(found.2 > bytes / 4, "{paged} with {budget} bytes paged {}", found.2);
            assert!(expected.0 == found.0, "{paged} with {budget} bytes: parameters differ");
            assert!(expected.1 == found.1, "{paged} with {budget} bytes: state differs");
        }
        assert_eq!(train(paged, Some(1 << 40), &gradients).2, 0, "what fits stays in memory");
    }
}

#[test]
fn the_numbers_of_pytorch_and_bitsandbytes() {
    let golden = Golden::open("optimizers/optimizers.safetensors");
    assert_eq!(bits(&DynamicMap::unsigned().levels), bits(&golden.f32("map.unsigned")));
    assert_eq!(DynamicMap::signed().nearest(0.0), SIGNED_ZERO);
    let start = golden.f32("start");
    for optim in ["adamw_torch", "adamw_8bit", "lion_32bit", "sgd"] {
        let backend = Cpu::new(None).unwrap();
        let mut layout = ParamLayout::default();
        let id = layout.add("p", &[start.len()], true);
        let mut params = layout.build(&backend, DType::F32).unwrap();
        params.set(id, &start).unwrap();
        params.zero_grads().unwrap();
        let arguments = OptimizerArguments {
            optim: optim.parse().unwrap(),
            weight_decay: 0.1,
            ..OptimizerArguments::default()
        };
        let mut optimizer = Optimizer::new(&backend, &params, arguments, &std::env::temp_dir()).unwrap();
        for step in 0..4 {
            let grad = golden.f32(&format!("grad.{step}"));
            backend.upload(&mut params.grad(id).unwrap(), bytemuck::cast_slice(&grad)).unwrap();
            optimizer.step(&backend, &mut params, 1e-2, 1.0).unwrap();
        }
        let end = golden.f32(&format!("{optim}.end"));
        let worst =
            params.to_vec(id).unwrap().iter().zip(&end).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // In eight bits a moment between two codes may fall to either.
        assert!(worst < if optim == "adamw_8bit" { 2e-4 } else { 1e-6 }, "{optim}: {worst}");
        if optim == "adamw_8bit" {
            let state = optimizer.tensors(&backend, &params).unwrap();
            for (ours, theirs) in state.iter().zip(["state1", "state2"]) {
                let (mut codes, theirs) = (Vec::new(), golden.u8(&format!("{optim}.{theirs}")));
                (ours.write)(&mut codes).unwrap();
                let different = codes.iter().zip(&theirs).filter(|(a, b)| a != b).count();
                assert!(
                    different * 1000 < codes.len(),
                    "{}: {different} codes of {}",
                    ours.name,
                    codes.len()
                );
            }
        }
    }
}
