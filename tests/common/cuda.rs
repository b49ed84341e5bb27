//! CUDA backends for tests: the kernels on the host, with threads in several orders, and the GPU if there is one.

use super::host_kernels::project_library;
use lowrank::Result;
use lowrank::arena::MemorySource;
use lowrank::backend::Backend;
use lowrank::backend::cuda::{
    Cuda, Device, Event, Executor, Graph, HostExecutor, Launch, Node, Properties, Stream, ThreadOrder,
    TmaMatrix, driver_is_present,
};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

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

/// Every executor that there is here.
pub fn all() -> Vec<Backend> {
    if device_only() {
        return vec![Cuda::new(0).unwrap()];
    }
    let mut backends: Vec<Backend> = ORDERS.into_iter().map(host).collect();
    if driver_is_present() {
        backends.push(Cuda::new(0).unwrap());
    }
    backends
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

/// An executor that keeps the names of the kernels it runs, and what they fail with; with four multiprocessors, so that
/// every device chooses the same kernels.
#[derive(Debug)]
pub struct Recorder {
    inner: Arc<dyn Executor>,
    properties: Properties,
    pub kernels: Mutex<Vec<String>>,
    pub errors: Mutex<Vec<String>>,
}

impl Recorder {
    /// Acts a chip of this compute capability (times ten).
    pub fn new(inner: Arc<dyn Executor>, capability: u32) -> Arc<Self> {
        let properties = Properties { multiprocessors: 4, capability, ..inner.properties().clone() };
        Arc::new(Recorder { inner, properties, kernels: Mutex::default(), errors: Mutex::default() })
    }

    /// On the GPU where it alone is to be tested, else on the host.
    pub fn here(capability: u32) -> Arc<Self> {
        if device_only() {
            return Self::new(Arc::new(Device::open(0).unwrap()), capability);
        }
        Self::new(Arc::new(HostExecutor::open(&project_library(), ORDERS[0]).unwrap()), capability)
    }

    /// Of what it runs on.
    pub fn capability_of_chip(&self) -> u32 {
        self.inner.properties().capability
    }

    /// The names since the last call, and of those the last.
    pub fn take(&self) -> (Vec<String>, String) {
        let kernels = std::mem::take(&mut *self.kernels.lock().unwrap());
        let last = kernels.last().cloned().unwrap_or_default();
        (kernels, last)
    }
}

impl MemorySource for Recorder {
    fn allocate(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.inner.allocate(bytes)
    }

    fn free(&self, pointer: NonNull<u8>) {
        self.inner.free(pointer)
    }
}

impl Executor for Recorder {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn free_memory(&self) -> Result<usize> {
        self.inner.free_memory()
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.inner.allocate_pinned(bytes)
    }

    fn free_pinned(&self, pointer: NonNull<u8>) {
        self.inner.free_pinned(pointer)
    }

    unsafe fn copy(&self, stream: Stream, to: *mut u8, from: *const u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.copy(stream, to, from, bytes) }
    }

    fn tensor_map(&self, matrix: &TmaMatrix) -> Result<[u64; 16]> {
        self.inner.tensor_map(matrix)
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.kernels.lock().unwrap().push(launch.kernel.into());
        // SAFETY: the caller's promise.
        let result = unsafe { self.inner.launch(launch) };
        self.errors.lock().unwrap().extend(result.as_ref().err().map(ToString::to_string));
        result
    }

    fn event(&self) -> Result<Event> {
        self.inner.event()
    }

    fn record(&self, event: Event, stream: Stream) -> Result<()> {
        self.inner.record(event, stream)
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<()> {
        self.inner.wait(stream, event)
    }

    fn synchronize(&self, event: Event) -> Result<()> {
        self.inner.synchronize(event)
    }

    fn finish(&self) -> Result<()> {
        self.inner.finish()
    }

    fn graph(&self, _: &[Node<'_>]) -> Result<Graph> {
        Err(lowrank::Error::Unsupported("kernels are recorded one by one".into()))
    }

    fn update_graph(&self, graph: Graph, index: usize, node: &Node<'_>) -> Result<()> {
        self.inner.update_graph(graph, index, node)
    }

    unsafe fn launch_graph(&self, graph: Graph) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.launch_graph(graph) }
    }

    fn drop_graph(&self, graph: Graph) {
        self.inner.drop_graph(graph)
    }
}
