//! The host acting a device, watched, or with a fault of whoever drives it.

use super::host_kernels::project_library;
use lowrank::Result;
use lowrank::arena::MemorySource;
use lowrank::backend::cuda::{
    Counts, Event, Executor, Graph, HostExecutor, Launch, Node, Properties, Stream, ThreadOrder, TmaMatrix,
};
use std::ptr::NonNull;

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
}

/// An executor with a fault of whoever drives it.
#[derive(Debug)]
pub struct Watched {
    inner: HostExecutor,
    fault: Fault,
}

impl Watched {
    pub fn new(order: ThreadOrder, fault: Fault) -> Self {
        let inner = HostExecutor::open(&project_library(), order).unwrap();
        Watched { inner, fault }
    }

    pub fn counts(&self) -> Counts {
        self.inner.counts()
    }
}

impl MemorySource for Watched {
    fn allocate(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.inner.allocate(bytes)
    }

    fn free(&self, pointer: NonNull<u8>) {
        self.inner.free(pointer)
    }
}

impl Executor for Watched {
    fn properties(&self) -> &Properties {
        self.inner.properties()
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
        // SAFETY: the caller's promise.
        unsafe { self.inner.launch(launch) }
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
