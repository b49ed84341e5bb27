//! The executor on a GPU, by the CUDA driver's interface.
//!
//! The driver's library is loaded when the first device is asked for; nothing links it. Computations go to one
//! stream, so that memory may be reused as soon as the last operation on it was started; what goes beside them keeps its
//! memory until they wait for it.

mod graph;

use super::executor::{Event, Executor, Graph, Launch, Node, Properties, Stream, TmaMatrix};
use super::kernels::KernelFile;
use crate::arena::MemorySource;
use crate::error::{Error, Result};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction, CUfunction_attribute};
use graph::Recorded;
use std::collections::HashMap;
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The oldest driver that takes the kernels' binaries, as the driver counts: 1000 * major + 10 * minor.
const OLDEST_DRIVER: i32 = 13_000;

/// Dynamic shared memory that a kernel may have without being told, beside static arrays of up to 2 KiB: together 48 KiB.
const PLAIN_SHARED: u32 = 46 << 10;

/// Between two questions whether an event was reached.
const POLL: Duration = Duration::from_micros(100);

/// A GPU with its kernels loaded.
pub struct Device {
    ordinal: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    streams: [sys::CUstream; 4], // by `Stream`
    events: Mutex<Vec<Handle<sys::CUevent>>>,
    graphs: Mutex<HashMap<usize, Recorded>>,
    modules: Vec<sys::CUmodule>,
    functions: Mutex<HashMap<String, Function>>,
    properties: Properties,
    has_pool: bool,
    lost: AtomicBool,
}

/// A handle of the driver.
#[derive(Clone, Copy)]
struct Handle<T>(T);

// SAFETY: the driver's handles may be used from every thread.
unsafe impl<T> Send for Handle<T> {}

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
            streams: [std::ptr::null_mut(); 4],
            events: Mutex::new(Vec::new()),
            graphs: Mutex::new(HashMap::new()),
            modules: Vec::new(),
            functions: Mutex::new(HashMap::new()),
            properties,
            has_pool: attribute(CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? != 0,
            lost: AtomicBool::new(false),
        };
        opened.enter()?;
        if opened.has_pool {
            opened.keep_pool().map_err(fail("the device's memory can't be pooled"))?;
        }
        for stream in Stream::ALL {
            // Lower numbers go first; the driver takes them for the nearest that it has. Kernels beside the others are small,
            // and the others wait for them.
            let (flags, priority) =
                (sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32, -i32::from(stream == Stream::Beside));
            // SAFETY: the context is current; the driver writes one handle.
            unsafe { sys::cuStreamCreateWithPriority(&mut opened.streams[stream as usize], flags, priority) }
                .result()
                .map_err(fail("no stream could be made"))?;
        }
        for image in file.images() {
            // SAFETY: the image is a whole fat binary or cubin, which the driver checks.
            let module = unsafe { result::module::load_data(image.as_ptr().cast()) }
                .map_err(fail(&format!("the kernels of {} do not load on {chip}", file.name())))?;
            opened.modules.push(module);
        }
        Ok(opened)
    }

    /// Lets the driver keep memory that was given back, so that taking and giving waits for nothing.
    fn keep_pool(&self) -> std::result::Result<(), DriverError> {
        let mut pool = std::ptr::null_mut();
        let (all, which) = (u64::MAX, sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD);
        // SAFETY: the device exists; the driver writes one handle and reads a number of 64 bits.
        unsafe {
            sys::cuDeviceGetDefaultMemPool(&mut pool, self.device).result()?;
            sys::cuMemPoolSetAttribute(pool, which, (&raw const all).cast_mut().cast()).result()
        }
    }

    fn error(&self, what: &str, e: DriverError) -> Error {
        Error::device(format!("cuda:{}", self.ordinal), format!("{what}: {}", describe(e)))
    }

    /// Makes the device's context the calling thread's. Every call of the driver comes after it.
    fn enter(&self) -> Result<()> {
        if self.lost.load(Ordering::Relaxed) {
            return Err(Error::device(format!("cuda:{}", self.ordinal), "a kernel on it does not end"));
        }
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
            let graphs = self.graphs.get_mut().unwrap_or_else(|e| e.into_inner());
            for (_, recorded) in graphs.drain() {
                recorded.destroy();
            }
            for event in self.events.get_mut().unwrap_or_else(|e| e.into_inner()).drain(..) {
                let _ = sys::cuEventDestroy_v2(event.0);
            }
            for module in self.modules.drain(..) {
                let _ = result::module::unload(module);
            }
            for stream in self.streams.into_iter().filter(|stream| !stream.is_null()) {
                let _ = result::stream::destroy(stream);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

impl MemorySource for Device {
    fn allocate(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.enter()?;
        let stream = self.streams[Stream::Compute as usize];
        // SAFETY: the context is current, the stream its own.
        let address = unsafe {
            if self.has_pool { result::malloc_async(stream, bytes) } else { result::malloc_sync(bytes) }
        };
        let address = address.map_err(|e| match e.0 {
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
            let (address, stream) =
                (pointer.as_ptr() as sys::CUdeviceptr, self.streams[Stream::Compute as usize]);
            // SAFETY: the address came from `allocate`; what was started before is done before it is free.
            let _ = unsafe {
                if self.has_pool { result::free_async(address, stream) } else { result::free_sync(address) }
            };
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

    fn allocate_pinned(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.enter()?;
        let mut address = std::ptr::null_mut();
        // SAFETY: the context is current; the driver writes one address.
        unsafe { sys::cuMemHostAlloc(&mut address, bytes, 0) }.result().map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory {
                bytes,
                what: "pinned memory of the host".into(),
                advice: "give optimizer state more room on the device (--optimizer-memory) or take paged_adamw_8bit"
                    .into(),
            },
            _ => self.error("no pinned memory could be had", e),
        })?;
        NonNull::new(address.cast())
            .ok_or_else(|| Error::device(format!("cuda:{}", self.ordinal), "the driver gave no address"))
    }

    fn free_pinned(&self, pointer: NonNull<u8>) {
        if self.finish().is_ok() {
            // SAFETY: the address came from `allocate_pinned`, and no copy uses it any more.
            let _ = unsafe { sys::cuMemFreeHost(pointer.as_ptr().cast()) };
        }
    }

    unsafe fn copy(&self, stream: Stream, to: *mut u8, from: *const u8, bytes: usize) -> Result<()> {
        self.enter()?;
        let stream = self.streams[stream as usize];
        // SAFETY: the caller's promise; device and pinned memory share one space of addresses.
        unsafe { sys::cuMemcpyAsync(to as sys::CUdeviceptr, from as sys::CUdeviceptr, bytes, stream) }
            .result()
            .map_err(|e| self.error("a copy failed", e))
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

    fn clusters_at_once(&self, launch: &Launch<'_>) -> Result<usize> {
        self.enter()?;
        let function = self.function(launch.kernel, launch.shared_bytes)?;
        let (mut clusters, mut attribute) = (0, cluster_attribute(launch.cluster));
        let config = self.launch_config(Stream::Compute, launch, &mut attribute);
        // SAFETY: the driver writes one number.
        unsafe { sys::cuOccupancyMaxActiveClusters(&mut clusters, function, &config) }
            .result()
            .map_err(|e| self.error(&format!("there is no saying how `{}` fits", launch.kernel), e))?;
        Ok(clusters.max(0) as usize)
    }

    unsafe fn launch(&self, stream: Stream, launch: &Launch<'_>) -> Result<()> {
        self.enter()?;
        let function = self.function(launch.kernel, launch.shared_bytes)?;
        let mut params = [launch.params.as_ptr().cast_mut().cast()];
        let mut attribute = cluster_attribute(launch.cluster);
        let config = self.launch_config(stream, launch, &mut attribute);
        // SAFETY: the caller's promise; the driver copies the parameters and attributes before it returns.
        unsafe { sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(|e| self.error(&format!("kernel `{}` did not start", launch.kernel), e))
    }

    fn event(&self) -> Result<Event> {
        self.make_event(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    fn timed_event(&self) -> Result<Option<Event>> {
        self.make_event(sys::CUevent_flags::CU_EVENT_DEFAULT).map(Some)
    }

    fn milliseconds(&self, start: Event, end: Event) -> Result<f32> {
        self.enter()?;
        // SAFETY: both are this device's.
        unsafe { result::event::elapsed(self.event_handle(start), self.event_handle(end)) }
            .map_err(|e| self.error("events have no times", e))
    }

    fn record(&self, event: Event, stream: Stream) -> Result<()> {
        self.enter()?;
        // SAFETY: both are this device's.
        unsafe { result::event::record(self.event_handle(event), self.streams[stream as usize]) }
            .map_err(|e| self.error("the device failed", e))
    }

    fn wait(&self, stream: Stream, event: Event) -> Result<()> {
        self.enter()?;
        // SAFETY: both are this device's.
        unsafe { sys::cuStreamWaitEvent(self.streams[stream as usize], self.event_handle(event), 0) }
            .result()
            .map_err(|e| self.error("the device failed", e))
    }

    fn synchronize(&self, event: Event) -> Result<()> {
        self.enter()?;
        // SAFETY: the event is this device's.
        unsafe { sys::cuEventSynchronize(self.event_handle(event)) }
            .result()
            .map_err(|e| self.error("the device failed", e))
    }

    fn synchronize_within(&self, event: Event, limit: Duration) -> Result<bool> {
        self.enter()?;
        let (start, handle) = (Instant::now(), self.event_handle(event));
        loop {
            // SAFETY: the event is this device's.
            match unsafe { sys::cuEventQuery(handle) } {
                sys::CUresult::CUDA_SUCCESS => return Ok(true),
                sys::CUresult::CUDA_ERROR_NOT_READY if start.elapsed() < limit => sleep(POLL),
                sys::CUresult::CUDA_ERROR_NOT_READY => {
                    self.lost.store(true, Ordering::Relaxed);
                    return Ok(false);
                }
                e => return Err(self.error("the device failed", DriverError(e))),
            }
        }
    }

    fn finish(&self) -> Result<()> {
        self.enter()?;
        for stream in self.streams {
            // SAFETY: the stream is this device's.
            unsafe { result::stream::synchronize(stream) }.map_err(|e| self.error("the device failed", e))?;
        }
        Ok(())
    }

    fn graph(&self, nodes: &[Node<'_>]) -> Result<Graph> {
        self.make_graph(nodes)
    }

    fn update_graph(&self, graph: Graph, index: usize, node: &Node<'_>) -> Result<()> {
        self.change_graph(graph, index, node)
    }

    unsafe fn launch_graph(&self, graph: Graph) -> Result<()> {
        // SAFETY: the caller promises the same.
        unsafe { self.start_graph(graph) }
    }

    fn drop_graph(&self, graph: Graph) {
        self.free_graph(graph);
    }
}

impl Device {
    fn make_event(&self, flags: sys::CUevent_flags) -> Result<Event> {
        self.enter()?;
        let event = result::event::create(flags).map_err(|e| self.error("no event could be made", e))?;
        let mut events = self.events.lock().expect("the lock is never held across a panic");
        events.push(Handle(event));
        Ok(Event(events.len() - 1))
    }

    /// The driver's form of a launch, which points to the cluster's attribute.
    fn launch_config(
        &self,
        stream: Stream,
        launch: &Launch<'_>,
        cluster: &mut sys::CUlaunchAttribute,
    ) -> sys::CUlaunchConfig {
        let [x, y, z] = launch.grid;
        sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.streams[stream as usize],
            attrs: cluster,
            numAttrs: u32::from(launch.cluster > 1),
        }
    }

    fn event_handle(&self, event: Event) -> sys::CUevent {
        self.events.lock().expect("the lock is never held across a panic")[event.0].0
    }
}

/// That blocks come in clusters of so many.
fn cluster_attribute(blocks: u32) -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            clusterDim: sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: blocks, y: 1, z: 1 },
        },
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
