//! The CPU backend: C kernels of one instruction set, jobs spread over a pool of threads.
//!
//! A job writes rows or columns that no other job writes, and no sum is split over jobs, so the number of
//! threads changes no bits.

#[allow(missing_docs, non_camel_case_types, dead_code, clippy::all, unreachable_pub)]
mod bindings;

mod attention;
mod gemm;
mod isa;
mod ops;
mod optimizer;
mod quant;
mod rows;
mod team;

pub use isa::Isa;

use super::check::ensure;
use super::{Activation, AttentionShape, Backend, Gemm, Kernels, Moments8bit, OptimizerStep, RopeShape};
use crate::arena::Arena;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::{QuantConfig, Quantized};
use crate::rng::PhiloxKey;
use crate::tensor::Tensor;
use bindings::kernel_table;
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use team::Team;

/// A function of the kernel table.
macro_rules! kernel {
    ($cpu:expr, $name:ident) => {
        $cpu.table.$name.expect(concat!("every table has ", stringify!($name)))
    };
}
pub(crate) use kernel;

/// The CPU.
pub struct Cpu {
    arena: Arena,
    table: kernel_table,
    team: Arc<Team>,
    threads: usize,
    scratch: AtomicUsize, // bytes that the threads' scratch memory has grown to
    plan: Option<Arena>,  // of a planner: where indices are, which operations look at
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

// SAFETY: the table holds function pointers and a string literal, and is never changed.
unsafe impl Sync for Cpu {}
// SAFETY: as above.
unsafe impl Send for Cpu {}

/// A pointer that jobs share; each job writes elements that no other touches.
#[derive(Clone, Copy)]
pub(super) struct Shared<T>(pub *mut T);

// SAFETY: see the type's promise; every use says which elements are whose.
unsafe impl<T> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Send for Shared<T> {}

impl<T> Shared<T> {
    /// The element at `index`; the method (not the field) makes closures capture the whole wrapper.
    pub fn at(self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [f32; 16]);

thread_local! {
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

impl Cpu {
    /// A backend on `threads` threads (`None`: as many as the process may use), with the fastest available
    /// instruction set or the one that `LOWRANK_ISA` names.
    ///
    /// # Errors
    /// When `LOWRANK_ISA` can't be honoured or threads can't be started.
    #[allow(clippy::new_ret_no_self)]
    pub fn new(threads: Option<usize>) -> Result<Backend> {
        Self::with_isa(Isa::choose()?, threads)
    }

    /// A backend with the kernels of one instruction set.
    ///
    /// # Errors
    /// When this processor lacks the instruction set or threads can't be started.
    pub fn with_isa(isa: Isa, threads: Option<usize>) -> Result<Backend> {
        if !isa.is_available() {
            return Err(Error::Unsupported(format!("this processor has no {}", isa.name())));
        }
        let threads = threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()))
            .clamp(1, 1024);
        let team = Team::new(threads)
            .map_err(|e| Error::Unsupported(format!("{threads} threads can't be started: {e}")))?;
        Ok(Arc::new(Cpu {
            arena: Arena::new(),
            table: isa.table(),
            team: Arc::new(team),
            threads,
            scratch: AtomicUsize::new(0),
            plan: None,
        }))
    }

    /// Whether this backend only counts.
    fn is_planner(&self) -> bool {
        self.plan.is_some()
    }

    /// Runs `job` with at least `floats` floats of this thread's scratch memory.
    fn with_scratch<R>(&self, floats: usize, job: impl FnOnce(*mut f32) -> R) -> R {
        SCRATCH.with(|scratch| {
            let mut scratch = scratch.borrow_mut();
            let (lines, had) = (floats.div_ceil(16), scratch.len());
            if had < lines {
                scratch.reserve_exact(lines - had);
                scratch.resize(lines, Line([0.0; 16]));
                self.scratch.fetch_add((lines - had) * size_of::<Line>(), Ordering::Relaxed);
            }
            job(scratch.as_mut_ptr().cast())
        })
    }

    /// [`Cpu::run`] with `floats(i)` floats of scratch memory for job `i`; on the calling thread if `serial`.
    fn run_with_scratch(
        &self,
        jobs: usize,
        serial: bool,
        floats: impl Fn(usize) -> usize + Send + Sync,
        job: impl Fn(usize, *mut f32) + Send + Sync,
    ) {
        if self.is_planner() {
            let most = (0..jobs).map(floats).max().unwrap_or(0).div_ceil(16) * size_of::<Line>();
            self.scratch.fetch_max(most * self.threads, Ordering::Relaxed);
            return;
        }
        let job = |i: usize| self.with_scratch(floats(i), |scratch| job(i, scratch));
        if serial { (0..jobs).for_each(job) } else { self.run(jobs, job) }
    }

    /// Runs `job` for `0..jobs`, spread over the threads.
    fn run(&self, jobs: usize, job: impl Fn(usize) + Send + Sync) {
        if self.is_planner() {
            return;
        }
        if jobs == 1 || self.threads == 1 {
            (0..jobs).for_each(job);
        } else {
            self.team.run(jobs, &job);
        }
    }

    /// Runs `job(start, len)` over chunks of `0..n` of at least `grain` elements.
    fn run_chunks(&self, n: usize, grain: usize, job: impl Fn(usize, usize) + Send + Sync) {
        let chunk = n.div_ceil(4 * self.threads).next_multiple_of(64).max(grain);
        self.run(n.div_ceil(chunk), |i| job(i * chunk, chunk.min(n - i * chunk)));
    }

    /// Measures the arithmetic peak of `threads` cores at once, in operations per second, f32 or bf16: the
    /// best of a few runs of independent fused multiply-adds in registers.
    pub fn measure_peak(isa: Isa, bf16: bool, threads: usize) -> f64 {
        let peak = isa.table().peak.expect("every table has peak");
        let one = || {
            let (start, mut sink) = (std::time::Instant::now(), 0.0);
            // SAFETY: the function writes one float to `sink`.
            let operations = unsafe { peak(100_000, i32::from(bf16), &mut sink) };
            operations / start.elapsed().as_secs_f64()
        };
        let all = || {
            std::thread::scope(|scope| {
                let others: Vec<_> = (1..threads).map(|_| scope.spawn(one)).collect();
                one() + others.into_iter().map(|t| t.join().unwrap_or(0.0)).sum::<f64>()
            })
        };
        (0..20).map(|_| all()).fold(0.0, f64::max)
    }
}

/// The header's number of a float type.
pub(super) fn type_code(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::BF16 => 1,
        DType::F16 => 2,
        DType::I32 | DType::U8 => unreachable!("operands were checked to be floats"),
    }
}

impl Kernels for Cpu {
    fn name(&self) -> String {
        let s = if self.threads == 1 { "" } else { "s" };
        format!("cpu ({}, {} thread{s})", Isa::table_name(&self.table), self.threads)
    }

    fn arena(&self) -> &Arena {
        &self.arena
    }

    fn planner(&self) -> Result<Backend> {
        Ok(Arc::new(Cpu {
            arena: Arena::counting(),
            table: self.table,
            team: self.team.clone(),
            threads: self.threads,
            scratch: AtomicUsize::new(0),
            plan: Some(Arena::new()),
        }))
    }

    fn scratch_bytes(&self) -> usize {
        self.scratch.load(Ordering::Relaxed)
    }

    fn empty(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let bytes = shape.iter().try_fold(dtype.size(), |n, d| n.checked_mul(*d));
        let bytes = bytes.ok_or_else(|| Error::shape("tensor", format!("{shape:?} is too large")))?;
        if let (Some(indices), DType::I32) = (&self.plan, dtype) {
            return Tensor::from_block(indices.allocate(bytes)?, shape, dtype);
        }
        Tensor::from_block(self.arena.allocate(bytes)?, shape, dtype)
    }

    fn upload(&self, out: &mut Tensor, bytes: &[u8]) -> Result<()> {
        ensure(out.bytes() == bytes.len(), "upload", || {
            format!("{} bytes for {}", bytes.len(), out.bytes())
        })?;
        if self.is_planner() && out.dtype() != DType::I32 {
            return Ok(());
        }
        // SAFETY: `out` has as many bytes as the source, which can't overlap arena memory held mutably.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), out.host_bytes_mut()?, bytes.len()) };
        Ok(())
    }

    fn download(&self, x: &Tensor, bytes: &mut [u8]) -> Result<()> {
        ensure(x.bytes() == bytes.len(), "download", || format!("{} bytes for {}", bytes.len(), x.bytes()))?;
        if self.is_planner() && x.dtype() != DType::I32 {
            return Ok(());
        }
        // SAFETY: `x` has as many bytes as the destination.
        unsafe { std::ptr::copy_nonoverlapping(x.host_bytes(), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn fill(&self, out: &mut Tensor, value: f32) -> Result<()> {
        self.fill_rows(out, value)
    }

    fn cast(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        self.cast_elements(out, x)
    }

    fn gemm(&self, out: &mut Tensor, gemm: &Gemm<'_>) -> Result<()> {
        self.run_gemms(&mut [(out, *gemm)])
    }

    fn gemm_all(&self, products: &mut [(&mut Tensor, Gemm<'_>)]) -> Result<()> {
        self.run_gemms(products)
    }

    fn quantize(&self, x: &Tensor, config: &QuantConfig) -> Result<Quantized> {
        self.run_quantize(x, config)
    }

    fn dequantize(&self, out: &mut Tensor, x: &Quantized) -> Result<()> {
        self.run_dequantize(out, x)
    }

    fn lay_out_for_decoding(&self, all: &mut [&mut Quantized]) -> Result<()> {
        self.run_lay_out(all)
    }

    fn gather_rows(&self, out: &mut Tensor, x: &Tensor, rows: &Tensor) -> Result<()> {
        self.run_gather(out, x, rows)
    }

    fn scatter_add_rows(&self, out: &mut Tensor, x: &Tensor, rows: &Tensor) -> Result<()> {
        self.run_scatter_add(out, x, rows)
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
        self.run_copy_columns(out, out_col, x, x_col, cols, accumulate)
    }

    fn add(&self, out: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
        self.run_add(out, a, b)
    }

    fn add_assign(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        let a = out.clone();
        self.run_add(out, &a, x)
    }

    fn scale(&self, out: &mut Tensor, factor: f32) -> Result<()> {
        self.run_scale(out, factor)
    }

    fn add_column_sums(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        self.run_column_sums(out, x)
    }

    fn add_column_products(&self, out: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
        self.run_column_products(out, a, b)
    }

    fn scale_columns(
        &self,
        out: &mut Tensor,
        x: &Tensor,
        factors: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<()> {
        self.run_scale_columns(out, x, factors, bias)
    }

    fn softcap(&self, x: &mut Tensor, cap: f32) -> Result<()> {
        self.run_softcap(x, cap)
    }

    fn softcap_backward(&self, dx: &mut Tensor, y: &Tensor, cap: f32) -> Result<()> {
        self.run_softcap_backward(dx, y, cap)
    }

    fn rsqrt(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        self.run_rsqrt(out, x)
    }

    fn rms_norm(
        &self,
        y: &mut Tensor,
        rstd: &mut Tensor,
        x: &Tensor,
        weight: &Tensor,
        eps: f32,
    ) -> Result<()> {
        self.run_norm(y, rstd, x, weight, None, eps, false)
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
        self.run_norm_backward(dx, accumulate, dweight, dy, x, rstd, weight, false)
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
        self.run_norm(y, stats, x, weight, bias, eps, true)
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
        self.run_norm_backward(dx, accumulate, dweight, dy, x, stats, weight, true)?;
        match dbias {
            Some(dbias) => self.run_column_sums(dbias, dy),
            None => Ok(()),
        }
    }

    fn rope(&self, x: &mut Tensor, table: &Tensor, positions: &Tensor, shape: &RopeShape) -> Result<()> {
        self.run_rope(x, table, positions, shape)
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
        self.run_attention(out, lse, q, k, v, shape)
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
        self.run_attention_backward(dq, dk, dv, dout, q, k, v, out, lse, shape)
    }

    fn activation(&self, y: &mut Tensor, x: &Tensor, activation: Activation) -> Result<()> {
        self.run_activation(y, x, activation)
    }

    fn activation_backward(
        &self,
        dx: &mut Tensor,
        dy: &Tensor,
        x: &Tensor,
        activation: Activation,
    ) -> Result<()> {
        self.run_activation_backward(dx, dy, x, activation)
    }

    fn gated(&self, y: &mut Tensor, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<()> {
        self.run_gated(y, gate, up, activation)
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
        self.run_gated_backward(dgate, dup, dy, gate, up, activation)
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
        self.run_dropout(y, x, p, key, first_row, accumulate)
    }

    fn cross_entropy(
        &self,
        losses: &mut Tensor,
        dlogits: Option<&mut Tensor>,
        logits: &Tensor,
        targets: &Tensor,
        grad_scale: f32,
    ) -> Result<()> {
        self.run_cross_entropy(losses, dlogits, logits, targets, grad_scale)
    }

    fn sum_squares(&self, x: &Tensor) -> Result<f64> {
        self.run_sum_squares(x)
    }

    fn adamw(
        &self,
        p: &mut Tensor,
        g: &Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
        step: &OptimizerStep,
    ) -> Result<()> {
        self.run_adamw(p, g, m, v, step)
    }

    fn adamw_8bit(
        &self,
        p: &mut Tensor,
        g: &Tensor,
        moments: &mut Moments8bit<'_>,
        step: &OptimizerStep,
    ) -> Result<()> {
        self.run_adamw_8bit(p, g, moments, step)
    }

    fn lion(&self, p: &mut Tensor, g: &Tensor, m: &mut Tensor, step: &OptimizerStep) -> Result<()> {
        self.run_lion(p, g, m, step)
    }

    fn sgd(&self, p: &mut Tensor, g: &Tensor, step: &OptimizerStep) -> Result<()> {
        self.run_sgd(p, g, step)
    }
}
