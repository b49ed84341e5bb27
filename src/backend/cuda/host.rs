//! The executor of tests: kernels compiled for the host by `cuda/host/`, every thread of a block a fiber.
//!
//! Streams run as unlike each other as is legal: by the order of threads, the stream of computations at once and what is
//! beside it only when somebody waits for it, or the other way round, or at random. So a wait that is missing shows.

use super::executor::{Event, Executor, Graph, Launch, Node, Properties, Stream, TmaMatrix};
use crate::arena::MemorySource;
use crate::error::{Error, Result};
use libloading::{Library, Symbol};
use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

type LaunchFn = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    *const c_uint,
    *const c_uint,
    c_uint,
    c_uint,
    *const c_void,
    usize,
    c_int,
    u64,
    *mut c_char,
    usize,
) -> c_int;

type EncodeFn = unsafe extern "C" fn(
    *mut c_void,
    c_uint,
    c_uint,
    *const c_void,
    *const u64,
    *const u64,
    *const c_uint,
    c_int,
    *mut c_char,
    usize,
) -> c_int;

/// The order in which a block's threads take turns, and streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadOrder {
    /// By index; kernels and copies beside the computations as late as is legal.
    Forward,
    /// From the last to the first; computations as late as is legal.
    Reversed,
    /// At random by this seed.
    Random(u64),
}

impl Drop for HostExecutor {
    fn drop(&mut self) {
        let _ = self.finish();
    }
}

/// Something in a stream.
#[derive(Clone, Debug)]
enum Work {
    Copy {
        to: *mut u8,
        from: *const u8,
        bytes: usize,
    },
    Launch {
        kernel: CString,
        grid: [u32; 3],
        cluster: u32,
        threads: u32,
        shared_bytes: u32,
        params: Vec<u8>,
    },
    /// An event, the time of the record counted.
    Record(Event, u64),
    Wait(Event, u64),
    Free(NonNull<u8>),
}

// SAFETY: addresses, whose users promised that they may be used until the work is done.
unsafe impl Send for Work {}

impl Work {
    fn of(node: &Node<'_>) -> Result<Self> {
        Ok(match *node {
            Node::Copy { to, from, bytes } => Work::Copy { to, from, bytes },
            Node::Launch(Launch { kernel, grid, cluster, threads, shared_bytes, params }) => {
                let kernel = CString::new(kernel).map_err(|e| Error::Unsupported(e.to_string()))?;
                Work::Launch { kernel, grid, cluster, threads, shared_bytes, params: params.to_vec() }
            }
        })
    }
}

#[derive(Debug, Default)]
struct State {
    streams: [VecDeque<Work>; 4],
    recorded: Vec<u64>, // of each event: how often
    reached: Vec<u64>,  // and how often that was reached
    graphs: HashMap<usize, Vec<Work>>,
    made_graphs: usize,
    random: u64,
}

/// Kernels in a shared library that `cuda/host/` made.
#[derive(Debug)]
pub struct HostExecutor {
    library: Library,
    order: ThreadOrder,
    properties: Properties,
    state: Mutex<State>,
}

impl HostExecutor {
    /// Opens a library of kernels.
    ///
    /// # Errors
    /// When it can't be opened or is not one.
    pub fn open(library: &Path, order: ThreadOrder) -> Result<Self> {
        // SAFETY: the library is one that `cuda/host/` made, whose initializers only register kernels.
        let opened = unsafe { Library::new(library) };
        let library = opened.map_err(|e| Error::format(library, e.to_string()))?;
        let properties = Properties {
            name: "the host acting a device".into(),
            capability: 90,
            multiprocessors: 4,
            memory: 1 << 32,
            shared_memory: 227 << 10,
        };
        let random = if let ThreadOrder::Random(seed) = order { seed } else { 0 };
        let state = Mutex::new(State { random, ..State::default() });
        Ok(HostExecutor { library, order, properties, state })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Puts something into a stream, and lets those run whose turn it is.
    fn put(&self, state: &mut State, stream: Stream, work: Work) -> Result<()> {
        state.streams[stream as usize].push_back(work);
        match (self.order, stream) {
            (ThreadOrder::Forward, Stream::Compute)
            | (ThreadOrder::Reversed, Stream::Beside | Stream::In | Stream::Out) => {
                self.run(state, stream, |_| false)
            }
            (ThreadOrder::Random(_), _) => {
                for stream in Stream::ALL {
                    state.random =
                        state.random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    if state.random >> 63 == 0 {
                        self.run(state, stream, |_| false)?;
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Runs a stream until something was reached, or to its end, and others as far as it waits for them.
    fn run(&self, state: &mut State, stream: Stream, reached: impl Fn(&State) -> bool) -> Result<()> {
        while !reached(state)
            && let Some(work) = state.streams[stream as usize].pop_front()
        {
            match work {
                Work::Copy { to, from, bytes } => {
                    // SAFETY: whoever started the copy promised that both are so many bytes apart from each other.
                    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
                }
                Work::Launch { kernel, grid, cluster, threads, shared_bytes, params } => {
                    self.run_kernel(&kernel, grid, cluster, threads, shared_bytes, &params)?;
                }
                Work::Record(event, time) => state.reached[event.0] = time,
                Work::Wait(event, time) => self.reach(state, event, time)?,
                Work::Free(pointer) => self.give_memory(pointer),
            }
        }
        Ok(())
    }

    /// Runs what an event waits for, as it was recorded that time.
    fn reach(&self, state: &mut State, event: Event, time: u64) -> Result<()> {
        let is_record = |work: &Work| matches!(work, Work::Record(e, t) if *e == event && *t == time);
        let holder = Stream::ALL.into_iter().find(|s| state.streams[*s as usize].iter().any(is_record));
        holder.map_or(Ok(()), |stream| self.run(state, stream, |state| state.reached[event.0] >= time))
    }

    fn run_all(&self, state: &mut State) -> Result<()> {
        Stream::ALL.into_iter().try_for_each(|stream| self.run(state, stream, |_| false))
    }

    fn run_kernel(
        &self,
        kernel: &CStr,
        grid: [u32; 3],
        cluster: u32,
        threads: u32,
        shared_bytes: u32,
        params: &[u8],
    ) -> Result<()> {
        let run: Symbol<'_, LaunchFn> = self.symbol(c"lowrank_host_launch_cluster")?;
        let (order, seed) = match self.order {
            ThreadOrder::Forward => (0, 0),
            ThreadOrder::Reversed => (1, 0),
            ThreadOrder::Random(seed) => (2, seed),
        };
        let (cluster, block) = ([cluster, 1, 1], [threads, 1, 1]);
        let mut message = [0; 1024];
        // SAFETY: whoever started the kernel promised what it needs; the message has as many bytes as said.
        let status = unsafe {
            run(
                kernel.as_ptr(),
                grid.as_ptr(),
                cluster.as_ptr(),
                block.as_ptr(),
                shared_bytes,
                self.properties.capability,
                params.as_ptr().cast(),
                params.len(),
                order,
                seed,
                message.as_mut_ptr(),
                message.len(),
            )
        };
        if status == 0 {
            return Ok(());
        }
        Err(Error::Unsupported(format!("kernel {}: {}", kernel.to_string_lossy(), text(&message))))
    }

    fn take_memory(&self, bytes: usize) -> Result<NonNull<u8>> {
        let allocate: Symbol<'_, unsafe extern "C" fn(usize) -> *mut c_void> =
            self.symbol(c"lowrank_host_allocate")?;
        // SAFETY: the function takes any size.
        NonNull::new(unsafe { allocate(bytes) }.cast()).ok_or_else(|| Error::OutOfMemory {
            bytes,
            what: "a tensor".into(),
            advice: "the host has no more".into(),
        })
    }

    fn give_memory(&self, pointer: NonNull<u8>) {
        if let Ok(free) = self.symbol::<unsafe extern "C" fn(*mut c_void)>(c"lowrank_host_free") {
            // SAFETY: the pointer came from `lowrank_host_allocate`.
            unsafe { free(pointer.as_ptr().cast()) };
        }
    }

    /// Acts a chip of this compute capability (times ten), with its shared memory; at first 90.
    #[must_use]
    pub fn with_capability(mut self, capability: u32) -> Self {
        self.properties.capability = capability;
        if let Ok(limit) = self.symbol::<unsafe extern "C" fn(c_uint) -> c_uint>(c"lowrank_host_shared_limit")
        {
            // SAFETY: the function takes any number.
            self.properties.shared_memory = unsafe { limit(capability) } as usize;
        }
        self
    }

    fn symbol<T>(&self, name: &CStr) -> Result<Symbol<'_, T>> {
        // SAFETY: callers name functions of `cuda/host/` with their types.
        unsafe { self.library.get(name.to_bytes_with_nul()) }
            .map_err(|e| Error::Unsupported(format!("kernels for the host: {e}")))
    }
}

/// What a function of the library wrote.
fn text(message: &[c_char]) -> String {
    message.iter().take_while(|c| **c != 0).map(|c| char::from(*c as u8)).collect()
}

impl MemorySource for HostExecutor {
    fn allocate(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.take_memory(bytes)
    }

    fn free(&self, pointer: NonNull<u8>) {
        // What fails there is told to whoever waits next.
        let _ = self.put(&mut self.lock(), Stream::Compute, Work::Free(pointer));
    }
}

impl Executor for HostExecutor {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn free_memory(&self) -> Result<usize> {
        Ok(self.properties.memory)
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.take_memory(bytes)
    }

    fn free_pinned(&self, pointer: NonNull<u8>) {
        let _ = self.finish();
        self.give_memory(pointer);
    }

    unsafe fn copy(&self, stream: Stream, to: *mut u8, from: *const u8, bytes: usize) -> Result<()> {
        let mut state = self.lock();
        self.put(&mut state, stream, Work::Copy { to, from, bytes })
    }

    fn tensor_map(&self, matrix: &TmaMatrix) -> Result<[u64; 16]> {
        let encode: Symbol<'_, EncodeFn> = self.symbol(c"lowrank_host_encode_tensor_map")?;
        let swizzle = if matrix.swizzle == 0 { 0 } else { matrix.swizzle.ilog2() as c_int - 4 };
        let (mut words, mut message) = ([0u64; 16], [0; 256]);
        // SAFETY: arrays of two dimensions and one stride, room for the map, and as many bytes of message as said.
        let status = unsafe {
            encode(
                words.as_mut_ptr().cast(),
                matrix.element_bytes,
                2,
                matrix.data.cast(),
                matrix.size.as_ptr(),
                &matrix.row_bytes,
                matrix.box_size.as_ptr(),
                swizzle,
                message.as_mut_ptr(),
                message.len(),
            )
        };
        if status == 0 { Ok(words) } else { Err(Error::Unsupported(text(&message))) }
    }

    unsafe fn launch(&self, stream: Stream, launch: &Launch<'_>) -> Result<()> {
        let mut state = self.lock();
        self.put(&mut state, stream, Work::of(&Node::Launch(*launch))?)
    }

    fn event(&self) -> Result<Event> {
        let mut state = self.lock();
        state.recorded.push(0);
        state.reached.push(0);
        Ok(Event(state.recorded.len() - 1))
    }

    fn record(&self, event: Event, stream: Stream) -> Result<()> {
        let mut state = self.lock();
        state.recorded[event.0] += 1;
        let time = state.recorded[event.0];
        self.put(&mut state, stream, Work::Record(event, time))
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<()> {
        let mut state = self.lock();
        let time = state.recorded[event.0];
        self.put(&mut state, stream, Work::Wait(event, time))
    }

    fn synchronize(&self, event: Event) -> Result<()> {
        let mut state = self.lock();
        let time = state.recorded[event.0];
        self.reach(&mut state, event, time)
    }

    fn synchronize_within(&self, event: Event, _limit: Duration) -> Result<bool> {
        self.synchronize(event).map(|()| true) // a kernel here ends, or fails as a deadlock
    }

    fn finish(&self) -> Result<()> {
        let mut state = self.lock();
        self.run_all(&mut state)
    }

    fn graph(&self, nodes: &[Node<'_>]) -> Result<Graph> {
        let work = nodes.iter().map(Work::of).collect::<Result<_>>()?;
        let mut state = self.lock();
        state.made_graphs += 1;
        let number = state.made_graphs;
        state.graphs.insert(number, work);
        Ok(Graph(number))
    }

    fn update_graph(&self, graph: Graph, index: usize, node: &Node<'_>) -> Result<()> {
        let missing = || Error::Unsupported(format!("there is no node {index} in {graph:?}"));
        let mut state = self.lock();
        let nodes = state.graphs.get_mut(&graph.0).ok_or_else(missing)?;
        *nodes.get_mut(index).ok_or_else(missing)? = Work::of(node)?;
        Ok(())
    }

    unsafe fn launch_graph(&self, graph: Graph) -> Result<()> {
        let mut state = self.lock();
        let nodes = state.graphs.get(&graph.0).cloned();
        let nodes = nodes.ok_or_else(|| Error::Unsupported(format!("there is no {graph:?}")))?;
        nodes.into_iter().try_for_each(|work| self.put(&mut state, Stream::Compute, work))
    }

    fn drop_graph(&self, graph: Graph) {
        self.lock().graphs.remove(&graph.0);
    }
}
