//! Where kernels run: a GPU ([`device`](super::device)), or the host acting one, for tests ([`host`](super::host)).

use crate::arena::MemorySource;
use crate::error::Result;

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
#[derive(Clone, Copy, Debug)]
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

/// A device: memory, copies and launches. All of them happen in the order of the calls; only
/// [`Executor::download`] and [`Executor::synchronize`] wait.
pub trait Executor: MemorySource {
    /// What the device is and has.
    fn properties(&self) -> &Properties;

    /// Bytes of memory that are free now.
    ///
    /// # Errors
    /// When the device does not answer.
    fn free_memory(&self) -> Result<usize>;

    /// Copies host bytes to an address of the device; they may be changed when this returns.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// `to` begins so many bytes of this device's memory.
    unsafe fn upload(&self, to: *mut u8, bytes: &[u8]) -> Result<()>;

    /// Copies bytes of the device to the host, after everything that was started before.
    ///
    /// # Errors
    /// When the device fails, or failed in something that was started before.
    ///
    /// # Safety
    /// `from` begins so many bytes of this device's memory.
    unsafe fn download(&self, bytes: &mut [u8], from: *const u8) -> Result<()>;

    /// Copies within the device.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// Both addresses begin so many bytes of this device's memory, and the ranges do not overlap.
    unsafe fn copy(&self, to: *mut u8, from: *const u8, bytes: usize) -> Result<()>;

    /// The words of `struct tensor_map` for a matrix.
    ///
    /// # Errors
    /// When TMA can't copy it.
    fn tensor_map(&self, matrix: &TmaMatrix) -> Result<[u64; 16]>;

    /// Starts a kernel.
    ///
    /// # Errors
    /// When there is no such kernel, or the device fails.
    ///
    /// # Safety
    /// The kernel's argument is the structure that `cuda/params.h` gives it, and what that points to is as the kernel
    /// expects it.
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()>;

    /// Waits for everything that was started.
    ///
    /// # Errors
    /// When any of it failed.
    fn synchronize(&self) -> Result<()>;
}
