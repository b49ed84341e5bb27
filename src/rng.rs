//! Philox4x32-10, a counter-based random number generator: a word depends on key and counter alone, so
//! nothing needs saving but the counters, and a dropout mask can be made again instead of stored.
//!
//! Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The C and
//! CUDA kernels make the same words.

/// What a stream of random words is for; part of the key, so that streams never overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stream {
    /// Initial values of trainable parameters.
    Init = 1,
    /// The order of the training rows.
    Shuffle = 2,
    /// Dropout masks.
    Dropout = 3,
    /// Sampling of generated tokens.
    Sample = 4,
    /// Weights of a dummy model.
    Dummy = 5,
}

/// Key of a stream: 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhiloxKey(pub [u32; 2]);

impl PhiloxKey {
    /// The key for `stream` of a run with this seed; `index` tells apart the users of the stream (an
    /// operation, an epoch, a parameter).
    pub fn new(seed: u64, stream: Stream, index: u64) -> Self {
        let mixed = philox(
            [seed as u32, (seed >> 32) as u32],
            [index as u32, (index >> 32) as u32, stream as u32, 0x6c6f_7772],
        );
        PhiloxKey([mixed[0], mixed[1]])
    }

    /// The four words at `counter`.
    pub fn words(self, counter: u64) -> [u32; 4] {
        philox(self.0, [counter as u32, (counter >> 32) as u32, 0, 0])
    }
}

/// Ten rounds of Philox4x32.
fn philox(mut key: [u32; 2], mut c: [u32; 4]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(c[0]) * 0xD251_1F53;
        let b = u64::from(c[2]) * 0xCD9E_8D57;
        c = [(b >> 32) as u32 ^ c[1] ^ key[0], b as u32, (a >> 32) as u32 ^ c[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// A sequence of random words of one key, for host-side use.
#[derive(Clone, Debug)]
pub struct Philox {
    key: PhiloxKey,
    counter: u64,
    words: [u32; 4],
    used: usize,
}

impl Philox {
    /// The sequence from its beginning.
    pub fn new(key: PhiloxKey) -> Self {
        Self::at(key, 0)
    }

    /// The sequence from the four words at `counter` on.
    pub fn at(key: PhiloxKey, counter: u64) -> Self {
        Philox { key, counter, words: [0; 4], used: 4 }
    }

    /// The next word.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.words = self.key.words(self.counter);
            self.counter += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// A number in `[0, 1)` with 24 random bits.
    pub fn uniform(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// An integer in `0..bound` without bias (Lemire's method).
    ///
    /// # Panics
    /// When `bound` is zero.
    pub fn below(&mut self, bound: u32) -> u32 {
        assert!(bound > 0, "an empty range has no member");
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u64::from(self.next_u32()) * u64::from(bound);
            if product as u32 >= threshold {
                return (product >> 32) as u32;
            }
        }
    }

    /// A sample of the standard normal distribution (Box and Muller), by the crate's own functions.
    pub fn normal(&mut self) -> f32 {
        let u = 1.0 - f64::from(self.uniform());
        let v = f64::from(self.uniform());
        ((-2.0 * crate::math::ln(u)).sqrt() * crate::math::cos(2.0 * std::f64::consts::PI * v)) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_the_paper() {
        assert_eq!(philox([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 2], [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn moments_of_uniform_and_normal() {
        let mut r = Philox::new(PhiloxKey::new(7, Stream::Init, 0));
        let n = 20_000;
        let mean = (0..n).map(|_| f64::from(r.uniform())).sum::<f64>() / f64::from(n);
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        let squares = (0..n).map(|_| f64::from(r.normal()).powi(2)).sum::<f64>() / f64::from(n);
        assert!((squares - 1.0).abs() < 0.05, "{squares}");
        assert!((0..1000).all(|_| r.below(7) < 7));
    }
}
