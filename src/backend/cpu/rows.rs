//! Moving and converting: fill, cast, gather, scatter, column ranges.

use super::{Cpu, Shared, kernel, type_code};
use crate::backend::check::{self, ensure};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;
use half::{bf16, f16};

/// Elements per job below which sharing out costs more than it gains.
const GRAIN: usize = 1 << 14;

impl Cpu {
    pub(super) fn fill_rows(&self, out: &mut Tensor, value: f32) -> Result<()> {
        let n = out.elements();
        let dtype = out.dtype();
        ensure(dtype.is_float(), "fill", || format!("expected floats, found {dtype}"))?;
        let to = Shared(out.host_bytes_mut()?);
        self.run_chunks(n, 4 * GRAIN, |start, len| {
            let at = to.at(start * dtype.size());
            // SAFETY: chunks are disjoint and inside the tensor, whose elements have the matched type.
            unsafe {
                match dtype {
                    DType::F32 => std::slice::from_raw_parts_mut(at.cast::<f32>(), len).fill(value),
                    DType::BF16 => {
                        std::slice::from_raw_parts_mut(at.cast::<bf16>(), len).fill(bf16::from_f32(value));
                    }
                    _ => std::slice::from_raw_parts_mut(at.cast::<f16>(), len).fill(f16::from_f32(value)),
                }
            }
        });
        Ok(())
    }

    pub(super) fn cast_elements(&self, out: &mut Tensor, x: &Tensor) -> Result<()> {
        let (n, to_type, from_type) = (out.elements(), out.dtype(), x.dtype());
        check::cast(out, x)?;
        let (to, from) = (Shared(out.host_bytes_mut()?), Shared(x.host_bytes().cast_mut()));
        self.run_chunks(n, GRAIN, |start, len| {
            let (to, from) = (to.at(start * to_type.size()), from.at(start * from_type.size()));
            // SAFETY: chunks are disjoint and inside both tensors, whose elements have the matched types.
            unsafe { self.cast_row(to, to_type, from, from_type, len) };
        });
        Ok(())
    }

    /// # Safety
    /// Both addresses hold `len` elements of their types, not overlapping.
    pub(super) unsafe fn cast_row(
        &self,
        to: *mut u8,
        to_type: DType,
        from: *const u8,
        from_type: DType,
        len: usize,
    ) {
        if to_type == from_type {
            // SAFETY: by the caller's promise.
            unsafe { std::ptr::copy_nonoverlapping(from, to, len * to_type.size()) };
        } else if to_type == DType::F16 {
            for i in 0..len {
                // SAFETY: by the caller's promise.
                unsafe {
                    let x = match from_type {
                        DType::F32 => from.cast::<f32>().add(i).read_unaligned(),
                        _ => from.cast::<bf16>().add(i).read_unaligned().to_f32(),
                    };
                    to.cast::<f16>().add(i).write_unaligned(f16::from_f32(x));
                }
            }
        } else {
            // SAFETY: by the caller's promise.
            unsafe {
                kernel!(self, cast)(to.cast(), type_code(to_type), from.cast(), type_code(from_type), len)
            };
        }
    }

    /// The row numbers, checked against `limit`.
    fn row_numbers<'a>(&self, operation: &'static str, rows: &'a Tensor, limit: usize) -> Result<&'a [i32]> {
        // SAFETY: the tensor holds that many i32 and is not written during the operation.
        let numbers = unsafe { std::slice::from_raw_parts(rows.host::<i32>()?, rows.elements()) };
        match numbers.iter().find(|r| usize::try_from(**r).map_or(true, |r| r >= limit)) {
            None => Ok(numbers),
            Some(bad) => ensure(false, operation, || format!("row {bad} of {limit}")).map(|()| numbers),
        }
    }

    pub(super) fn run_gather(&self, out: &mut Tensor, x: &Tensor, rows: &Tensor) -> Result<()> {
        let cols = x.cols();
        check::gather_rows(out, x, rows)?;
        let numbers = self.row_numbers("gather_rows", rows, x.rows())?;
        let (to_type, from_type) = (out.dtype(), x.dtype());
        let (to, from) = (Shared(out.host_bytes_mut()?), Shared(x.host_bytes().cast_mut()));
        self.run_rows(numbers.len(), cols, |i| {
            let (to, from) =
                (to.at(i * cols * to_type.size()), from.at(numbers[i] as usize * cols * from_type.size()));
            // SAFETY: each job writes its own row; row numbers were checked.
            unsafe { self.cast_row(to, to_type, from, from_type, cols) };
        });
        Ok(())
    }

    pub(super) fn run_scatter_add(&self, out: &mut Tensor, x: &Tensor, rows: &Tensor) -> Result<()> {
        let cols = x.cols();
        let (to_type, from_type) = (out.dtype(), x.dtype());
        check::scatter_add_rows(out, x, rows)?;
        let numbers = self.row_numbers("scatter_add_rows", rows, out.rows())?;
        let (to, from) = (Shared(out.host_bytes_mut()?), Shared(x.host_bytes().cast_mut()));
        let width = 64;
        self.run(cols.div_ceil(width), |job| {
            let (first, len) = (job * width, width.min(cols - job * width));
            self.with_scratch(width, |wide| {
                for (i, row) in numbers.iter().enumerate() {
                    let to = to.at((*row as usize * cols + first) * to_type.size());
                    let mut from: *const u8 = from.at((i * cols + first) * from_type.size());
                    // SAFETY: each job has its own columns; row numbers were checked; scratch holds `width`.
                    unsafe {
                        if from_type != to_type {
                            self.cast_row(wide.cast(), DType::F32, from, from_type, len);
                            from = wide.cast();
                        }
                        kernel!(self, add)(to.cast(), to.cast(), from.cast(), len, type_code(to_type));
                    }
                }
            });
        });
        Ok(())
    }

    pub(super) fn run_copy_columns(
        &self,
        out: &mut Tensor,
        out_col: usize,
        x: &Tensor,
        x_col: usize,
        cols: usize,
        accumulate: bool,
    ) -> Result<()> {
        let dtype = check::copy_columns(out, out_col, x, x_col, cols)?;
        let (out_cols, x_cols) = (out.cols(), x.cols());
        let rows = x.rows();
        let (to, from) = (Shared(out.host_bytes_mut()?), Shared(x.host_bytes().cast_mut()));
        self.run_rows(rows, cols, |i| {
            let to = to.at((i * out_cols + out_col) * dtype.size());
            let from = from.at((i * x_cols + x_col) * dtype.size());
            // SAFETY: each job writes its own row; the column ranges were checked.
            unsafe {
                if accumulate {
                    kernel!(self, add)(to.cast(), to.cast(), from.cast(), cols, type_code(dtype));
                } else {
                    std::ptr::copy_nonoverlapping(from, to, cols * dtype.size());
                }
            }
        });
        Ok(())
    }

    /// Runs `job` for every row, in jobs of at least [`GRAIN`] elements.
    pub(super) fn run_rows(&self, rows: usize, cols: usize, job: impl Fn(usize) + Send + Sync) {
        let per_job = (GRAIN / cols.max(1)).max(1).max(rows.div_ceil(8 * self.threads));
        self.run(rows.div_ceil(per_job), |i| (i * per_job..((i + 1) * per_job).min(rows)).for_each(&job));
    }
}
