//! The executor on a GPU, by the CUDA driver's interface.
//!
//! The driver's library is loaded when the first device is asked for; nothing links it. All work goes to one stream,
//! so that memory may be reused as soon as the last operation on it was started.

use super::executor::{Executor, Launch, Properties, TmaMatrix};
use super::kernels::KernelFile;
use crate::arena::MemorySource;
use crate::error::{Error, Result};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction, CUfunction_attribute};
use std::collections::HashMap;
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::Mutex;

/// The oldest driver that takes the kernels' binaries, as the driver counts: 1000 * major + 10 * minor.
const OLDEST_DRIVER: i32 = 13_000;

/// Dynamic shared memory that a kernel may have without being told.
const PLAIN_SHARED: u32 = 48 << 10;

/// A GPU with its kernels loaded.
pub struct Device {
    ordinal: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    functions: Mutex<HashMap<String, Function>>,
    properties: Properties,
}

#[derive(Clone, Copy)]
struct Function {
    handle: CUfunction,
    shared: u32, // dynamic shared memory that it is allowed so far
}

// SAFETY: the handles are the driver's, which may be used from every thread.
unsafe impl Send for Device {}
// SAFETY: as above; what changes is behind a lock.
unsafe impl Sync for Device {}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cuda:{} {}", self.ordinal, self.properties.name)
    }
}

/// Runs a call of the driver that may panic because the driver is older than its interface.
fn guarded<T>(ordinal: usize, call: impl FnOnce() -> Result<T>) -> Result<T> {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = catch_unwind(AssertUnwindSafe(call));
    std::panic::set_hook(hook);
    result.unwrap_or_else(|_| {
        Err(Error::device(
            format!("cuda:{ordinal}"),
            "the driver lacks a function; expected one of release 580 or later: update it",
        ))
    })
}

/// Whether the driver's library is there, as on every machine that can run CUDA.
pub fn driver_is_present() -> bool {
    // SAFETY: it only tries to open the library.
    unsafe { sys::is_culib_present() }
}

impl Device {
    /// Opens a device and loads the kernels.
    ///
    /// # Errors
    /// When there is no driver, an old one, no such device, or no kernels for it.
    pub fn open(ordinal: usize) -> Result<Self> {
        if !driver_is_present() {
            return Err(Error::device(
                format!("cuda:{ordinal}"),
                "the CUDA driver's library was not found; install an NVIDIA driver (release 580 or later), or use --device cpu",
            ));
        }
        guarded(ordinal, || Self::open_present(ordinal))
    }

    fn open_present(ordinal: usize) -> Result<Self> {
        let name = format!("cuda:{ordinal}");
        let fail = |what: &str| {
            let (name, what) = (name.clone(), what.to_string());
            move |e: DriverError| Error::device(name, format!("{what}: {}", describe(e)))
        };
        let mut version = 0;
        // SAFETY: the driver writes one number, and needs no initialization for it.
        unsafe { sys::cuDriverGetVersion(&mut version) }
            .result()
            .map_err(fail("the driver does not answer"))?;
        if version < OLDEST_DRIVER {
            return Err(Error::device(
                name,
                format!(
                    "expected a driver for CUDA {} or later (release 580), found one for {}: update it",
                    version_text(OLDEST_DRIVER),
                    version_text(version)
                ),
            ));
        }
        result::init().map_err(fail("the driver did not start"))?;
        let count = result::device::get_count().map_err(fail("the driver does not answer"))?;
        if ordinal >= count.max(0) as usize {
            return Err(Error::device(name, format!("there are {count} devices, counted from cuda:0")));
        }
        let device = result::device::get(ordinal as i32).map_err(fail("no such device"))?;
        let attribute = |which| {
            // SAFETY: the device exists.
            unsafe { result::device::get_attribute(device, which) }
                .map_err(fail("the device does not answer"))
        };
        use CUdevice_attribute::*;
        let capability = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
            + attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let chip = result::device::get_name(device).map_err(fail("the device does not answer"))?;
        if capability < 80 {
            return Err(Error::device(
                name,
                format!(
                    "{chip} has compute capability {}.{}; expected 8.0 or later",
                    capability / 10,
                    capability % 10
                ),
            ));
        }
        let properties = Properties {
            name: format!("{chip} (sm_{capability}, driver for CUDA {})", version_text(version)),
            capability: capability as u32,
            multiprocessors: attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            // SAFETY: the device exists.
            memory: unsafe { result::device::total_mem(device) }
                .map_err(fail("the device does not answer"))?,
            shared_memory: attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        };
        let file = KernelFile::find()?;
        // SAFETY: the device exists; the context is released when the device is dropped.
        let context =
            unsafe { result::primary_ctx::retain(device) }.map_err(fail("no context could be made"))?;
        let mut opened = Device {
            ordinal,
            device,
            context,
            stream: std::ptr::null_mut(),
            modules: Vec::new(),
            functions: Mutex::new(HashMap::new()),
            properties,
        };
        opened.enter()?;
        opened.stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(fail("no stream could be made"))?;
        for image in file.images() {
            // SAFETY: the image is a whole fat binary or cubin, which the driver checks.
            let module = unsafe { result::module::load_data(image.as_ptr().cast()) }
                .map_err(fail(&format!("the kernels of {} do not load on {chip}", file.name())))?;
            opened.modules.push(module);
        }
        Ok(opened)
    }

    fn error(&self, what: &str, e: DriverError) -> Error {
        Error::device(format!("cuda:{}", self.ordinal), format!("{what}: {}", describe(e)))
    }

    /// Makes the device's context the calling thread's.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as the device.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| self.error("the device is lost", e))
    }

    /// The kernel of this name, allowed so much dynamic shared memory.
    fn function(&self, name: &str, shared: u32) -> Result<CUfunction> {
        let mut functions = self.functions.lock().expect("the lock is never held across a panic");
        let mut function = match functions.get(name) {
            Some(function) => *function,
            None => {
                let c_name = CString::new(name).map_err(|e| Error::Unsupported(e.to_string()))?;
                let find = |module: &sys::CUmodule| {
                    // SAFETY: the module is loaded.
                    unsafe { result::module::get_function(*module, c_name.clone()) }.ok()
                };
                let handle = self.modules.iter().find_map(find).ok_or_else(|| {
                    Error::device(
                        format!("cuda:{}", self.ordinal),
                        format!(
                            "there is no kernel `{name}` in the kernels that were loaded; build them again"
                        ),
                    )
                })?;
                Function { handle, shared: PLAIN_SHARED }
            }
        };
        if shared > function.shared {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            unsafe { result::function::set_function_attribute(function.handle, attribute, shared as i32) }
                .map_err(|e| {
                    self.error(&format!("kernel `{name}` needs {shared} bytes of shared memory"), e)
                })?;
            function.shared = shared;
        }
        functions.insert(name.to_string(), function);
        Ok(function.handle)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        // SAFETY: the handles are this device's own and nothing uses them any more.
        unsafe {
            for module in self.modules.drain(..) {
                let _ = result::module::unload(module);
            }
            if !self.stream.is_null() {
                let _ = result::stream::destroy(self.stream);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

impl MemorySource for Device {
    fn allocate(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.enter()?;
        // SAFETY: the context is current.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory {
                bytes,
                what: format!("a tensor on cuda:{}", self.ordinal),
                advice:
                    "use a smaller batch, a shorter --max-length, --gradient-checkpointing or --quant nf4"
                        .into(),
            },
            _ => self.error("no memory could be had", e),
        })?;
        NonNull::new(address as *mut u8)
            .ok_or_else(|| Error::device(format!("cuda:{}", self.ordinal), "the driver gave no address"))
    }

    fn free(&self, pointer: NonNull<u8>) {
        if self.enter().is_ok() {
            // SAFETY: the address came from `allocate`; freeing waits for what uses it.
            let _ = unsafe { result::free_sync(pointer.as_ptr() as sys::CUdeviceptr) };
        }
    }
}

impl Executor for Device {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn free_memory(&self) -> Result<usize> {
        self.enter()?;
        Ok(result::mem_get_info().map_err(|e| self.error("the device does not answer", e))?.0)
    }

    unsafe fn upload(&self, to: *mut u8, bytes: &[u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller's promise. From pageable memory the driver has copied the bytes when it returns.
        unsafe { result::memcpy_htod_async(to as sys::CUdeviceptr, bytes, self.stream) }
            .map_err(|e| self.error("a copy to the device failed", e))
    }

    unsafe fn download(&self, bytes: &mut [u8], from: *const u8) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller's promise; the stream is waited for before the bytes are looked at.
        unsafe { result::memcpy_dtoh_async(bytes, from as sys::CUdeviceptr, self.stream) }
            .map_err(|e| self.error("a copy from the device failed", e))?;
        self.synchronize()
    }

    unsafe fn copy(&self, to: *mut u8, from: *const u8, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller's promise.
        unsafe {
            result::memcpy_dtod_async(to as sys::CUdeviceptr, from as sys::CUdeviceptr, bytes, self.stream)
        }
        .map_err(|e| self.error("a copy on the device failed", e))
    }

    fn tensor_map(&self, matrix: &TmaMatrix) -> Result<[u64; 16]> {
        use sys::CUtensorMapSwizzle::*;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let element = if matrix.element_bytes == 1 {
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8
        } else {
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
        };
        let swizzle = match matrix.swizzle {
            32 => CU_TENSOR_MAP_SWIZZLE_32B,
            64 => CU_TENSOR_MAP_SWIZZLE_64B,
            128 => CU_TENSOR_MAP_SWIZZLE_128B,
            _ => CU_TENSOR_MAP_SWIZZLE_NONE,
        };
        // SAFETY: arrays of two dimensions and one stride; the driver only looks at the address.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                element,
                2,
                matrix.data.cast_mut().cast(),
                matrix.size.as_ptr(),
                &matrix.row_bytes,
                matrix.box_size.as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(|e| self.error(&format!("TMA can't copy {matrix:?}"), e))?;
        Ok(map.opaque)
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.enter()?;
        let function = self.function(launch.kernel, launch.shared_bytes)?;
        let [x, y, z] = launch.grid;
        let mut params = [launch.params.as_ptr().cast_mut().cast()];
        let mut cluster = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: launch.cluster, y: 1, z: 1 },
            },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream,
            attrs: &mut cluster,
            numAttrs: u32::from(launch.cluster > 1),
        };
        // SAFETY: the caller's promise; the driver copies the parameters and attributes before it returns.
        unsafe { sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(|e| self.error(&format!("kernel `{}` did not start", launch.kernel), e))
    }

    fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream is this device's.
        unsafe { result::stream::synchronize(self.stream) }.map_err(|e| self.error("the device failed", e))
    }
}

fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn describe(e: DriverError) -> String {
    let text = |t: std::result::Result<&std::ffi::CStr, DriverError>| {
        t.map_or_else(|_| format!("{:?}", e.0), |t| t.to_string_lossy().into_owned())
    };
    format!("{} ({})", text(e.error_string()), text(e.error_name()))
}
