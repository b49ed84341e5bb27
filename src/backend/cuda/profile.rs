//! What a run's launches are and take, by kernel: an executor around another one that counts them, and on a device times
//! them by events. It refuses graphs, so kernels start one by one.

use super::bindings::*;
use super::executor::{Event, Executor, Graph, Launch, Node, Properties, Stream, TmaMatrix};
use crate::arena::MemorySource;
use crate::error::{Error, Result};
use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// Launches whose times are read together.
const TIMED_TOGETHER: usize = 1024;

/// What launches have in common that are counted together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LaunchShape {
    /// The kernel, or `copy` with the stream for copies.
    pub kernel: String,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Rows, columns and summed contractions of a matrix product's results, of each that shares the launch; none else.
    pub products: Vec<[u64; 3]>,
    /// Bytes that it has to read and write, each operand once; 0 where that does not follow from the arguments alone.
    pub bytes: u64,
}

impl LaunchShape {
    fn of(launch: &Launch<'_>) -> Self {
        let (products, bytes) = work(launch);
        LaunchShape {
            kernel: launch.kernel.into(),
            grid: launch.grid,
            threads: launch.threads,
            products,
            bytes,
        }
    }

    fn copy(stream: Stream, bytes: usize) -> Self {
        let kernel = format!("copy ({stream:?})");
        LaunchShape { kernel, grid: [0; 3], threads: 0, products: Vec::new(), bytes: 2 * bytes as u64 }
    }

    /// Operations of its matrix products: multiplications and additions.
    pub fn operations(&self) -> u64 {
        self.products.iter().map(|[m, n, k]| 2 * m * n * k).sum()
    }
}

/// Launches of one shape.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LaunchCount {
    /// How many there were.
    pub launches: usize,
    /// Those that were timed: on a device all but the first of each kernel, which may wait until it is loaded.
    pub timed: usize,
    /// Their time, in milliseconds.
    pub ms: f64,
}

#[derive(Debug, Default)]
struct State {
    counts: HashMap<LaunchShape, LaunchCount>,
    started: HashSet<String>,                    // kernels
    under_way: Vec<(LaunchShape, Event, Event)>, // not read yet
    events: Vec<(Event, Event)>,                 // to be used again
}

/// An executor that counts another one's launches and copies. When it goes it prints [`Profile::table`] to stderr, unless it
/// was made [quiet](Profile::quiet).
#[derive(Debug)]
pub struct Profile {
    inner: Arc<dyn Executor>,
    quiet: bool,
    state: Mutex<State>,
}

impl Profile {
    /// Counts the launches of an executor.
    pub fn new(inner: Arc<dyn Executor>) -> Self {
        Profile { inner, quiet: false, state: Mutex::default() }
    }

    /// Prints nothing.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Forgets what was counted so far.
    ///
    /// # Errors
    /// When the device fails.
    pub fn reset(&self) -> Result<()> {
        let mut state = self.lock();
        self.read_times(&mut state)?;
        state.counts.clear();
        Ok(())
    }

    /// What was counted: those that took most time first, without times those with most launches.
    ///
    /// # Errors
    /// When the device fails.
    pub fn counts(&self) -> Result<Vec<(LaunchShape, LaunchCount)>> {
        let mut state = self.lock();
        self.read_times(&mut state)?;
        let mut all: Vec<_> = state.counts.iter().map(|(shape, count)| (shape.clone(), *count)).collect();
        all.sort_by(|(a, x), (b, y)| {
            let by_name = || (&a.kernel, a.grid, a.bytes).cmp(&(&b.kernel, b.grid, b.bytes));
            y.ms.total_cmp(&x.ms).then(y.launches.cmp(&x.launches)).then_with(by_name)
        });
        Ok(all)
    }

    /// [`Profile::counts`] for people.
    ///
    /// # Errors
    /// When the device fails.
    pub fn table(&self) -> Result<String> {
        let counts = self.counts()?;
        let all_ms: f64 = counts.iter().map(|(_, count)| count.ms).sum();
        let launches: usize = counts.iter().map(|(_, count)| count.launches).sum();
        let mut text = format!(
            "{launches} launches and copies, {all_ms:.2} ms in those that were timed, on {}\n\
             | kernel | grid x threads | rows x columns x contraction | launches | ms | share | µs each | GB/s | TFLOP/s |\n\
             |---|---|---|---|---|---|---|---|---|\n",
            self.properties().name
        );
        for (shape, count) in &counts {
            let products: Vec<_> = shape.products.iter().map(|[m, n, k]| format!("{m}x{n}x{k}")).collect();
            let [x, y, z] = shape.grid;
            let seconds = count.ms / 1e3 / count.timed.max(1) as f64;
            let rate = |amount: u64, unit: f64| match amount {
                0 => String::new(),
                _ if count.timed == 0 => String::new(),
                _ => format!("{:.0}", amount as f64 / seconds / unit),
            };
            let (share, each) = match count.timed {
                0 => (String::new(), String::new()),
                _ => (format!("{:.1}%", 100.0 * count.ms / all_ms), format!("{:.1}", 1e6 * seconds)),
            };
            let _ = writeln!(
                text,
                "| {} | {x},{y},{z} x {} | {} | {} | {:.3} | {share} | {each} | {} | {} |",
                shape.kernel,
                shape.threads,
                products.join(" + "),
                count.launches,
                count.ms,
                rate(shape.bytes, 1e9),
                rate(shape.operations(), 1e12),
            );
        }
        Ok(text)
    }

    /// Counts `shape` and runs it, between two events.
    fn count(&self, stream: Stream, shape: LaunchShape, run: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut state = self.lock();
        state.counts.entry(shape.clone()).or_default().launches += 1;
        if state.started.insert(shape.kernel.clone()) {
            return run();
        }
        if state.under_way.len() >= TIMED_TOGETHER {
            self.read_times(&mut state)?;
        }
        let pair = match state.events.pop() {
            None => self.inner.timed_event()?.zip(self.inner.timed_event()?),
            pair => pair,
        };
        let Some((start, end)) = pair else { return run() };
        self.inner.record(start, stream)?;
        run()?;
        self.inner.record(end, stream)?;
        state.under_way.push((shape, start, end));
        Ok(())
    }

    /// Waits for what is under way and adds its times.
    fn read_times(&self, state: &mut State) -> Result<()> {
        for (shape, start, end) in std::mem::take(&mut state.under_way) {
            self.inner.synchronize(end)?;
            let ms = self.inner.milliseconds(start, end)?;
            let count = state.counts.entry(shape).or_default();
            count.timed += 1;
            count.ms += f64::from(ms);
            state.events.push((start, end));
        }
        Ok(())
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        match self.table() {
            Ok(table) if !self.quiet && !self.lock().counts.is_empty() => eprint!("{table}"),
            Ok(_) => {}
            Err(e) => eprintln!("warning: there is no profile: {e}"),
        }
    }
}

fn no_graphs() -> Error {
    Error::Unsupported("kernels that are profiled start one by one".into())
}

impl MemorySource for Profile {
    fn allocate(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.inner.allocate(bytes)
    }

    fn free(&self, pointer: NonNull<u8>) {
        self.inner.free(pointer);
    }
}

impl Executor for Profile {
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
        self.inner.free_pinned(pointer);
    }

    unsafe fn copy(&self, stream: Stream, to: *mut u8, from: *const u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        self.count(stream, LaunchShape::copy(stream, bytes), || unsafe {
            self.inner.copy(stream, to, from, bytes)
        })
    }

    fn tensor_map(&self, matrix: &TmaMatrix) -> Result<[u64; 16]> {
        self.inner.tensor_map(matrix)
    }

    fn clusters_at_once(&self, launch: &Launch<'_>) -> Result<usize> {
        self.inner.clusters_at_once(launch)
    }

    unsafe fn launch(&self, stream: Stream, launch: &Launch<'_>) -> Result<()> {
        // SAFETY: the caller's promise.
        self.count(stream, LaunchShape::of(launch), || unsafe { self.inner.launch(stream, launch) })
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

    fn synchronize_within(&self, event: Event, limit: Duration) -> Result<bool> {
        self.inner.synchronize_within(event, limit)
    }

    fn finish(&self) -> Result<()> {
        self.inner.finish()
    }

    fn graph(&self, _nodes: &[Node<'_>]) -> Result<Graph> {
        Err(no_graphs())
    }

    fn update_graph(&self, _graph: Graph, _index: usize, _node: &Node<'_>) -> Result<()> {
        Err(no_graphs())
    }

    unsafe fn launch_graph(&self, _graph: Graph) -> Result<()> {
        Err(no_graphs())
    }

    fn drop_graph(&self, _graph: Graph) {}
}

/// The structure that a launch's bytes are, if there are as many.
fn params<P: Copy>(launch: &Launch<'_>) -> Option<P> {
    // SAFETY: structures of the C header, of numbers and pointers that are not followed; the length is theirs.
    (launch.params.len() == size_of::<P>())
        .then(|| unsafe { launch.params.as_ptr().cast::<P>().read_unaligned() })
}

fn type_bytes(type_: i32) -> u64 {
    if type_ == TYPE_F32 as i32 { 4 } else { 2 }
}

/// The sizes of a launch's matrix products, and the bytes it has to move, as far as its arguments say.
fn work(launch: &Launch<'_>) -> (Vec<[u64; 3]>, u64) {
    let kernel = launch.kernel;
    if kernel.starts_with("gemm_hopper") {
        return params::<gemm_hopper_params>(launch).map_or_else(Default::default, |p| product_work(&p.gemm));
    }
    if kernel.starts_with("gem") {
        return params::<gemm_params>(launch).map_or_else(Default::default, |p| product_work(&p));
    }
    (Vec::new(), moved(launch).unwrap_or(0))
}

fn product_work(p: &gemm_params) -> (Vec<[u64; 3]>, u64) {
    let (mut sizes, mut bytes) = (Vec::new(), 0);
    for problem in p.problems.iter().take(p.n_problems as usize) {
        let (m, n) = (u64::from(problem.m), u64::from(problem.n));
        let mut contraction = 0;
        bytes += m * n * type_bytes(problem.out_type) * if problem.accumulate != 0 { 2 } else { 1 };
        for term in problem.terms.iter().take(problem.n_terms as usize) {
            contraction += term.k;
            bytes += m * term.k * type_bytes(term.a.type_);
            bytes += match term.b.type_ as u32 {
                TYPE_QUANTIZED => n * term.k * u64::from(p.code_bits.max(4)) / 8,
                _ => n * term.k * type_bytes(term.b.type_),
            };
        }
        sizes.push([m, n, contraction]);
    }
    (sizes, bytes)
}

/// Bytes of a kernel on elements or rows.
fn moved(launch: &Launch<'_>) -> Option<u64> {
    let kernel = launch.kernel;
    let size = if kernel.ends_with("_bf16") || kernel.ends_with("_f16") { 2 } else { 4 };
    let is = |name: &str| kernel.starts_with(name);
    Some(match () {
        () if is("fill_") => params::<fill_params>(launch)?.n * size,
        () if is("cast_") => {
            let from = if is("cast_f32") { 4 } else { 2 };
            params::<cast_params>(launch)?.n * (from + size)
        }
        () if is("add_") => 3 * params::<add_params>(launch)?.n * size,
        () if is("scale_columns_") => 2 * params::<scale_columns_params>(launch)?.n * size,
        () if is("gated_backward_") => 5 * params::<gated_backward_params>(launch)?.n * size,
        () if is("gated_") => 3 * params::<gated_params>(launch)?.n * size,
        () if is("dropout_") => 2 * params::<dropout_params>(launch)?.n * size,
        () if is("rope_") => {
            let p = params::<rope_params>(launch)?;
            2 * p.rows * u64::from(p.n_heads.iter().sum::<u32>() * p.rotary_dim) * size
        }
        () if is("rms_norm_dx") || is("layer_norm_dx") => {
            let p = params::<norm_dx_params>(launch)?;
            (3 + u64::from(p.accumulate != 0)) * p.rows * u64::from(p.cols) * size
        }
        () if is("rms_norm_dweight") || is("layer_norm_dweight") => {
            let p = params::<norm_dweight_params>(launch)?;
            2 * p.rows * u64::from(p.cols) * size
        }
        () if is("rms_norm_") || is("layer_norm_") => {
            let p = params::<norm_params>(launch)?;
            (if p.added.is_null() { 2 } else { 4 }) * p.rows * u64::from(p.cols) * size
        }
        () if is("sum_squares") => 4 * params::<sum_squares_params>(launch)?.n,
        () if is("adamw_8bit") => 16 * params::<adamw_8bit_params>(launch)?.step.n,
        () if is("adamw") => 28 * params::<optimizer_params>(launch)?.n,
        () if is("gather_rows_") => {
            let p = params::<gather_rows_params>(launch)?;
            2 * p.n * u64::from(p.cols) * size
        }
        () if is("cross_entropy_columns_") => {
            let p = params::<cross_entropy_columns_params>(launch)?;
            u64::from(launch.grid[0])
                * u64::from(p.columns)
                * (4 + if p.weights.is_null() { 0 } else { size })
        }
        () if is("attention_delta_") => {
            let p = params::<attention_delta_params>(launch)?;
            2 * p.rows * u64::from(p.head_dim) * size
        }
        () => return None,
    })
}
