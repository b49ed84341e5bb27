//! Launches of `cuda/gemm_hopper.cu`, and the check that each of its kernels passes before it serves.
//!
//! A row's bits must not depend on how many rows there are, so a kernel for many rows serves only if it has the bits of
//! the portable ones. Whether `wgmma` sums like `mma` is the chip's secret; each kernel is asked once.

use super::bindings::{self, gemm_hopper_params};
use super::executor::{Launch, Properties, TmaMatrix};
use super::gemm::{self, By, Cluster, Family, Layout, MAP, MIDDLE, PAIRS, Product, TILE_K, Term, Tile};
use super::{Cuda, quant};
use crate::backend::{Gemm, GemmTerm, Kernels, Matrix};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::{Format, QuantConfig, Quantized};
use crate::rng::{Philox, PhiloxKey, Stream};
use crate::tensor::Tensor;
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

/// Of the result, in a block's tile; threads.
const COLUMNS: usize = 128;
const THREADS: usize = 384;

/// Bytes of a swizzled tile's line: 64 elements.
const LINE: usize = 128;

/// Bytes of shared memory beside the ring: static, results on their way, a tile's scales where rows are contracted.
const STATIC: usize = 1024;
const STAGED: usize = 2 * 16 * COLUMNS * 4;
const SCALES: usize = 8 * TILE_K * 8;

/// Bytes that the parts of a sum take in the ring's place.
const SPLIT: usize = 128 * (COLUMNS + 4) * 4;

/// log2 of the copies of the table of pairs, as in the kernels: every read is free of conflicts.
const PAIR_COPIES: u32 = 4;

const fn wgmma(cluster: Cluster, rows: usize, cost: [usize; 2], overhead: usize) -> Tile {
    Tile { rows, columns: COLUMNS, threads: THREADS, groups: 1, by: By::Wgmma(cluster), cost, overhead }
}

/// A quarter of the cost for the blocks that have a quarter of a sum. See docs/cuda.md for the numbers.
const TILES: [Tile; 6] = [
    wgmma(Cluster::Pair, 128, [640, 768], 1500),
    wgmma(Cluster::Pair, 192, [832, 960], 2000),
    wgmma(Cluster::Square, 128, [640, usize::MAX], 1500),
    wgmma(Cluster::Square, 192, [832, usize::MAX], 2000),
    wgmma(Cluster::Square, 208, [880, usize::MAX], 2150),
    wgmma(Cluster::Split, 128, [160, 192], JOIN),
];

/// Cycles in which the blocks of a cluster join the parts of their sums and write results.
pub(super) const JOIN: usize = 2500;

/// A check's products take microseconds.
const CHECK_LIMIT: Duration = Duration::from_secs(10);

/// Which kernels for Hopper serve on a device.
#[derive(Debug)]
pub(super) struct Checked {
    there: bool,
    kernels: Mutex<HashMap<String, bool>>, // those that were asked
    clusters: Mutex<HashMap<(Family, usize, Cluster), usize>>, // at once, with tiles of so many rows
}

impl Checked {
    pub(super) fn new(properties: &Properties, portable: bool) -> Self {
        let there = properties.capability == 90 && !portable;
        Checked { there, kernels: Mutex::default(), clusters: Mutex::default() }
    }

    /// Whether there are kernels to ask.
    pub(super) fn is_there(&self) -> bool {
        self.there
    }

    /// Whether a kernel serves: `miss` found nothing amiss. Asked once; a miss is one line on stderr. A kernel that does
    /// not end is an error, since the device does nothing else then.
    pub(super) fn serves(
        &self,
        cuda: &Cuda,
        kernel: String,
        miss: impl FnOnce() -> Result<Option<String>>,
    ) -> Result<bool> {
        if cuda.plans {
            return Ok(true);
        }
        let known = || self.kernels.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(serves) = known().get(&kernel) {
            return Ok(*serves);
        }
        let miss = match cuda.queue.within(CHECK_LIMIT, miss) {
            Err(e @ Error::OutOfMemory { .. }) => return Err(e),
            Err(e) => Some(e.to_string()),
            Ok(Some(miss)) => miss,
            Ok(None) => {
                let seconds = CHECK_LIMIT.as_secs();
                let message = format!(
                    "{kernel} has not ended after {seconds} seconds of its check, and nothing can run behind it; set LOWRANK_CUDA_PORTABLE=1 to go without kernels for one kind of chip"
                );
                return Err(Error::device(cuda.name(), message));
            }
        };
        if let Some(miss) = &miss {
            eprintln!(
                "warning: {}: the portable kernels serve for {kernel}, which failed its check: {miss}",
                cuda.name()
            );
        }
        known().insert(kernel, miss.is_none());
        Ok(miss.is_none())
    }
}

/// The tiles of kernels that may serve, where the device has room for a cluster.
pub(super) fn tiles(cuda: &Cuda, family: Family) -> impl Iterator<Item = Tile> {
    TILES.into_iter().filter(move |tile| {
        let Some(cluster) = tile.cluster().filter(|_| cuda.hopper.there) else { return false };
        has_kernel(family, cluster, tile.rows) && clusters_at_once(cuda, family, tile, cluster) > 0
    })
}

/// Whether there is a kernel. Halves of a transposed left operand are made of 64 rows each.
fn has_kernel(family: Family, cluster: Cluster, rows: usize) -> bool {
    match family {
        Family::Bf16(layout) => layout != Layout::Tn || rows.is_multiple_of(64),
        Family::Decoded(Layout::Nt | Layout::Nn, 4 | 8) => cluster != Cluster::Square,
        _ => false,
    }
}

/// How many clusters the device holds at a time; asked once. Those of four leave multiprocessors idle that have not three
/// neighbours to spare, and a persistent grid of more clusters than that would take twice as long.
pub(super) fn clusters_at_once(cuda: &Cuda, family: Family, tile: &Tile, cluster: Cluster) -> usize {
    let known = || cuda.hopper.clusters.lock().unwrap_or_else(|e| e.into_inner());
    let key = (family, tile.rows, cluster);
    if let Some(clusters) = known().get(&key) {
        return *clusters;
    }
    let blocks = cluster.blocks() as u32;
    let launch = Launch {
        kernel: &kernel(family, tile, cluster),
        grid: [blocks, 1, 1],
        cluster: blocks,
        threads: THREADS as u32,
        shared_bytes: memory(cuda, family, tile, cluster).1 as u32,
        params: &[],
    };
    // Where the device can't say, a launch will say why.
    let all = (cuda.executor.properties().multiprocessors / blocks) as usize;
    let clusters = cuda.executor.clusters_at_once(&launch).unwrap_or(all);
    known().insert(key, clusters);
    clusters
}

/// The layout, and bits of codes or 0.
fn layout_and_bits(family: Family) -> (Layout, usize) {
    match family {
        Family::Bf16(layout) => (layout, 0),
        Family::Decoded(layout, bits) => (layout, bits),
        _ => unreachable!("only these have tiles"),
    }
}

fn stage_bytes(tile: &Tile) -> usize {
    (tile.rows + COLUMNS) * LINE
}

/// Bytes of shared memory beside the ring.
fn beside_ring(cluster: Cluster, family: Family) -> usize {
    let (layout, bits) = layout_and_bits(family);
    let staged = if cluster == Cluster::Split { 0 } else { STAGED };
    let scales = if layout == Layout::Nn { SCALES } else { 0 };
    let tables = match bits {
        0 => 0,
        4 => scales + MAP + (PAIRS << PAIR_COPIES),
        _ => scales + MAP,
    };
    STATIC + staged + tables
}

pub(super) fn least_shared_bytes(tile: &Tile, cluster: Cluster, family: Family) -> usize {
    SPLIT.max(3 * stage_bytes(tile)) + beside_ring(cluster, family)
}

/// Stages of the ring, and bytes of dynamic shared memory.
fn memory(cuda: &Cuda, family: Family, tile: &Tile, cluster: Cluster) -> (usize, usize) {
    let (stage, beside) = (stage_bytes(tile), beside_ring(cluster, family));
    let stages = cuda.executor.properties().shared_memory.saturating_sub(beside) / stage;
    let stages = stages.min(bindings::GEMM_HOPPER_MAX_STAGES as usize);
    (stages, stages * stage + beside - STATIC)
}

fn kernel(family: Family, tile: &Tile, cluster: Cluster) -> String {
    let (layout, bits) = layout_and_bits(family);
    let shape = match cluster {
        Cluster::Pair => "",
        Cluster::Square => "square_",
        Cluster::Split => "split_",
    };
    let operand = if bits == 0 { "bf16".into() } else { format!("codes{bits}") };
    format!("gemm_hopper_{shape}{operand}_{}_{}", tile.rows, layout.letters())
}

/// What TMA copies of a term's operands.
fn matrices(term: &Term<'_>, product: &Product<'_>, tile: &Tile, cluster: Cluster) -> Result<[TmaMatrix; 2]> {
    let bf16 = |o: &bindings::gemm_operand, size: [usize; 2], box_size: [usize; 2]| TmaMatrix {
        data: o.data.cast(),
        element_bytes: 2,
        size: size.map(|n| n as u64),
        row_bytes: 2 * o.ld,
        box_size: box_size.map(|n| n as u32),
        swizzle: LINE as u32,
    };
    let (m, n, k) = (product.rows, product.columns, term.k);
    let a = if term.a.transposed != 0 {
        bf16(&term.a, [m, k], [64, TILE_K / 2])
    } else {
        bf16(&term.a, [k, m], [TILE_K, tile.rows / 2])
    };
    let transposed = gemm::is_transposed(&term.b);
    let columns = if cluster == Cluster::Square { COLUMNS / 2 } else { COLUMNS };
    let b = match term.b {
        Matrix::Dense { .. } if transposed => bf16(&gemm::operand(&term.b)?, [k, n], [TILE_K, columns]),
        Matrix::Dense { .. } => bf16(&gemm::operand(&term.b)?, [n, k], [64, TILE_K]),
        Matrix::Quantized { matrix, .. } => {
            let bytes = |elements: usize| elements * matrix.config().format.bits() / 8;
            let (size, box_size) = if transposed {
                ([bytes(k), n], [bytes(TILE_K), COLUMNS])
            } else {
                ([bytes(n), k], [bytes(COLUMNS), TILE_K])
            };
            TmaMatrix {
                data: quant::view(matrix)?.codes,
                element_bytes: 1,
                size: size.map(|n| n as u64),
                row_bytes: bytes(matrix.shape()[1]) as u64,
                box_size: box_size.map(|n| n as u32),
                // Lines of 32 bytes are read without conflicts as they are.
                swizzle: if box_size[0] == 32 { 0 } else { box_size[0] as u32 },
            }
        }
    };
    Ok([a, b])
}

/// How the clusters of a launch go through its tiles.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turns {
    /// At most so many clusters, each of which goes from tile to tile.
    clusters: usize,
    /// The last squares, which are cut: each of their tiles is a cluster's, whose blocks have parts of its sums.
    cut: usize,
}

impl Turns {
    fn of(cuda: &Cuda, family: Family, tile: &Tile, cluster: Cluster, tiles: usize) -> Self {
        if cluster == Cluster::Split {
            return Turns { clusters: tiles, cut: 0 }; // a cluster has one tile
        }
        let clusters = clusters_at_once(cuda, family, tile, cluster).max(1);
        Turns { clusters, cut: cut(cluster, tiles, clusters) }
    }
}

/// Squares that are cut: those of the last turn, where their tiles, four times as many, still fit one turn, which then takes a
/// quarter of the time.
pub(super) fn cut(cluster: Cluster, tiles: usize, at_once: usize) -> usize {
    let last = tiles % at_once;
    if cluster == Cluster::Square && 4 * last <= at_once { last } else { 0 }
}

/// One launch of products of one family, by these turns or those that the device has room for.
pub(super) fn launch(
    cuda: &Cuda,
    family: Family,
    tile: &Tile,
    cluster: Cluster,
    products: &[Product<'_>],
    turns: Option<Turns>,
) -> Result<()> {
    if cuda.plans {
        return Ok(());
    }
    // SAFETY: a structure of the C header, of numbers and pointers.
    let mut params: gemm_hopper_params = unsafe { std::mem::zeroed() };
    let mut tiles = 0;
    for (i, product) in products.iter().enumerate() {
        gemm::describe(&mut params.gemm.problems[i], product, tiles)?;
        tiles += tile.count(product.rows, product.columns);
        for (j, term) in product.terms.iter().enumerate() {
            for (map, matrix) in
                params.tensor_maps[i][j].iter_mut().zip(matrices(term, product, tile, cluster)?)
            {
                map.words = cuda.executor.tensor_map(&matrix)?;
            }
        }
    }
    let (stages, shared) = memory(cuda, family, tile, cluster);
    params.gemm.n_problems = products.len() as u32;
    let turns = turns.unwrap_or_else(|| Turns::of(cuda, family, tile, cluster, tiles));
    let (whole, tiles) = (tiles - turns.cut, tiles + 3 * turns.cut);
    (params.whole, params.tiles, params.stages) = (whole as u32, tiles as u32, stages as u32);
    let (blocks, name) = (cluster.blocks(), kernel(family, tile, cluster));
    let grid = [tiles.min(turns.clusters) * blocks, 1, 1];
    // SAFETY: the operands were checked to fit each other, and the family and the tile fit the kernel.
    unsafe { cuda.launch_clusters(&name, grid, blocks, THREADS, shared, &params) }
}

/// Whether a kernel serves: it runs, with the bits of the portable ones.
pub(super) fn serves(cuda: &Cuda, family: Family, tile: &Tile, cluster: Cluster) -> Result<bool> {
    cuda.hopper.serves(cuda, kernel(family, tile, cluster), || miss(cuda, family, tile, cluster))
}

/// What to say of results that have not the bits of the portable kernels'.
pub(super) fn difference(expected: &[f32], found: &[f32]) -> Option<String> {
    let different = expected.iter().zip(found).filter(|(e, f)| e.to_bits() != f.to_bits()).count();
    if different == 0 {
        return None;
    }
    let distance = |(e, f): (&f32, &f32)| if e == f { 0.0 } else { (e - f).abs() };
    let largest = expected.iter().zip(found).map(distance).fold(0.0, |a: f32, b| if b <= a { a } else { b });
    let of = expected.iter().fold(0.0, |a: f32, b| a.max(b.abs()));
    Some(format!(
        "{different} of {} results differ from theirs, by up to {largest:e} where the largest is {of:e}",
        expected.len()
    ))
}

/// How far off a kernel is on small products that reach every part of it: odd sizes, a low-rank term, each kind of
/// weight.
fn miss(cuda: &Cuda, family: Family, tile: &Tile, cluster: Cluster) -> Result<Option<String>> {
    let (layout, bits) = layout_and_bits(family);
    let formats: &[Option<&str>] = match bits {
        0 => &[None],
        4 => &[Some("nf4"), Some("int4-asym")],
        _ => &[Some("int8-block"), Some("fp8")],
    };
    for format in formats {
        let (expected, found) = results(cuda, family, layout, (tile, cluster), *format)?;
        let miss = found.iter().find_map(|found| difference(&expected, found));
        if miss.is_some() {
            return Ok(miss);
        }
    }
    Ok(None)
}

/// The results of the portable kernel and of the other one, that of squares with and without cut ones.
fn results(
    cuda: &Cuda,
    family: Family,
    layout: Layout,
    (tile, cluster): (&Tile, Cluster),
    format: Option<&str>,
) -> Result<(Vec<f32>, Vec<Vec<f32>>)> {
    let backend: &dyn Kernels = cuda;
    // A cluster's tiles of rows, the last partly outside; two tiles or pairs of columns, the last partly or wholly outside; more
    // tiles of the contraction than stages, which a block with a quarter of them reaches later.
    let rows = cluster.tiles()[0] * tile.rows;
    let (m, rank) = (rows - if layout == Layout::Tn { 8 } else { 3 }, 24);
    let (n, k) = match cluster {
        Cluster::Pair => (288, 352),
        Cluster::Square => (288, 1760),
        Cluster::Split => (160, 2016),
    };
    let mut random = Philox::new(PhiloxKey::new(0, Stream::Dummy, 0));
    let mut floats = |rows: usize, columns: usize| -> Result<Tensor> {
        let values: Vec<f32> = (0..rows * columns).map(|_| random.normal()).collect();
        backend.from_slice(&values, &[rows, columns])
    };
    let stored = |rows, columns, transposed| if transposed { (columns, rows) } else { (rows, columns) };
    let (a_transposed, b_transposed) = (layout == Layout::Tn, layout == Layout::Nt);
    let mut operand = |rows, columns, transposed| -> Result<Tensor> {
        let (rows, columns) = stored(rows, columns, transposed);
        backend.to_dtype(&floats(rows, columns)?, DType::BF16)
    };
    let (x, h) = (operand(m, k, a_transposed)?, operand(m, rank, a_transposed)?);
    let (w, up) = (operand(k, n, b_transposed)?, operand(rank, n, b_transposed)?);
    let (init, bias) = (floats(m, n)?, floats(1, n)?.reshape(&[n])?);
    let quantized: Option<Quantized> = match format {
        Some(name) => Some(cuda.quantize(&w, &QuantConfig::new(Format::by_name(name)?))?),
        None => None,
    };
    let base = match &quantized {
        Some(matrix) => Matrix::Quantized { matrix, transposed: b_transposed },
        None => Matrix::Dense { tensor: &w, transposed: b_transposed },
    };
    let a = |tensor| Matrix::Dense { tensor, transposed: a_transposed };
    let terms = [
        GemmTerm { a: a(&x), b: base },
        GemmTerm { a: a(&h), b: Matrix::Dense { tensor: &up, transposed: b_transposed } },
    ];
    let gemm = Gemm { scale: 0.5, bias: Some(&bias), accumulate: true, ..Gemm::new(&terms) };
    let run = |launch: &dyn Fn(&[Product<'_>]) -> Result<()>| -> Result<Vec<f32>> {
        let mut out = backend.zeros(&[m, n], DType::F32)?;
        backend.cast(&mut out, &init)?;
        launch(&Product::all_of(&mut out, &gemm)?)?;
        backend.to_f32(&out)
    };
    // One cluster goes from tile to tile; one of four goes from the first square to a tile of the second, which is cut.
    let (through, cut) = (Some(Turns { clusters: 1, cut: 0 }), Some(Turns { clusters: 4, cut: 1 }));
    let trials: &[Option<Turns>] = match cluster {
        Cluster::Pair => &[through],
        Cluster::Square => &[through, cut],
        Cluster::Split => &[None],
    };
    let found =
        trials.iter().map(|turns| run(&|products| launch(cuda, family, tile, cluster, products, *turns)));
    Ok((run(&|products| gemm::launch(cuda, family, &MIDDLE, products))?, found.collect::<Result<_>>()?))
}
