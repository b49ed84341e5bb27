//! Quantized weights: the table of formats, and matrices in one of them.
//!
//! A matrix `[rows, cols]` is cut into blocks with a scale each; an element is `(level of its code - zero
//! point) * scale`, or `level * scale + minimum`, computed in f32 and rounded once to the type that is asked for. Codes lie
//! row-major, so a file of bitsandbytes is used in place, and all devices share one layout; for generating text, a backend
//! may have one of its own ([`Layout`]).

pub mod double_quant;
pub mod dynamic_map;
pub mod format;
pub mod fp4;
pub mod fp8;
pub mod int4;
pub mod int6;
pub mod int8;
pub mod matrix;
pub mod nf4;

pub use format::{Blocks, Codes, FORMATS, Format, Pair, READ_ONLY};
pub use matrix::{Layout, Quantized, Scales};

use crate::error::{Error, Result};
use double_quant::NESTED_BLOCKSIZE;

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

#[cfg(test)]
mod tests {
    use super::*;

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
