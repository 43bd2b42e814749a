//! Whose turn it is: from a number that counts up to one of several weights, evenly.
//!
//! Of any so many consecutive turns, each weight gets its share, give or take one for each halving of the list: a canary of
//! 1 % gets exactly 10 of any 1,000. Nothing is kept between two turns but the number, so all workers share one sequence,
//! an edit of weights loses no place, and where a node begins spreads small shares over nodes that see few requests.

/// The index of the weight whose turn it is. `None`: all weights are 0.
pub fn pick(weights: &[u32], turn: u64) -> Option<usize> {
    let (mut from, mut to, mut turn) = (0, weights.len(), turn);
    while to - from > 1 {
        let middle = from + (to - from) / 2;
        let left = sum(&weights[from..middle]);
        let all = left + sum(&weights[middle..to]);
        if all == 0 {
            return None;
        }
        // The left half's turns are those at which its share of all turns so far grows by one.
        let before = part(turn, left, all);
        if part(turn + 1, left, all) > before {
            (to, turn) = (middle, before);
        } else {
            (from, turn) = (middle, turn - before);
        }
    }
    weights.get(from).filter(|weight| **weight > 0).map(|_| from)
}

fn sum(weights: &[u32]) -> u64 {
    weights.iter().map(|weight| u64::from(*weight)).sum()
}

fn part(turns: u64, weight: u64, all: u64) -> u64 {
    // At most `turns`, as no weight is more than all.
    (u128::from(turns) * u128::from(weight) / u128::from(all)) as u64
}

/// For what else depends on chance, so that it does not fall on the same turns as a backend does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Salt {
    /// Copies; of several mirrors each has its own place.
    Mirror(usize),
    /// Faults that delay.
    Delay,
    /// Faults that answer.
    Abort,
}

/// Whether this turn is among `numerator` of `denominator`: evenly spread, and independent of [`pick`].
pub fn hits(salt: Salt, numerator: u32, denominator: u32, turn: u64) -> bool {
    // Multiples of an irrational number, modulo 1: they come close to every share sooner than chance would. Each salt has
    // its own number (the fractions of the roots of 5, 2, 3, 7, …) so that they do not fall together.
    const STEPS: [u64; 6] = [
        0x9e37_79b9_7f4a_7c15,
        0x6a09_e667_f3bc_c909,
        0xbb67_ae85_84ca_a73b,
        0xa54f_f53a_5f1d_36f1,
        0x510e_527f_ade6_82d1,
        0x9b05_688c_2b3e_6c1f,
    ];
    let step = match salt {
        Salt::Delay => STEPS[0],
        Salt::Abort => STEPS[1],
        Salt::Mirror(index) => STEPS[2 + index % 4],
    };
    let place = turn.wrapping_mul(step) >> 32;
    // place / 2^32 < numerator / denominator
    u128::from(place) * u128::from(denominator) < u128::from(numerator) << 32
}
