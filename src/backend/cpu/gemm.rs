//! Matrix products: operands packed and column panels computed in parallel.

use super::bindings::{gemm_args, gemm_operand, gemm_term, quantized};
use super::quant::view;
use super::{Cpu, Shared, kernel, type_code};
use crate::backend::{Gemm, Kernels, Matrix, check};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;
use std::ops::Range;

/// Row tiles per job, so that a job's accumulators stay in the second-level cache.
const TILES_PER_JOB: usize = 40;

/// Products of at most this many rows are computed from registers (`cpu/gemv.h`), a panel at a time.
const FEW_ROWS: usize = 4;

/// Jobs of a thread, of products with few rows, from which on a job takes several panels: enough to end evenly.
const FEW_ROWS_JOBS: usize = 12;

/// Products below this many multiplications run on the calling thread.
const SERIAL_WORK: usize = 1 << 17;

/// Many products of at most this many multiplications each run side by side, each on one thread.
const SMALL_WORK: usize = 1 << 20;

/// Results of at most this many columns, and at least four times as many rows, are computed as their
/// transpose: the long operand is then packed panel by panel in cache instead of ahead, in memory.
const SKINNY: usize = 128;

fn dense_operand(tensor: &Tensor, transposed: bool) -> gemm_operand {
    gemm_operand {
        data: tensor.host_bytes().cast(),
        quantized: std::ptr::null(),
        ld: tensor.cols(),
        type_: type_code(tensor.dtype()),
        transposed: i32::from(transposed),
    }
}

fn quantized_operand(view: &quantized, transposed: bool) -> gemm_operand {
    gemm_operand {
        data: std::ptr::null(),
        quantized: view,
        ld: view.cols,
        type_: 0,
        transposed: i32::from(transposed),
    }
}

fn is_transposed(matrix: &Matrix<'_>) -> bool {
    match *matrix {
        Matrix::Dense { transposed, .. } | Matrix::Quantized { transposed, .. } => transposed,
    }
}

fn is_quantized(matrix: &Matrix<'_>) -> bool {
    matches!(matrix, Matrix::Quantized { .. })
}

/// Products that are ready to run, and what they point to, which has its place from the start.
struct Prepared<'a> {
    products: Vec<Product>,
    terms: Vec<gemm_term>,
    views: Vec<quantized>,
    casts: Vec<Tensor>,
    packed: Vec<Packed<'a>>,
}

/// A product that is ready to run.
struct Product {
    args: gemm_args,
    work: usize, // multiplications
}

/// A packed left operand.
struct Packed<'a> {
    of: Option<PackedOf<'a>>, // nothing that another product may have too
    units: Tensor,
}

/// What a packed left operand depends on.
struct PackedOf<'a> {
    matrix: &'a Tensor,
    transposed: bool,
    m: usize,
    rows: Range<usize>,
    bf16: bool,
}

impl PackedOf<'_> {
    fn is_same(&self, other: &PackedOf<'_>) -> bool {
        let key = |of: &PackedOf<'_>| (of.matrix.dtype(), of.transposed, of.m, of.rows.clone(), of.bf16);
        self.matrix.is_same(other.matrix) && key(self) == key(other)
    }
}

impl Product {
    /// Whether the kernels for few rows take it.
    fn has_few_rows(&self) -> bool {
        self.args.m <= FEW_ROWS && self.args.bf16 != 0
    }
}

impl Prepared<'_> {
    /// Room for products of so many terms in all.
    fn with_capacity(products: usize, terms: usize) -> Self {
        Prepared {
            products: Vec::with_capacity(products),
            terms: Vec::with_capacity(terms),
            views: Vec::with_capacity(terms),
            casts: Vec::with_capacity(terms),
            packed: Vec::with_capacity(terms),
        }
    }
}

impl Cpu {
    pub(super) fn run_gemms(&self, products: &mut [(&mut Tensor, Gemm<'_>)]) -> Result<()> {
        products.iter().try_for_each(|(out, gemm)| check::gemm(out, gemm))?;
        let terms = products.iter().map(|(_, gemm)| gemm.terms.len() + gemm.row_terms.len()).sum();
        let mut prepared = Prepared::with_capacity(products.len(), terms);
        for (out, gemm) in products.iter_mut().filter(|(out, _)| out.elements() > 0) {
            self.prepare(out, gemm, &mut prepared)?;
        }
        let products = &prepared.products[..];
        if products.iter().all(Product::has_few_rows) {
            self.run_few_rows(products);
        } else if products.len() >= 4 * self.threads && products.iter().all(|p| p.work <= SMALL_WORK) {
            self.run_small(products);
        } else {
            products.iter().for_each(|product| self.run_panels(&product.args, product.work));
        }
        Ok(())
    }

    /// Packs what the product before it has not packed: those of one input are neighbours.
    fn prepare<'a>(&self, out: &mut Tensor, gemm: &Gemm<'a>, to: &mut Prepared<'a>) -> Result<()> {
        debug_assert!(to.terms.capacity() - to.terms.len() >= gemm.terms.len() + gemm.row_terms.len());
        let (rows, cols) = (out.rows(), out.cols());
        let all = || gemm.terms_by_rows(rows);
        let bf16 = all().all(|(_, t)| t.a.dense().is_ok_and(|a| a.dtype() == DType::BF16));
        let can_flip = gemm.row_terms.is_empty() && !all().any(|(_, t)| is_quantized(&t.b));
        let flip = cols <= SKINNY && 4 * cols <= rows && can_flip;
        let (m, n) = if flip { (cols, rows) } else { (rows, cols) };
        let (first, before) = (to.terms.len(), to.products.last().map_or(0, |product| product.args.n_terms));
        let mut work = 0;
        for (range, term) in all() {
            let k = term.a.shape().1;
            let (left, transposed) = (term.a.dense()?, is_transposed(&term.a));
            let a = dense_operand(left, transposed != flip);
            let b = self.right_operand(&term.b, bf16, flip, to)?;
            let (a, b) = if flip { (b, a) } else { (a, b) };
            let range = if flip { 0..m } else { range };
            let of = (!flip).then(|| PackedOf { matrix: left, transposed, m, rows: range.clone(), bf16 });
            let is_same = |packed: &&Packed<'_>| matches!((&of, &packed.of), (Some(of), Some(other)) if of.is_same(other));
            let units = match to.packed[first - before..first].iter().find(is_same) {
                Some(packed) => packed.units.clone(),
                None => self.pack_a(&a, m, range.clone(), k, bf16)?,
            };
            to.terms.push(gemm_term {
                a: units.host_bytes().cast(),
                b,
                k,
                first_row: range.start,
                last_row: range.end,
            });
            to.packed.push(Packed { of, units });
            work += range.len() * n * k;
        }
        let terms = &to.terms[first..];
        let args = gemm_args {
            terms: terms.as_ptr(),
            n_terms: terms.len(),
            m,
            n,
            ldo: cols,
            out_type: type_code(out.dtype()),
            out_transposed: i32::from(flip),
            out: out.host_bytes_mut()?.cast(),
            bf16: i32::from(bf16),
            accumulate: i32::from(gemm.accumulate),
            scale: gemm.scale,
            bias: gemm.bias.map_or(std::ptr::null(), |b| b.host_bytes().cast()),
            bias_type: gemm.bias.map_or(0, |b| type_code(b.dtype())),
        };
        to.products.push(Product { args, work });
        Ok(())
    }

    /// A right operand in a type that the arithmetic takes; `to` keeps what it points to.
    fn right_operand(
        &self,
        matrix: &Matrix<'_>,
        bf16: bool,
        flip: bool,
        to: &mut Prepared<'_>,
    ) -> Result<gemm_operand> {
        let transposed = is_transposed(matrix) != flip;
        let tensor = match *matrix {
            Matrix::Dense { tensor, .. } => tensor,
            Matrix::Quantized { matrix, .. } => {
                to.views.push(view(matrix));
                return Ok(quantized_operand(&to.views[to.views.len() - 1], transposed));
            }
        };
        if !bf16 || tensor.dtype() == DType::BF16 {
            return Ok(dense_operand(tensor, transposed));
        }
        let mut out = self.empty(tensor.shape(), DType::BF16)?;
        self.cast(&mut out, tensor)?;
        let operand = dense_operand(&out, transposed);
        to.casts.push(out);
        Ok(operand)
    }

    fn tile_rows(&self, m: usize) -> usize {
        // SAFETY: a pure function of its argument.
        unsafe { kernel!(self, gemm_tile_rows)(m) }
    }

    fn tiles(&self, m: usize) -> usize {
        m.div_ceil(self.tile_rows(m))
    }

    /// Packs a left operand, the rows `range` of a result of `m` rows.
    fn pack_a(
        &self,
        a: &gemm_operand,
        m: usize,
        range: Range<usize>,
        k: usize,
        bf16: bool,
    ) -> Result<Tensor> {
        let (first_row, rows, bf16) = (range.start, range.len(), i32::from(bf16));
        // SAFETY: a pure function of its arguments.
        let units = unsafe { kernel!(self, gemm_pack_a_units)(rows, k, bf16) };
        let mut packed = self.empty(&[units], DType::F32)?;
        let to = Shared(packed.host_mut::<f32>()?);
        let a = Shared(std::ptr::from_ref(a).cast_mut());
        let (first_tile, last_tile) = (first_row / self.tile_rows(m), range.end.div_ceil(self.tile_rows(m)));
        let tiles = last_tile - first_tile;
        let chunk = if rows * k < SERIAL_WORK / 4 { tiles } else { tiles.div_ceil(2 * self.threads) }.max(1);
        self.run(tiles.div_ceil(chunk), |i| {
            let first = first_tile + i * chunk;
            let last = (first + chunk).min(last_tile);
            // SAFETY: a tile's units are written by the one job that has the tile; `a` outlives the jobs.
            unsafe {
                kernel!(self, gemm_pack_a)(to.at(0).cast(), a.at(0), m, first_row, rows, k, bf16, first, last)
            };
        });
        Ok(packed)
    }

    fn run_panels(&self, args: &gemm_args, work: usize) {
        let width = self.table.gemm_nr;
        let m = args.m;
        let panels = args.n.div_ceil(width);
        let tiles = self.tiles(m);
        let together = self.panels_per_job(panels, tiles);
        let groups = panels.div_ceil(together);
        let mut tiles_per_job = tiles.min(TILES_PER_JOB);
        if groups < 3 * self.threads && !groups.is_multiple_of(self.threads) {
            let row_jobs = (4 * self.threads).div_ceil(groups);
            tiles_per_job = tiles_per_job.min(tiles.div_ceil(row_jobs)).max(1);
        }
        let row_jobs = tiles.div_ceil(tiles_per_job);
        let shared = Shared(std::ptr::from_ref(args).cast_mut());
        let part = |i: usize| {
            let (group, first) = (i / row_jobs, i % row_jobs * tiles_per_job);
            let start = group * together;
            (start, together.min(panels - start), first, (first + tiles_per_job).min(tiles))
        };
        let floats = |i: usize| {
            let (_, count, first, last) = part(i);
            // SAFETY: a pure function of its arguments.
            unsafe { kernel!(self, gemm_scratch)(m, count, first, last) }
        };
        self.run_with_scratch(groups * row_jobs, work < SERIAL_WORK, floats, |i, scratch| {
            let (start, count, first, last) = part(i);
            // SAFETY: the jobs' column panels and row tiles are disjoint; operands were checked.
            unsafe { kernel!(self, gemm_panels)(shared.at(0), start * width, count, first, last, scratch) };
        });
    }

    /// Many small products, a job for each.
    fn run_small(&self, products: &[Product]) {
        let width = self.table.gemm_nr;
        let all: Vec<_> = products
            .iter()
            .map(|p| (Shared(std::ptr::from_ref(&p.args).cast_mut()), p.args.m, p.args.n))
            .collect();
        let floats = |i: usize| {
            // SAFETY: a pure function of its arguments.
            unsafe { kernel!(self, gemm_scratch)(all[i].1, 1, 0, self.tiles(all[i].1)) }
        };
        let work: usize = products.iter().map(|product| product.work).sum();
        self.run_with_scratch(all.len(), work < SERIAL_WORK, floats, |i, scratch| {
            let (args, m, n) = &all[i];
            for column in (0..*n).step_by(width) {
                // SAFETY: each job writes its own product's result; operands were checked; the products outlive the jobs.
                unsafe { kernel!(self, gemm_panels)(args.at(0), column, 1, 0, self.tiles(*m), scratch) };
            }
        });
    }

    /// Products of few rows, all at once: each thread takes its share of every one's panels.
    fn run_few_rows(&self, products: &[Product]) {
        let (width, threads) = (self.table.gemm_nr, self.threads);
        // By product: its arguments, tiles, panels, panels of a job, and jobs of a thread.
        let parts: Vec<_> = products
            .iter()
            .map(|product| {
                let panels = product.args.n.div_ceil(width);
                let together = (panels / (FEW_ROWS_JOBS * threads)).clamp(1, 4);
                let args = Shared(std::ptr::from_ref(&product.args).cast_mut());
                let jobs = panels.div_ceil(threads).div_ceil(together);
                (args, self.tiles(product.args.m), panels, together, jobs)
            })
            .collect();
        let jobs: usize = parts.iter().map(|(.., jobs)| jobs).sum();
        let rows = products.iter().map(|product| product.args.m).max().unwrap_or(0);
        // SAFETY: a pure function of its arguments.
        let floats = |_| unsafe { kernel!(self, gemm_scratch)(rows, 1, 0, self.tiles(rows)) };
        let work: usize = products.iter().map(|product| product.work).sum();
        self.run_with_scratch(threads * jobs, work < SERIAL_WORK, floats, |i, scratch| {
            let (thread, mut job) = (i / jobs, i % jobs);
            for (args, tiles, panels, together, jobs) in &parts {
                if job >= *jobs {
                    job -= jobs;
                    continue;
                }
                let (first, end) = (thread * panels / threads, (thread + 1) * panels / threads);
                let first = first + job * together;
                for panel in first..end.min(first + together) {
                    // SAFETY: the jobs' column panels are disjoint; operands were checked; the products outlive
                    // the jobs.
                    unsafe { kernel!(self, gemm_panels)(args.at(0), panel * width, 1, 0, *tiles, scratch) };
                }
                return;
            }
        });
    }

    /// Neighbouring panels that a job takes: they share reads of A, and pages of an untransposed B. One where
    /// there are few rows, so that B stays in the first-level cache; else as many as keep the threads evenly busy.
    fn panels_per_job(&self, panels: usize, tiles: usize) -> usize {
        if tiles < 8 {
            return 1;
        }
        let even = |groups: usize| groups.is_multiple_of(self.threads) || groups >= 8 * self.threads;
        let fits = |together: &usize| {
            let groups = panels.div_ceil(*together);
            groups >= 2 * self.threads && panels.is_multiple_of(*together) && even(groups)
        };
        (2..=4).rev().find(fits).unwrap_or(1)
    }
}
