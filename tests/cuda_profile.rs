//! Launches as a profile counts them: those of the host, and those that no device gets.
#![cfg(feature = "cuda")]

mod common;

use common::cuda;
use common::golden::path;
use common::host_kernels::project_library;
use common::training::{joined, sequences};
use lowrank::adapter::{LoraConfig, Method};
use lowrank::backend::cuda::{
    Cuda, DryExecutor, Executor, HostExecutor, LaunchCount, LaunchShape, Profile, ThreadOrder,
};
use lowrank::backend::{Backend, Gemm, GemmTerm, Matrix};
use lowrank::model::{LoadOptions, Model};
use lowrank::quant::{Format, QuantConfig};
use lowrank::{DType, Result};
use std::sync::Arc;

fn host() -> Arc<dyn Executor> {
    Arc::new(HostExecutor::open(&project_library(), ThreadOrder::Forward).unwrap())
}

/// A backend and the profile of its launches, on the GPU where it alone is to be tested.
fn profiled(executor: Arc<dyn Executor>) -> (Backend, Arc<Profile>) {
    let profile = Arc::new(Profile::new(executor).quiet());
    (Cuda::on(profile.clone()).unwrap(), profile)
}

/// Starts what still waits in the queue.
fn flush(backend: &Backend) {
    backend.to_f32(&backend.zeros(&[1], DType::F32).unwrap()).unwrap();
}

#[test]
fn launches_are_counted_by_shape() -> Result<()> {
    for executor in cuda::executors(&[ThreadOrder::Forward]) {
        let (backend, profile) = profiled(executor);
        let x = backend.to_dtype(&backend.zeros(&[40, 64], DType::F32)?, DType::BF16)?;
        let w = backend.to_dtype(&backend.zeros(&[24, 64], DType::F32)?, DType::BF16)?;
        let mut y = backend.empty(&[40, 24], DType::F32)?;
        let mut sum = backend.empty(&[40, 64], DType::BF16)?;
        let terms = [GemmTerm { a: Matrix::plain(&x), b: Matrix::transposed(&w) }];
        let product = || backend.gemm(&mut y.clone(), &Gemm::new(&terms));
        product()?;
        flush(&backend);
        profile.reset()?;
        assert!(profile.counts()?.is_empty());
        for _ in 0..3 {
            backend.gemm(&mut y, &Gemm::new(&terms))?;
        }
        backend.add(&mut sum, &x, &x)?;
        backend.add(&mut sum, &x, &x)?;
        flush(&backend);
        let counts = profile.counts()?;
        let find = |name: &str| -> (LaunchShape, LaunchCount) {
            let mut found = counts.iter().filter(|(shape, _)| shape.kernel.starts_with(name));
            let one = found.next().unwrap_or_else(|| panic!("{name} is not among {counts:?}"));
            assert!(found.next().is_none(), "{name} is there twice: {counts:?}");
            one.clone()
        };
        let (shape, count) = find("gemm");
        assert_eq!((count.launches, &shape.products[..]), (3, &[[40, 24, 64]][..]));
        assert_eq!(shape.operations(), 2 * 40 * 24 * 64);
        assert_eq!(shape.bytes, 2 * (40 + 24) * 64 + 4 * 40 * 24);
        let (shape, count) = find("add_bf16");
        assert_eq!((count.launches, shape.bytes, shape.grid), (2, 3 * 2 * 40 * 64, [2, 1, 1]));
        let table = profile.table()?;
        assert!(
            table.contains("| add_bf16 | 2,1,1 x 256 |") && table.contains("| 40x24x64 | 3 |"),
            "{table}"
        );
    }
    Ok(())
}

/// The launches of a QLoRA step.
fn launches_of_a_step(executor: Arc<dyn Executor>) -> Vec<(LaunchShape, usize)> {
    let (backend, profile) = profiled(executor);
    let quant = Some(QuantConfig::new(Format::by_name("nf4").unwrap()));
    let options = LoadOptions { dtype: DType::BF16, quant };
    let mut model = Model::load(&path("llama"), &backend, options).unwrap();
    LoraConfig { r: 4, ..LoraConfig::default() }.attach(&mut model, 3).unwrap();
    model.gradient_checkpointing = 1;
    let batch = joined(&sequences(&[9, 24]));
    for _ in 0..2 {
        profile.reset().unwrap();
        model.params.zero_grads().unwrap();
        model.train_step(&batch, 1.0, None).unwrap();
        flush(&backend);
    }
    profile.counts().unwrap().into_iter().map(|(shape, count)| (shape, count.launches)).collect()
}

#[test]
fn an_executor_that_does_nothing_gets_the_launches_of_one_that_does() {
    let host = host();
    let dry = Arc::new(DryExecutor::new(host.properties().clone()));
    let launches = launches_of_a_step(host);
    assert!(launches.iter().any(|(shape, _)| shape.kernel.starts_with("rms_norm_dx_bf16")), "{launches:?}");
    assert_eq!(launches, launches_of_a_step(dry));
}
