//! What a launch should take on an H200, by the resources of docs/cuda.md and docs/cuda_attention.md. No number here was
//! measured.

use lowrank::backend::cuda::LaunchShape;

const MULTIPROCESSORS: u64 = 132;
/// Clusters of four blocks at a time, and cycles in which their blocks join parts of sums.
const FOURS: u64 = 32;
const JOIN: f64 = 2500.0;
/// A second, in microseconds: cycles, bytes of memory, and bytes of L2 for all multiprocessors and for one.
const CYCLES: f64 = 1755.0;
const MEMORY: f64 = 4.3e6;
const L2: f64 = 5.5e6;
const L2_OF_ONE: f64 = 64.0 * CYCLES;
/// Until a kernel's first loads are there and its last stores are done, beside what its resources take.
const LATENCY: f64 = 1.5;
/// From a read of L2 to what it gives, in cycles.
const READ: f64 = 300.0;

/// Of dependent multiplications through 64 of the contraction, in cycles.
const CHAIN: f64 = 150.0;

/// Between two kernels of a graph that depend on each other, in microseconds.
pub const GAP: f64 = 1.3;

/// What a kernel is for: the table's parts.
pub fn part(shape: &LaunchShape) -> &'static str {
    let is = |names: &[&str]| names.iter().any(|name| shape.kernel.contains(name));
    let is_skinny = |[m, n, _]: &[u64; 3]| *m.min(n) <= 64;
    match () {
        () if is(&["copy"]) => "copies",
        () if is(&["gem"]) && shape.products.iter().all(is_skinny) => "LoRA's own products",
        () if is(&["codes"]) => "base and LoRA's terms",
        () if is(&["gem", "cross_entropy", "gather", "scatter"]) => "head and loss",
        () if is(&["attention"]) => "attention",
        () if is(&["norm"]) => "norms",
        () if is(&["adamw", "sum_squares", "cast_f32", "fill_f32"]) => "optimizer",
        () => "elements",
    }
}

/// Microseconds, without the gap before it.
pub fn microseconds(shape: &LaunchShape) -> f64 {
    let kernel = shape.kernel.as_str();
    let of_memory = shape.bytes as f64 / MEMORY;
    if kernel.starts_with("gem") {
        return product(shape).max(of_memory);
    }
    let busy = |cycles: f64| cycles / 0.6 / CYCLES + LATENCY; // as attention's kernels are expected to be
    // One sequence and 32 heads in blocks of 128 rows, of which the last sees all tiles of 64: the longest block, or all of them.
    let blocks_of_head = shape.grid.iter().product::<u32>() as f64 / 32.0;
    let all = 32.0 * blocks_of_head * (blocks_of_head + 1.0) / MULTIPROCESSORS as f64;
    let tiles = all.max(2.0 * blocks_of_head);
    match kernel {
        "attention_hopper_128" => busy(tiles * 1024.0),
        "attention_backward_keys_hopper_128" => busy(tiles * 2048.0),
        "attention_backward_queries_hopper_128" => busy(tiles * 1536.0),
        // Sixteen threads sum rows of 4096 from shared memory.
        _ if kernel.contains("norm_") => (4096.0 / 16.0 * 8.0 + 2.0 * READ) / CYCLES + of_memory + LATENCY,
        _ => of_memory + LATENCY,
    }
}

/// A kernel `..._{rows}_..` or `..._{rows}x{columns}_..`.
fn product(shape: &LaunchShape) -> f64 {
    let kernel = shape.kernel.as_str();
    let sizes =
        kernel.split('_').find(|part| part.starts_with(|c: char| c.is_ascii_digit())).unwrap_or("64x64");
    let (rows, columns) = sizes.split_once('x').unwrap_or((sizes, "128"));
    let (rows, columns): (u64, u64) = (rows.parse().unwrap_or(64), columns.parse().unwrap_or(64));
    let codes = kernel.contains("codes");
    let split = kernel.contains("split");
    let (hopper, square) = (kernel.contains("hopper"), kernel.contains("square"));
    let high = if square { 2 * rows } else { rows };
    let wide = if hopper && !split { 2 * columns } else { columns };
    let depth = shape.products.iter().map(|[_, _, k]| k.div_ceil(64)).max().unwrap_or(0) as f64;
    let tiles: u64 = shape.products.iter().map(|[m, n, _]| m.div_ceil(high) * n.div_ceil(wide)).sum();
    let narrow = shape.products.iter().map(|[_, n, _]| *n).min().unwrap_or(0).min(columns);
    if !hopper {
        // Shared memory, and what a multiprocessor gets from L2.
        let bytes = 128.0 * (rows + narrow) as f64;
        let parts = if kernel.contains("parts") { 4.0 } else { 1.0 };
        let turns = (tiles as f64 * parts / MULTIPROCESSORS as f64).ceil();
        let cycles = if columns == 32 {
            112.0
        } else if rows == 64 {
            384.0
        } else {
            1024.0
        };
        let one = depth / parts * f64::max(cycles / CYCLES, bytes / L2_OF_ONE);
        let chain = depth / 4.0 * CHAIN / CYCLES;
        let joining = if parts > 1.0 { 2.0 * 2.0 * READ / CYCLES } else { 0.0 };
        let resources = f64::max(turns * one, tiles as f64 * depth * bytes / L2);
        return resources.max(chain) + LATENCY + joining;
    }
    let (cost, overhead) = match (rows, split) {
        (208, _) => (880.0, 2150.0),
        (192, _) => (if codes { 960.0 } else { 832.0 }, 2000.0),
        (_, false) => (if codes { 768.0 } else { 640.0 }, 1500.0),
        (_, true) => (if codes { 192.0 } else { 160.0 }, JOIN),
    };
    let at_once = if split || square { FOURS } else { MULTIPROCESSORS / 2 };
    let last = tiles % at_once;
    let cut = if square && 4 * last <= at_once { last } else { 0 };
    let (turns, quarter) = ((tiles - cut).div_ceil(at_once) as f64, f64::from(u8::from(cut > 0)));
    let cycles = (turns + quarter / 4.0) * cost * depth + turns * overhead + quarter * JOIN;
    let n = shape.products.iter().map(|[_, n, _]| *n).max().unwrap_or(0).min(wide);
    let bytes = 128.0 * high as f64 + (n * if codes { 32 } else { 128 }) as f64;
    f64::max(cycles / CYCLES, (tiles + cut) as f64 * depth * bytes / L2)
}
