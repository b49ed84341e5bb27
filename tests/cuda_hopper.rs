//! Hopper's wrappers on the host executor: a wgmma GEMM over TMA with a producer warp, in every order of threads, and
//! planted faults.

#[path = "common/host_library.rs"]
mod host_library;

use host_library::{Library, ORDERS, TensorMap, all_say, exact, shown, to_bf16};

#[repr(C)]
struct HopperGemmParams {
    a: TensorMap,
    b: TensorMap,
    d: TensorMap,
    a_rows: *const u16,
    m: u32,
    k: u32,
}

/// A kernel of tests/cuda/hopper.cu: bytes of the swizzle, and what is special about it.
struct Variant {
    kernel: &'static str,
    swizzle: usize,
    mn_major: bool,
    cluster: u32,
}

const fn variant(kernel: &'static str, swizzle: usize) -> Variant {
    Variant { kernel, swizzle, mn_major: false, cluster: 1 }
}

const VARIANTS: [Variant; 6] = [
    variant("hopper_gemm_128", 128),
    variant("hopper_gemm_64", 64),
    variant("hopper_gemm_32", 32),
    Variant { mn_major: true, ..variant("hopper_gemm_mn", 128) },
    variant("hopper_gemm_registers", 64),
    Variant { cluster: 2, ..variant("hopper_gemm_cluster", 128) },
];

fn run_gemm(library: &Library, variant: &Variant, [m, n, k]: [usize; 3], order: i32) -> Result<bool, String> {
    let (a, b) = (exact(m * k, 1), exact(n * k, 2));
    let mut want = vec![0f32; m * n];
    for (i, sum) in want.iter_mut().enumerate() {
        let (row, column) = (&a[i / n * k..][..k], &b[i % n * k..][..k]);
        *sum = row.iter().zip(column).map(|(x, y)| x * y).sum();
    }
    let transposed: Vec<f32> = (0..n * k).map(|i| b[i % n * k + i / n]).collect();
    let a = library.buffer(&to_bf16(&a));
    let b = library.buffer(&to_bf16(if variant.mn_major { &transposed } else { &b }));
    let d = library.buffer(&vec![0f32; m * n]);
    let (step, swizzle) = (variant.swizzle as u32 / 2, variant.swizzle.ilog2() as i32 - 4);
    let (b_shape, b_box) =
        if variant.mn_major { ([k, n], [step, 64]) } else { ([n, k], [64 / variant.cluster, step]) };
    let params = HopperGemmParams {
        a: library.tensor_map(a.data, [m, k], [64, step], swizzle)?,
        b: library.tensor_map(b.data, b_shape, b_box, swizzle)?,
        d: library.tensor_map(d.data, [m, n], [64, 64], 0)?,
        a_rows: a.data,
        m: m as u32,
        k: k as u32,
    };
    let grid = [n.div_ceil(64) as u32, (m.div_ceil(64) as u32).next_multiple_of(variant.cluster), 1];
    let shared = 3 * 2 * 64 * variant.swizzle as u32 + 64 * 64 * 4;
    library.launch_cluster(
        variant.kernel,
        grid,
        [1, variant.cluster, 1],
        [160, 1, 1],
        shared,
        &params,
        order,
    )?;
    Ok(d.values() == want)
}

#[test]
fn gemms_by_wgmma_and_tma_are_exact_in_every_order() {
    let library = Library::load("hopper", None);
    for variant in &VARIANTS {
        for order in ORDERS {
            for shape in [[64, 64, 64], [150, 72, 200], [1, 8, 264]] {
                let found = run_gemm(&library, variant, shape, order);
                assert_eq!(found, Ok(true), "{} {shape:?} {order}", variant.kernel);
            }
        }
    }
}

#[repr(C)]
struct WgmmaParams {
    a: *const u16,
    b: *const u16,
    d: *mut f32,
}

/// wgmma of many widths, both operands either way round, with each swizzle and without, from tiles that threads write.
#[test]
fn wgmmas_of_all_layouts_are_exact() {
    let library = Library::load("hopper_wrappers", None);
    for name in ["8_128", "24_none", "256_none", "64_none_a", "40_none_b", "192_128_a", "192_128_ab"]
        .into_iter()
        .chain(["96_64_ab", "176_32_ab", "200_64"])
    {
        let n: usize = name.split('_').next().unwrap().parse().unwrap();
        let (a, b) = (exact(64 * 32, 3), exact(n * 32, 4));
        let sum = |i: usize| a[i % 64 * 32..][..32].iter().zip(&b[i / 64 * 32..]).map(|(x, y)| x * y).sum();
        let want: Vec<f32> = (0..n * 64).map(sum).collect();
        let (a, b) = (library.buffer(&to_bf16(&a)), library.buffer(&to_bf16(&b)));
        for order in ORDERS {
            let d = library.buffer(&vec![0f32; 64 * n]);
            let params = WgmmaParams { a: a.data, b: b.data, d: d.data };
            let kernel = format!("wgmma_{name}");
            library.launch(&kernel, [1; 3], [128, 1, 1], 64 << 10, &params, order).unwrap();
            assert!(d.values() == want, "{kernel} {order}");
        }
    }
}

#[repr(C)]
struct CopiesParams {
    x: TensorMap,
    y: TensorMap,
    added: *const f32,
    at: [i32; 3],
}

/// Boxes of three dimensions, inside and partly outside of their tensor, and plain bytes.
#[test]
fn boxes_of_three_dimensions_are_copied() {
    let library = Library::load("hopper_wrappers", None);
    let [planes, rows, columns] = [3, 5, 12];
    let x = exact(planes * rows * columns, 6);
    let added = exact(64, 7);
    let (from, vector) = (library.buffer(&x), library.buffer(&added));
    for at in [[0, 0, 0], [4, 1, 1], [8, 3, 2], [-4, -2, -1]] {
        for order in ORDERS {
            let to = library.buffer(&vec![7f32; x.len()]);
            let map = |data: *const f32| {
                let dims = [columns as u64, rows as u64, planes as u64];
                let strides = [4 * columns as u64, 4 * (rows * columns) as u64];
                library.tensor_map_of(data, &dims, &strides, &[8, 4, 2], 0).unwrap()
            };
            let params = CopiesParams { x: map(from.data), y: map(to.data), added: vector.data, at };
            library.launch("copies", [1; 3], [64, 1, 1], 512, &params, order).unwrap();
            let mut want = vec![7f32; x.len()];
            for (i, added) in added.iter().enumerate() {
                let [c, r, p] = [i % 8, i / 8 % 4, i / 32];
                let place = [at[0] + c as i32, at[1] + r as i32, at[2] + p as i32].map(|i| i as usize);
                if place[0] < columns && place[1] < rows && place[2] < planes {
                    let index = (place[2] * rows + place[1]) * columns + place[0];
                    want[index] = x[index] + added;
                }
            }
            assert!(to.values() == want, "{at:?} {order}");
        }
    }
}

/// Row r of matrix i has register i of the lanes 4 r to 4 r + 3, or, transposed, half r % 2 of that of r / 2, r / 2 + 4,
/// ...
#[test]
fn matrices_are_stored() {
    let library = Library::load("hopper_wrappers", None);
    for order in ORDERS {
        let out = library.buffer(&[0u32; 256]);
        library.launch("store_matrices", [1; 3], [32, 1, 1], 0, &out.data, order).unwrap();
        let words = out.values();
        for (i, element) in words.iter().flat_map(|word| [word & 0xffff, word >> 16]).enumerate() {
            let (transposed, matrix, row, column) = (i / 256 == 1, i / 64 % 4, i / 8 % 8, i % 8);
            let (line, along) = if transposed { (column, row) } else { (row, column) };
            let lane = 4 * line + along / 2;
            assert_eq!(element as usize, 512 * matrix + 2 * lane + along % 2, "{i} {order}");
        }
    }
}

#[test]
fn planted_faults_of_single_wrappers_are_caught() {
    let wgmma = |piece, other| {
        let library = Library::load("hopper_wrappers", Some((piece, other)));
        let (a, b) = (library.buffer(&[0u16; 64 * 32]), library.buffer(&[0u16; 8 * 32]));
        let d = library.buffer(&[0f32; 64 * 8]);
        let params = WgmmaParams { a: a.data, b: b.data, d: d.data };
        shown(|order| {
            library.launch("wgmma_8_128", [1; 3], [128, 1, 1], 64 << 10, &params, order).map(|()| true)
        })
    };
    let fence = "fence_proxy_async();\n    __syncthreads();\n    float";
    all_say(
        &wgmma(fence, "__syncthreads();\n    float"),
        "wgmma reads what threads wrote without fence_proxy_async",
    );

    let registers = |piece, other| {
        let library = Library::load("hopper_wrappers", Some((piece, other)));
        let out = library.buffer(&[0u32; 1]);
        shown(|order| library.launch("registers", [1; 3], [384, 1, 1], 0, &out.data, order).map(|()| true))
    };
    assert_eq!(registers("p.out[0] = 1", "p.out[0] = 2"), ORDERS.map(|_| Ok(true)));
    all_say(&registers("more_registers<232>", "more_registers<240>"), "setmaxnreg waits for ever");
    all_say(
        &registers("more_registers<232>", "more_registers<160>"),
        "setmaxnreg: 160 registers, now there are 168",
    );
    all_say(&registers(">= 256) fewer", ">= 288) fewer"), "setmaxnreg");
    all_say(&registers("384, 1)", "384)"), "KERNEL doesn't say how many blocks a multiprocessor has");
}

#[test]
fn tensor_maps_are_checked() {
    let library = Library::load("hopper", None);
    let x = library.buffer(&[0u16; 1024]);
    let wrong = |shape, tile, swizzle| library.tensor_map(x.data, shape, tile, swizzle).err().unwrap();
    assert_eq!(
        wrong([8, 60], [8, 32], 2),
        "tensor map: dimension 1 has a stride of 120 bytes, expected a multiple of 16, 120 or more, below 2^40"
    );
    assert_eq!(
        wrong([8, 64], [8, 32], 3),
        "tensor map: the box's rows have 64 bytes, expected the swizzle's 128"
    );
    assert_eq!(wrong([8, 64], [300, 32], 2), "tensor map: dimension 1 has a box of 300, expected 1 to 256");
    let short = library.tensor_map_of(x.data, &[64, 8], &[112], &[32, 8], 2).err().unwrap();
    assert_eq!(
        short,
        "tensor map: dimension 1 has a stride of 112 bytes, expected a multiple of 16, 128 or more, below 2^40"
    );
}

#[test]
fn planted_faults_of_a_hopper_gemm_are_caught() {
    let run = |variant: usize, piece, other| {
        let library = Library::load("hopper", Some((piece, other)));
        shown(|order| run_gemm(&library, &VARIANTS[variant], [150, 72, 600], order))
    };

    // Nobody waits for the tiles: they are NaN where they haven't come.
    let shown = run(0, "mbarrier_wait(&full[s], step / STAGES % 2);", "");
    assert!(shown.iter().all(|s| *s != Ok(true)), "{shown:?}");
    // Nobody waits for room: copies that land at once overwrite tiles that are being read.
    let shown = run(0, "mbarrier_wait(&empty[s], step / STAGES % 2 ^ 1);", "");
    assert!(shown.iter().any(|s| *s != Ok(true)), "{shown:?}");
    // The wait for the wrong phase.
    all_say(&run(0, "step / STAGES % 2 ^ 1", "step / STAGES % 2"), "wait at mbarrier_wait (hopper.cu:");
    // The wrong number of bytes, of arrivals.
    all_say(
        &run(0, "&full[s], STAGE)", "&full[s], STAGE + 16)"),
        "where 0 of 1 arrivals and 16 bytes are missing",
    );
    all_say(&run(0, "else mbarrier_arrive(&empty[s]);", ""), "where 4 of 4 arrivals and 0 bytes are missing");
    // wgmma: no wait, the wrong one, no fence.
    all_say(&run(0, "wgmma_wait<0>();", ""), "exited before wgmma_wait<0>()");
    all_say(&run(0, "wgmma_wait<0>();", "wgmma_wait<1>();"), "exited before wgmma_wait<0>()");
    all_say(&run(0, "wgmma_fence();", ""), "wgmma without a wgmma_fence after the last wgmma_wait");
    // A tile that begins in the middle of the swizzle's pattern; warps with different tiles.
    all_say(
        &run(
            0,
            "*b = a + A_BYTES;\n            mbarrier_wait(&full",
            "*b = a + A_BYTES + 512;\n            mbarrier_wait(&full",
        ),
        "expected a multiple of 1024 bytes, or a place in its first line",
    );
    all_say(
        &run(0, "wgmma_advance(a_tile, 2 * k)", "wgmma_advance(a_tile, 2 * k + 16 * (warp == 1))"),
        "descriptors or flags of the warps of a warpgroup differ",
    );
    // Boxes there; barriers that TMA doesn't know of; results that it doesn't see.
    all_say(
        &run(
            0,
            "*b = a + A_BYTES;\n            mbarrier_wait(&empty",
            "*b = a + A_BYTES + 512;\n            mbarrier_wait(&empty",
        ),
        "is not aligned to 1024 bytes",
    );
    all_say(&run(0, "fence_mbarrier_init();", ""), "tma_load: no fence_mbarrier_init after mbarrier_init");
    all_say(
        &run(0, "fence_proxy_async();", ""),
        "tma_store reads what threads wrote without fence_proxy_async",
    );
    // More bytes than a phase can wait for.
    all_say(&run(0, "&full[s], STAGE)", "&full[s], STAGE << 8)"), "a phase waits for at most 1048575");
    // One warp of the warpgroup does less.
    let shown =
        run(0, "bool accumulate =", "if (warp == 2 && step + 1 == steps && k > 0) break;\nbool accumulate =");
    all_say(&shown, "wgmmas, the first one of its warpgroup");
    // A store that no one waits for.
    all_say(&run(0, "tma_store_wait<0>();", ""), "thread 0: exited before tma_store_wait<0>()");
    // A block of the cluster that leaves while others still need it.
    let shown = run(5, "__syncwarp();\n        cluster_arrive();\n        cluster_wait();", "");
    assert!(
        shown.iter().any(|s| matches!(s, Err(message) if message.contains("has already exited"))),
        "{shown:?}"
    );
    // Barriers that the other block has not made yet.
    let shown = run(
        5,
        "if constexpr (CLUSTER > 1) {\n        cluster_arrive();\n        cluster_wait();\n    } else __syncthreads();",
        "__syncthreads();",
    );
    assert!(shown.iter().any(Result::is_err), "{shown:?}");
}
