//! The CUDA backend: kernels of `cuda/*.cu`, launched in program order on one stream.
//!
//! Operations on elements and rows have the bits of the CPU; products and attention are deterministic and as near to
//! the truth as plain arithmetic, and a row's bits depend on that row alone. The same kernels run on the host in tests
//! ([`HostExecutor`]). An index outside its range, which only the device sees, is an error of the next
//! [`Kernels::download`] or [`Kernels::sum_squares`].

#[allow(missing_docs, non_camel_case_types, dead_code, clippy::all, unreachable_pub)]
mod bindings;

mod device;
mod elementwise;
mod executor;
mod host;
mod kernels;

pub use device::{Device, driver_is_present};
pub use executor::{Executor, Launch, Properties};
pub use host::{HostExecutor, ThreadOrder};

use super::check::{self, ensure};
use super::{Activation, AttentionShape, Backend, Gemm, Kernels, Moments8bit, OptimizerStep, RopeShape};
use crate::arena::Arena;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::{QuantConfig, Quantized};
use crate::rng::PhiloxKey;
use crate::tensor::Tensor;
use std::sync::Arc;

/// An NVIDIA GPU, or the host acting one.
#[derive(Debug)]
pub struct Cuda {
    executor: Arc<dyn Executor>,
    arena: Arena,
    faults: Tensor, // u32 [1], bits of `fault`
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

    /// A backend on any executor.
    ///
    /// # Errors
    /// When it has no memory.
    pub fn on<E: Executor + 'static>(executor: Arc<E>) -> Result<Backend> {
        let arena = Arena::on_device(executor.clone());
        let faults = Tensor::from_block(arena.allocate(4)?, &[1], DType::I32)?;
        let cuda = Cuda { executor, arena, faults };
        cuda.reset_faults()?;
        Ok(Arc::new(cuda))
    }

    fn reset_faults(&self) -> Result<()> {
        // SAFETY: the tensor has four bytes, which nothing else writes now.
        unsafe { self.executor.upload(self.faults.device_bytes()?, &[0; 4]) }
    }

    /// Fails if a kernel met an index outside its range since the last look.
    fn check_faults(&self) -> Result<()> {
        let mut word = [0; 4];
        // SAFETY: the tensor has four bytes.
        unsafe { self.executor.download(&mut word, self.faults.device_bytes()?)? };
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
        ];
        let found = operations.iter().find(|(bit, _)| word & bit != 0);
        let operation = found.map_or("kernel", |(_, name)| name);
        Err(Error::shape(operation, "an index lies outside its table, or an element is not finite"))
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
        if grid.contains(&0) {
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
            threads: threads as u32,
            shared_bytes: shared_bytes as u32,
            params,
        };
        // SAFETY: the caller's promise.
        unsafe { self.executor.launch(&launch) }
    }

    /// A tensor of host data.
    #[allow(dead_code)]
    fn tensor_of<T: bytemuck::NoUninit>(&self, data: &[T]) -> Result<Tensor> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let mut out = self.empty(&[bytes.len()], DType::U8)?;
        self.upload(&mut out, bytes)?;
        Ok(out)
    }
}

/// Address of a tensor that is read.
fn read<T>(x: &Tensor) -> Result<*const T> {
    Ok(x.device_bytes()?.cast_const().cast())
}

/// Address of a tensor that is written.
fn written<T>(x: &mut Tensor) -> Result<*mut T> {
    Ok(x.device_bytes()?.cast())
}

/// An operation that has no kernel yet.
fn missing(operation: &'static str) -> Result<()> {
    Err(Error::Unsupported(format!("{operation} has no CUDA kernel yet")))
}

impl Kernels for Cuda {
    fn name(&self) -> String {
        self.executor.properties().name.clone()
    }

    fn arena(&self) -> &Arena {
        &self.arena
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
        // SAFETY: `out` has as many bytes as the source.
        unsafe { self.executor.upload(written(out)?, bytes) }
    }

    fn download(&self, x: &Tensor, bytes: &mut [u8]) -> Result<()> {
        ensure(x.bytes() == bytes.len(), "download", || format!("{} bytes for {}", bytes.len(), x.bytes()))?;
        // SAFETY: `x` has as many bytes as the destination.
        unsafe { self.executor.download(bytes, read(x)?)? };
        self.check_faults()
    }

    fn fill(&self, out: &mut Tensor, value: f32) -> Result<()> {
        elementwise::fill(self, out, value)
    }

    fn cast(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        check::cast(out, x)?;
        if out.dtype() == x.dtype() {
            // SAFETY: both have so many bytes, in different tensors.
            return unsafe { self.executor.copy(written(out)?, read(x)?, x.bytes()) };
        }
        elementwise::cast(self, out, x)
    }

    fn gemm(&self, out: &mut Tensor, gemm: &Gemm<'_>) -> Result<()> {
        check::gemm(out, gemm)?;
        missing("gemm")
    }

    fn quantize(&self, _x: &Tensor, _config: &QuantConfig) -> Result<Quantized> {
        Err(Error::Unsupported("quantize has no CUDA kernel yet".into()))
    }

    fn dequantize(&self, _out: &mut Tensor, _x: &Quantized) -> Result<()> {
        missing("dequantize")
    }

    fn gather_rows(&self, out: &mut Tensor, x: &Tensor, rows: &Tensor) -> Result<()> {
        check::gather_rows(out, x, rows)?;
        missing("gather_rows")
    }

    fn scatter_add_rows(&self, out: &mut Tensor, x: &Tensor, rows: &Tensor) -> Result<()> {
        check::scatter_add_rows(out, x, rows)?;
        missing("scatter_add_rows")
    }

    fn copy_columns(
        &self,
        out: &mut Tensor,
        out_col: usize,
        x: &Tensor,
        x_col: usize,
        cols: usize,
        _accumulate: bool,
    ) -> Result<()> {
        check::copy_columns(out, out_col, x, x_col, cols)?;
        missing("copy_columns")
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

    fn add_column_sums(&self, _out: &mut Tensor, _x: &Tensor) -> Result<()> {
        missing("add_column_sums")
    }

    fn add_column_products(&self, _out: &mut Tensor, _a: &Tensor, _b: &Tensor) -> Result<()> {
        missing("add_column_products")
    }

    fn scale_columns(
        &self,
        _out: &mut Tensor,
        _x: &Tensor,
        _factors: &Tensor,
        _bias: Option<&Tensor>,
    ) -> Result<()> {
        missing("scale_columns")
    }

    fn rsqrt(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        elementwise::rsqrt(self, out, x)
    }

    fn rms_norm(
        &self,
        _y: &mut Tensor,
        _rstd: &mut Tensor,
        _x: &Tensor,
        _weight: &Tensor,
        _eps: f32,
    ) -> Result<()> {
        missing("rms_norm")
    }

    fn rms_norm_backward(
        &self,
        _dx: Option<&mut Tensor>,
        _accumulate: bool,
        _dweight: Option<&mut Tensor>,
        _dy: &Tensor,
        _x: &Tensor,
        _rstd: &Tensor,
        _weight: &Tensor,
    ) -> Result<()> {
        missing("rms_norm_backward")
    }

    fn layer_norm(
        &self,
        _y: &mut Tensor,
        _stats: &mut Tensor,
        _x: &Tensor,
        _weight: &Tensor,
        _bias: Option<&Tensor>,
        _eps: f32,
    ) -> Result<()> {
        missing("layer_norm")
    }

    fn layer_norm_backward(
        &self,
        _dx: Option<&mut Tensor>,
        _accumulate: bool,
        _dweight: Option<&mut Tensor>,
        _dbias: Option<&mut Tensor>,
        _dy: &Tensor,
        _x: &Tensor,
        _stats: &Tensor,
        _weight: &Tensor,
    ) -> Result<()> {
        missing("layer_norm_backward")
    }

    fn rope(&self, x: &mut Tensor, table: &Tensor, positions: &Tensor, shape: &RopeShape) -> Result<()> {
        elementwise::rope(self, x, table, positions, shape)
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
        check::ensure_alike("attention", &[out, q])?;
        check::attention(shape, q, k, v, lse)?;
        missing("attention")
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
        check::ensure_alike("attention_backward", &[dq, dout, q, out])?;
        check::ensure_alike("attention_backward", &[dk, dv, k, v])?;
        check::attention(shape, q, k, v, lse)?;
        missing("attention_backward")
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
        _losses: &mut Tensor,
        _dlogits: Option<&mut Tensor>,
        _logits: &Tensor,
        _targets: &Tensor,
        _grad_scale: f32,
    ) -> Result<()> {
        missing("cross_entropy")
    }

    fn softcap(&self, x: &mut Tensor, cap: f32) -> Result<()> {
        elementwise::softcap(self, x, cap)
    }

    fn softcap_backward(&self, dx: &mut Tensor, y: &Tensor, cap: f32) -> Result<()> {
        elementwise::softcap_backward(self, dx, y, cap)
    }

    fn sum_squares(&self, _x: &Tensor) -> Result<f64> {
        missing("sum_squares").map(|()| 0.0)
    }

    fn adamw(
        &self,
        _p: &mut Tensor,
        _g: &Tensor,
        _m: &mut Tensor,
        _v: &mut Tensor,
        _step: &OptimizerStep,
    ) -> Result<()> {
        missing("adamw")
    }

    fn adamw_8bit(
        &self,
        _p: &mut Tensor,
        _g: &Tensor,
        _moments: &mut Moments8bit<'_>,
        _step: &OptimizerStep,
    ) -> Result<()> {
        missing("adamw_8bit")
    }

    fn lion(&self, _p: &mut Tensor, _g: &Tensor, _m: &mut Tensor, _step: &OptimizerStep) -> Result<()> {
        missing("lion")
    }

    fn sgd(&self, _p: &mut Tensor, _g: &Tensor, _step: &OptimizerStep) -> Result<()> {
        missing("sgd")
    }
}
