//! A quantized matrix: its codes and constants, checked.

use super::double_quant::NESTED_BLOCKSIZE;
use super::{Codes, Geometry, QuantConfig};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
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
