//! A quantized matrix: its codes and constants, checked.

use super::double_quant::NESTED_BLOCKSIZE;
use super::{Codes, Geometry, QuantConfig};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use std::ops::Range;
use std::sync::Arc;

/// The scales of a matrix's blocks, or their minimums.
#[derive(Clone, Debug)]
pub enum Scales {
    /// As they are: f32 `[blocks]`.
    Plain(Tensor),
    /// Quantized themselves; see [`double_quant`](super::double_quant).
    Nested {
        /// u8 `[blocks]`.
        codes: Tensor,
        /// f32 `[blocks / 256]`, rounded up.
        absmax: Tensor,
        /// f32 `[256]`.
        map: Tensor,
        /// The scales' mean.
        offset: f32,
    },
    /// Whole numbers times a factor that several blocks share.
    Products {
        /// Two's complement, u8 `[blocks]`.
        codes: Tensor,
        /// f32 `[blocks / per_factor]`.
        factors: Tensor,
        /// Blocks that share a factor: a power of two.
        per_factor: usize,
    },
}

impl Scales {
    fn bytes(&self) -> usize {
        match self {
            Scales::Plain(scales) => scales.bytes(),
            Scales::Nested { codes, absmax, .. } => codes.bytes() + absmax.bytes(),
            Scales::Products { codes, factors, .. } => codes.bytes() + factors.bytes(),
        }
    }

    fn check(&self, what: &str, blocks: usize) -> Result<()> {
        match self {
            Scales::Plain(plain) => expect(what, plain, DType::F32, blocks),
            Scales::Nested { codes, absmax, map, .. } => {
                expect(&format!("codes of {what}"), codes, DType::U8, blocks)?;
                expect(&format!("nested {what}"), absmax, DType::F32, blocks.div_ceil(NESTED_BLOCKSIZE))?;
                expect("entries of the nested map", map, DType::F32, 256)
            }
            Scales::Products { codes, factors, per_factor } => {
                if !per_factor.is_power_of_two() {
                    return Err(Error::shape("quantized", format!("{per_factor} blocks to a factor")));
                }
                expect(&format!("codes of {what}"), codes, DType::U8, blocks)?;
                expect(&format!("factors of {what}"), factors, DType::F32, blocks.div_ceil(*per_factor))
            }
        }
    }
}

impl Scales {
    /// Those of some blocks; none where what several blocks share would have to be cut.
    fn slice(&self, blocks: &Range<usize>) -> Result<Option<Self>> {
        let shared = |per: usize| {
            let whole = blocks.start.is_multiple_of(per);
            whole.then(|| blocks.start / per..blocks.end.div_ceil(per))
        };
        Ok(match self {
            Scales::Plain(plain) => Some(Scales::Plain(plain.slice(blocks.clone())?)),
            Scales::Nested { codes, absmax, map, offset } => match shared(NESTED_BLOCKSIZE) {
                Some(range) => Some(Scales::Nested {
                    codes: codes.slice(blocks.clone())?,
                    absmax: absmax.slice(range)?,
                    map: map.clone(),
                    offset: *offset,
                }),
                None => None,
            },
            Scales::Products { codes, factors, per_factor } => match shared(*per_factor) {
                Some(range) => Some(Scales::Products {
                    codes: codes.slice(blocks.clone())?,
                    factors: factors.slice(range)?,
                    per_factor: *per_factor,
                }),
                None => None,
            },
        })
    }
}

/// Fails unless a part of a matrix has this type and size.
fn expect(what: &str, part: &Tensor, dtype: DType, count: usize) -> Result<()> {
    if part.dtype() == dtype && part.elements() == count {
        return Ok(());
    }
    Err(Error::shape(
        "quantized",
        format!("expected {count} {dtype} {what}, found {} {}", part.elements(), part.dtype()),
    ))
}

/// The order of codes and constants in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Row-major.
    Rows,
    /// As the CPU's products with few rows read them (`cpu/panels.h`).
    Panels,
}

/// A quantized matrix; cheap to clone.
#[derive(Clone, Debug)]
pub struct Quantized {
    inner: Arc<Parts>,
}

#[derive(Debug)]
struct Parts {
    config: QuantConfig,
    shape: [usize; 2],
    layout: Layout,
    codes: Tensor,
    scales: Scales,
    zeros: Option<Tensor>,
    minimums: Option<Scales>,
    dtype: DType,
}

impl Quantized {
    /// Whether both handles are of one matrix.
    pub(crate) fn is_same(&self, other: &Quantized) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// A matrix of these parts: `codes` u8, `zeros` u8 `[blocks]` where the format has zero points. `dtype` is
    /// the type that the weight had.
    ///
    /// # Errors
    /// When a part's size does not fit.
    pub fn new(
        config: QuantConfig,
        shape: [usize; 2],
        codes: Tensor,
        scales: Scales,
        zeros: Option<Tensor>,
        dtype: DType,
    ) -> Result<Self> {
        Self::with_minimums(config, shape, codes, scales, zeros, None, dtype)
    }

    /// [`Quantized::new`] with the minimums of the blocks, for formats that have them. Minimums are kept as the scales are.
    ///
    /// # Errors
    /// When a part's size does not fit.
    pub fn with_minimums(
        config: QuantConfig,
        shape: [usize; 2],
        codes: Tensor,
        scales: Scales,
        zeros: Option<Tensor>,
        minimums: Option<Scales>,
        dtype: DType,
    ) -> Result<Self> {
        config.check_blocks(16)?;
        let [rows, cols] = shape;
        let elements = rows.checked_mul(cols).filter(|n| *n <= isize::MAX as usize / 16);
        let elements =
            elements.ok_or_else(|| Error::shape("quantized", format!("{shape:?} is too large")))?;
        let blocks = config.geometry(rows, cols).count;
        expect("bytes of codes", &codes, DType::U8, (elements * config.format.bits()).div_ceil(8))?;
        scales.check("scales", blocks)?;
        if let Some(zeros) = &zeros {
            expect("zero points", zeros, DType::U8, blocks)?;
        }
        if let Some(minimums) = &minimums {
            minimums.check("minimums", blocks)?;
        }
        let alike = match (&scales, &minimums) {
            (_, None) | (Scales::Plain(_), Some(Scales::Plain(_))) => true,
            (Scales::Products { per_factor: a, .. }, Some(Scales::Products { per_factor: b, .. })) => a == b,
            _ => false,
        };
        // The planes of six-bit codes, and blocks in either, begin at whole bytes.
        let whole = config.format.codes != Codes::Int6 || elements.is_multiple_of(16);
        let fits =
            zeros.is_some() == config.format.zero_points() && minimums.is_some() == config.format.minimums();
        if !fits || !alike || !whole {
            return Err(Error::shape("quantized", "zero points, minimums or sizes do not fit the format"));
        }
        let config = QuantConfig { double_quant: matches!(scales, Scales::Nested { .. }), ..config };
        let layout = Layout::Rows;
        Ok(Quantized {
            inner: Arc::new(Parts { config, shape, layout, codes, scales, zeros, minimums, dtype }),
        })
    }

    /// Some of the rows as a matrix that shares the codes and constants; none where these can't be cut there: inside a block, a
    /// byte, what blocks share, or the planes of six-bit codes.
    ///
    /// # Errors
    /// When the range leaves the matrix.
    pub fn slice(&self, rows: Range<usize>) -> Result<Option<Self>> {
        let ([all, cols], config, geometry) = (*self.shape(), self.config(), self.geometry());
        if rows.start > rows.end || rows.end > all {
            return Err(Error::shape("slice", format!("rows {rows:?} of a matrix with {all}")));
        }
        let (unit, per_unit) = match geometry.block_rows {
            0 => (cols, geometry.block_cols),
            block_rows => (1, block_rows),
        };
        let bits = cols * config.format.bits();
        let whole = |row: usize| {
            row == all || (row * unit).is_multiple_of(per_unit) && (row * bits).is_multiple_of(8)
        };
        let planes = config.format.codes == Codes::Int6 && rows != (0..all);
        if self.layout() != Layout::Rows || planes || !whole(rows.start) || !whole(rows.end) {
            return Ok(None);
        }
        let block = |row: usize| if row == all { geometry.count } else { geometry.block(row, 0, cols) };
        let blocks = block(rows.start)..block(rows.end);
        let bytes = rows.start * bits / 8..(rows.end * bits).div_ceil(8);
        let minimums = self.minimums().map(|m| m.slice(&blocks)).transpose()?;
        let (Some(scales), false) = (self.scales().slice(&blocks)?, matches!(minimums, Some(None))) else {
            return Ok(None);
        };
        let zeros = self.zeros().map(|zeros| zeros.slice(blocks)).transpose()?;
        let (codes, minimums) = (self.codes().slice(bytes)?, minimums.flatten());
        let shape = [rows.len(), cols];
        Self::with_minimums(config, shape, codes, scales, zeros, minimums, self.dtype()).map(Some)
    }

    /// The same matrix with codes and constants in another order.
    pub(crate) fn laid_out(
        &self,
        layout: Layout,
        codes: Tensor,
        scales: Tensor,
        zeros: Option<Tensor>,
        minimums: Option<Tensor>,
    ) -> Self {
        let (config, shape, dtype) = (self.config(), *self.shape(), self.dtype());
        let (scales, minimums) = (Scales::Plain(scales), minimums.map(Scales::Plain));
        Quantized { inner: Arc::new(Parts { config, shape, layout, codes, scales, zeros, minimums, dtype }) }
    }

    /// The order of codes and constants in memory.
    pub fn layout(&self) -> Layout {
        self.inner.layout
    }

    /// Fails unless codes and constants lie row by row.
    ///
    /// # Errors
    /// As said.
    pub(crate) fn expect_rows(&self) -> Result<()> {
        match self.layout() {
            Layout::Rows => Ok(()),
            Layout::Panels => Err(Error::Unsupported(
                "expected a quantized matrix as it was loaded, found one laid out for decoding; load the model again".into(),
            )),
        }
    }

    /// The settings it was made with.
    pub fn config(&self) -> QuantConfig {
        self.inner.config
    }

    /// Rows and columns.
    pub fn shape(&self) -> &[usize; 2] {
        &self.inner.shape
    }

    /// The type of the weight that was quantized.
    pub fn dtype(&self) -> DType {
        self.inner.dtype
    }

    /// u8; four bits: two codes in a byte.
    pub fn codes(&self) -> &Tensor {
        &self.inner.codes
    }

    /// One per block.
    pub fn scales(&self) -> &Scales {
        &self.inner.scales
    }

    /// One per block, for formats that have them.
    pub fn zeros(&self) -> Option<&Tensor> {
        self.inner.zeros.as_ref()
    }

    /// One per block, for formats that have them.
    pub fn minimums(&self) -> Option<&Scales> {
        self.inner.minimums.as_ref()
    }

    /// The cut into blocks.
    pub fn geometry(&self) -> Geometry {
        self.inner.config.geometry(self.inner.shape[0], self.inner.shape[1])
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.codes().bytes()
            + self.scales().bytes()
            + self.minimums().map_or(0, Scales::bytes)
            + self.zeros().map_or(0, Tensor::bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::quant::{FORMATS, Format, QuantConfig};

    #[test]
    fn slices_have_the_rows() {
        let backend = Cpu::new(Some(1)).unwrap();
        let (rows, cols) = (520, 128);
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 37 % 1009) as f32 - 500.0) / 97.0).collect();
        let x = backend.from_slice(&values, &[rows, cols]).unwrap();
        let dense = |matrix: &Quantized| {
            let mut out = backend.empty(matrix.shape(), DType::F32).unwrap();
            backend.dequantize(&mut out, matrix).unwrap();
            backend.to_f32(&out).unwrap()
        };
        for format in &FORMATS {
            for double_quant in [false, true] {
                let config = QuantConfig::new(format);
                let config = QuantConfig { double_quant: double_quant && config.double_quant, ..config };
                let whole = backend.quantize(&x, &config).unwrap();
                let all = dense(&whole);
                for range in [0..520, 0..128, 128..256, 256..520, 512..520, 128..128] {
                    let part = whole.slice(range.clone()).unwrap().unwrap();
                    assert_eq!(part.shape(), &[range.len(), cols]);
                    assert!(
                        dense(&part) == all[range.start * cols..range.end * cols],
                        "{} {range:?}",
                        format.name
                    );
                }
                assert!(whole.slice(0..521).is_err());
            }
        }
        let refused = |name: &str, columns: usize, range: Range<usize>| {
            let x = backend.from_slice(&values[..64 * columns], &[64, columns]).unwrap();
            let config = QuantConfig::new(Format::by_name(name).unwrap());
            backend.quantize(&x, &config).unwrap().slice(range).unwrap().is_none()
        };
        assert!(refused("nf4", 64, 32..64), "inside what 256 scales share");
        assert!(refused("int4", 100, 1..64) && refused("int4", 100, 0..1), "inside a block");
        assert!(refused("fp8-block", 64, 0..32), "inside a square");
        assert!(!refused("int8", 100, 3..5), "rows have scales of their own");
    }
}
