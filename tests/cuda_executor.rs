//! The executor that runs CUDA kernels on the host: small kernels (`tests/cuda/`) in every order of threads, and a test
//! of the tests: planted faults must be caught, each with its message.

#[path = "common/host_library.rs"]
mod host_library;

use host_library::{Library, ORDERS, all_say, exact, shown, to_bf16};

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

#[test]
fn other_processors_switch_by_the_c_library() {
    let library = Library::load_with("reduce", None, &["LOWRANK_UCONTEXT"]);
    for order in ORDERS {
        assert_eq!(run_reduce(&library, 256, 97, order), Ok(true), "{order}");
    }
}

#[repr(C)]
struct ConversionsParams {
    x: *const f32,
    as_bf16: *mut u16,
    as_f16: *mut u16,
    from_f16: *mut f32,
    packed: *mut u32,
    n: u32,
}

#[test]
fn conversions_have_the_bits_of_the_cpu() {
    let library = Library::load("operations", None);
    // Around every f16 and bf16 value: halfway cases, neighbours of them, denormals, infinities, NaNs.
    let x: Vec<f32> = (0..1u32 << 16)
        .flat_map(|i| {
            [
                i << 16,
                i << 16 | 0x8000,
                i << 16 | 0x7fff,
                i << 16 | 0x8001,
                i << 16 | 0x1000,
                i << 16 | 0xf001,
            ]
        })
        .map(f32::from_bits)
        .collect();
    let n = x.len();
    let xs = library.buffer(&x);
    let (as_bf16, as_f16) = (library.buffer(&vec![0u16; n]), library.buffer(&vec![0u16; n]));
    let (from_f16, packed) = (library.buffer(&vec![0f32; 1 << 16]), library.buffer(&vec![0u32; 2 * n]));
    let params = ConversionsParams {
        x: xs.data,
        as_bf16: as_bf16.data,
        as_f16: as_f16.data,
        from_f16: from_f16.data,
        packed: packed.data,
        n: n as u32,
    };
    library.launch("conversions", [n.div_ceil(256) as u32, 1, 1], [256, 1, 1], 0, &params, 0).unwrap();
    let (as_bf16, as_f16, packed) = (as_bf16.values(), as_f16.values(), packed.values());
    for (i, &x) in x.iter().enumerate() {
        let (bf16, f16) = (half::bf16::from_f32(x).to_bits(), half::f16::from_f32(x).to_bits());
        assert_eq!((as_bf16[i], as_f16[i]), (bf16, f16), "{:08x}", x.to_bits());
        let [bf16, f16] = if x.is_nan() { [0x7fff; 2] } else { [bf16, f16] };
        assert_eq!(packed[2 * i], 0x3f80 << 16 | u32::from(bf16), "{:08x}", x.to_bits());
        assert_eq!(packed[2 * i + 1], u32::from(f16) << 16 | 0x3c00, "{:08x}", x.to_bits());
    }
    for (i, x) in from_f16.values().into_iter().enumerate() {
        assert_eq!(x.to_bits(), half::f16::from_bits(i as u16).to_f32().to_bits(), "{i:04x}");
    }
}

#[test]
fn warp_operations_do_what_they_say() {
    let library = Library::load("operations", None);
    for order in ORDERS {
        let threads = 96u32;
        let out = library.buffer(&vec![0u32; 10 * threads as usize]);
        library.launch("warp_operations", [1, 1, 1], [48, 2, 1], 0, &out.data, order).unwrap();
        let out = out.values();
        for thread in 0..threads {
            let (warp, lane) = (thread / 32 * 32, thread % 32);
            let value = |lane: u32| (warp + lane) * 3;
            let bytes = |a: u32, b: u32| (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
            let source = bytes(0x8382_8180 + lane, 0x0706_0504);
            let sign = if source[4] & 0x80 != 0 { 0xff } else { 0 };
            let permuted = u32::from_le_bytes([source[1], source[5], sign, source[3]]);
            let majority = thread & lane | thread & 0x55 | lane & 0x55;
            let want = [
                value(5),
                value(lane / 8 * 8 + (lane + 1) % 8),
                value(if lane < 3 { lane } else { lane - 3 }),
                value(if lane % 16 + 3 > 15 { lane } else { lane + 3 }),
                value(lane ^ 9),
                (0..32).filter(|l| l % 3 == 0).map(|l| 1 << l).sum(),
                if warp == 32 { 2 } else { u32::from(warp == 0) },
                (0..32).map(value).sum(),
                permuted ^ majority,
                value(lane ^ if lane < 16 { 1 } else { 2 }),
            ];
            let found: Vec<u32> =
                out.iter().skip(thread as usize).step_by(threads as usize).copied().collect();
            assert_eq!(found, want, "thread {thread}, order {order}");
        }
    }
}

#[repr(C)]
struct MatrixParams {
    a: *const u16,
    b: *const u16,
    fa: *const f32,
    fb: *const f32,
    d: *mut f32,
}

/// a [16, k] times the transpose of b [8, k], plus `init`.
fn product(a: &[f32], b: &[f32], k: usize, init: f32) -> Vec<f32> {
    let element =
        |i: usize| a[i / 8 * k..][..k].iter().zip(&b[i % 8 * k..][..k]).map(|(x, y)| x * y).sum::<f32>();
    (0..128).map(|i| init + element(i)).collect()
}

#[test]
fn matrix_operations_are_exact() {
    let library = Library::load("operations", None);
    // Whole numbers: as bf16 and, from the same bits, as f16.
    let (a, b) = (exact(256, 3), exact(128, 4));
    let (fa, fb) = (exact(128, 5), exact(64, 6));
    let as_f16 =
        |x: &[f32]| -> Vec<f32> { to_bf16(x).iter().map(|b| half::f16::from_bits(*b).to_f32()).collect() };
    let as_bytes = |x: &[f32]| -> Vec<f32> {
        to_bf16(x).iter().flat_map(|word| word.to_le_bytes()).map(f32::from).collect()
    };
    let buffers = (
        library.buffer(&to_bf16(&a)),
        library.buffer(&to_bf16(&b)),
        library.buffer(&fa),
        library.buffer(&fb),
    );
    let d = library.buffer(&[0f32; 640]);
    let params = MatrixParams {
        a: buffers.0.data,
        b: buffers.1.data,
        fa: buffers.2.data,
        fb: buffers.3.data,
        d: d.data,
    };
    for order in ORDERS {
        library.launch("matrix_operations", [1, 1, 1], [32, 1, 1], 0, &params, order).unwrap();
        let d = d.values();
        assert_eq!(d[..128], product(&a, &b, 16, 0.0));
        assert_eq!(d[128..256], product(&a, &b, 16, 0.0));
        let close = |(x, y): (&f32, f32)| (x - y).abs() <= 1e-6 * y.abs();
        assert!(d[256..384].iter().zip(product(&as_f16(&a), &as_f16(&b), 16, 1.0)).all(close));
        assert_eq!(d[384..512], product(&fa, &fb, 8, 0.0));
        assert_eq!(d[512..], product(&as_bytes(&a), &as_bytes(&b), 32, 1.0));
    }
}

#[repr(C)]
struct QueueParams {
    x: *const f32,
    y: *mut f32,
    rounds: u32,
}

fn run_queue(library: &Library, order: i32) -> Result<bool, String> {
    let rounds = 7;
    let x = exact(rounds * 32, 8);
    let want: Vec<f32> = x.chunks(32).flat_map(|row| row.iter().rev().copied()).collect();
    let (x, y) = (library.buffer(&x), library.buffer(&vec![0f32; rounds * 32]));
    let params = QueueParams { x: x.data, y: y.data, rounds: rounds as u32 };
    library.launch("queue", [1, 1, 1], [64, 1, 1], 0, &params, order)?;
    Ok(y.values() == want)
}

#[test]
fn named_barriers_carry_a_queue() {
    let library = Library::load("operations", None);
    for order in ORDERS {
        assert_eq!(run_queue(&library, order), Ok(true), "{order}");
    }
}

/// Row r is 1 - 2^-(20 + r): rounded to nearest, or, as Hopper's tensor cores do it, cut at 2^-25 and then to f32.
#[test]
fn sums_round_as_a_chips() {
    #[repr(C)]
    struct SumParams {
        a: *const u16,
        b: *const u16,
        d: *mut f32,
    }
    for (defines, as_chip) in [(&[][..], false), (&["LOWRANK_SUMS_AS_CHIP"][..], true)] {
        let library = Library::load_with("operations", None, defines);
        let less = |row: usize| 2f32.powi(-20 - row as i32);
        let a: Vec<f32> = (0..256).map(|i| if i % 16 == 3 { -less(i / 16) } else { 0.0 }).collect();
        let (a, b) = (library.buffer(&to_bf16(&a)), library.buffer(&to_bf16(&[1.0; 128])));
        let d = library.buffer(&[1f32; 128]);
        let params = SumParams { a: a.data, b: b.data, d: d.data };
        library.launch("sum", [1; 3], [32, 1, 1], 0, &params, 0).unwrap();
        for (i, found) in d.values().into_iter().enumerate() {
            let expected = if as_chip && i / 8 == 5 { 1.0 - less(4) } else { 1.0 - less(i / 8) };
            assert_eq!(found, expected, "row {}, {as_chip}", i / 8);
        }
    }
}

#[test]
fn launches_are_checked() {
    let library = Library::load("operations", None);
    let params = QueueParams { x: std::ptr::null(), y: std::ptr::null_mut(), rounds: 1 };
    let launch =
        |kernel, grid, block, shared| library.launch(kernel, grid, block, shared, &params, 0).unwrap_err();
    assert_eq!(launch("nothing", [1; 3], [32, 1, 1], 0), "there is no kernel nothing");
    assert_eq!(
        launch("queue", [1; 3], [65, 1, 1], 0),
        "kernel queue: it takes blocks of 1 to 64 threads, found 65 x 1 x 1"
    );
    assert_eq!(
        launch("queue", [1, 65536, 1], [64, 1, 1], 0),
        "kernel queue: no device takes a grid of 1 x 65536 x 1 blocks"
    );
    assert_eq!(
        launch("queue", [1; 3], [64, 1, 1], 300_000),
        "kernel queue: a block of sm_90 has at most 232448 bytes of shared memory, found 300000"
    );
    assert_eq!(
        launch("divide", [1; 3], [32, 1, 1], 0),
        "kernel divide: its parameters have 16 bytes, found 24"
    );
    // Null pointers fault.
    let message = launch("queue", [1; 3], [64, 1, 1], 0);
    assert!(message.starts_with("kernel queue, block (0, 0, 0), thread 0: access to "), "{message}");
    let message = library.launch("divide", [1; 3], [32, 1, 1], 0, &(params.y, 0u32), 0).unwrap_err();
    assert_eq!(message, "kernel divide, block (0, 0, 0), thread 0: integer division by zero");
}

#[test]
fn planted_faults_of_a_reduction_are_caught() {
    let mutant = |piece, other| Library::load("reduce", Some((piece, other)));
    let run = |library: &Library, columns| shown(|order| run_reduce(library, 256, columns, order));

    // A missing barrier: the first warp adds up what isn't there yet, unless it happens to come last.
    let shown = run(&mutant("__syncthreads();", ""), 1000);
    assert_eq!(shown[0], Ok(false), "{shown:?}");

    // A divergent barrier.
    let shown = run(&mutant("__syncthreads();", "if (warp_index() == 0) __syncthreads();"), 1000);
    all_say(
        &shown,
        "0, 0): threads 0..31 wait at __syncthreads (reduce.cu:22), \
         where 32 of 256 threads have arrived; threads 32..255 have exited",
    );
    let shown = run(
        &mutant("__syncthreads();", "if (warp_index() % 2 == 0) __syncthreads();\nelse __syncthreads();"),
        9,
    );
    all_say(&shown, "divergent barrier: this thread is at __syncthreads (reduce.cu:2");

    // A lane that doesn't take part.
    let shown =
        run(&mutant("sum = warp_sum(sum);\n    if", "if (threadIdx.x != 7) sum = warp_sum(sum);\n    if"), 9);
    all_say(&shown, "threads 0..6, 8..31 wait at __shfl_xor_sync (reduce.cu:11)");
    all_say(&shown, "threads 7, 32..255 wait at __syncthreads");

    // One element too many is read: past the allocation, or, where it doesn't end with a page, NaN.
    let library = mutant("i < p.columns", "i <= p.columns");
    all_say(&run(&library, 1024), "0 bytes past the end of an allocation of 12288 bytes");
    assert_eq!(run(&library, 1000), [Ok(false), Ok(false), Ok(false)]);

    // A vector that doesn't lie at a multiple of its size.
    let library =
        mutant("sum += row[i]", "sum += ((const float4 *)(row + 1))->x + ((const float4 *)(row + 1))->w");
    all_say(&run(&library, 1000), "access to an address that is misaligned or none at all");

    // And written.
    let shown = run(&mutant("p.sums[blockIdx.x]", "p.sums[blockIdx.x + 1]"), 9);
    all_say(&shown, "kernel reduce: wrote 0 bytes past the end of an allocation of 12 bytes");
    let shown = run(&mutant("partial[warp_index()] =", "partial[warp_index() + 1] ="), 9);
    all_say(&shown, "0 bytes past the end of shared array partial of 32 bytes");
    let shown = run(&mutant("SHARED(float, partial, 8)", "SHARED(float, partial, 7)"), 9);
    all_say(&shown, "kernel reduce, block (");
    all_say(&shown, "wrote 0 bytes past the end of shared array partial of 28 bytes");
}

#[test]
fn planted_faults_of_a_pipelined_gemm_are_caught() {
    let mutant = |piece, other| Library::load("gemm", Some((piece, other)));
    let run = |library: &Library| shown(|order| run_gemm(library, [97, 70, 160], order));

    // A missing wait: what the copies should have brought is NaN.
    assert_eq!(run(&mutant("cp_async_wait<1>();", "")), [Ok(false), Ok(false), Ok(false)]);
    assert_eq!(run(&mutant("cp_async_wait<1>();", "cp_async_wait<2>();")), [Ok(false), Ok(false), Ok(false)]);
    // A buffer that is filled while others read it: copies that land at once show it.
    let shown = run(&mutant("__syncthreads(); // before this stage is filled again", ""));
    assert!(shown.contains(&Ok(false)), "{shown:?}");
    // A missing barrier after the wait.
    let shown = run(&mutant("cp_async_wait<1>();\n        __syncthreads();", "cp_async_wait<1>();"));
    assert!(shown.contains(&Ok(false)), "{shown:?}");
    // Addresses.
    let library =
        mutant("a + (warp * 16 + lane % 16) * STRIDE", "a + (warp * 16 + lane % 16) * (STRIDE + 1)");
    all_say(&run(&library), "ldmatrix_x4: shared address");
    all_say(
        &run(&mutant("first + row < rows", "first + row <= rows")),
        "bytes past the end of an allocation of",
    );
}

#[test]
fn planted_faults_of_named_barriers_are_caught() {
    let mutant =
        |piece, other| shown(|order| run_queue(&Library::load("operations", Some((piece, other))), order));
    all_say(
        &mutant("if (round + 2 < p.rounds) barrier_arrive(1 + slot, 64);", ""),
        "threads 0..31 wait at barrier_sync (operations.cu:127), where 32 of 64 threads have arrived; \
         threads 32..63 wait at barrier_sync (operations.cu:134)",
    );
    all_say(&mutant("barrier_arrive(3 + slot, 64);", "barrier_arrive(3 + slot, 32);"), "barrier");
    assert!(mutant("barrier_sync(3 + slot, 64);", "").contains(&Ok(false)));
}
