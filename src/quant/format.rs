//! The table of formats: what a code stands for, and which elements share a scale.

use super::fp8::Fp8;
use super::{fp4, int4, int6, int8, nf4};
use crate::error::{Error, Result};

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
}
