//! The executor that runs CUDA kernels on the host: small kernels (`tests/cuda/`) in every order of threads, and a test
//! of the tests: planted faults must be caught, each with its message.

#[path = "common/host_kernels.rs"]
mod host_kernels;

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use host_kernels::{HostKernels, root};

type Launch = unsafe extern "C" fn(
    *const c_char,
    *const u32,
    *const u32,
    u32,
    *const c_void,
    usize,
    c_int,
    u64,
    *mut c_char,
    usize,
) -> c_int;

/// A library of kernels and its interface.
struct Library {
    library: libloading::Library,
}

impl Library {
    /// `tests/cuda/<name>.cu`, with a piece of its text exchanged where one is given.
    fn load(name: &str, mutation: Option<(&str, &str)>) -> Self {
        let file = format!("{name}.cu");
        let source = root().join("tests/cuda").join(&file);
        let mut kernels = HostKernels { sources: vec![source.clone()], ..Default::default() };
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

    /// Runs a kernel over a parameter structure; `order` as in the C interface.
    fn launch<P>(
        &self,
        kernel: &str,
        grid: [u32; 3],
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
            let launch: libloading::Symbol<Launch> = self.library.get(b"lowrank_host_launch").unwrap();
            let params_bytes = size_of::<P>();
            let message_at = message.as_mut_ptr().cast();
            let params = (params as *const P).cast();
            launch(
                name.as_ptr(),
                grid.as_ptr(),
                block.as_ptr(),
                shared,
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

    fn buffer<T: Copy>(&self, values: &[T]) -> Buffer<'_, T> {
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
struct Buffer<'a, T> {
    library: &'a Library,
    data: *mut T,
    len: usize,
}

impl<T: Copy> Buffer<'_, T> {
    fn values(&self) -> Vec<T> {
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
fn exact(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as i64 % 64
    };
    (0..n).map(|_| next() as f32 / 128.0).collect()
}

fn to_bf16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|x| (x.to_bits() >> 16) as u16).collect()
}

#[repr(C)]
struct ReduceParams {
    x: *const f32,
    sums: *mut f32,
    columns: u32,
}

/// Sums of rows by `reduce`, whether they are right, or the message.
fn run_reduce(library: &Library, threads: u32, columns: usize, order: i32) -> Result<bool, String> {
    let rows = 3;
    let x = exact(rows * columns, 5);
    let want: Vec<f32> = x.chunks(columns).map(|row| row.iter().sum()).collect();
    let (x, sums) = (library.buffer(&x), library.buffer(&vec![0f32; rows]));
    let params = ReduceParams { x: x.data, sums: sums.data, columns: columns as u32 };
    library.launch("reduce", [rows as u32, 1, 1], [threads, 1, 1], 0, &params, order)?;
    Ok(sums.values() == want)
}

#[repr(C)]
struct GemmParams {
    a: *const u16,
    b: *const u16,
    d: *mut f32,
    m: u32,
    n: u32,
    k: u32,
}

fn run_gemm(library: &Library, [m, n, k]: [usize; 3], order: i32) -> Result<bool, String> {
    let (a, b) = (exact(m * k, 1), exact(n * k, 2));
    let mut want = vec![0f32; m * n];
    for (i, sum) in want.iter_mut().enumerate() {
        let (row, column) = (&a[i / n * k..][..k], &b[i % n * k..][..k]);
        *sum = row.iter().zip(column).map(|(x, y)| x * y).sum();
    }
    let (a, b) = (library.buffer(&to_bf16(&a)), library.buffer(&to_bf16(&b)));
    let d = library.buffer(&vec![0f32; m * n]);
    let params = GemmParams { a: a.data, b: b.data, d: d.data, m: m as u32, n: n as u32, k: k as u32 };
    let grid = [n.div_ceil(64) as u32, m.div_ceil(64) as u32, 1];
    library.launch("gemm", grid, [128, 1, 1], 4 * 64 * 40 * 2, &params, order)?;
    Ok(d.values() == want)
}

const ORDERS: [i32; 3] = [0, 1, 2];

#[test]
fn reductions_are_exact_in_every_order() {
    let library = Library::load("reduce", None);
    for order in ORDERS {
        for (threads, columns) in [(32, 7), (64, 97), (256, 1000)] {
            assert_eq!(
                run_reduce(&library, threads, columns, order),
                Ok(true),
                "{threads} {columns} {order}"
            );
        }
    }
}

#[test]
fn a_pipelined_gemm_is_exact_in_every_order() {
    let library = Library::load("gemm", None);
    for order in ORDERS {
        for shape in [[64, 64, 32], [97, 70, 160], [1, 1, 64]] {
            assert_eq!(run_gemm(&library, shape, order), Ok(true), "{shape:?} {order}");
        }
    }
}
