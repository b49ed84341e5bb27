//! CUDA backends for tests: the kernels on the host, with threads in several orders, and the GPU if there is one.

use super::host_kernels::project_library;
use lowrank::backend::Backend;
use lowrank::backend::cuda::{Cuda, HostExecutor, ThreadOrder, driver_is_present};
use std::sync::Arc;

/// The kernels on the host, threads taking turns in this order.
pub fn host(order: ThreadOrder) -> Backend {
    Cuda::on(Arc::new(HostExecutor::open(&project_library(), order).unwrap())).unwrap()
}

/// Every executor that there is here; with `LOWRANK_CUDA_TESTS=device` the GPU alone.
pub fn all() -> Vec<Backend> {
    if std::env::var_os("LOWRANK_CUDA_TESTS").is_some_and(|which| which == "device") {
        return vec![Cuda::new(0).unwrap()];
    }
    let orders = [ThreadOrder::Forward, ThreadOrder::Reversed, ThreadOrder::Random(7)];
    let mut backends: Vec<Backend> = orders.into_iter().map(host).collect();
    if driver_is_present() {
        backends.push(Cuda::new(0).unwrap());
    }
    backends
}
