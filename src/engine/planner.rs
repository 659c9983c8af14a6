//! Which rows the next step computes. Pure: numbers in, a plan out.
//!
//! There is no prefill phase and no decode phase. A sequence has tokens, of which some are computed; those
//! that lack one token (decodes) go first, then the others catch up in chunks, under a budget that keeps a
//! step with both nearly as short as one with decodes alone, so that a long prompt never keeps the others
//! from their next token. What is then left goes to drafts. When KV blocks run out, sequences are sent back
//! to waiting: the lowest class first, then who has computed least; nothing new joins in such a step.

use std::cmp::Reverse;

use crate::domain::Priority;

/// What the planner knows of a running sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    pub tokens: usize,
    pub computed: usize,
    pub blocks: usize,
    /// Those of its blocks that would be free without it.
    pub own_blocks: usize,
    /// Tokens guessed beyond those it has.
    pub drafts: usize,
    pub priority: Priority,
}

/// What it knows of one that waits, with nothing computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub tokens: usize,
    /// Blocks that stand in the prefix cache already.
    pub found: usize,
    /// Those of them that count as free.
    pub found_free: usize,
    /// Who is about to compute the next block that it could use.
    pub behind: Option<Leader>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Leader {
    /// A running sequence.
    Running,
    /// The one at this place of the waiting line, if it joins now.
    Waiting(usize),
}

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub sequences_max: usize,
    pub step_tokens_max: usize,
    /// Rows that may catch up in a step that also decodes; at least 1.
    pub chunk_tokens_max: usize,
    pub block_tokens: usize,
    pub blocks_total: usize,
}

#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// What becomes of each running sequence.
    pub running: Vec<Turn>,
    /// Who joins: its place in the waiting line, in rising order, and its rows.
    pub admitted: Vec<(usize, usize)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Turn {
    /// Rows to compute; 0 sits the step out. More than what it lacks are drafts.
    Rows(usize),
    /// Back to waiting.
    Preempted,
}

/// Plans one step. `running` is in order of admission, `waiting` in order of service.
pub fn plan(running: &[Demand], waiting: impl Iterator<Item = Candidate>, blocks_free: usize, limits: &Limits) -> Plan {
    let turns = vec![Turn::Rows(0); running.len()];
    let mut state = State { running, limits, turns, blocks_free, budget: limits.step_tokens_max };
    state.decodes();
    let mut catches_up = state.chunks();
    if state.is_stuck() {
        // Every sequence waits for blocks that only another one can give back.
        if let Some(victim) = state.victim() {
            state.preempt(victim);
        }
        state.decodes();
        catches_up = state.chunks();
    }
    let nobody_left = state.turns.iter().all(|turn| *turn != Turn::Preempted);
    let admitted = if nobody_left { state.admissions(waiting) } else { Vec::new() };
    if !catches_up && admitted.is_empty() {
        state.drafts();
    }
    Plan { running: state.turns, admitted }
}

struct State<'a> {
    running: &'a [Demand],
    limits: &'a Limits,
    turns: Vec<Turn>,
    blocks_free: usize,
    budget: usize,
}

impl State<'_> {
    fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.limits.block_tokens)
    }

    fn alive(&self) -> impl Iterator<Item = usize> + use<> {
        let alive: Vec<usize> = (0..self.turns.len()).filter(|i| self.turns[*i] != Turn::Preempted).collect();
        alive.into_iter()
    }

    /// Rows planned so far.
    fn rows(&self, i: usize) -> usize {
        match self.turns[i] {
            Turn::Rows(rows) => rows,
            Turn::Preempted => 0,
        }
    }

    /// Blocks that it has after what is planned so far.
    fn held(&self, i: usize) -> usize {
        let Demand { computed, blocks, .. } = self.running[i];
        blocks.max(self.blocks_for(computed + self.rows(i)))
    }

    fn is_stuck(&self) -> bool {
        let mut alive = self.alive().peekable();
        alive.peek().is_some() && alive.all(|i| self.rows(i) == 0)
    }

    /// One row for everybody who lacks one token.
    fn decodes(&mut self) {
        for i in self.alive() {
            let Demand { tokens, computed, blocks, .. } = self.running[i];
            if tokens - computed != 1 || self.turns[i] != Turn::Rows(0) || self.budget == 0 {
                continue;
            }
            let missing = self.blocks_for(tokens).saturating_sub(blocks);
            while missing > self.blocks_free && self.turns[i] != Turn::Preempted {
                match self.victim() {
                    Some(victim) => self.preempt(victim),
                    None => return,
                }
            }
            if self.turns[i] != Turn::Preempted {
                self.take(i, 1, missing);
            }
        }
    }

    /// Rows for those who lack more, the higher class first. Whether there were any.
    fn chunks(&mut self) -> bool {
        let mut behind: Vec<usize> =
            self.alive().filter(|i| self.running[*i].tokens - self.running[*i].computed > 1).collect();
        behind.sort_by_key(|i| Reverse(self.running[*i].priority));
        let mut left = self.chunk_budget();
        let mut any = false;
        for i in behind {
            if self.turns[i] != Turn::Rows(0) {
                continue;
            }
            let Demand { tokens, computed, blocks, .. } = self.running[i];
            let reachable = (blocks + self.blocks_free) * self.limits.block_tokens - computed;
            let rows = (tokens - computed).min(left).min(reachable);
            let missing = self.blocks_for(computed + rows).saturating_sub(blocks);
            self.take(i, rows, missing);
            left -= rows;
            any |= rows > 0;
        }
        any
    }

    /// What may still catch up in this step.
    fn chunk_budget(&self) -> usize {
        let is_decode = |i: usize| self.running[i].tokens - self.running[i].computed == 1;
        let (mut decodes, mut chunks) = (0, 0);
        for i in self.alive() {
            *(if is_decode(i) { &mut decodes } else { &mut chunks }) += self.rows(i);
        }
        match decodes {
            0 => self.budget,
            _ => self.budget.min(self.limits.chunk_tokens_max.saturating_sub(chunks)),
        }
    }

    fn take(&mut self, i: usize, rows: usize, blocks: usize) {
        self.turns[i] = Turn::Rows(self.rows(i) + rows);
        self.budget -= rows;
        self.blocks_free -= blocks;
    }

    /// Who goes first when blocks run out: the lowest class, in it who has computed least, of these the last.
    fn victim(&self) -> Option<usize> {
        self.alive().min_by_key(|i| (self.running[*i].priority, self.running[*i].computed, Reverse(*i)))
    }

    fn preempt(&mut self, i: usize) {
        let taken = self.held(i) - self.running[i].blocks;
        self.budget += self.rows(i);
        self.blocks_free += self.running[i].own_blocks + taken;
        self.turns[i] = Turn::Preempted;
        let mut alive = self.alive();
        if let (Some(last), None) = (alive.next(), alive.next()) {
            // Blocks that those who went had in common are free as well.
            self.blocks_free = self.limits.blocks_total - self.held(last);
        }
    }

    fn admissions(&mut self, waiting: impl Iterator<Item = Candidate>) -> Vec<(usize, usize)> {
        // What the running sequences still need for the tokens that they have is not given away, and one
        // block each is left for their next ones.
        let needs = |i: usize| self.blocks_for(self.running[i].tokens).saturating_sub(self.held(i)) + 1;
        let promised: usize = self.alive().map(needs).sum();
        let mut spare = self.blocks_free.saturating_sub(promised);
        let mut left = self.chunk_budget();
        let mut places = self.limits.sequences_max.saturating_sub(self.running.len());
        let mut admitted: Vec<(usize, usize)> = Vec::new();
        for (at, candidate) in waiting.enumerate() {
            let Candidate { tokens, found, found_free, behind } = candidate;
            let waits = match behind {
                None => false,
                Some(Leader::Running) => true,
                Some(Leader::Waiting(leader)) => admitted.iter().any(|(at, _)| *at == leader),
            };
            if places == 0 || left == 0 {
                break;
            }
            if waits {
                continue;
            }
            let need = self.blocks_for(tokens + 1) - found + found_free;
            if need > spare {
                break;
            }
            let rows = (tokens - found * self.limits.block_tokens).min(left);
            left -= rows;
            self.budget -= rows;
            spare -= need;
            places -= 1;
            admitted.push((at, rows));
        }
        admitted
    }

    /// What is left of budget and blocks, for guesses. They preempt nobody, and leave everybody a block.
    fn drafts(&mut self) {
        let decodes: Vec<usize> = self.alive().filter(|i| self.rows(*i) == 1).collect();
        let mut spare = self.blocks_free.saturating_sub(self.running.len());
        for i in decodes {
            let held = self.held(i);
            let reachable = (held + spare) * self.limits.block_tokens - self.running[i].tokens;
            let rows = self.running[i].drafts.min(self.budget).min(reachable);
            let blocks = self.blocks_for(self.running[i].tokens + rows).saturating_sub(held);
            self.take(i, rows, blocks);
            spare -= blocks;
        }
    }
}

#[cfg(test)]
mod tests;
