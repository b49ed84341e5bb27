//! Launches of `cuda/gemm.cu`, `cuda/gemv.cu` and `cuda/gemm_f32.cu`, and the choice between them and
//! `cuda/gemm_hopper.cu` ([`gemm_hopper`]).
//!
//! Which kernel a product gets follows from its operands' types and addresses and from its size; in bf16 arithmetic all
//! of them sum in the same order, so its bits don't. Independent products that get the same kernel share a launch.

use super::bindings::{self, gemm_operand, gemm_params, gemm_problem};
use super::{Cuda, gemm_hopper, quant, read, type_code, written};
use crate::backend::check::{self, ensure};
use crate::backend::{Gemm, Kernels, Matrix};
use crate::dtype::DType;
use crate::error::Result;
use crate::quant::READ_ONLY;
use crate::tensor::Tensor;
use std::ptr::null;

const MAX_TERMS: usize = bindings::GEMM_MAX_TERMS as usize;
const MAX_PROBLEMS: usize = bindings::GEMM_MAX_PROBLEMS as usize;

/// Of the contraction, in a tile.
pub(super) const TILE_K: usize = 64;

/// Tiles of the left operand that a part's warps in `cuda/gemv.cu` have under way.
const TILES_AHEAD: usize = 4;

/// Bytes that a multiprocessor gets from L2 in a cycle where all of them ask for some: what an H200 has been seen to do.
const L2_BYTES: usize = 24;

/// Elements of a quantized matrix that are decoded together.
const RUN: usize = 32;

/// Bytes of tables that kernels of decoded operands have in shared memory: the nested map, and one copy of the pairs.
pub(super) const MAP: usize = 256 * 4;
pub(super) const PAIRS: usize = 256 * 8;

/// A product as one kernel computes it: rows of a result that all have the same terms.
pub(super) struct Product<'a> {
    out: *mut u8,
    out_type: DType,
    pub(super) rows: usize,
    pub(super) columns: usize,
    bf16: bool, // the arithmetic
    pub(super) terms: Vec<Term<'a>>,
    gemm: Gemm<'a>, // for what is not of terms
}

pub(super) struct Term<'a> {
    pub(super) a: gemm_operand,
    pub(super) b: Matrix<'a>,
    pub(super) k: usize,
}

impl<'a> Product<'a> {
    /// The products that a checked one consists of: one for all rows, or, with terms of some rows, one for each run of
    /// rows with the same. An element's bits follow from its terms alone.
    pub(super) fn all_of(out: &mut Tensor, gemm: &Gemm<'a>) -> Result<Vec<Self>> {
        let (rows, columns) = (out.rows(), out.cols());
        let mut bounds = vec![0, rows];
        let mut bf16 = true;
        for (range, term) in gemm.terms_by_rows(rows) {
            bounds.extend([range.start, range.end]);
            bf16 &= term.a.dense()?.dtype() == DType::BF16;
        }
        bounds.sort_unstable();
        bounds.dedup();
        let mut products = Vec::with_capacity(bounds.len() - 1);
        for (&first, &end) in bounds.iter().zip(&bounds[1..]) {
            let mut terms = Vec::new();
            for (range, term) in gemm.terms_by_rows(rows) {
                let k = term.a.shape().1;
                if range.start <= first && end <= range.end && k > 0 {
                    terms.push(Term { a: rows_from(&term.a, first - range.start)?, b: term.b, k });
                }
            }
            ensure(terms.len() <= MAX_TERMS, "gemm", || {
                format!("expected at most {MAX_TERMS} terms of a row, found {}", terms.len())
            })?;
            let out_bytes = first * columns * out.dtype().size();
            let deepest = terms.iter().map(|term| term.k).max().unwrap_or(0);
            ensure(u32::try_from(deepest + TILE_K).is_ok(), "gemm", || {
                format!("a contraction of {deepest} is too large")
            })?;
            products.push(Product {
                out: written::<u8>(out)?.wrapping_add(out_bytes),
                out_type: out.dtype(),
                rows: end - first,
                columns,
                bf16,
                terms,
                gemm: *gemm,
            });
        }
        Ok(products)
    }

    /// Whether a matrix has a format that only GGUF files have.
    fn is_read_only(&self) -> bool {
        self.terms.iter().any(|term| match term.b {
            Matrix::Quantized { matrix, .. } => READ_ONLY.contains(matrix.config().format),
            Matrix::Dense { .. } => false,
        })
    }

    /// Tiles of the contraction.
    fn depth(&self) -> usize {
        self.terms.iter().map(|term| term.k.div_ceil(TILE_K)).sum()
    }
}

/// The part of a result that a block computes, and what that takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) threads: usize,
    /// Groups of warps with tiles of their own.
    pub(super) groups: usize,
    /// How the right operand gets to the multiplications.
    pub(super) by: By,
    /// Cycles of a multiprocessor for [`TILE_K`] of the contraction of what takes longest there, which are accesses to shared
    /// memory, 128 bytes each: of bf16 operands and of decoded ones.
    pub(super) cost: [usize; 2],
    /// Cycles beside the contraction.
    pub(super) overhead: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// By way of shared memory, where so many tiles of it are under way.
    Stages(usize),
    /// By registers, where four-bit codes are decoded (`cuda/gemv.cu`).
    Registers,
    /// The same in blocks for each part of a sum.
    Parts(usize),
    /// By TMA and wgmma (`cuda/gemm_hopper.cu`).
    Wgmma(Cluster),
}

/// What the blocks of a cluster share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Cluster {
    /// Two have neighbouring columns: they share tiles of the left operand.
    Pair,
    /// Two by two share tiles of both operands, which are of bf16.
    Square,
    /// Four have the same tile, each a part of its sum.
    Split,
}

impl Cluster {
    pub(super) fn blocks(self) -> usize {
        if self == Cluster::Pair { 2 } else { 4 }
    }

    /// Tiles of the result that a cluster has at a time, in a column and in a row.
    pub(super) fn tiles(self) -> [usize; 2] {
        match self {
            Cluster::Pair => [1, 2],
            Cluster::Square => [2, 2],
            Cluster::Split => [1, 1],
        }
    }
}

const fn few_rows(rows: usize, cost: usize) -> Tile {
    Tile {
        rows,
        columns: 32,
        threads: 256,
        groups: 4,
        by: By::Registers,
        cost: [usize::MAX, cost],
        overhead: 0,
    }
}

const FEW_ROWS: [Tile; 3] = [few_rows(8, 85), few_rows(16, 93), few_rows(32, 141)];
const fn square(side: usize, threads: usize, stages: usize, cost: [usize; 2]) -> Tile {
    Tile { rows: side, columns: side, threads, groups: 1, by: By::Stages(stages), cost, overhead: 0 }
}

const SMALL: Tile = Tile { rows: 16, columns: 32, groups: 4, ..square(16, 256, 4, [112, 192]) };
/// Results of at most so many tiles have the parts of their sums in blocks of their own, which the last one to come joins; beside
/// the contraction that takes two trips to L2.
const MAX_PARTED: usize = 256;
const PARTED: Tile =
    Tile { threads: 64, groups: 1, by: By::Parts(8), cost: [28, usize::MAX], overhead: 1800, ..SMALL };
const PARTS: usize = 4;
pub(super) const MIDDLE: Tile = square(64, 128, 4, [384, 544]);
const LARGE: Tile = square(128, 256, 3, [1024, 1344]);

/// Which kernels can compute a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Family {
    F32,
    /// Any operands in bf16 arithmetic.
    AnyBf16,
    /// bf16 operands with aligned lines.
    Bf16(Layout),
    /// The same with one right operand that is decoded, of elements of so many bits: quantized, or other floats.
    Decoded(Layout, usize),
}

/// Of the left and of the right operand: as stored or transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Layout {
    Nn,
    Nt,
    Tn,
}

impl Layout {
    fn of(a_transposed: bool, b_transposed: bool) -> Option<Self> {
        match (a_transposed, b_transposed) {
            (false, false) => Some(Layout::Nn),
            (false, true) => Some(Layout::Nt),
            (true, false) => Some(Layout::Tn),
            (true, true) => None,
        }
    }

    pub(super) fn letters(self) -> &'static str {
        match self {
            Layout::Nn => "nn",
            Layout::Nt => "nt",
            Layout::Tn => "tn",
        }
    }
}

impl Tile {
    /// What the blocks of a cluster share, if there are clusters.
    pub(super) fn cluster(&self) -> Option<Cluster> {
        if let By::Wgmma(cluster) = self.by { Some(cluster) } else { None }
    }

    /// Tiles of a result; of `cuda/gemm_hopper.cu` those of clusters.
    pub(super) fn count(&self, rows: usize, columns: usize) -> usize {
        let [down, across] = self.cluster().map_or([1, 1], Cluster::tiles);
        rows.div_ceil(down * self.rows) * columns.div_ceil(across * self.columns)
    }

    /// Bytes of a tile's operands for [`TILE_K`] of the contraction, without scales: what is read from L2, as the blocks of a cluster
    /// share the rest.
    fn l2_bytes(&self, family: Family, rows: usize, columns: usize) -> usize {
        let bits = if let Family::Decoded(_, bits) = family { bits } else { 16 };
        let [down, across] = self.cluster().map_or([1, 1], Cluster::tiles);
        let (rows, columns) = (rows.min(down * self.rows), columns.min(across * self.columns));
        rows * TILE_K * 2 + columns * TILE_K * bits / 8
    }

    /// Bytes of shared memory without the tables for decoding.
    fn shared_bytes(&self, family: Family) -> usize {
        let (a, b) = (self.rows * TILE_K * 2, self.columns * TILE_K * 2);
        let operands = match (family, self.by) {
            (Family::F32, _) => return 0,
            (Family::AnyBf16, _) => 2 * (a + b),
            (_, By::Registers) => TILES_AHEAD * a,
            (_, By::Parts(stages)) => {
                return (stages * (a + b)).max(PARTS * self.rows * self.columns * size_of::<f32>());
            }
            (Family::Bf16(_), By::Stages(stages)) => stages * (a + b),
            (Family::Decoded(_, bits), By::Stages(stages)) => {
                stages * (a + self.columns * TILE_K * bits / 8) + 2 * b
            }
            (_, By::Wgmma(cluster)) => {
                return gemm_hopper::least_shared_bytes(self, cluster, family);
            }
        };
        let result = self.rows * (self.columns + 4) * 4;
        self.groups * operands.max(result)
    }
}

pub(super) fn is_transposed(matrix: &Matrix<'_>) -> bool {
    match *matrix {
        Matrix::Dense { transposed, .. } | Matrix::Quantized { transposed, .. } => transposed,
    }
}

/// Whether the operand is of bf16 and its lines are 16-byte aligned.
fn has_aligned_lines(o: &gemm_operand) -> bool {
    o.type_ == bindings::TYPE_BF16 as i32 && o.ld.is_multiple_of(8) && (o.data as usize).is_multiple_of(16)
}

fn family(product: &Product<'_>) -> Result<Family> {
    if !product.bf16 {
        return Ok(Family::F32);
    }
    let mut layout = None;
    let mut bits = None;
    for term in &product.terms {
        let this = Layout::of(term.a.transposed != 0, is_transposed(&term.b));
        let fits = match term.b {
            Matrix::Dense { tensor, .. } if tensor.dtype() != DType::BF16 => {
                let size = tensor.dtype().size();
                let first = bits.replace(8 * size).is_none();
                let aligned = (tensor.device_bytes()? as usize).is_multiple_of(16);
                first && (tensor.cols() * size).is_multiple_of(16) && aligned
            }
            Matrix::Dense { .. } => has_aligned_lines(&operand(&term.b)?),
            Matrix::Quantized { matrix, .. } => {
                let first = bits.replace(matrix.config().format.bits()).is_none();
                let aligned = (matrix.codes().device_bytes()? as usize).is_multiple_of(16);
                first
                    && matrix.shape()[1].is_multiple_of(RUN)
                    && aligned
                    && quant::is_decoded_in_runs(matrix, RUN)
            }
        };
        let agrees = this.is_some() && layout.is_none_or(|l| Some(l) == this);
        if !agrees || !fits || !has_aligned_lines(&term.a) {
            return Ok(Family::AnyBf16);
        }
        layout = this;
    }
    Ok(match (layout, bits) {
        (Some(Layout::Tn), Some(_)) => Family::AnyBf16,
        (Some(layout), Some(bits)) => Family::Decoded(layout, bits),
        (layout, _) => Family::Bf16(layout.unwrap_or(Layout::Nn)),
    })
}

/// Whether a block with this tile fits a multiprocessor.
fn fits(cuda: &Cuda, family: Family, tile: &Tile) -> bool {
    tile.shared_bytes(family) + MAP + PAIRS <= cuda.executor.properties().shared_memory
}

/// Cycles that a device takes for results of these sizes and of so many tiles of the contraction, by a rough count: those of
/// the multiprocessor that has most blocks, or of all that is read from L2.
fn cycles(
    cuda: &Cuda,
    tile: &Tile,
    family: Family,
    results: impl Iterator<Item = (usize, usize)>,
    depth: usize,
) -> usize {
    let multiprocessors = cuda.executor.properties().multiprocessors as usize;
    let (mut tiles, mut bytes) = (0, 0);
    for (rows, columns) in results {
        tiles += tile.count(rows, columns);
        bytes += tile.count(rows, columns) * tile.l2_bytes(family, rows, columns);
    }
    let (at_once, cut) = match tile.by {
        By::Wgmma(cluster) => {
            let at_once = gemm_hopper::clusters_at_once(cuda, family, tile, cluster).max(1);
            (at_once, gemm_hopper::cut(cluster, tiles, at_once))
        }
        By::Parts(_) if tiles > MAX_PARTED => return usize::MAX,
        By::Parts(_) => (multiprocessors.div_ceil(PARTS), 0),
        _ => (multiprocessors, 0),
    };
    let (turns, last) = ((tiles - cut).div_ceil(at_once), usize::from(cut > 0));
    let cost = tile.cost[usize::from(matches!(family, Family::Decoded(..)))];
    let of_one = (4 * turns + last).saturating_mul(cost).saturating_mul(depth) / 4;
    // Cut squares share nothing.
    bytes = bytes * (tiles + cut) / tiles.max(1);
    let of_l2 = bytes.saturating_mul(depth) / (L2_BYTES * multiprocessors);
    // Several blocks with parts wait on a multiprocessor side by side.
    let waits = if let By::Parts(_) = tile.by { 1 } else { turns };
    of_one.max(of_l2).saturating_add(waits * tile.overhead + last * gemm_hopper::JOIN)
}

/// The tiles that may serve.
fn tiles(cuda: &Cuda, family: Family) -> Vec<Tile> {
    let few_rows = FEW_ROWS.into_iter().filter(|_| family == Family::Decoded(Layout::Nt, 4));
    let parted = [PARTED].into_iter().filter(|_| matches!(family, Family::Bf16(Layout::Nt | Layout::Nn)));
    let mut tiles: Vec<_> = few_rows.chain(parted).chain([SMALL, MIDDLE, LARGE]).collect();
    tiles.extend(gemm_hopper::tiles(cuda, family));
    tiles.retain(|tile| fits(cuda, family, tile));
    tiles
}

/// The cycles that a product of bf16 matrices with a result of this size takes, by a rough count.
pub(super) fn least_cycles(cuda: &Cuda, rows: usize, columns: usize, depth: usize) -> usize {
    let family = Family::Bf16(Layout::Nt);
    let of =
        |tile: &Tile| cycles(cuda, tile, family, std::iter::once((rows, columns)), depth.div_ceil(TILE_K));
    tiles(cuda, family).iter().map(of).min().unwrap_or(usize::MAX)
}

/// The tile that takes least time for results of these sizes, by a rough count, of those that serve.
fn tile(cuda: &Cuda, family: Family, products: &[Product<'_>]) -> Result<Tile> {
    match family {
        Family::F32 => return Ok(Tile { threads: 256, ..MIDDLE }),
        Family::AnyBf16 => return Ok(MIDDLE),
        Family::Bf16(_) | Family::Decoded(..) => {}
    }
    let depth = products.iter().map(Product::depth).max().unwrap_or(0).max(1);
    let results = || products.iter().map(|p| (p.rows, p.columns));
    let mut tiles = tiles(cuda, family);
    if products.iter().any(Product::is_read_only) {
        tiles.retain(|tile| tile.cluster().is_none());
    }
    tiles.sort_by_cached_key(|tile| cycles(cuda, tile, family, results(), depth));
    for tile in tiles {
        let serves = tile.cluster().map(|cluster| gemm_hopper::serves(cuda, family, &tile, cluster));
        if serves.unwrap_or(Ok(true))? {
            return Ok(tile);
        }
    }
    Ok(MIDDLE)
}

pub(super) fn operand(matrix: &Matrix<'_>) -> Result<gemm_operand> {
    let transposed = i32::from(is_transposed(matrix));
    Ok(match *matrix {
        Matrix::Dense { tensor, .. } => gemm_operand {
            data: read(tensor)?,
            ld: tensor.cols() as u64,
            type_: type_code(tensor.dtype()),
            transposed,
        },
        Matrix::Quantized { matrix, .. } => gemm_operand {
            data: null(),
            ld: matrix.shape()[1] as u64,
            type_: bindings::TYPE_QUANTIZED as i32,
            transposed,
        },
    })
}

/// The dense operand without its first rows.
fn rows_from(matrix: &Matrix<'_>, first: usize) -> Result<gemm_operand> {
    let mut operand = operand(matrix)?;
    let elements = if operand.transposed != 0 { first } else { first * operand.ld as usize };
    let bytes = elements * matrix.dense()?.dtype().size();
    operand.data = operand.data.wrapping_byte_add(bytes);
    Ok(operand)
}

/// Describes a product to the kernels, in a structure of zeros; `first_block` counts tiles.
pub(super) fn describe(problem: &mut gemm_problem, product: &Product<'_>, first_block: usize) -> Result<()> {
    let (m, n, gemm) = (product.rows, product.columns, &product.gemm);
    ensure(u32::try_from(m.max(n)).is_ok(), "gemm", || format!("[{m}, {n}] is too large"))?;
    problem.out = product.out.cast();
    problem.out_type = type_code(product.out_type);
    (problem.m, problem.n, problem.first_block) = (m as u32, n as u32, first_block as u32);
    problem.scale = gemm.scale;
    problem.accumulate = i32::from(gemm.accumulate);
    if let Some(bias) = gemm.bias {
        (problem.bias, problem.bias_type) = (read(bias)?, type_code(bias.dtype()));
    }
    problem.n_terms = product.terms.len() as u32;
    for (to, term) in problem.terms.iter_mut().zip(&product.terms) {
        (to.a, to.b, to.k) = (term.a, operand(&term.b)?, term.k as u64);
        if let Matrix::Quantized { matrix, .. } = term.b {
            to.quantized = quant::view(matrix)?;
        }
    }
    Ok(())
}

/// Where blocks leave parts of [`MAX_PARTED`] tiles, and count them. Launches follow each other, so all share it.
fn parts(cuda: &Cuda) -> Result<(*mut f32, *mut u32)> {
    let mut place = cuda.parts.lock().expect("the lock is never held across a panic");
    if place.is_none() {
        let backend: &dyn Kernels = cuda;
        let sums = MAX_PARTED * PARTS * PARTED.rows * PARTED.columns;
        *place = Some([backend.empty(&[sums], DType::F32)?, backend.zeros(&[MAX_PARTED], DType::F32)?]);
    }
    let [sums, arrived] = place.as_mut().expect("made above");
    Ok((written(sums)?, written(arrived)?))
}

/// One launch of products of one family.
pub(super) fn launch(cuda: &Cuda, family: Family, tile: &Tile, products: &[Product<'_>]) -> Result<()> {
    // SAFETY: a structure of the C header, of numbers and pointers.
    let mut params: gemm_params = unsafe { std::mem::zeroed() };
    let mut blocks = 0;
    for (problem, product) in params.problems.iter_mut().zip(products) {
        describe(problem, product, blocks)?;
        blocks += tile.count(product.rows, product.columns);
    }
    params.n_problems = products.len() as u32;
    let mut shared = tile.shared_bytes(family);
    let size = format!("{}x{}", tile.rows, tile.columns);
    let kernel = match family {
        Family::F32 => "gemm_f32".into(),
        Family::AnyBf16 => "gemm_any_bf16".into(),
        Family::Bf16(layout) if matches!(tile.by, By::Parts(_)) => {
            (params.parts, params.arrived) = parts(cuda)?;
            blocks *= PARTS;
            format!("gemm_parts_{size}_{}", layout.letters())
        }
        Family::Bf16(layout) => format!("gemm_bf16_{size}_{}", layout.letters()),
        Family::Decoded(layout, bits) => {
            params.code_bits = bits as u32;
            shared += MAP;
            let available = cuda.executor.properties().shared_memory;
            // Sixteen copies make every read free of conflicts; fewer, if two blocks then fit a multiprocessor, which the
            // registers of the largest `cuda/gemv.cu` don't allow.
            let two = 2 * (shared + PAIRS) <= available && (tile.by != By::Registers || tile.rows <= 16);
            let room = if two { available / 2 } else { available };
            let copies = if bits == 4 { 4 } else { 0 };
            params.pair_copies = (0..=copies).rev().find(|c| shared + (PAIRS << c) <= room).unwrap_or(0);
            shared += PAIRS << params.pair_copies;
            match tile.by {
                By::Registers => format!("gemv_{size}"),
                _ => format!("gemm_decoded_{size}_{}", layout.letters()),
            }
        }
    };
    // SAFETY: the operands were checked to fit each other, and the family and the tile fit the kernel.
    unsafe { cuda.launch(&kernel, [blocks, 1, 1], tile.threads, shared, &params) }
}

pub(super) fn gemm_all(cuda: &Cuda, products: &mut [(&mut Tensor, Gemm<'_>)]) -> Result<()> {
    products.iter().try_for_each(|(out, gemm)| check::gemm(out, gemm))?;
    let mut by_family: Vec<(Family, Vec<Product<'_>>)> = Vec::new();
    for (out, gemm) in products.iter_mut().filter(|(out, _)| out.elements() > 0) {
        for product in Product::all_of(out, gemm)? {
            let best = family(&product)?;
            let family = if fits(cuda, best, &MIDDLE) { best } else { Family::AnyBf16 };
            match by_family.iter_mut().find(|(f, _)| *f == family) {
                Some((_, together)) => together.push(product),
                None => by_family.push((family, vec![product])),
            }
        }
    }
    for (family, products) in &by_family {
        for together in products.chunks(MAX_PROBLEMS) {
            let tile = tile(cuda, *family, together)?;
            match tile.cluster() {
                Some(cluster) => gemm_hopper::launch(cuda, *family, &tile, cluster, together, None)?,
                None => launch(cuda, *family, &tile, together)?,
            }
        }
    }
    Ok(())
}
