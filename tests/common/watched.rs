//! Executors that are watched, or have a fault of whoever drives them.

use super::host_kernels::project_library;
use lowrank::Result;
use lowrank::arena::MemorySource;
use lowrank::backend::cuda::{
    Event, Executor, Graph, HostExecutor, Launch, Node, Properties, Stream, ThreadOrder, TmaMatrix,
};
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Waits of one stream for events of another.
    Wait(Stream, Stream),
    /// Waits of the host.
    Synchronize,
    /// Updates of graphs.
    Update,
    /// Graphs: kernels start one by one.
    Graphs,
    /// The end of kernels for Hopper; there are no graphs.
    End,
    /// Room for clusters of four, but for so many; there are no graphs.
    Fours(usize),
}

/// What an executor was asked for so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Waits of the host for something that was started.
    pub waits: usize,
    /// Kernels started one by one.
    pub launches: usize,
    /// Graphs started.
    pub graphs: usize,
    /// Copies by themselves.
    pub copies: usize,
    /// Waits of the stream of computations for others.
    pub joins: usize,
}

impl std::ops::Sub for Counts {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Counts {
            waits: self.waits - other.waits,
            launches: self.launches - other.launches,
            graphs: self.graphs - other.graphs,
            copies: self.copies - other.copies,
            joins: self.joins - other.joins,
        }
    }
}

/// An executor with a fault of whoever drives it, which counts, and keeps the names of the kernels it runs by themselves and
/// what they fail with.
#[derive(Debug)]
pub struct Watched<E: Executor + ?Sized> {
    properties: Properties,
    fault: Fault,
    kernels: Mutex<Vec<String>>,
    /// Of the last kernel.
    blocks: Mutex<u32>,
    errors: Mutex<Vec<String>>,
    /// Where each event was recorded last.
    recorded: Mutex<HashMap<Event, Stream>>,
    counts: Mutex<Counts>,
    inner: Arc<E>,
}

impl<E: Executor + ?Sized> Watched<E> {
    pub fn of(inner: Arc<E>, properties: Properties, fault: Fault) -> Self {
        let (kernels, errors, recorded) = (Mutex::default(), Mutex::default(), Mutex::default());
        let (blocks, counts) = (Mutex::default(), Mutex::default());
        Watched { properties, fault, kernels, blocks, errors, recorded, counts, inner }
    }

    pub fn counts(&self) -> Counts {
        *self.counts.lock().unwrap()
    }

    /// Whether a kernel runs that does not end.
    fn never_ends(&self) -> bool {
        self.fault == Fault::End
            && self.kernels.lock().unwrap().iter().any(|kernel| kernel.contains("hopper"))
    }

    fn count(&self, one: impl FnOnce(&mut Counts)) {
        one(&mut self.counts.lock().unwrap());
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

    /// Blocks in x of the last kernel that ran by itself.
    pub fn last_blocks(&self) -> u32 {
        *self.blocks.lock().unwrap()
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
        self.count(|counts| counts.copies += 1);
        // SAFETY: the caller's promise.
        unsafe { self.inner.copy(stream, to, from, bytes) }
    }

    fn tensor_map(&self, matrix: &TmaMatrix) -> Result<[u64; 16]> {
        self.inner.tensor_map(matrix)
    }

    fn clusters_at_once(&self, launch: &Launch<'_>) -> Result<usize> {
        let all = (self.properties.multiprocessors / launch.cluster) as usize;
        Ok(if let (Fault::Fours(most), 4) = (self.fault, launch.cluster) { most.min(all) } else { all })
    }

    unsafe fn launch(&self, stream: Stream, launch: &Launch<'_>) -> Result<()> {
        self.count(|counts| counts.launches += 1);
        self.kernels.lock().unwrap().push(launch.kernel.into());
        *self.blocks.lock().unwrap() = launch.grid[0];
        // SAFETY: the caller's promise.
        let result = unsafe { self.inner.launch(stream, launch) };
        self.errors.lock().unwrap().extend(result.as_ref().err().map(ToString::to_string));
        result
    }

    fn event(&self) -> Result<Event> {
        self.inner.event()
    }

    fn record(&self, event: Event, stream: Stream) -> Result<()> {
        self.recorded.lock().unwrap().insert(event, stream);
        self.inner.record(event, stream)
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<()> {
        let Some(of) = self.recorded.lock().unwrap().get(&event).copied() else { return Ok(()) };
        self.count(|counts| counts.joins += usize::from(stream == Stream::Compute));
        if self.fault == Fault::Wait(stream, of) { Ok(()) } else { self.inner.wait(stream, event) }
    }

    fn synchronize(&self, event: Event) -> Result<()> {
        if self.recorded.lock().unwrap().contains_key(&event) {
            self.count(|counts| counts.waits += 1);
        }
        assert!(!self.never_ends(), "this would wait forever");
        if self.fault == Fault::Synchronize { Ok(()) } else { self.inner.synchronize(event) }
    }

    fn synchronize_within(&self, event: Event, limit: Duration) -> Result<bool> {
        self.count(|counts| counts.waits += 1);
        if self.never_ends() { Ok(false) } else { self.inner.synchronize_within(event, limit) }
    }

    fn finish(&self) -> Result<()> {
        assert!(!self.never_ends(), "this would wait forever");
        self.count(|counts| counts.waits += 1);
        self.inner.finish()
    }

    fn graph(&self, nodes: &[Node<'_>]) -> Result<Graph> {
        if matches!(self.fault, Fault::Graphs | Fault::End | Fault::Fours(_)) {
            return Err(lowrank::Error::Unsupported("there are no graphs".into()));
        }
        self.inner.graph(nodes)
    }

    fn update_graph(&self, graph: Graph, index: usize, node: &Node<'_>) -> Result<()> {
        if self.fault == Fault::Update { Ok(()) } else { self.inner.update_graph(graph, index, node) }
    }

    unsafe fn launch_graph(&self, graph: Graph) -> Result<()> {
        self.count(|counts| counts.graphs += 1);
        // SAFETY: the caller's promise.
        unsafe { self.inner.launch_graph(graph) }
    }

    fn drop_graph(&self, graph: Graph) {
        self.inner.drop_graph(graph)
    }
}
