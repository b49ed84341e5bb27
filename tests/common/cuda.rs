//! CUDA backends for tests: the kernels on the host, with threads in several orders, and the GPU if there is one.

use super::host_kernels::project_library;
use super::watched::{Fault, Watched};
use lowrank::backend::Backend;
use lowrank::backend::cuda::{
    Cuda, Device, Executor, HostExecutor, Properties, ThreadOrder, driver_is_present,
};
use std::sync::Arc;

pub const ORDERS: [ThreadOrder; 3] = [ThreadOrder::Forward, ThreadOrder::Reversed, ThreadOrder::Random(7)];

/// The kernels on the host, threads taking turns in this order.
pub fn host(order: ThreadOrder) -> Backend {
    Cuda::on(Arc::new(HostExecutor::open(&project_library(), order).unwrap())).unwrap()
}

/// Whether the GPU alone is to be tested: `LOWRANK_CUDA_TESTS=device`.
pub fn device_only() -> bool {
    std::env::var_os("LOWRANK_CUDA_TESTS").is_some_and(|which| which == "device")
}

/// The GPU where it alone is to be tested, else the kernels on the host in this order.
pub fn one(order: ThreadOrder) -> Backend {
    if device_only() { Cuda::new(0).unwrap() } else { host(order) }
}

/// The kernels on the host, unless the GPU alone is to be tested, in each of these orders; and the GPU if there is one.
pub fn executors(orders: &[ThreadOrder]) -> Vec<Arc<dyn Executor>> {
    let mut executors: Vec<Arc<dyn Executor>> = Vec::new();
    if !device_only() {
        let host = |order| HostExecutor::open(&project_library(), order).unwrap();
        executors.extend(orders.iter().map(|order| -> Arc<dyn Executor> { Arc::new(host(*order)) }));
    }
    if device_only() || driver_is_present() {
        executors.push(Arc::new(Device::open(0).unwrap()));
    }
    executors
}

/// Every executor that there is here.
pub fn all() -> Vec<Backend> {
    executors(&ORDERS).into_iter().map(|executor| Cuda::on(executor).unwrap()).collect()
}

/// One executor of each kind, for what takes a while when the host acts a device.
pub fn one_of_each() -> Vec<Backend> {
    executors(&ORDERS[..1]).into_iter().map(|executor| Cuda::on(executor).unwrap()).collect()
}

/// Backends that must have the same bits, those of each chip together: first the portable kernels alone.
pub fn chips() -> Vec<Vec<Backend>> {
    let mut chips = Vec::new();
    if !device_only() {
        let inner = HostExecutor::open(&project_library(), ORDERS[0]).unwrap();
        let mut backends = vec![Cuda::portable(Arc::new(inner)).unwrap()];
        backends.extend(ORDERS.into_iter().map(host));
        chips.push(backends);
    }
    if driver_is_present() {
        let device = Arc::new(Device::open(0).unwrap());
        chips.push(vec![Cuda::portable(device.clone()).unwrap(), Cuda::on(device).unwrap()]);
    }
    assert!(!chips.is_empty(), "there is no GPU");
    chips
}

/// An executor that starts kernels one by one, whose names it keeps; with four multiprocessors, so that every device chooses
/// the same ones.
pub type Recorder = Watched<dyn Executor>;

impl Recorder {
    /// Acts a chip of this compute capability (times ten).
    pub fn new(inner: Arc<dyn Executor>, capability: u32) -> Arc<Self> {
        let properties = Properties { multiprocessors: 4, capability, ..inner.properties().clone() };
        Arc::new(Watched::of(inner, properties, Fault::Graphs))
    }

    /// On the GPU where it alone is to be tested, else on the host.
    pub fn here(capability: u32) -> Arc<Self> {
        if device_only() {
            return Self::new(Arc::new(Device::open(0).unwrap()), capability);
        }
        let host = HostExecutor::open(&project_library(), ORDERS[0]).unwrap().with_capability(capability);
        Self::new(Arc::new(host), capability)
    }
}
