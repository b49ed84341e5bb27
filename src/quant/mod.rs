//! Quantized weights: the table of formats, and matrices in one of them.
//!
//! A matrix `[rows, cols]` is cut into blocks with a scale each; an element is `(level of its code - zero
//! point) * scale`, or `level * scale + minimum`, computed in f32 and rounded once to the type that is asked for. Codes lie
//! row-major, so a file of bitsandbytes is used in place, and all devices share one layout; for generating text, a backend
//! may have one of its own ([`Layout`]).

pub mod double_quant;
pub mod dynamic_map;
pub mod fp4;
pub mod fp8;
pub mod int4;
pub mod int6;
pub mod int8;
pub mod nf4;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use double_quant::NESTED_BLOCKSIZE;
use fp8::Fp8;
use std::sync::Arc;

/// How codes stand for levels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Codes {
    /// Four bits by a table; encoding goes to the nearest level, ties to the lower.
    Levels {
        /// Values of the codes.
        levels: &'static [f32; 16],
        /// Codes by rank of their values.
        ranks: &'static [u8; 16],
    },
    /// Four bits, whole numbers with the zero point 8, or with one for each block.
    Int4 {
        /// Whether blocks have zero points of their own.
        zero_points: bool,
    },
    /// Four bits, whole numbers from 0; blocks have minimums, which are added after the scale.
    Int4Minimum,
    /// Six bits, whole numbers with the zero point 32: see [`int6`].
    Int6,
    /// Eight bits, whole numbers.
    Int8,
    /// Eight bits, small floats.
    Fp8(Fp8),
}

/// Which elements share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks {
    /// Runs of `blocksize` elements of the flat matrix; they cross rows whose length it does not divide.
    Flat,
    /// Rows.
    Row,
    /// Squares of this edge.
    Square(usize),
}

/// A row of the table of formats.
#[derive(Debug, PartialEq)]
pub struct Format {
    /// The name in flags.
    pub name: &'static str,
    /// What the codes mean.
    pub codes: Codes,
    /// What shares a scale.
    pub blocks: Blocks,
    /// The scale is a block's largest magnitude (the range, with zero points) over this.
    pub max_level: f32,
    /// Whether scales are quantized themselves unless that is turned off.
    pub double_quant: bool,
}

/// All formats that weights can be quantized to.
pub static FORMATS: [Format; 10] = [
    levels("nf4", &nf4::LEVELS, &nf4::RANKS),
    levels("fp4", &fp4::LEVELS, &fp4::RANKS),
    int4("int4", false, 7.0),
    int4("int4-asym", true, 15.0),
    Format { name: "int8", codes: Codes::Int8, blocks: Blocks::Row, max_level: 127.0, double_quant: false },
    fp8("fp8", Fp8::E4m3, Blocks::Row),
    fp8("fp8-e5m2", Fp8::E5m2, Blocks::Row),
    fp8("fp8-block", Fp8::E4m3, Blocks::Square(128)),
    fp8("fp8-e5m2-block", Fp8::E5m2, Blocks::Square(128)),
    Format {
        name: "int8-block",
        codes: Codes::Int8,
        blocks: Blocks::Flat,
        max_level: 127.0,
        double_quant: false,
    },
];

/// Formats of GGUF files, which are read and never made: whole numbers of four bits with minimums, and of six bits.
pub static READ_ONLY: [Format; 2] = [
    Format {
        name: "int4-minimum",
        codes: Codes::Int4Minimum,
        blocks: Blocks::Flat,
        max_level: 15.0,
        double_quant: false,
    },
    Format { name: "int6", codes: Codes::Int6, blocks: Blocks::Flat, max_level: 31.0, double_quant: false },
];

const fn levels(name: &'static str, levels: &'static [f32; 16], ranks: &'static [u8; 16]) -> Format {
    let codes = Codes::Levels { levels, ranks };
    Format { name, codes, blocks: Blocks::Flat, max_level: 1.0, double_quant: true }
}

const fn int4(name: &'static str, zero_points: bool, max_level: f32) -> Format {
    Format { name, codes: Codes::Int4 { zero_points }, blocks: Blocks::Flat, max_level, double_quant: false }
}

const fn fp8(name: &'static str, kind: Fp8, blocks: Blocks) -> Format {
    Format { name, codes: Codes::Fp8(kind), blocks, max_level: kind.max(), double_quant: false }
}

impl Format {
    /// The format of this name.
    ///
    /// # Errors
    /// When there is none; the message lists those that exist.
    pub fn by_name(name: &str) -> Result<&'static Format> {
        FORMATS.iter().find(|f| f.name == name).ok_or_else(|| {
            let names: Vec<_> = FORMATS.iter().map(|f| f.name).collect();
            Error::config(
                "quantization",
                "quant",
                format!("`{name}` is not one of none, {}", names.join(", ")),
            )
        })
    }

    /// Bits of a code: 4, 6 or 8.
    pub fn bits(&self) -> usize {
        match self.codes {
            Codes::Levels { .. } | Codes::Int4 { .. } | Codes::Int4Minimum => 4,
            Codes::Int6 => 6,
            Codes::Int8 | Codes::Fp8(_) => 8,
        }
    }

    /// Whether blocks have zero points.
    pub fn zero_points(&self) -> bool {
        self.codes == Codes::Int4 { zero_points: true }
    }

    /// Whether blocks have minimums.
    pub fn minimums(&self) -> bool {
        self.codes == Codes::Int4Minimum
    }

    /// Values of codes of four bits.
    pub fn levels(&self) -> Option<&'static [f32; 16]> {
        match self.codes {
            Codes::Levels { levels, .. } => Some(levels),
            Codes::Int4 { zero_points: false } => Some(&int4::SYMMETRIC),
            Codes::Int4 { zero_points: true } | Codes::Int4Minimum => Some(&int4::ASYMMETRIC),
            _ => None,
        }
    }

    /// The value of a code.
    pub fn decode(&self, code: u8) -> f32 {
        match (self.levels(), self.codes) {
            (Some(levels), _) => levels[usize::from(code & 15)],
            (None, Codes::Fp8(kind)) => kind.decode(code),
            (None, Codes::Int6) => int6::decode(code),
            (None, _) => int8::decode(code),
        }
    }

    /// The code of an element times the reciprocal of its scale. `zero` is its block's zero point.
    pub fn encode(&self, x: f32, zero: f32) -> u8 {
        match self.codes {
            Codes::Levels { ranks, .. } => {
                let rank = self.thresholds().map_or(0, |t| t.iter().filter(|t| x > **t).count());
                ranks[rank]
            }
            Codes::Int4 { .. } | Codes::Int4Minimum => (x.round_ties_even() + zero).clamp(0.0, 15.0) as u8,
            Codes::Int6 => (x.round_ties_even() + 32.0).clamp(0.0, 63.0) as u8,
            Codes::Int8 => int8::encode(x),
            Codes::Fp8(kind) => kind.encode(x),
        }
    }

    /// The midpoints between neighbouring levels, ascending: an element above the i-th has a rank above i.
    pub fn thresholds(&self) -> Option<[f32; 15]> {
        let Codes::Levels { levels, ranks } = self.codes else { return None };
        let level = |rank: usize| levels[usize::from(ranks[rank])];
        Some(std::array::from_fn(|i| (level(i) + level(i + 1)) / 2.0))
    }
}

/// Codes of two neighbours of the flat matrix in formats of four bits, as they lie in memory: the even element's in
/// the high half, the odd one's in the low half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Pair(pub u8);

const _: () = assert!(size_of::<Pair>() == 1);

impl Pair {
    /// The pair of two codes below 16.
    pub const fn new(even: u8, odd: u8) -> Self {
        Pair(even << 4 | odd)
    }

    /// The even element's code.
    pub const fn even(self) -> u8 {
        self.0 >> 4
    }

    /// The odd element's code.
    pub const fn odd(self) -> u8 {
        self.0 & 15
    }
}

/// How weights are to be quantized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantConfig {
    /// The format.
    pub format: &'static Format,
    /// Elements of a block, for formats with flat blocks: a power of two from 32 to 4096.
    pub blocksize: usize,
    /// Whether scales are quantized themselves; needs flat blocks without zero points.
    pub double_quant: bool,
    /// Whether the output head is quantized too. It stays as it is by default, as in transformers.
    pub head: bool,
}

impl QuantConfig {
    /// Block size 64, and double quantization where the format has it by default.
    pub fn new(format: &'static Format) -> Self {
        QuantConfig { format, blocksize: 64, double_quant: format.double_quant, head: false }
    }

    /// Fails on settings that the format does not have.
    ///
    /// # Errors
    /// As said.
    pub fn check(&self) -> Result<()> {
        if READ_ONLY.contains(self.format) {
            return Err(Error::config(
                "quantization",
                "quant",
                format!("{} is read from files and never made", self.format.name),
            ));
        }
        self.check_blocks(32)
    }

    /// [`QuantConfig::check`] for matrices that are there already, with blocks of at least so many elements.
    fn check_blocks(&self, least: usize) -> Result<()> {
        let bad = |key: &str, message: String| Err(Error::config("quantization", key, message));
        if !self.blocksize.is_power_of_two() || !(least..=4096).contains(&self.blocksize) {
            return bad(
                "blocksize",
                format!("expected a power of two from {least} to 4096, found {}", self.blocksize),
            );
        }
        if self.format.blocks != Blocks::Flat && self.blocksize != 64 {
            return bad("blocksize", format!("{} has no block size", self.format.name));
        }
        if self.double_quant && !matches!(self.format.codes, Codes::Levels { .. }) {
            return bad("double_quant", format!("only nf4 and fp4 have it, {} has not", self.format.name));
        }
        Ok(())
    }

    /// Rows, columns and number per row of the blocks of a matrix; 0 rows: flat blocks.
    pub(crate) fn geometry(&self, rows: usize, cols: usize) -> Geometry {
        let (block_rows, block_cols, count) = match self.format.blocks {
            Blocks::Flat => (0, self.blocksize, (rows * cols).div_ceil(self.blocksize)),
            Blocks::Row => (1, cols.max(1), rows),
            Blocks::Square(edge) => (edge, edge, rows.div_ceil(edge) * cols.div_ceil(edge)),
        };
        Geometry { block_rows, block_cols, blocks_per_row: cols.div_ceil(block_cols), count }
    }

    /// Bytes that a matrix takes.
    pub fn bytes(&self, rows: usize, cols: usize) -> usize {
        let blocks = self.geometry(rows, cols).count;
        let zeros = if self.format.zero_points() { blocks } else { 0 };
        let scales =
            if self.double_quant { blocks + 4 * blocks.div_ceil(NESTED_BLOCKSIZE) } else { 4 * blocks };
        (rows * cols * self.format.bits()).div_ceil(8) + scales + zeros
    }
}

/// How a matrix is cut into blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Rows of a block; 0 for runs of the flat matrix.
    pub block_rows: usize,
    /// Columns of a block, or elements of a run.
    pub block_cols: usize,
    /// Blocks side by side.
    pub blocks_per_row: usize,
    /// All blocks.
    pub count: usize,
}

impl Geometry {
    /// The block of an element.
    pub fn block(&self, row: usize, col: usize, cols: usize) -> usize {
        match self.block_rows {
            0 => (row * cols + col) / self.block_cols,
            rows => row / rows * self.blocks_per_row + col / self.block_cols,
        }
    }
}

/// The scales of a matrix's blocks, or their minimums.
#[derive(Clone, Debug)]
pub enum Scales {
    /// As they are: f32 `[blocks]`.
    Plain(Tensor),
    /// Quantized themselves; see [`double_quant`].
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_encodes_its_own_level() {
        for format in &FORMATS {
            let zero = 8.0;
            for code in 0..if format.bits() == 4 { 16 } else { 255u8 } {
                let level = format.decode(code);
                if !level.is_finite() || level.abs() > format.max_level.max(8.0) || level == -128.0 {
                    continue;
                }
                let shifted = if format.zero_points() { level - zero } else { level };
                let again = format.decode(format.encode(shifted, zero));
                assert_eq!(level, again, "{} code {code}", format.name);
            }
        }
    }

    #[test]
    fn ties_go_to_the_lower_level() {
        for format in &FORMATS[..2] {
            for t in format.thresholds().unwrap() {
                let (at, above) = (format.encode(t, 0.0), format.encode(t.next_up(), 0.0));
                assert!(format.decode(at) <= format.decode(above) && at != above, "{} at {t}", format.name);
            }
        }
    }

    #[test]
    fn settings_that_do_not_fit_are_refused() {
        let nf4 = QuantConfig::new(Format::by_name("nf4").unwrap());
        let int8 = QuantConfig::new(Format::by_name("int8").unwrap());
        assert!(nf4.check().is_ok() && int8.check().is_ok());
        for bad in [
            QuantConfig { blocksize: 48, ..nf4 },
            QuantConfig { blocksize: 16, ..nf4 },
            QuantConfig { blocksize: 128, ..int8 },
            QuantConfig { double_quant: true, ..int8 },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
        let error = Format::by_name("nf5").unwrap_err().to_string();
        assert!(error.contains("nf5") && error.contains("nf4, fp4, int4"), "{error}");
    }
}
