//! The order of a backend's launches: they are gathered, and sequences that come again are replayed as graphs.
//!
//! A step starts the same kernels again and again; what changes is arguments (a learning rate, counters of dropout,
//! addresses, sizes of a batch). So a sequence of kernels that was seen before becomes a graph, and every later time the
//! nodes whose arguments differ from last time's are updated before it is started. All arguments are compared, so a
//! graph does what the launches themselves would do.

use super::executor::{Event, Executor, Graph, Launch, Node, Stream};
use crate::arena::MemorySource;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::collections::hash_map::{DefaultHasher, Entry};
use std::hash::{Hash, Hasher};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// Nodes of a graph: so many are gathered before the device gets them, so the device works while the host prepares more.
const GRAPH_NODES: usize = 64;

/// Below this many nodes launches themselves are as fast.
const LEAST_NODES: usize = 8;

/// Places that are told apart, so that a loop without a wait does not go on making graphs.
const PLACES: usize = 256;

/// Graphs that are kept at most.
const MAX_GRAPHS: usize = 1024;

/// Launches and copies on the device in program order. It gives memory too, since what waits here may use it.
#[derive(Debug)]
pub(super) struct Queue {
    executor: Arc<dyn Executor>,
    /// In the stream of computations, what comes before work beside them.
    fork: Event,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    waiting: Vec<Owned>,
    /// Where nodes go: to the stream of computations by way of `waiting`, or beside it at once.
    stream: Stream,
    /// Memory that nothing uses but what waits.
    freed: Vec<Freed>,
    /// Sequences since the host last waited, or a step ended without.
    sequence: usize,
    /// What was seen, by kernels and by its place since the host last waited.
    seen: HashMap<u64, Seen>,
    with_graphs: bool,
    /// How long the host waits at most, and whether that was too short once.
    limit: Option<Duration>,
    is_stuck: bool,
}

#[derive(Debug)]
enum Seen {
    Once,
    Recorded(Graph, Vec<Owned>),
}

/// Memory to be given back.
#[derive(Debug)]
struct Freed(NonNull<u8>);

// SAFETY: nobody else has it.
unsafe impl Send for Freed {}

/// A [`Node`] with its own arguments.
#[derive(Debug, PartialEq, Eq)]
enum Owned {
    Launch {
        kernel: Box<str>,
        grid: [u32; 3],
        cluster: u32,
        threads: u32,
        shared_bytes: u32,
        params: Box<[u8]>,
    },
    Copy {
        to: *mut u8,
        from: *const u8,
        bytes: usize,
    },
}

// SAFETY: addresses of a device's memory, which the host does not follow.
unsafe impl Send for Owned {}

impl Owned {
    fn node(&self) -> Node<'_> {
        match self {
            Owned::Launch { kernel, grid, cluster, threads, shared_bytes, params } => Node::Launch(Launch {
                kernel,
                grid: *grid,
                cluster: *cluster,
                threads: *threads,
                shared_bytes: *shared_bytes,
                params,
            }),
            Owned::Copy { to, from, bytes } => Node::Copy { to: *to, from: *from, bytes: *bytes },
        }
    }

    /// The kernel's name and the blocks of a cluster, which nodes of graphs keep; none for a copy.
    fn kernel(&self) -> Option<(&str, u32)> {
        match self {
            Owned::Launch { kernel, cluster, .. } => Some((kernel, *cluster)),
            Owned::Copy { .. } => None,
        }
    }
}

impl Queue {
    pub fn new(executor: Arc<dyn Executor>, with_graphs: bool) -> Result<Self> {
        let state = State {
            waiting: Vec::new(),
            stream: Stream::Compute,
            freed: Vec::new(),
            sequence: 0,
            seen: HashMap::new(),
            with_graphs,
            limit: None,
            is_stuck: false,
        };
        Ok(Queue { fork: executor.event()?, executor, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the lock is never held across a panic")
    }

    /// Puts a kernel behind what is there.
    ///
    /// # Safety
    /// As [`Executor::launch`].
    pub unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let Launch { kernel, grid, cluster, threads, shared_bytes, params } = *launch;
        let (kernel, params) = (kernel.into(), params.into());
        self.add(Owned::Launch { kernel, grid, cluster, threads, shared_bytes, params })
    }

    /// Puts a copy within the device behind what is there.
    ///
    /// # Safety
    /// As [`Executor::copy`].
    pub unsafe fn copy(&self, to: *mut u8, from: *const u8, bytes: usize) -> Result<()> {
        self.add(Owned::Copy { to, from, bytes })
    }

    fn add(&self, node: Owned) -> Result<()> {
        let mut state = self.lock();
        if state.stream != Stream::Compute {
            return start(&*self.executor, state.stream, &[node]);
        }
        state.waiting.push(node);
        if state.waiting.len() < GRAPH_NODES {
            return Ok(());
        }
        state.flush(&*self.executor)
    }

    /// The stream that kernels go to now.
    pub fn stream(&self) -> Stream {
        self.lock().stream
    }

    /// What goes beside the computations from now on comes after all of them so far.
    pub fn fork(&self) -> Result<()> {
        self.flush()?;
        self.executor.record(self.fork, Stream::Compute)?;
        self.executor.wait(Stream::Beside, self.fork)
    }

    /// Lets `work` start its kernels beside the computations that follow, and an event behind them.
    pub fn beside(&self, end: Event, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.fork()?;
        self.lock().stream = Stream::Beside;
        let result = work();
        self.lock().stream = Stream::Compute;
        if result.is_err() {
            let _ = self.finish(); // what was started, whose tensors may go now
        }
        result.and_then(|()| self.executor.record(end, Stream::Beside))
    }

    /// Makes computations from now on wait for an event.
    pub fn join(&self, event: Event) -> Result<()> {
        self.flush()?;
        self.executor.wait(Stream::Compute, event)
    }

    /// Gives the device everything that waits here.
    pub fn flush(&self) -> Result<()> {
        self.lock().flush(&*self.executor)
    }

    /// Counts places anew, as after a wait of the host.
    pub fn start_over(&self) -> Result<()> {
        let mut state = self.lock();
        state.flush(&*self.executor)?;
        state.sequence = 0;
        Ok(())
    }

    /// Waits on the host for an event behind everything so far.
    pub fn synchronize(&self, event: Event) -> Result<()> {
        let mut state = self.lock();
        state.flush(&*self.executor)?;
        state.sequence = 0;
        self.executor.record(event, Stream::Compute)?;
        let Some(limit) = state.limit else { return self.executor.synchronize(event) };
        if self.executor.synchronize_within(event, limit)? {
            return Ok(());
        }
        state.is_stuck = true;
        Err(Error::Unsupported(format!("kernels did not end within {} seconds", limit.as_secs())))
    }

    /// Does `work`, whose waits fail after `limit`, after everything so far has ended. None if one took longer: then nothing
    /// else will end.
    pub fn within<T>(&self, limit: Duration, work: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
        self.finish()?;
        self.lock().limit = Some(limit);
        let result = work();
        let mut state = self.lock();
        state.limit = None;
        if state.is_stuck { Ok(None) } else { result.map(Some) }
    }

    /// Waits on the host for everything so far, copies beside the computations too.
    pub fn finish(&self) -> Result<()> {
        self.flush()?;
        self.executor.finish()
    }
}

impl MemorySource for Queue {
    fn allocate(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.executor.allocate(bytes).or_else(|e| {
            let nothing = self.lock().freed.is_empty();
            self.flush()?;
            if nothing { Err(e) } else { self.executor.allocate(bytes) }
        })
    }

    fn free(&self, pointer: NonNull<u8>) {
        self.lock().freed.push(Freed(pointer));
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let mut state = self.lock();
        state.forget(&*self.executor);
        state.freed.drain(..).for_each(|Freed(pointer)| self.executor.free(pointer));
    }
}

impl State {
    fn flush(&mut self, executor: &dyn Executor) -> Result<()> {
        let result = self.start_waiting(executor);
        self.freed.drain(..).for_each(|Freed(pointer)| executor.free(pointer));
        result
    }

    fn start_waiting(&mut self, executor: &dyn Executor) -> Result<()> {
        let nodes = std::mem::take(&mut self.waiting);
        if nodes.is_empty() {
            return Ok(());
        }
        self.sequence += 1;
        if !self.with_graphs || nodes.len() < LEAST_NODES {
            return start(executor, Stream::Compute, &nodes);
        }
        if self.seen.len() >= MAX_GRAPHS {
            self.forget(executor);
        }
        let mut hasher = DefaultHasher::new();
        (self.sequence % PLACES, nodes.len()).hash(&mut hasher);
        nodes.iter().for_each(|node| node.kernel().hash(&mut hasher));
        match self.seen.entry(hasher.finish()) {
            Entry::Vacant(entry) => {
                entry.insert(Seen::Once);
                start(executor, Stream::Compute, &nodes)
            }
            Entry::Occupied(mut entry) => {
                match replay(executor, entry.get_mut(), nodes) {
                    // SAFETY: whoever put the nodes here promised what they need.
                    Ok(graph) => unsafe { executor.launch_graph(graph) },
                    // Without graphs the same things happen.
                    Err(nodes) => {
                        self.with_graphs = false;
                        start(executor, Stream::Compute, &nodes)
                    }
                }
            }
        }
    }

    fn forget(&mut self, executor: &dyn Executor) {
        for (_, seen) in self.seen.drain() {
            if let Seen::Recorded(graph, _) = seen {
                executor.drop_graph(graph);
            }
        }
    }
}

/// Starts nodes one by one.
fn start(executor: &dyn Executor, stream: Stream, nodes: &[Owned]) -> Result<()> {
    nodes.iter().try_for_each(|node| match node.node() {
        // SAFETY: whoever put the node into the queue promised what it needs.
        Node::Launch(launch) => unsafe { executor.launch(stream, &launch) },
        // SAFETY: as above.
        Node::Copy { to, from, bytes } => unsafe { executor.copy(stream, to, from, bytes) },
    })
}

/// The graph of a sequence that was seen before, with the arguments of `nodes`; the nodes if there can be none.
fn replay(
    executor: &dyn Executor,
    seen: &mut Seen,
    nodes: Vec<Owned>,
) -> std::result::Result<Graph, Vec<Owned>> {
    if let Seen::Recorded(graph, last) = seen
        && last.iter().map(Owned::kernel).eq(nodes.iter().map(Owned::kernel))
    {
        let changed = last.iter().zip(&nodes).enumerate().filter(|(_, (last, node))| last != node);
        for (index, (_, node)) in changed {
            if executor.update_graph(*graph, index, &node.node()).is_err() {
                return Err(nodes);
            }
        }
        *last = nodes;
        return Ok(*graph);
    }
    let Ok(graph) = executor.graph(&nodes.iter().map(Owned::node).collect::<Vec<_>>()) else {
        return Err(nodes);
    };
    if let Seen::Recorded(other, _) = std::mem::replace(seen, Seen::Recorded(graph, nodes)) {
        executor.drop_graph(other);
    }
    Ok(graph)
}
