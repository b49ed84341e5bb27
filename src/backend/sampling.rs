//! Choosing tokens by their scores: what backends compute in [`Kernels::sample`](super::Kernels::sample).
//!
//! Weights are `exp((score - top) / temperature)` in f64. Their sums have one order, which a device keeps too: of 64
//! neighbours each, of 64 such sums each, and of those, ascending. Adding numbers that are not negative in a fixed order never
//! gives less for more of them, so what top-p keeps is found by halving.

use crate::math;

/// Weights that are added up first, and such sums that are.
const GROUP: usize = 64;

/// Scores that are compared at once.
const LANES: usize = 32;

/// How the token of one row is chosen.
#[derive(Clone, Copy, Debug)]
pub struct SampleRow<'a> {
    /// Divides the scores; 0: always the likeliest token, of equal ones that with the lowest number.
    pub temperature: f32,
    /// Only this many likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the fewest likeliest tokens that together have this probability; 1: all.
    pub top_p: f32,
    /// Where in `[0, 1)` the draw falls.
    pub uniform: f32,
    /// Scores of `seen` tokens are divided by it, or multiplied if negative; each token is named once.
    pub repetition_penalty: f32,
    /// Tokens that were there already.
    pub seen: &'a [u32],
    /// Tokens that are not to be chosen.
    pub banned: &'a [u32],
}

/// The place of a token among all, the best first: by score, then by number.
fn rank_key(score: f32, id: usize) -> u64 {
    let bits = score.to_bits();
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!ascending) << 32 | id as u64
}

/// A token that may be chosen.
struct Candidate {
    id: usize,
    key: u64,
    weight: f64,
}

/// Candidates by number, of which those whose key is at most `cutoff` count.
struct Weights<'a> {
    all: &'a [Candidate],
    cutoff: u64,
}

impl<'a> Weights<'a> {
    fn at(&self, candidate: &Candidate) -> f64 {
        if candidate.key <= self.cutoff { candidate.weight } else { 0.0 }
    }

    fn groups(&self) -> impl Iterator<Item = &'a [Candidate]> {
        self.all.chunk_by(|a, b| a.id / (GROUP * GROUP) == b.id / (GROUP * GROUP))
    }

    fn blocks(group: &[Candidate]) -> impl Iterator<Item = &[Candidate]> {
        group.chunk_by(|a, b| a.id / GROUP == b.id / GROUP)
    }

    fn block_sum(&self, block: &[Candidate]) -> f64 {
        block.iter().fold(0.0, |sum, candidate| sum + self.at(candidate))
    }

    fn group_sum(&self, group: &[Candidate]) -> f64 {
        Self::blocks(group).fold(0.0, |sum, block| sum + self.block_sum(block))
    }

    fn sum(&self) -> f64 {
        self.groups().fold(0.0, |sum, group| sum + self.group_sum(group))
    }

    /// The first candidate with which the weights so far exceed `target`; the last that has any if none does.
    fn draw(&self, target: f64) -> Option<usize> {
        let found = self.exceeding(target);
        let last = || self.all.iter().rev().find(|candidate| self.at(candidate) > 0.0);
        found.or_else(last).map(|candidate| candidate.id)
    }

    fn exceeding(&self, target: f64) -> Option<&'a Candidate> {
        let (mut before, mut in_group, mut inside) = (0.0, 0.0, 0.0);
        let group = self.groups().find(|group| exceeds(&mut before, self.group_sum(group), 0.0, target))?;
        let block = Self::blocks(group)
            .find(|block| exceeds(&mut in_group, self.block_sum(block), before, target))?;
        block.iter().find(|candidate| {
            inside += self.at(candidate);
            before + (in_group + inside) > target
        })
    }
}

/// Whether a sum passes the target with one more part, which is added if not. `before`: what is not in the sum.
fn exceeds(sum: &mut f64, part: f64, before: f64, target: f64) -> bool {
    let exceeds = before + (*sum + part) > target;
    if !exceeds {
        *sum += part;
    }
    exceeds
}

/// The largest score and its first place; none if a score is not a number. Scores are looked at many at once: each lane has
/// a maximum of its own, and no comparison waits for the last one.
fn largest(scores: &[f32]) -> Option<(f32, usize)> {
    let (mut top, mut nan) = ([f32::NEG_INFINITY; LANES], [0u32; LANES]);
    for chunk in scores.chunks(LANES) {
        for ((top, nan), score) in top.iter_mut().zip(&mut nan).zip(chunk) {
            *top = if *score > *top { *score } else { *top };
            *nan |= u32::from(score.is_nan());
        }
    }
    if nan.contains(&1) {
        return None;
    }
    let top = top.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let has_top = |chunk: &[f32]| chunk.iter().fold(false, |has, score| has | (*score == top));
    let chunk = scores.chunks(LANES).position(has_top)?;
    let place = scores[chunk * LANES..].iter().position(|score| *score == top)?;
    Some((top, chunk * LANES + place))
}

/// The token of a row of scores, which are changed by what the row's settings say; none if a score is not a number.
pub(super) fn choose(scores: &mut [f32], row: &SampleRow<'_>) -> Option<u32> {
    for id in row.seen {
        if let Some(score) = scores.get_mut(*id as usize) {
            let factor = row.repetition_penalty;
            *score = if *score < 0.0 { *score * factor } else { *score / factor };
        }
    }
    for id in row.banned {
        if let Some(score) = scores.get_mut(*id as usize) {
            *score = f32::NEG_INFINITY;
        }
    }
    let (top, best) = largest(scores)?;
    if row.temperature == 0.0 {
        return Some(best as u32);
    }
    let (temperature, largest) = (f64::from(row.temperature), f64::from(top));
    let candidate = |(id, score): (usize, &f32)| Candidate {
        id,
        key: rank_key(*score, id),
        weight: math::exp((f64::from(*score) - largest) / temperature),
    };
    let mut all: Vec<Candidate> = scores.iter().enumerate().map(candidate).collect();
    let sum = |all: &[Candidate], cutoff: u64| Weights { all, cutoff }.sum();
    let mut high = u64::MAX;
    if row.top_k > 0 && row.top_k < scores.len() {
        let mut keys: Vec<u64> = all.iter().map(|candidate| candidate.key).collect();
        high = *keys.select_nth_unstable(row.top_k - 1).1;
        all.retain(|candidate| candidate.key <= high);
    }
    let mut total = sum(&all, high);
    if row.top_p < 1.0 {
        let mut low = 0;
        while low < high {
            let middle = low + (high - low) / 2;
            if sum(&all, middle) / total >= f64::from(row.top_p) {
                high = middle;
                all.retain(|candidate| candidate.key <= high);
            } else {
                low = middle + 1;
            }
        }
        total = sum(&all, high);
    }
    let drawn = Weights { all: &all, cutoff: high }.draw(f64::from(row.uniform) * total);
    Some(drawn.unwrap_or(best) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(temperature: f32, top_k: usize, top_p: f32, uniform: f32) -> SampleRow<'static> {
        SampleRow { temperature, top_k, top_p, uniform, repetition_penalty: 1.0, seen: &[], banned: &[] }
    }

    #[test]
    fn shares_of_the_draws_are_the_probabilities() {
        // 0.5, 0.25, 0.125, 0.125 of sum 1 at temperature 1.
        let scores: Vec<f32> = [2.0f32, 8.0, 4.0, 2.0].iter().map(|x| x.ln()).collect();
        let share = |row: &dyn Fn(f32) -> SampleRow<'static>, id: u32| {
            let drawn =
                (0..1000).filter(|i| choose(&mut scores.clone(), &row(*i as f32 / 1000.0)) == Some(id));
            drawn.count() as f64 / 1000.0
        };
        let close = |a: f64, b: f64| assert!((a - b).abs() < 0.003, "{a} {b}");
        for (id, p) in [(0, 0.125), (1, 0.5), (2, 0.25), (3, 0.125)] {
            close(share(&|u| row(1.0, 0, 1.0, u), id), p);
        }
        close(share(&|u| row(1.0, 2, 1.0, u), 1), 2.0 / 3.0);
        // Three are 0.875 together; of equal ones the lower number is kept.
        close(share(&|u| row(1.0, 0, 0.8, u), 0), 1.0 / 7.0);
        close(share(&|u| row(1.0, 0, 0.8, u), 3), 0.0);
        close(share(&|u| row(1.0, 0, 0.5, u), 1), 1.0);
        assert_eq!(choose(&mut scores.clone(), &row(0.0, 0, 1.0, 0.9)), Some(1));
        assert_eq!(choose(&mut [1.0, f32::NAN], &row(1.0, 0, 1.0, 0.9)), None);
        let banned = SampleRow { banned: &[1], ..row(0.0, 0, 1.0, 0.0) };
        assert_eq!(choose(&mut scores.clone(), &banned), Some(2));
        let seen = SampleRow { seen: &[1], repetition_penalty: 4.0, ..row(0.0, 0, 1.0, 0.0) };
        assert_eq!(choose(&mut scores.clone(), &seen), Some(2));
    }

    #[test]
    fn the_likeliest_token_is_the_first_of_the_largest_wherever_it_is() {
        for n in [1, 31, 32, 33, 100] {
            for place in 0..n {
                let mut scores = vec![-1.0; n];
                scores[place..].fill(2.0);
                assert_eq!(largest(&scores), Some((2.0, place)));
                scores[place] = f32::NAN;
                assert_eq!(largest(&scores), None);
            }
            assert_eq!(largest(&vec![f32::NEG_INFINITY; n]), Some((f32::NEG_INFINITY, 0)));
        }
        assert_eq!(largest(&[]), None);
    }
}
