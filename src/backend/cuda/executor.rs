//! Where kernels run: a GPU ([`device`](super::device)), or the host acting one, for tests ([`host`](super::host)), or nowhere
//! ([`dry`](super::dry)).

use crate::arena::MemorySource;
use crate::error::{Error, Result};
use std::ptr::NonNull;
use std::time::Duration;

/// What a device is and has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// For people: `NVIDIA H200 (sm_90, driver 13.0)`.
    pub name: String,
    /// Compute capability, times ten: 90.
    pub capability: u32,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of memory, all of it.
    pub memory: usize,
    /// Bytes of shared memory that one block may have.
    pub shared_memory: usize,
}

/// One launch of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch<'a> {
    /// The kernel's name in `cuda/`.
    pub kernel: &'a str,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Blocks of a cluster, neighbours in x; 1 for kernels without clusters.
    pub cluster: u32,
    /// Threads of a block, all in x.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared_bytes: u32,
    /// The kernel's one argument, a structure of `cuda/params.h`.
    pub params: &'a [u8],
}

/// A matrix that TMA copies boxes of (sm_90a), as `cuTensorMapEncodeTiled` wants it; `[columns, rows]` in elements.
#[derive(Clone, Copy, Debug)]
pub struct TmaMatrix {
    /// Its first element, 16-byte aligned.
    pub data: *const u8,
    /// Bytes of an element, 1 or 2.
    pub element_bytes: u32,
    /// Of the matrix; what lies outside is copied as zeros.
    pub size: [u64; 2],
    /// Bytes from a row to the next, a multiple of 16.
    pub row_bytes: u64,
    /// Of a box, at most 256 each.
    pub box_size: [u32; 2],
    /// Bytes in which 16-byte chunks change places in shared memory: 32, 64 or 128, as long as a box's row, or 0.
    pub swizzle: u32,
}

/// What a graph is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node<'a> {
    /// A kernel.
    Launch(Launch<'a>),
    /// Bytes copied within the device.
    #[allow(missing_docs)]
    Copy { to: *mut u8, from: *const u8, bytes: usize },
}

/// A queue of work: what is put into one happens in that order; what is put into different ones happens in any order but
/// for events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Kernels, and copies that they wait for.
    Compute,
    /// Kernels beside them.
    Beside,
    /// Copies to the device beside them.
    In,
    /// Copies to the host beside them.
    Out,
}

impl Stream {
    /// All streams.
    pub const ALL: [Stream; 4] = [Stream::Compute, Stream::Beside, Stream::In, Stream::Out];
}

/// A mark in a stream, by number; whoever waits for it waits for what was there before it when it was last recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Event(pub usize);

/// A recorded sequence of launches and copies, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Graph(pub usize);

/// A device: memory, copies and launches. Only [`Executor::synchronize`], [`Executor::synchronize_within`],
/// [`Executor::finish`] and [`Executor::free_pinned`] wait. Memory is taken and given back in the order of the stream of computations.
pub trait Executor: MemorySource {
    /// What the device is and has.
    fn properties(&self) -> &Properties;

    /// Bytes of memory that are free now.
    ///
    /// # Errors
    /// When the device does not answer.
    fn free_memory(&self) -> Result<usize>;

    /// Host memory that the device copies to and from by itself: its pages are locked.
    ///
    /// # Errors
    /// When the system has none.
    fn allocate_pinned(&self, bytes: usize) -> Result<NonNull<u8>>;

    /// Takes back what [`Executor::allocate_pinned`] gave, after everything that was started.
    fn free_pinned(&self, pointer: NonNull<u8>);

    /// Copies within the device, or between it and pinned memory.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// Both addresses begin so many bytes of this device's memory or of pinned memory, and the ranges do not overlap.
    /// Until the copy has happened nobody writes what is read, or reads what is written.
    unsafe fn copy(&self, stream: Stream, to: *mut u8, from: *const u8, bytes: usize) -> Result<()>;

    /// The words of `struct tensor_map` for a matrix.
    ///
    /// # Errors
    /// When TMA can't copy it.
    fn tensor_map(&self, matrix: &TmaMatrix) -> Result<[u64; 16]>;

    /// How many of a kernel's clusters the device holds at a time, of blocks with that many threads and that much shared
    /// memory; grid and parameters don't matter. Unless a device knows better, every multiprocessor has a block and any are
    /// neighbours.
    ///
    /// # Errors
    /// When there is no such kernel, or the device does not answer.
    fn clusters_at_once(&self, launch: &Launch<'_>) -> Result<usize> {
        Ok((self.properties().multiprocessors / launch.cluster) as usize)
    }

    /// Starts a kernel, in a stream of computations.
    ///
    /// # Errors
    /// When there is no such kernel, or the device fails.
    ///
    /// # Safety
    /// The kernel's argument is the structure that `cuda/params.h` gives it, and what that points to is as the kernel
    /// expects it.
    unsafe fn launch(&self, stream: Stream, launch: &Launch<'_>) -> Result<()>;

    /// A new event, which counts as reached until it is recorded.
    ///
    /// # Errors
    /// When the device fails.
    fn event(&self) -> Result<Event>;

    /// An event whose time the device notes when it is reached; none where there is no clock.
    ///
    /// # Errors
    /// When the device fails.
    fn timed_event(&self) -> Result<Option<Event>> {
        Ok(None)
    }

    /// From one timed event to another, both of which were reached.
    ///
    /// # Errors
    /// When the device fails, or has no clock.
    fn milliseconds(&self, _start: Event, _end: Event) -> Result<f32> {
        Err(Error::Unsupported(format!("{} has no clock", self.properties().name)))
    }

    /// Puts the event's mark behind what is in a stream now.
    ///
    /// # Errors
    /// When the device fails.
    fn record(&self, event: Event, stream: Stream) -> Result<()>;

    /// Makes what is put into a stream from now on wait until an event, as it was last recorded, is reached.
    ///
    /// # Errors
    /// When the device fails.
    fn wait(&self, stream: Stream, event: Event) -> Result<()>;

    /// Waits on the host until an event is reached.
    ///
    /// # Errors
    /// When what was started before it failed.
    fn synchronize(&self, event: Event) -> Result<()>;

    /// The same, but not longer than `limit`: whether it was reached. If it was not, the device counts as lost: whatever it
    /// is asked for from then on is an error at once, so that nobody waits for it.
    ///
    /// # Errors
    /// When what was started before it failed.
    fn synchronize_within(&self, event: Event, limit: Duration) -> Result<bool>;

    /// Waits on the host for everything that was started.
    ///
    /// # Errors
    /// When any of it failed.
    fn finish(&self) -> Result<()>;

    /// A graph that does these things one after the other, with the arguments that they have now.
    ///
    /// # Errors
    /// When the device can't make it.
    fn graph(&self, nodes: &[Node<'_>]) -> Result<Graph>;

    /// Gives a node of a graph another grid and other arguments, of the same kernel.
    ///
    /// # Errors
    /// When the device can't change it.
    fn update_graph(&self, graph: Graph, index: usize, node: &Node<'_>) -> Result<()>;

    /// Starts all of a graph, in the stream of computations.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// As [`Executor::launch`] and [`Executor::copy`] of all its nodes.
    unsafe fn launch_graph(&self, graph: Graph) -> Result<()>;

    /// Forgets a graph.
    fn drop_graph(&self, graph: Graph);
}
