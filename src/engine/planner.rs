//! Which rows the next step computes. Pure: numbers in, a plan out.
//!
//! There is no prefill phase and no decode phase. A sequence has tokens, of which some are computed; those
//! that lack one token (decodes) go first, then the others catch up in chunks under one token budget, so
//! that a long prompt never keeps the others from their next token. When KV blocks run out, the sequence
//! that joined last is sent back to waiting, and nothing new joins in such a step.

/// What the planner knows of a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    pub tokens: usize,
    pub computed: usize,
    pub blocks: usize,
}

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub sequences_max: usize,
    pub step_tokens_max: usize,
    pub block_tokens: usize,
}

#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// Rows to compute for each running sequence, after those of `preempted` are gone; 0 sits the step out.
    pub running: Vec<usize>,
    /// Rows for the sequences taken from the front of the waiting line.
    pub admitted: Vec<usize>,
    /// How many running sequences, counted from the end, go back to waiting.
    pub preempted: usize,
}

/// Plans one step. `running` is in order of admission, `waiting` in order of service.
pub fn plan(running: &[Demand], waiting: impl Iterator<Item = Demand>, blocks_free: usize, limits: &Limits) -> Plan {
    let mut state = State {
        blocks_free,
        budget: limits.step_tokens_max,
        alive: running.len(),
        rows: vec![0; running.len()],
        limits,
        running,
    };
    state.decodes();
    state.chunks();
    if state.alive > 0 && state.rows[..state.alive].iter().all(|rows| *rows == 0) {
        // Every sequence waits for blocks that only another one can give back.
        state.preempt_last();
        state.decodes();
        state.chunks();
    }
    let preempted = running.len() - state.alive;
    let admitted = if preempted == 0 { state.admissions(waiting) } else { Vec::new() };
    state.rows.truncate(state.alive);
    Plan { running: state.rows, admitted, preempted }
}

struct State<'a> {
    running: &'a [Demand],
    limits: &'a Limits,
    blocks_free: usize,
    budget: usize,
    alive: usize,
    rows: Vec<usize>,
}

impl State<'_> {
    fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.limits.block_tokens)
    }

    fn decodes(&mut self) {
        let mut i = 0;
        while i < self.alive {
            let Demand { tokens, computed, blocks } = self.running[i];
            if tokens - computed == 1 && self.rows[i] == 0 && self.budget > 0 {
                let missing = self.blocks_for(tokens).saturating_sub(blocks);
                while missing > self.blocks_free && self.alive > i {
                    self.preempt_last();
                }
                if self.alive <= i {
                    return;
                }
                self.take(i, 1, missing);
            }
            i += 1;
        }
    }

    fn chunks(&mut self) {
        for i in 0..self.alive {
            let Demand { tokens, computed, blocks } = self.running[i];
            if tokens - computed > 1 && self.rows[i] == 0 {
                let reachable = (blocks + self.blocks_free) * self.limits.block_tokens - computed;
                let rows = (tokens - computed).min(self.budget).min(reachable);
                let missing = self.blocks_for(computed + rows).saturating_sub(blocks);
                self.take(i, rows, missing);
            }
        }
    }

    fn take(&mut self, i: usize, rows: usize, blocks: usize) {
        self.rows[i] = rows;
        self.budget -= rows;
        self.blocks_free -= blocks;
    }

    fn preempt_last(&mut self) {
        self.alive -= 1;
        let Demand { computed, blocks, .. } = self.running[self.alive];
        let planned = std::mem::take(&mut self.rows[self.alive]);
        self.budget += planned;
        self.blocks_free += blocks.max(self.blocks_for(computed + planned));
    }

    fn admissions(&mut self, waiting: impl Iterator<Item = Demand>) -> Vec<usize> {
        // What the running sequences still need for the tokens that they have is not given away, and one
        // block each is left for their next ones.
        let promised: usize = (0..self.alive)
            .map(|i| {
                let Demand { tokens, computed, blocks } = self.running[i];
                let held = blocks.max(self.blocks_for(computed + self.rows[i]));
                self.blocks_for(tokens).saturating_sub(held) + 1
            })
            .sum();
        let mut spare = self.blocks_free.saturating_sub(promised);
        if self.alive == 0 {
            spare = self.blocks_free;
        }
        let mut admitted = Vec::new();
        for demand in waiting {
            let need = self.blocks_for(demand.tokens + 1);
            if self.alive + admitted.len() >= self.limits.sequences_max || self.budget == 0 || need > spare {
                break;
            }
            let rows = demand.tokens.min(self.budget);
            self.budget -= rows;
            spare -= need;
            admitted.push(rows);
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits { sequences_max: 4, step_tokens_max: 64, block_tokens: 16 };

    fn at(tokens: usize, computed: usize) -> Demand {
        Demand { tokens, computed, blocks: computed.div_ceil(16) }
    }

    #[test]
    fn a_long_prompt_never_keeps_the_others_from_their_next_token() {
        let running = [at(4000, 640), at(100, 99), at(50, 49)];
        let plan = plan(&running, std::iter::empty(), 1000, &LIMITS);
        assert_eq!(plan.running, [62, 1, 1]);
    }

    #[test]
    fn waiting_requests_join_in_order_and_only_when_their_whole_prompt_fits() {
        let waiting = [at(40, 0), at(500, 0), at(10, 0)];
        let plan = plan(&[at(20, 19)], waiting.iter().copied(), 10, &LIMITS);
        assert_eq!((plan.running, plan.admitted), (vec![1], vec![40]));
    }

    #[test]
    fn the_youngest_gives_way_when_blocks_run_out_and_nobody_joins_then() {
        let running = [at(17, 16), at(17, 16), at(17, 16)];
        let plan = plan(&running, [at(1, 0)].into_iter(), 1, &LIMITS);
        assert_eq!((plan.preempted, plan.running, plan.admitted.len()), (1, vec![1, 1], 0));
    }

    proptest! {
        #[test]
        fn every_plan_keeps_its_bounds_and_moves_something_forward(
            sizes in prop::collection::vec((1usize..400, 0usize..400), 0..4),
            waits in prop::collection::vec(1usize..400, 0..6),
            spare in 0usize..30,
        ) {
            let running: Vec<Demand> = sizes.iter().map(|(more, computed)| at(computed + more, *computed)).collect();
            let held: usize = running.iter().map(|d| d.blocks).sum();
            // As at load time: one sequence of the longest length always fits.
            let free = (800usize.div_ceil(16) + 1).saturating_sub(held).max(spare);
            let plan = plan(&running, waits.iter().map(|n| at(*n, 0)), free, &LIMITS);
            let kept = running.len() - plan.preempted;
            prop_assert_eq!(plan.running.len(), kept);
            let rows: usize = plan.running.iter().chain(&plan.admitted).sum();
            prop_assert!(rows <= LIMITS.step_tokens_max);
            prop_assert!(kept + plan.admitted.len() <= LIMITS.sequences_max);
            prop_assert!(plan.admitted.is_empty() || plan.preempted == 0);
            prop_assert!(running.is_empty() || rows > 0, "a step that computes nothing would loop forever");
            let freed: usize = running[kept..].iter().map(|d| d.blocks).sum();
            let taken: usize = plan.running.iter().zip(&running)
                .map(|(rows, d)| (d.computed + rows).div_ceil(16).saturating_sub(d.blocks))
                .chain(plan.admitted.iter().map(|rows| rows.div_ceil(16)))
                .sum();
            prop_assert!(taken <= free + freed);
        }
    }
}
