//! Executors that are watched, or have a fault of whoever drives them.

use super::host_kernels::project_library;
use lowrank::Result;
use lowrank::arena::MemorySource;
use lowrank::backend::cuda::{
    Counts, Event, Executor, Graph, HostExecutor, Launch, Node, Properties, Stream, ThreadOrder, TmaMatrix,
};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

/// What is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Waits of a stream for events of others.
    Wait(Stream),
    /// Waits of the host.
    Synchronize,
    /// Updates of graphs.
    Update,
    /// Graphs: kernels start one by one.
    Graphs,
}

/// An executor with a fault of whoever drives it, which keeps the names of the kernels it runs by themselves and what they
/// fail with.
#[derive(Debug)]
pub struct Watched<E: Executor + ?Sized> {
    properties: Properties,
    fault: Fault,
    kernels: Mutex<Vec<String>>,
    errors: Mutex<Vec<String>>,
    inner: Arc<E>,
}

impl<E: Executor + ?Sized> Watched<E> {
    pub fn of(inner: Arc<E>, properties: Properties, fault: Fault) -> Self {
        Watched { properties, fault, kernels: Mutex::default(), errors: Mutex::default(), inner }
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

    /// What kernels failed with.
    pub fn errors(&self) -> Vec<String> {
        self.errors.lock().unwrap().clone()
    }
}

impl Watched<HostExecutor> {
    pub fn on_host(order: ThreadOrder, fault: Fault) -> Self {
        let inner = Arc::new(HostExecutor::open(&project_library(), order).unwrap());
        Watched::of(inner.clone(), inner.properties().clone(), fault)
    }

    pub fn counts(&self) -> Counts {
        self.inner.counts()
    }
}

impl<E: Executor + ?Sized> MemorySource for Watched<E> {
    fn allocate(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.inner.allocate(bytes)
    }

    fn free(&self, pointer: NonNull<u8>) {
        self.inner.free(pointer)
    }
}

impl<E: Executor + ?Sized> Executor for Watched<E> {
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
        if self.fault == Fault::Wait(stream) { Ok(()) } else { self.inner.wait(stream, event) }
    }

    fn synchronize(&self, event: Event) -> Result<()> {
        if self.fault == Fault::Synchronize { Ok(()) } else { self.inner.synchronize(event) }
    }

    fn finish(&self) -> Result<()> {
        self.inner.finish()
    }

    fn graph(&self, nodes: &[Node<'_>]) -> Result<Graph> {
        if self.fault == Fault::Graphs {
            return Err(lowrank::Error::Unsupported("there are no graphs".into()));
        }
        self.inner.graph(nodes)
    }

    fn update_graph(&self, graph: Graph, index: usize, node: &Node<'_>) -> Result<()> {
        if self.fault == Fault::Update { Ok(()) } else { self.inner.update_graph(graph, index, node) }
    }

    unsafe fn launch_graph(&self, graph: Graph) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.launch_graph(graph) }
    }

    fn drop_graph(&self, graph: Graph) {
        self.inner.drop_graph(graph)
    }
}
