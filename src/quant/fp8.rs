//! Floats of eight bits: e4m3 (largest 448) and e5m2 (largest 57344), with a scale for each row or each
//! block of 128 x 128.
//!
//! Bits: sign, exponent (4 or 5 bits), fraction (3 or 2 bits), subnormals included. Infinities and NaN are
//! never made: encoding saturates. Source: Micikevicius et al., "FP8 formats for deep learning"
//! (arXiv 2209.05433); e4m3 is PyTorch's `float8_e4m3fn`.

/// Which eight bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Fp8 {
    E4m3,
    E5m2,
}

impl Fp8 {
    /// Bits of the fraction.
    const fn fraction(self) -> i32 {
        match self {
            Fp8::E4m3 => 3,
            Fp8::E5m2 => 2,
        }
    }

    const fn bias(self) -> i32 {
        match self {
            Fp8::E4m3 => 7,
            Fp8::E5m2 => 15,
        }
    }

    /// The largest magnitude.
    pub const fn max(self) -> f32 {
        match self {
            Fp8::E4m3 => 448.0,
            Fp8::E5m2 => 57344.0,
        }
    }

    /// The value of a code.
    pub fn decode(self, code: u8) -> f32 {
        let (fraction_bits, bias) = (self.fraction(), self.bias());
        let exponent = i32::from(code & 0x7f) >> fraction_bits;
        let fraction =
            f64::from(i32::from(code) & ((1 << fraction_bits) - 1)) / f64::from(1 << fraction_bits);
        let magnitude = if exponent == 0 {
            fraction * 2f64.powi(1 - bias)
        } else {
            (1.0 + fraction) * 2f64.powi(exponent - bias)
        };
        (if code & 0x80 == 0 { magnitude } else { -magnitude }) as f32
    }

    /// The nearest code of a scaled element, ties to even.
    pub fn encode(self, x: f32) -> u8 {
        let sign = if x.is_sign_negative() { 0x80 } else { 0 };
        let magnitude = x.abs().min(self.max());
        // The spacing of codes around this magnitude; subnormals share the smallest normal one's.
        let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(1 - self.bias());
        let step = 2f64.powi(exponent - self.fraction());
        let steps = (f64::from(magnitude) / step).round_ties_even() as i32;
        // The exponent field counts from 1 at the smallest normal number, whose leading bit is in `steps`.
        let code = ((exponent + self.bias() - 1) << self.fraction()) + steps;
        sign | code as u8
    }
}
