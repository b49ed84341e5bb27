//! Kernels of `tests/cuda/` in a library of the host executor: launches, device memory, planted faults.
#![allow(dead_code)]

#[path = "host_kernels.rs"]
mod host_kernels;

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use host_kernels::{HostKernels, root};

type Launch = unsafe extern "C" fn(
    *const c_char,
    *const u32,
    *const u32,
    *const u32,
    u32,
    u32,
    *const c_void,
    usize,
    c_int,
    u64,
    *mut c_char,
    usize,
) -> c_int;

/// `struct tensor_map` of cuda/tensor_map.h.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
pub struct TensorMap([u64; 16]);

type EncodeTensorMap = unsafe extern "C" fn(
    *mut TensorMap,
    u32,
    u32,
    *const c_void,
    *const u64,
    *const u64,
    *const u32,
    c_int,
    *mut c_char,
    usize,
) -> c_int;

/// A library of kernels and its interface.
pub struct Library {
    library: libloading::Library,
}

impl Library {
    /// `tests/cuda/<name>.cu`, with a piece of its text exchanged where one is given.
    pub fn load(name: &str, mutation: Option<(&str, &str)>) -> Self {
        Self::load_with(name, mutation, &[])
    }

    /// The same with these macros defined.
    pub fn load_with(name: &str, mutation: Option<(&str, &str)>, defines: &[&str]) -> Self {
        let file = format!("{name}.cu");
        let source = root().join("tests/cuda").join(&file);
        let defines = defines.iter().map(|define| define.to_string()).collect();
        let mut kernels = HostKernels { sources: vec![source.clone()], defines, ..Default::default() };
        if let Some((piece, other)) = mutation {
            let text = std::fs::read_to_string(source).unwrap();
            assert_eq!(text.matches(piece).count(), 1, "{piece:?} in {file}");
            kernels.replacements.push((file, text.replace(piece, other)));
        }
        let path = kernels.build().unwrap_or_else(|message| panic!("{message}"));
        // SAFETY: a library that was just compiled from the project's sources; its constructors only register kernels.
        let library = unsafe { libloading::Library::new(path) }.unwrap();
        Self { library }
    }

    /// Runs a kernel over a parameter structure; `order` as in the C interface, or what went wrong.
    pub fn launch<P>(
        &self,
        kernel: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        params: &P,
        order: i32,
    ) -> Result<(), String> {
        self.launch_cluster(kernel, grid, [1; 3], block, shared, params, order)
    }

    /// The same for a kernel whose blocks run in clusters.
    pub fn launch_cluster<P>(
        &self,
        kernel: &str,
        grid: [u32; 3],
        cluster: [u32; 3],
        block: [u32; 3],
        shared: u32,
        params: &P,
        order: i32,
    ) -> Result<(), String> {
        let name = CString::new(kernel).unwrap();
        let mut message = vec![0u8; 4096];
        // SAFETY: the signature is that of cuda/host/executor.cc, `params` is a C structure of P's size, and a fault
        // inside the kernel comes back as a message.
        let code = unsafe {
            let launch: libloading::Symbol<Launch> =
                self.library.get(b"lowrank_host_launch_cluster").unwrap();
            let params_bytes = size_of::<P>();
            let message_at = message.as_mut_ptr().cast();
            let params = (params as *const P).cast();
            launch(
                name.as_ptr(),
                grid.as_ptr(),
                cluster.as_ptr(),
                block.as_ptr(),
                shared,
                90, // the chip
                params,
                params_bytes,
                order,
                17,
                message_at,
                4096,
            )
        };
        let message = CStr::from_bytes_until_nul(&message).unwrap().to_str().unwrap();
        if code == 0 { Ok(()) } else { Err(message.to_owned()) }
    }

    /// What TMA needs to know of a matrix [rows, columns] in row-major order: boxes [box_rows, box_columns], and the
    /// swizzle, 0 for none or 1 to 3 for 32 to 128 bytes; or what is wrong with it.
    pub fn tensor_map<T>(
        &self,
        data: *const T,
        [rows, columns]: [usize; 2],
        [box_rows, box_columns]: [u32; 2],
        swizzle: i32,
    ) -> Result<TensorMap, String> {
        let stride = (columns * size_of::<T>()) as u64;
        self.tensor_map_of(data, &[columns as u64, rows as u64], &[stride], &[box_columns, box_rows], swizzle)
    }

    /// The same for any tensor, innermost dimension first: sizes, bytes between neighbours of all dimensions but the
    /// first, and the box.
    pub fn tensor_map_of<T>(
        &self,
        data: *const T,
        dims: &[u64],
        strides: &[u64],
        tile: &[u32],
        swizzle: i32,
    ) -> Result<TensorMap, String> {
        assert!(dims.len() == tile.len() && dims.len() == strides.len() + 1);
        let (mut map, mut message) = (TensorMap([0; 16]), [0u8; 256]);
        // SAFETY: the signature is that of cuda/host/hopper.cc; the arrays are as long as the rank says.
        let code = unsafe {
            let encode: libloading::Symbol<EncodeTensorMap> =
                self.library.get(b"lowrank_host_encode_tensor_map").unwrap();
            encode(
                &mut map,
                size_of::<T>() as u32,
                dims.len() as u32,
                data.cast(),
                dims.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                swizzle,
                message.as_mut_ptr().cast(),
                256,
            )
        };
        let message = CStr::from_bytes_until_nul(&message).unwrap().to_str().unwrap();
        if code == 0 { Ok(map) } else { Err(message.to_owned()) }
    }

    /// Device memory with these values.
    pub fn buffer<T: Copy>(&self, values: &[T]) -> Buffer<'_, T> {
        let bytes = size_of_val(values);
        // SAFETY: the signatures are those of cuda/host/memory.cc; the new memory has room for the values.
        let data = unsafe {
            let allocate: libloading::Symbol<unsafe extern "C" fn(usize) -> *mut c_void> =
                self.library.get(b"lowrank_host_allocate").unwrap();
            let data = allocate(bytes).cast::<T>();
            assert!(!data.is_null());
            data.copy_from_nonoverlapping(values.as_ptr(), values.len());
            data
        };
        Buffer { library: self, data, len: values.len() }
    }
}

/// Device memory, as the host executor has it.
pub struct Buffer<'a, T> {
    library: &'a Library,
    pub data: *mut T,
    len: usize,
}

impl<T: Copy> Buffer<'_, T> {
    /// What is there now.
    pub fn values(&self) -> Vec<T> {
        // SAFETY: `len` elements were written at first and every bit pattern of the types used here is a value.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }.to_vec()
    }
}

impl<T> Drop for Buffer<'_, T> {
    fn drop(&mut self) {
        // SAFETY: the memory came from this library and is given back once.
        unsafe {
            let free: libloading::Symbol<unsafe extern "C" fn(*mut c_void)> =
                self.library.library.get(b"lowrank_host_free").unwrap();
            free(self.data.cast());
        }
    }
}

/// Small whole numbers over 128: exact in bf16, and so are f32 sums of their products.
pub fn exact(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as i64 % 64
    };
    (0..n).map(|_| next() as f32 / 128.0).collect()
}

/// Their bits as bf16, which must hold them exactly.
pub fn to_bf16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|x| (x.to_bits() >> 16) as u16).collect()
}

/// Orders of threads: forward, reversed, random.
pub const ORDERS: [i32; 3] = [0, 1, 2];

/// What a planted fault shows in each order: a message, or whether the result is right.
pub fn shown(run: impl Fn(i32) -> Result<bool, String>) -> [Result<bool, String>; 3] {
    ORDERS.map(run)
}

/// Every order fails with a message that has these words in it.
pub fn all_say(shown: &[Result<bool, String>; 3], words: &str) {
    for result in shown {
        assert!(
            result.as_ref().is_err_and(|message| message.contains(words)),
            "expected {words:?}: {shown:?}"
        );
    }
}
