//! The executor of tests: kernels compiled for the host by `cuda/host/`, every thread of a block a fiber.

use super::executor::{Executor, Launch, Properties, TmaMatrix};
use crate::arena::MemorySource;
use crate::error::{Error, Result};
use libloading::{Library, Symbol};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::ptr::NonNull;

type LaunchFn = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    *const c_uint,
    *const c_uint,
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

/// The order in which a block's threads take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadOrder {
    /// By index.
    Forward,
    /// From the last to the first.
    Reversed,
    /// At random by this seed.
    Random(u64),
}

/// Kernels in a shared library that `cuda/host/` made.
#[derive(Debug)]
pub struct HostExecutor {
    library: Library,
    order: ThreadOrder,
    properties: Properties,
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
        Ok(HostExecutor { library, order, properties })
    }

    /// Acts a chip of this compute capability (times ten); at first 90.
    #[must_use]
    pub fn with_capability(mut self, capability: u32) -> Self {
        self.properties.capability = capability;
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
        let allocate: Symbol<'_, unsafe extern "C" fn(usize) -> *mut c_void> =
            self.symbol(c"lowrank_host_allocate")?;
        // SAFETY: the function takes any size.
        NonNull::new(unsafe { allocate(bytes) }.cast()).ok_or_else(|| Error::OutOfMemory {
            bytes,
            what: "a tensor".into(),
            advice: "the host has no more".into(),
        })
    }

    fn free(&self, pointer: NonNull<u8>) {
        if let Ok(free) = self.symbol::<unsafe extern "C" fn(*mut c_void)>(c"lowrank_host_free") {
            // SAFETY: the pointer came from `lowrank_host_allocate`.
            unsafe { free(pointer.as_ptr().cast()) };
        }
    }
}

impl Executor for HostExecutor {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn free_memory(&self) -> Result<usize> {
        Ok(self.properties.memory)
    }

    unsafe fn upload(&self, to: *mut u8, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    unsafe fn download(&self, bytes: &mut [u8], from: *const u8) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn copy(&self, to: *mut u8, from: *const u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
        Ok(())
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

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let run: Symbol<'_, LaunchFn> = self.symbol(c"lowrank_host_launch_cluster")?;
        let name = CString::new(launch.kernel).map_err(|e| Error::Unsupported(e.to_string()))?;
        let (order, seed) = match self.order {
            ThreadOrder::Forward => (0, 0),
            ThreadOrder::Reversed => (1, 0),
            ThreadOrder::Random(seed) => (2, seed),
        };
        let (cluster, block) = ([launch.cluster, 1, 1], [launch.threads, 1, 1]);
        let mut message = [0; 1024];
        // SAFETY: the caller's promise; the message has as many bytes as said.
        let status = unsafe {
            run(
                name.as_ptr(),
                launch.grid.as_ptr(),
                cluster.as_ptr(),
                block.as_ptr(),
                launch.shared_bytes,
                launch.params.as_ptr().cast(),
                launch.params.len(),
                order,
                seed,
                message.as_mut_ptr(),
                message.len(),
            )
        };
        if status == 0 {
            return Ok(());
        }
        Err(Error::Unsupported(format!("kernel {}: {}", launch.kernel, text(&message))))
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
