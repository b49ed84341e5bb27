//! Quantizing and dequantizing matrices.

use super::bindings::{quantized, quantizer};
use super::{Cpu, Shared, kernel, type_code};
use crate::backend::Kernels;
use crate::backend::check::ensure;
use crate::backend::quantized::{format_code, upload_nested};
use crate::dtype::DType;
use crate::error::Result;
use crate::quant::double_quant::{NESTED_BLOCKSIZE, NestedScales};
use crate::quant::{Codes, Geometry, Layout, QuantConfig, Quantized, Scales};
use crate::tensor::Tensor;
use std::sync::atomic::{AtomicBool, Ordering};

/// Elements per job.
const GRAIN: usize = 1 << 15;

/// The values of two's complement bytes.
static WHOLE_NUMBERS: [f32; 256] = {
    let (mut all, mut i) = ([0.0; 256], 0);
    while i < 256 {
        all[i] = (i as u8 as i8) as f32;
        i += 1;
    }
    all
};

fn layout(config: &QuantConfig, shape: [usize; 2], geometry: Geometry) -> quantized {
    quantized {
        codes: std::ptr::null_mut(),
        scales: std::ptr::null_mut(),
        zeros: std::ptr::null_mut(),
        nested: std::ptr::null(),
        nested_absmax: std::ptr::null(),
        minimums: std::ptr::null_mut(),
        minimum_codes: std::ptr::null(),
        minimum_factors: std::ptr::null(),
        nested_map: std::ptr::null(),
        nested_offset: 0.0,
        nested_shift: NESTED_BLOCKSIZE.trailing_zeros() as i32,
        levels: config.format.levels().map_or(std::ptr::null(), |l| l.as_ptr()),
        rows: shape[0],
        cols: shape[1],
        block_rows: geometry.block_rows,
        block_cols: geometry.block_cols,
        blocks_per_row: geometry.blocks_per_row,
        format: format_code(config.format.codes),
        panels: 0,
    }
}

/// The matrix as the C kernels see it, for reading; it lives no longer than `x`.
pub(super) fn view(x: &Quantized) -> quantized {
    let mut view = layout(&x.config(), *x.shape(), x.geometry());
    view.panels = i32::from(x.layout() == Layout::Panels);
    view.codes = x.codes().host_bytes().cast_mut();
    match x.scales() {
        Scales::Plain(scales) => view.scales = scales.host_bytes().cast::<f32>().cast_mut(),
        Scales::Nested { codes, absmax, map, offset } => {
            view.nested = codes.host_bytes();
            view.nested_absmax = absmax.host_bytes().cast();
            view.nested_map = map.host_bytes().cast();
            view.nested_offset = *offset;
        }
        Scales::Products { codes, factors, per_factor } => {
            view.nested = codes.host_bytes();
            view.nested_absmax = factors.host_bytes().cast();
            view.nested_map = WHOLE_NUMBERS.as_ptr();
            view.nested_shift = per_factor.trailing_zeros() as i32;
        }
    }
    match x.minimums() {
        Some(Scales::Plain(minimums)) => view.minimums = minimums.host_bytes().cast::<f32>().cast_mut(),
        Some(Scales::Products { codes, factors, .. } | Scales::Nested { codes, absmax: factors, .. }) => {
            view.minimum_codes = codes.host_bytes();
            view.minimum_factors = factors.host_bytes().cast();
        }
        None => {}
    }
    view.zeros = x.zeros().map_or(std::ptr::null_mut(), |z| z.host_bytes().cast_mut());
    view
}

/// Rows and columns of which a panel's parts are made (`cpu/panels.h`).
const PANEL: usize = 32;

/// Bytes of codes from which on no more matrices are laid out in one block of memory. Small blocks would have small
/// pages, with which decoding is a tenth slower or more.
const LAID_OUT_TOGETHER: usize = 16 << 20;

/// Whether the matrix's format and shape allow panels.
fn has_panels(x: &Quantized) -> bool {
    let ([rows, cols], geometry, format) = (*x.shape(), x.geometry(), x.config().format);
    let whole = rows.is_multiple_of(PANEL) && cols.is_multiple_of(PANEL) && rows * cols > 0;
    let flat = geometry.block_rows == 0 && cols.is_multiple_of(geometry.block_cols);
    let blocks = match format.bits() {
        4 => flat,
        8 => (flat || geometry.block_rows > 0) && geometry.block_cols.is_multiple_of(PANEL),
        _ => false,
    };
    x.layout() == Layout::Rows && whole && blocks
}

/// Constants of each kind that the matrix has in panels: rows that share a block have a copy each.
fn constants_in_panels(x: &Quantized) -> usize {
    let [rows, cols] = *x.shape();
    rows * cols.div_ceil(x.geometry().block_cols)
}

impl Cpu {
    /// Puts the matrices into panels whose format, shape and scales, and the instruction set, allow it.
    pub(super) fn run_lay_out(&self, all: &mut [&mut Quantized]) -> Result<()> {
        let mut all: Vec<_> = all.iter_mut().filter(|x| has_panels(x)).collect();
        let mut rest = &mut all[..];
        while !rest.is_empty() {
            let (mut count, mut bytes, mut blocks) = (0, 0, 0);
            while count < rest.len() && bytes < LAID_OUT_TOGETHER {
                bytes += rest[count].codes().elements();
                blocks += constants_in_panels(rest[count]);
                count += 1;
            }
            let (group, others) = rest.split_at_mut(count);
            let (codes, scales) = (self.empty(&[bytes], DType::U8)?, self.empty(&[blocks], DType::F32)?);
            let (mut byte, mut block) = (0, 0);
            for x in group {
                let (bytes, blocks) = (x.codes().elements(), constants_in_panels(x));
                let to = (codes.slice(byte..byte + bytes)?, scales.slice(block..block + blocks)?);
                if let Some(laid_out) = self.lay_out(x, to)? {
                    ***x = laid_out;
                }
                (byte, block) = (byte + bytes, block + blocks);
            }
            rest = others;
        }
        Ok(())
    }

    /// The matrix in panels, its codes and scales in the tensors given; none if its scales don't allow it.
    fn lay_out(&self, x: &Quantized, (mut codes, mut scales): (Tensor, Tensor)) -> Result<Option<Quantized>> {
        let ([rows, cols], geometry) = (*x.shape(), x.geometry());
        let mut zeros = x.zeros().map(|z| self.empty(z.shape(), DType::U8)).transpose()?;
        let mut minimums =
            x.minimums().map(|_| self.empty(&[constants_in_panels(x)], DType::F32)).transpose()?;
        let from = view(x);
        let mut to = layout(&x.config(), *x.shape(), geometry);
        to.codes = codes.host_mut()?;
        to.scales = scales.host_mut()?;
        if let Some(zeros) = &mut zeros {
            to.zeros = zeros.host_mut()?;
        }
        if let Some(minimums) = &mut minimums {
            to.minimums = minimums.host_mut()?;
        }
        let takes = AtomicBool::new(true);
        let (to, from) = (Shared(std::ptr::from_mut(&mut to)), Shared(std::ptr::from_ref(&from).cast_mut()));
        let (panels, per_job) = (rows / PANEL, (GRAIN / (PANEL * cols)).max(1));
        self.run(panels.div_ceil(per_job), |job| {
            let (first, last) = (job * per_job, ((job + 1) * per_job).min(panels));
            // SAFETY: each job writes its own panels, which are whole; the sizes follow from the geometry.
            if unsafe { kernel!(self, lay_out_panels)(to.at(0), from.at(0), first, last) } == 0 {
                takes.store(false, Ordering::Relaxed);
            }
        });
        let takes = takes.into_inner();
        Ok(takes.then(|| x.laid_out(Layout::Panels, codes, scales, zeros, minimums)))
    }

    pub(super) fn run_quantize(&self, x: &Tensor, config: &QuantConfig) -> Result<Quantized> {
        config.check()?;
        ensure(x.dtype().is_float(), "quantize", || format!("expected floats, found {}", x.dtype()))?;
        let shape = [x.rows(), x.cols()];
        let (format, geometry) = (config.format, config.geometry(shape[0], shape[1]));
        let count = geometry.count;
        let mut codes = self.empty(&[(x.elements() * format.bits()).div_ceil(8)], DType::U8)?;
        let mut scales = self.empty(&[count], DType::F32)?;
        let mut zeros = format.zero_points().then(|| self.empty(&[count], DType::U8)).transpose()?;
        let mut matrix = layout(config, shape, geometry);
        matrix.codes = codes.host_mut()?;
        matrix.scales = scales.host_mut()?;
        if let Some(zeros) = &mut zeros {
            matrix.zeros = zeros.host_mut()?;
        }
        let thresholds = format.thresholds();
        let ranks = match format.codes {
            Codes::Levels { ranks, .. } => ranks.map(f32::from),
            _ => [0.0; 16],
        };
        let how = quantizer {
            thresholds: thresholds.as_ref().map_or(std::ptr::null(), |t| t.as_ptr()),
            ranks: ranks.as_ptr(),
            max_level: format.max_level,
        };
        let finite = AtomicBool::new(true);
        let (matrix, how) =
            (Shared(std::ptr::from_mut(&mut matrix)), Shared(std::ptr::from_ref(&how).cast_mut()));
        let from = Shared(x.host_bytes().cast_mut());
        let per_job = (GRAIN * count).div_ceil(x.elements().max(1)).max(1);
        self.run(count.div_ceil(per_job), |job| {
            let (first, last) = (job * per_job, ((job + 1) * per_job).min(count));
            // SAFETY: each job writes the codes and constants of its own blocks, whose codes share no byte:
            // blocks of four-bit codes have an even number of elements. The sizes follow from the geometry.
            let good = unsafe {
                kernel!(self, quantize)(
                    matrix.at(0),
                    how.at(0),
                    from.at(0).cast(),
                    type_code(x.dtype()),
                    first,
                    last,
                )
            };
            if good == 0 {
                finite.store(false, Ordering::Relaxed);
            }
        });
        ensure(finite.into_inner(), "quantize", || "expected finite elements, found one that is not".into())?;
        let scales = if config.double_quant { self.nest(&scales)? } else { Scales::Plain(scales) };
        Quantized::new(*config, shape, codes, scales, zeros, x.dtype())
    }

    fn nest(&self, scales: &Tensor) -> Result<Scales> {
        let mut plain = vec![0f32; scales.elements()];
        self.download(scales, bytemuck::cast_slice_mut(&mut plain))?;
        let nested = match self.is_planner() {
            true => NestedScales::zeros(plain.len()),
            false => NestedScales::quantize(&plain),
        };
        upload_nested(self, &nested)
    }

    pub(super) fn run_dequantize(&self, out: &mut Tensor, x: &Quantized) -> Result<()> {
        let [rows, cols] = *x.shape();
        let dtype = out.dtype();
        ensure(dtype.is_float() && out.elements() == rows * cols, "dequantize", || {
            format!("[{rows}, {cols}] into {:?} {dtype}", out.shape())
        })?;
        let matrix = view(x);
        let (matrix, to) = (Shared(std::ptr::from_ref(&matrix).cast_mut()), Shared(out.host_bytes_mut()?));
        self.run_rows(rows, cols, |row| {
            let to = to.at(row * cols * dtype.size());
            // SAFETY: each job writes its own row; scratch holds a row of floats.
            unsafe {
                if dtype != DType::F16 {
                    return kernel!(self, dequantize_row)(matrix.at(0), row, to.cast(), type_code(dtype));
                }
                self.with_scratch(cols, |wide| {
                    kernel!(self, dequantize_row)(matrix.at(0), row, wide.cast(), type_code(DType::F32));
                    self.cast_row(to, dtype, wide.cast(), DType::F32, cols);
                });
            }
        });
        Ok(())
    }
}
