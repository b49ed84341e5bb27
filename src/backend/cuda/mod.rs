//! The CUDA backend: kernels of `cuda/*.cu`, launched in program order on one stream, but for an optimizer's pages.
//!
//! Operations on elements and rows have the bits of the CPU; products and attention are deterministic and as near to
//! the truth as plain arithmetic, and a row's bits depend on that row alone. The same kernels run on the host in tests
//! ([`HostExecutor`]). An index outside its range, which only the device sees, is an error of the next
//! [`Kernels::download`] or [`Kernels::sum_squares`].

#[allow(missing_docs, non_camel_case_types, dead_code, clippy::all, unreachable_pub)]
mod bindings;

mod attention;
mod attention_hopper;
mod device;
mod dry;
mod elementwise;
mod executor;
mod gemm;
mod gemm_hopper;
mod head_loss;
mod host;
mod kernels;
mod norm;
mod optimizer;
mod paging;
mod profile;
mod quant;
mod queue;
mod rows;
mod sample;
mod staging;

pub use device::{Device, driver_is_present};
pub use dry::DryExecutor;
pub use executor::{Event, Executor, Graph, Launch, Node, Properties, Stream, TmaMatrix};
pub use host::{HostExecutor, ThreadOrder};
pub use profile::{LaunchCount, LaunchShape, Profile};

use super::check::{self, ensure};
use super::{
    Activation, AttentionShape, Backend, Gemm, HeadLoss, Kernels, Mark, Moments8bit, OptimizerStep,
    RopeShape, SampleRow,
};
use crate::arena::Arena;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::{QuantConfig, Quantized};
use crate::rng::PhiloxKey;
use crate::tensor::Tensor;
use paging::Paging;
use queue::Queue;
use staging::Staging;
use std::sync::{Arc, Mutex, MutexGuard};

/// Threads of a block that works on elements, and elements that each takes.
const THREADS: usize = 256;
const PACK: usize = 8;

/// An NVIDIA GPU, or the host acting one.
#[derive(Debug)]
pub struct Cuda {
    executor: Arc<dyn Executor>,
    queue: Arc<Queue>,
    staging: Option<Mutex<Staging>>, // none: it only counts
    paging: Mutex<Paging>,
    arena: Arena,
    faults: Tensor,                               // u32 [1], bits of `fault`
    maps: Mutex<Option<Tensor>>, // f32, the dynamic maps of moments in eight bits, when they have been needed
    sequences: Mutex<Option<(Vec<u32>, Tensor)>>, // of the last batch, as attention's kernels take them
    parts: Mutex<Option<[Tensor; 2]>>, // of sums, see `gemm`
    hopper: Arc<gemm_hopper::Checked>,
    plans: bool, // only counts
}

impl Cuda {
    /// A backend on the GPU of this number.
    ///
    /// # Errors
    /// When there is no driver, no such device, or no kernels for it.
    #[allow(clippy::new_ret_no_self)]
    pub fn new(ordinal: usize) -> Result<Backend> {
        Self::on(Arc::new(Device::open(ordinal)?))
    }

    /// A backend on any executor, with graphs unless `LOWRANK_CUDA_GRAPHS` is 0. With `LOWRANK_CUDA_PROFILE` it is
    /// [profiled](Profile), as are those of the next functions.
    ///
    /// # Errors
    /// When it has no memory.
    pub fn on(executor: Arc<dyn Executor>) -> Result<Backend> {
        Self::open(executor, is_on("LOWRANK_CUDA_PORTABLE", false), is_on("LOWRANK_CUDA_GRAPHS", true))
    }

    /// The same without kernels that are for one kind of chip alone.
    ///
    /// # Errors
    /// When the executor has no memory.
    pub fn portable(executor: Arc<dyn Executor>) -> Result<Backend> {
        Self::open(executor, true, is_on("LOWRANK_CUDA_GRAPHS", true))
    }

    /// A backend on any executor, which replays sequences of kernels as graphs or not; nothing else depends on it.
    ///
    /// # Errors
    /// When it has no memory.
    pub fn on_with(executor: Arc<dyn Executor>, with_graphs: bool) -> Result<Backend> {
        Self::open(executor, is_on("LOWRANK_CUDA_PORTABLE", false), with_graphs)
    }

    fn open(executor: Arc<dyn Executor>, portable: bool, with_graphs: bool) -> Result<Backend> {
        let executor: Arc<dyn Executor> = match is_on("LOWRANK_CUDA_PROFILE", false) {
            true => Arc::new(Profile::new(executor)),
            false => executor,
        };
        let hopper = Arc::new(gemm_hopper::Checked::new(executor.properties(), portable));
        let queue = Arc::new(Queue::new(executor.clone(), with_graphs)?);
        let arena = Arena::on_device(queue.clone());
        let cuda = Self::with(executor, queue, arena, hopper, false)?;
        cuda.reset_faults()?;
        Ok(Arc::new(cuda))
    }

    fn with(
        executor: Arc<dyn Executor>,
        queue: Arc<Queue>,
        arena: Arena,
        hopper: Arc<gemm_hopper::Checked>,
        plans: bool,
    ) -> Result<Self> {
        Ok(Cuda {
            hopper,
            staging: if plans { None } else { Some(Mutex::new(Staging::new(&executor)?)) },
            paging: Mutex::new(Paging::new(&executor)?),
            faults: Tensor::from_block(arena.allocate(4)?, &[1], DType::I32)?,
            executor,
            queue,
            arena,
            maps: Mutex::new(None),
            sequences: Mutex::new(None),
            parts: Mutex::new(None),
            plans,
        })
    }

    fn paging(&self) -> MutexGuard<'_, Paging> {
        self.paging.lock().expect("the lock is never held across a panic")
    }

    fn reset_faults(&self) -> Result<()> {
        // SAFETY: the tensor has four bytes.
        unsafe { self.to_device(self.faults.device_bytes()?, &[0; 4]) }
    }

    /// # Safety
    /// `to` begins so many bytes of the device's memory.
    unsafe fn to_device(&self, to: *mut u8, bytes: &[u8]) -> Result<()> {
        let Some(staging) = &self.staging else { return Ok(()) };
        let mut staging = staging.lock().expect("the lock is never held across a panic");
        // SAFETY: the caller's promise.
        unsafe { staging.upload(&self.queue, to, bytes) }
    }

    /// Copies tensors to the host and waits, once; fails if a kernel met an index outside its range since the last time.
    fn to_host(&self, tensors: &mut [(&Tensor, &mut [u8])]) -> Result<()> {
        let Some(staging) = &self.staging else { return Ok(()) };
        let mut word = [0; 4];
        let mut parts: Vec<(&mut [u8], *const u8)> = Vec::with_capacity(tensors.len() + 1);
        for (tensor, bytes) in tensors {
            ensure(tensor.bytes() == bytes.len(), "download", || {
                format!("{} bytes for {}", bytes.len(), tensor.bytes())
            })?;
            parts.push((bytes, read(tensor)?));
        }
        parts.push((&mut word, read(&self.faults)?));
        // SAFETY: the tensors have as many bytes as their destinations, as was checked.
        unsafe {
            let mut staging = staging.lock().expect("the lock is never held across a panic");
            staging.download(&self.queue, &mut parts)?;
        }
        let word = u32::from_ne_bytes(word);
        if word == 0 {
            return Ok(());
        }
        self.reset_faults()?;
        let operations = [
            (bindings::FAULT_GATHER_ROWS, "gather_rows"),
            (bindings::FAULT_SCATTER_ADD_ROWS, "scatter_add_rows"),
            (bindings::FAULT_ROPE, "rope"),
            (bindings::FAULT_CROSS_ENTROPY, "cross_entropy"),
            (bindings::FAULT_QUANTIZE, "quantize"),
        ];
        let found = operations.iter().find(|(bit, _)| word & bit != 0);
        let operation = found.map_or("kernel", |(_, name)| name);
        Err(Error::shape(
            operation,
            match operation {
                "quantize" => "expected finite elements, found one that is not",
                _ => "an index lies outside its table",
            },
        ))
    }

    /// Starts a kernel whose argument is `params`.
    ///
    /// # Safety
    /// `params` is the kernel's structure and points to what it says.
    unsafe fn launch<P: Copy>(
        &self,
        kernel: &str,
        grid: [usize; 3],
        threads: usize,
        shared_bytes: usize,
        params: &P,
    ) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_clusters(kernel, grid, 1, threads, shared_bytes, params) }
    }

    /// The same with clusters of so many blocks.
    ///
    /// # Safety
    /// As above.
    unsafe fn launch_clusters<P: Copy>(
        &self,
        kernel: &str,
        grid: [usize; 3],
        cluster: usize,
        threads: usize,
        shared_bytes: usize,
        params: &P,
    ) -> Result<()> {
        if self.plans || grid.contains(&0) {
            return Ok(());
        }
        let [x, y, z] = grid;
        let fits = x <= i32::MAX as usize && y <= 65_535 && z <= 65_535;
        ensure(fits, "launch", || format!("{kernel}: a grid of {grid:?} blocks is too large"))?;
        // SAFETY: the bytes of a plain structure of the C header; padding is never looked at.
        let params =
            unsafe { std::slice::from_raw_parts(std::ptr::from_ref(params).cast::<u8>(), size_of::<P>()) };
        let launch = Launch {
            kernel,
            grid: grid.map(|n| n as u32),
            cluster: cluster as u32,
            threads: threads as u32,
            shared_bytes: shared_bytes as u32,
            params,
        };
        // SAFETY: the caller's promise.
        unsafe { self.queue.launch(&launch) }
    }

    /// A tensor of host data.
    fn tensor_of<T: bytemuck::NoUninit>(&self, data: &[T]) -> Result<Tensor> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let mut out = self.empty(&[bytes.len()], DType::U8)?;
        self.upload(&mut out, bytes)?;
        Ok(out)
    }
}

/// Whether a variable of the environment says yes; `default` where it is not set.
fn is_on(variable: &str, default: bool) -> bool {
    std::env::var_os(variable).map_or(default, |value| !value.is_empty() && value != "0")
}

/// Address of a tensor that is read.
fn read<T>(x: &Tensor) -> Result<*const T> {
    Ok(x.device_bytes()?.cast_const().cast())
}

/// Address of a tensor that is written.
fn written<T>(x: &mut Tensor) -> Result<*mut T> {
    Ok(x.device_bytes()?.cast())
}

/// The kernels' number of a float type.
fn type_code(dtype: DType) -> i32 {
    (match dtype {
        DType::F32 => bindings::TYPE_F32,
        DType::BF16 => bindings::TYPE_BF16,
        DType::F16 => bindings::TYPE_F16,
        DType::I32 | DType::U8 => unreachable!("operands were checked to be floats"),
    }) as i32
}

impl Kernels for Cuda {
    fn name(&self) -> String {
        self.executor.properties().name.clone()
    }

    fn arena(&self) -> &Arena {
        &self.arena
    }

    fn free_memory(&self) -> Option<usize> {
        self.executor.free_memory().ok()
    }

    fn planner(&self) -> Result<Backend> {
        let (executor, queue) = (self.executor.clone(), self.queue.clone());
        Ok(Arc::new(Self::with(executor, queue, Arena::counting_on_device(), self.hopper.clone(), true)?))
    }

    fn empty(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let bytes = shape.iter().try_fold(dtype.size(), |n, d| n.checked_mul(*d));
        let bytes = bytes.ok_or_else(|| Error::shape("tensor", format!("{shape:?} is too large")))?;
        Tensor::from_block(self.arena.allocate(bytes)?, shape, dtype)
    }

    fn place(&self, x: &Tensor) -> Result<Tensor> {
        if x.is_on_device() {
            return Ok(x.clone());
        }
        let mut out = self.empty(x.shape(), x.dtype())?;
        // SAFETY: a tensor of the host has its bytes there, and nothing writes them now.
        let bytes = unsafe { std::slice::from_raw_parts(x.host_bytes(), x.bytes()) };
        self.upload(&mut out, bytes)?;
        Ok(out)
    }

    fn upload(&self, out: &mut Tensor, bytes: &[u8]) -> Result<()> {
        ensure(out.bytes() == bytes.len(), "upload", || {
            format!("{} bytes for {}", bytes.len(), out.bytes())
        })?;
        if !out.is_on_device() {
            self.paging().settle(&*self.executor)?;
            // SAFETY: `out` has as many bytes as the source, which is other memory.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), out.host_bytes_mut()?, bytes.len()) };
            return Ok(());
        }
        if self.plans {
            return Ok(());
        }
        // SAFETY: `out` has as many bytes as the source.
        unsafe { self.to_device(written(out)?, bytes) }
    }

    fn download(&self, x: &Tensor, bytes: &mut [u8]) -> Result<()> {
        ensure(x.bytes() == bytes.len(), "download", || format!("{} bytes for {}", bytes.len(), x.bytes()))?;
        if !x.is_on_device() {
            self.paging().settle(&*self.executor)?;
            // SAFETY: `x` has as many bytes as the destination, which is other memory.
            unsafe { std::ptr::copy_nonoverlapping(x.host_bytes(), bytes.as_mut_ptr(), bytes.len()) };
            return Ok(());
        }
        self.to_host(&mut [(x, bytes)])
    }

    fn fill(&self, out: &mut Tensor, value: f32) -> Result<()> {
        elementwise::fill(self, out, value)
    }

    fn cast(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        check::cast(out, x)?;
        let x = &self.place(x)?;
        if self.plans {
            return Ok(());
        }
        if out.dtype() == x.dtype() {
            // SAFETY: both have so many bytes, in different tensors.
            return unsafe { self.queue.copy(written(out)?, read(x)?, x.bytes()) };
        }
        elementwise::cast(self, out, x)
    }

    fn gemm(&self, out: &mut Tensor, gemm: &Gemm<'_>) -> Result<()> {
        gemm::gemm_all(self, &mut [(out, *gemm)])
    }

    fn gemm_all(&self, products: &mut [(&mut Tensor, Gemm<'_>)]) -> Result<()> {
        gemm::gemm_all(self, products)
    }

    fn quantize(&self, x: &Tensor, config: &QuantConfig) -> Result<Quantized> {
        quant::quantize(self, &self.place(x)?, config)
    }

    fn dequantize(&self, out: &mut Tensor, x: &Quantized) -> Result<()> {
        quant::dequantize(self, out, x)
    }

    fn gather_rows(&self, out: &mut Tensor, x: &Tensor, rows: &Tensor) -> Result<()> {
        rows::gather_rows(self, out, x, rows)
    }

    fn scatter_add_rows(&self, out: &mut Tensor, x: &Tensor, rows: &Tensor) -> Result<()> {
        rows::scatter_add_rows(self, out, x, rows)
    }

    fn copy_columns(
        &self,
        out: &mut Tensor,
        out_col: usize,
        x: &Tensor,
        x_col: usize,
        cols: usize,
        accumulate: bool,
    ) -> Result<()> {
        rows::copy_columns(self, out, out_col, x, x_col, cols, accumulate)
    }

    fn add(&self, out: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
        elementwise::add(self, out, a, b)
    }

    fn add_assign(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        let a = out.clone();
        elementwise::add(self, out, &a, x)
    }

    fn scale(&self, out: &mut Tensor, factor: f32) -> Result<()> {
        elementwise::scale(self, out, factor)
    }

    fn add_column_sums(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        norm::column_sums(self, out, x, None)
    }

    fn add_column_products(&self, out: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
        norm::column_sums(self, out, a, Some(b))
    }

    fn scale_columns(
        &self,
        out: &mut Tensor,
        x: &Tensor,
        factors: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<()> {
        norm::scale_columns(self, out, x, factors, bias)
    }

    fn rsqrt(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        elementwise::rsqrt(self, out, x)
    }

    fn rms_norm(
        &self,
        y: &mut Tensor,
        rstd: &mut Tensor,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
    ) -> Result<()> {
        norm::norm(self, y, rstd, x, None, weight, None, eps, false)
    }

    fn add_rms_norm(
        &self,
        results: [&mut Tensor; 3],
        terms: [&Tensor; 2],
        weight: &Tensor,
        eps: f32,
    ) -> Result<()> {
        norm::add_rms_norm(self, results, terms, weight, eps)
    }

    fn rms_norm_backward(
        &self,
        dx: Option<&mut Tensor>,
        accumulate: bool,
        dweight: Option<&mut Tensor>,
        dy: &Tensor,
        x: &Tensor,
        rstd: &Tensor,
        weight: &Tensor,
    ) -> Result<()> {
        norm::norm_backward(self, dx, accumulate, dweight, dy, x, rstd, weight, false)
    }

    fn layer_norm(
        &self,
        y: &mut Tensor,
        stats: &mut Tensor,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        eps: f32,
    ) -> Result<()> {
        norm::norm(self, y, stats, x, None, weight, bias, eps, true)
    }

    fn layer_norm_backward(
        &self,
        dx: Option<&mut Tensor>,
        accumulate: bool,
        dweight: Option<&mut Tensor>,
        dbias: Option<&mut Tensor>,
        dy: &Tensor,
        x: &Tensor,
        stats: &Tensor,
        weight: &Tensor,
    ) -> Result<()> {
        norm::norm_backward(self, dx, accumulate, dweight, dy, x, stats, weight, true)?;
        dbias.map_or(Ok(()), |dbias| norm::column_sums(self, dbias, dy, None))
    }

    fn rope(&self, x: &mut Tensor, table: &Tensor, positions: &Tensor, shape: &RopeShape) -> Result<()> {
        elementwise::rope(self, &mut [(x, *shape)], table, positions)
    }

    fn rope_all(
        &self,
        all: &mut [(&mut Tensor, RopeShape)],
        table: &Tensor,
        positions: &Tensor,
    ) -> Result<()> {
        elementwise::rope(self, all, table, positions)
    }

    fn attention(
        &self,
        out: &mut Tensor,
        lse: &mut Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: &AttentionShape<'_>,
    ) -> Result<()> {
        attention::attention(self, out, lse, q, k, v, shape)
    }

    fn attention_backward(
        &self,
        dq: &mut Tensor,
        dk: &mut Tensor,
        dv: &mut Tensor,
        dout: &Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        shape: &AttentionShape<'_>,
    ) -> Result<()> {
        attention::attention_backward(self, [dq, dk, dv], dout, [q, k, v], out, lse, shape)
    }

    fn activation(&self, y: &mut Tensor, x: &Tensor, activation: Activation) -> Result<()> {
        elementwise::activation(self, y, x, activation)
    }

    fn activation_backward(
        &self,
        dx: &mut Tensor,
        dy: &Tensor,
        x: &Tensor,
        activation: Activation,
    ) -> Result<()> {
        elementwise::activation_backward(self, dx, dy, x, activation)
    }

    fn gated(&self, y: &mut Tensor, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<()> {
        elementwise::gated(self, y, gate, up, activation)
    }

    fn gated_backward(
        &self,
        dgate: &mut Tensor,
        dup: &mut Tensor,
        dy: &Tensor,
        gate: &Tensor,
        up: &Tensor,
        activation: Activation,
    ) -> Result<()> {
        elementwise::gated_backward(self, dgate, dup, dy, gate, up, activation)
    }

    fn dropout(
        &self,
        y: &mut Tensor,
        x: &Tensor,
        p: f32,
        key: PhiloxKey,
        first_row: usize,
        accumulate: bool,
    ) -> Result<()> {
        elementwise::dropout(self, y, x, p, key, first_row, accumulate)
    }

    fn cross_entropy(
        &self,
        losses: &mut Tensor,
        dlogits: Option<&mut Tensor>,
        logits: &Tensor,
        targets: &Tensor,
        grad_scale: f32,
    ) -> Result<()> {
        norm::cross_entropy(self, losses, dlogits, logits, targets, grad_scale)
    }

    fn head_loss(&self, losses: &mut Tensor, dx: Option<&mut Tensor>, loss: &HeadLoss<'_>) -> Result<bool> {
        head_loss::head_loss(self, losses, dx, loss)
    }

    fn softcap(&self, x: &mut Tensor, cap: f32) -> Result<()> {
        elementwise::softcap(self, x, cap)
    }

    fn softcap_backward(&self, dx: &mut Tensor, y: &Tensor, cap: f32) -> Result<()> {
        elementwise::softcap_backward(self, dx, y, cap)
    }

    fn sum_squares(&self, x: &Tensor) -> Result<f64> {
        Ok(norm::step_report(self, Some(x), &[])?.0)
    }

    fn step_report(&self, gradients: Option<&Tensor>, losses: &[Tensor]) -> Result<(f64, Vec<f32>)> {
        norm::step_report(self, gradients, losses)
    }

    fn sample(&self, logits: &mut Tensor, rows: &[SampleRow<'_>]) -> Result<Vec<Option<u32>>> {
        sample::sample(self, logits, rows)
    }

    fn verdict(&self) -> Result<Option<Tensor>> {
        (self as &dyn Kernels).zeros(&[3], DType::F32).map(Some)
    }

    fn judge(
        &self,
        verdict: &mut Tensor,
        step: usize,
        gradients: Option<&Tensor>,
        losses: &[Tensor],
        max_grad_norm: Option<f64>,
    ) -> Result<()> {
        optimizer::judge(self, verdict, step, gradients, losses, max_grad_norm)
    }

    fn beside(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Mark> {
        let end = self.paging().take_mark(&*self.executor)?;
        self.queue.beside(end, work)?;
        Ok(Mark(end.0))
    }

    fn join(&self, marks: Vec<Mark>) -> Result<()> {
        let ends = marks.into_iter().map(|Mark(end)| Event(end)).collect();
        let Some(last) = self.paging().give_marks(ends) else { return Ok(()) };
        self.queue.join(last)
    }

    fn page_memory(&self, shape: &[usize], dtype: DType) -> Result<Option<Tensor>> {
        if self.plans {
            return Ok(None);
        }
        self.paging().memory(shape, dtype).map(Some)
    }

    fn fetch_page(&self, page: &[Tensor]) -> Result<Vec<Tensor>> {
        paging::fetch(self, page)
    }

    fn begin_page(&self, here: &[Tensor]) -> Result<()> {
        paging::begin(self, here)
    }

    fn store_page(&self, page: &[Tensor], here: Vec<Tensor>) -> Result<()> {
        paging::store(self, page, &here)
    }

    fn adamw(
        &self,
        p: &mut Tensor,
        g: &Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
        step: &OptimizerStep,
    ) -> Result<()> {
        optimizer::step(self, "adamw", p, g, Some(m), Some(v), step)
    }

    fn adamw_8bit(
        &self,
        p: &mut Tensor,
        g: &Tensor,
        moments: &mut Moments8bit<'_>,
        step: &OptimizerStep,
    ) -> Result<()> {
        optimizer::adamw_8bit(self, p, g, moments, step)
    }

    fn lion(&self, p: &mut Tensor, g: &Tensor, m: &mut Tensor, step: &OptimizerStep) -> Result<()> {
        let step = OptimizerStep { bias_correction1: 1.0, ..step.clone() };
        optimizer::step(self, "lion", p, g, Some(m), None, &step)
    }

    fn sgd(&self, p: &mut Tensor, g: &Tensor, step: &OptimizerStep) -> Result<()> {
        let step = OptimizerStep { bias_correction1: 1.0, ..step.clone() };
        optimizer::step(self, "sgd", p, g, None, None, &step)
    }
}
