//! What a step costs, learnt from the steps themselves. Pure: measured times are arguments.
//!
//! A step's time is taken to be a sum: a part that every step costs, and parts for its rows, for the rows
//! whose logits are wanted, for the tokens that attention goes over and for those that it brings from memory.
//! The five factors are fitted to the last few dozen steps by least squares with fading memory; where these
//! say nothing about a factor it stays what it was. How busy the machine is at the moment is followed apart
//! from that: it makes all steps longer alike, and only what steps cost compared with each other counts here.
//! Only decides how much goes into a step, never what comes out of it.

/// A step that decodes and catches up takes at most so many times what decoding alone would take. Streams
/// are promised twice; the rest is for what the fit does not know.
const MIXED_RATIO_MAX: f64 = 1.7;
/// Beside so many streams, every prompt beyond the first allows as much again: who waits for its first token
/// counts as well as who waits for its next, and else a busy node would have its places filled by prompts that
/// crawl.
const STREAMS_PER_PROMPT: f64 = 4.0;
/// Rows that catch up in any case, so that a prompt gets on beside any number of streams.
const CHUNK_TOKENS_MIN: usize = 2;
/// What one step's measurement weighs after the next one.
const MEMORY: f64 = 0.97;
/// How much the factors resist what few steps say.
const STIFFNESS: f64 = 0.2;
/// What the last step weighs in how busy the machine is.
const FOLLOWING: f64 = 0.25;
/// Times count as at most so many times longer or shorter than expected: a step may be interrupted.
const SURPRISE_MAX: f64 = 1.5;
/// Eight rows cost at least this part of what every step costs, whatever the fit says.
const ROWS_COST_MIN: f64 = 0.05;

const FACTORS: usize = 5;

/// What a step has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    pub rows: usize,
    pub logits_rows: usize,
    /// Tokens that attention goes over, summed over the rows.
    pub reads: usize,
    /// Tokens whose keys and values come from memory: summed over the sequences, however many rows each has.
    pub swept: usize,
}

impl Load {
    /// Adds `rows` rows of a sequence, the first of them at `position`.
    pub fn add(&mut self, position: usize, rows: usize, logits_rows: usize) {
        self.rows += rows;
        self.logits_rows += logits_rows;
        self.reads += rows * position + rows * (rows + 1) / 2;
        self.swept += position + rows;
    }

    /// In units that make the factors alike in size.
    fn features(&self) -> [f64; FACTORS] {
        let many = |tokens: usize| tokens as f64 / 8192.0;
        [1.0, self.rows as f64 / 8.0, self.logits_rows as f64 / 8.0, many(self.reads), many(self.swept)]
    }
}

pub struct Pace {
    factors: [f64; FACTORS],
    /// Measured times over fitted ones, lately.
    busyness: f64,
    /// Faded sums of the products of features, and of features and times.
    products: [[f64; FACTORS]; FACTORS],
    times: [f64; FACTORS],
    /// Rows of the largest of the last steps.
    rows_seen: f64,
    steps: u64,
}

impl Pace {
    pub fn new() -> Self {
        // Rows cost a tenth of a step each, until it is known better.
        let factors = [1.0, 0.8, 0.2, 0.4, 0.4];
        Self { factors, busyness: 1.0, products: Default::default(), times: [0.0; FACTORS], rows_seen: 0.0, steps: 0 }
    }

    /// Notes that a step took `ms`.
    pub fn observe(&mut self, load: Load, ms: f64) {
        let (features, ms) = (load.features(), ms.max(1e-3));
        let expected = self.expected(load);
        if self.steps == 0 {
            self.busyness = ms / expected;
        }
        self.steps += 1;
        self.rows_seen = (self.rows_seen * MEMORY).max(load.rows as f64);
        let surprise = (ms / (expected * self.busyness)).clamp(1.0 / SURPRISE_MAX, SURPRISE_MAX);
        let time = expected * surprise / (1.0 + FOLLOWING * (surprise - 1.0));
        self.busyness *= 1.0 + FOLLOWING * (surprise - 1.0);
        for i in 0..FACTORS {
            self.times[i] = self.times[i] * MEMORY + features[i] * time;
            for j in 0..FACTORS {
                self.products[i][j] = self.products[i][j] * MEMORY + features[i] * features[j];
            }
        }
        let mut matrix = self.products;
        let mut right = self.times;
        for i in 0..FACTORS {
            matrix[i][i] += STIFFNESS;
            right[i] += STIFFNESS * self.factors[i];
        }
        // More work never takes less time, and no step is free.
        let [step, rows, rest @ ..] = solve(matrix, right);
        let step = step.max(1e-3);
        let [logits, reads, swept] = rest.map(|factor| factor.max(0.0));
        self.factors = [step, rows.max(ROWS_COST_MIN * step), logits, reads, swept];
    }

    /// In steps of an idle machine, more or less.
    fn expected(&self, load: Load) -> f64 {
        dot(&self.factors, &load.features())
    }

    /// How many rows may catch up beside `decodes`, where `prompts` have to and the first stands at `position`.
    pub fn chunk_tokens(&self, decodes: Load, prompts: usize, position: usize) -> usize {
        if self.steps == 0 {
            return CHUNK_TOKENS_MIN;
        }
        let crowd = STREAMS_PER_PROMPT * prompts.saturating_sub(1) as f64 / decodes.rows.max(1) as f64;
        let spare = (MIXED_RATIO_MAX - 1.0) * crowd.max(1.0) * self.expected(decodes);
        let sweep = self.cost(Load { swept: position, ..Load::default() });
        let rows = ((spare - sweep) / self.row(position, 0)) as usize;
        // What no step of late was like is approached, not jumped at.
        let known = (2.0 * self.rows_seen) as usize - decodes.rows.min(self.rows_seen as usize);
        rows.min(known).max(CHUNK_TOKENS_MIN)
    }

    /// What verifying one more draft at `position` costs, as a part of the step with `decodes`; 1 is a step.
    pub fn draft_price(&self, decodes: Load, position: usize) -> f64 {
        if self.steps == 0 {
            return 1.0;
        }
        self.row(position, 1) / self.expected(decodes)
    }

    /// Of one more row of a sequence whose keys and values are read in any case.
    fn row(&self, position: usize, logits_rows: usize) -> f64 {
        self.cost(Load { rows: 1, logits_rows, reads: position + 1, swept: 1 })
    }

    /// What `load` adds to a step.
    fn cost(&self, load: Load) -> f64 {
        self.expected(load) - self.factors[0]
    }
}

fn dot(a: &[f64; FACTORS], b: &[f64; FACTORS]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Solves `matrix * x = right`, for a matrix that is symmetric and positive: elimination needs no pivots.
fn solve(mut matrix: [[f64; FACTORS]; FACTORS], mut right: [f64; FACTORS]) -> [f64; FACTORS] {
    for i in 0..FACTORS {
        for below in i + 1..FACTORS {
            let factor = matrix[below][i] / matrix[i][i];
            let row = matrix[i];
            matrix[below].iter_mut().zip(row).for_each(|(x, above)| *x -= factor * above);
            right[below] -= factor * right[i];
        }
    }
    let mut x = [0.0; FACTORS];
    for i in (0..FACTORS).rev() {
        let known: f64 = (i + 1..FACTORS).map(|j| matrix[i][j] * x[j]).sum();
        x[i] = (right[i] - known) / matrix[i][i];
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Milliseconds of a machine that wastes less the more rows there are.
    fn machine(load: Load, slowness: f64) -> f64 {
        let rows = load.rows as f64;
        let attention = load.reads as f64 / 7_000.0 + load.swept as f64 / 2_000.0;
        slowness * (8.0 + 1.4 * rows.powf(0.85) + 0.15 * load.logits_rows as f64 + attention)
    }

    fn decodes(sequences: usize, context: usize) -> Load {
        let mut load = Load::default();
        (0..sequences).for_each(|_| load.add(context, 1, 1));
        load
    }

    /// Runs streams for a while, then a prompt of 4,000 tokens beside them, and answers with how many times
    /// as long as a step without it the slowest one of its steps was, but for the first few.
    fn worst_ratio(pace: &mut Pace, sequences: usize, slowness: f64) -> f64 {
        for step in 0..30 {
            let load = decodes(sequences, 100 + step);
            pace.observe(load, machine(load, slowness));
        }
        let (mut position, mut worst, mut steps) = (0, 0f64, 0);
        while position < 4000 {
            let alone = decodes(sequences, 130 + steps);
            let rows = pace.chunk_tokens(alone, 1, position).min(64).min(4000 - position);
            let mut load = alone;
            load.add(position, rows, 0);
            pace.observe(load, machine(load, slowness));
            if steps > 3 {
                worst = worst.max(machine(load, slowness) / machine(alone, slowness));
            }
            (position, steps) = (position + rows, steps + 1);
        }
        worst
    }

    #[test]
    fn a_step_beside_which_a_long_prompt_catches_up_is_hardly_longer() {
        for sequences in [1, 2, 8, 32] {
            let worst = worst_ratio(&mut Pace::new(), sequences, 1.0);
            assert!(worst < 1.9, "{sequences} streams: {worst}");
        }
    }

    #[test]
    fn a_machine_that_gets_slower_or_faster_changes_nothing() {
        let mut pace = Pace::new();
        for slowness in [1.0, 4.0, 0.5] {
            let worst = worst_ratio(&mut pace, 4, slowness);
            assert!(worst < 1.9, "{slowness}: {worst}");
        }
    }

    #[test]
    fn a_prompt_always_gets_on_and_makes_use_of_what_is_there() {
        let mut pace = Pace::new();
        assert_eq!(pace.chunk_tokens(decodes(1, 10), 1, 0), CHUNK_TOKENS_MIN);
        worst_ratio(&mut pace, 1, 1.0);
        assert!(pace.chunk_tokens(decodes(1, 100), 1, 0) >= CHUNK_TOKENS_MIN);
        worst_ratio(&mut pace, 32, 1.0);
        assert!(pace.chunk_tokens(decodes(32, 100), 1, 0) > 16);
    }

    #[test]
    fn many_prompts_count_as_well_as_the_streams_beside_them() {
        let mut pace = Pace::new();
        worst_ratio(&mut pace, 16, 1.0);
        let rows = |prompts| pace.chunk_tokens(decodes(16, 100), prompts, 0);
        assert_eq!(rows(1), rows(4));
        assert!(2 * rows(12) > 3 * rows(1), "{} {}", rows(12), rows(1));
    }

    #[test]
    fn a_draft_is_cheap_beside_one_stream_and_dear_beside_many() {
        let mut pace = Pace::new();
        worst_ratio(&mut pace, 1, 1.0);
        let one = pace.draft_price(decodes(1, 100), 100);
        worst_ratio(&mut pace, 32, 1.0);
        let many = 32.0 * pace.draft_price(decodes(32, 100), 100);
        assert!(one > 0.02 && one < 0.25 && many > 0.4 && many > 2.0 * one, "{one} {many}");
    }

    #[test]
    fn times_that_scatter_are_averaged() {
        let (mut pace, mut noise) = (Pace::new(), 1u64);
        let mut scatter = move || {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            0.75 + 0.5 * (noise >> 33) as f64 / f64::from(1u32 << 31)
        };
        let mut ratios = Vec::new();
        for step in 0..600 {
            let alone = decodes(4, 100 + step);
            let mut load = alone;
            if step % 200 > 40 {
                let position = step % 200 * 10;
                load.add(position, pace.chunk_tokens(alone, 1, position).min(64), 0);
                ratios.push(machine(load, 1.0) / machine(alone, 1.0));
            }
            pace.observe(load, machine(load, scatter()));
        }
        ratios.sort_by(f64::total_cmp);
        let (middle, most) = (ratios[ratios.len() / 2], ratios[ratios.len() * 99 / 100]);
        assert!(middle > 1.4 && most < 2.0, "{middle} {most}");
    }

    #[test]
    fn an_interruption_is_not_taken_for_the_rule() {
        let mut pace = Pace::new();
        worst_ratio(&mut pace, 4, 1.0);
        let before = pace.chunk_tokens(decodes(4, 100), 1, 500);
        pace.observe(decodes(4, 100), 10_000.0);
        let after = pace.chunk_tokens(decodes(4, 100), 1, 500);
        assert!(after <= before * 2, "{before} {after}");
    }
}
