//! Which rows the next step computes. Pure: numbers in, a plan out.
//!
//! There is no prefill phase and no decode phase. A sequence has tokens, of which some are computed; those
//! that lack one token (decodes) go first, then the others catch up in chunks, under a budget that keeps a
//! step with both nearly as short as one with decodes alone, so that a long prompt never keeps the others
//! from their next token. What is then left goes to drafts. When KV blocks run out, sequences are sent back
//! to waiting: the lowest class first, in it those that wait for tokens to be paid for, then who has computed least;
//! nothing new joins in such a step.
//!
//! Who may not decode computes all rows but the last one of what it lacks, which is where its next token would come
//! from, and then sits in its place. Only where all do so, and somebody of their class or a higher one could go on in
//! their stead, is one of them sent back to waiting for that.

use std::{cmp::Reverse, iter::Peekable};

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
    /// Whether it may have its next token in this step.
    pub may_decode: bool,
    pub priority: Priority,
}

impl Demand {
    /// Whether it lacks one token alone and may not have it.
    fn sits(&self) -> bool {
        !self.may_decode && self.tokens - self.computed == 1
    }
}

/// What it knows of one that waits, with nothing computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub tokens: usize,
    /// Whether it may have its next token in this step; who may not does not join, and is in nobody's way.
    pub may_decode: bool,
    pub priority: Priority,
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

/// Plans one step. `running` is in order of admission, `waiting` in order of service: higher classes first.
pub fn plan(running: &[Demand], waiting: impl Iterator<Item = Candidate>, blocks_free: usize, limits: &Limits) -> Plan {
    let turns = vec![Turn::Rows(0); running.len()];
    let all_sit = !running.is_empty() && running.iter().all(Demand::sits);
    let budget = limits.step_tokens_max;
    let mut state = State { running, limits, turns, blocks_free, budget, all_sit, kept_out: None };
    state.decodes();
    let mut waiting = waiting.enumerate().peekable();
    let (mut admitted, mut is_open) = (Vec::new(), true);
    for class in [Priority::High, Priority::Normal, Priority::Low] {
        state.chunks(class);
        is_open = is_open && state.preempted() == 0 && state.admissions(class, &mut waiting, &mut admitted);
    }
    if admitted.is_empty() && state.is_stuck() {
        // Every sequence waits for blocks that only another one can give back.
        if let Some(victim) = state.victim() {
            state.preempt(victim);
        }
        state.decodes();
        [Priority::High, Priority::Normal, Priority::Low].into_iter().for_each(|class| state.chunks(class));
    }
    if admitted.is_empty()
        && let Some(class) = state.kept_out
        && let Some(victim) = state.victim()
        && running[victim].priority <= class
    {
        state.preempt(victim);
    }
    if admitted.is_empty() && state.catching_up() == 0 {
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
    /// Nobody of the running ones may go on.
    all_sit: bool,
    /// The class of the first one that could go on if these were not in its way.
    kept_out: Option<Priority>,
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
        let mut movable = self.alive().filter(|i| !self.running[*i].sits()).peekable();
        movable.peek().is_some() && movable.all(|i| self.rows(i) == 0)
    }

    /// One row for everybody who lacks one token.
    fn decodes(&mut self) {
        for i in self.alive() {
            let Demand { tokens, computed, blocks, may_decode, .. } = self.running[i];
            if tokens - computed != 1 || !may_decode || self.turns[i] != Turn::Rows(0) || self.budget == 0 {
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

    /// Rows for those of a class who lack more.
    fn chunks(&mut self, class: Priority) {
        for i in self.alive() {
            let Demand { tokens, computed, blocks, may_decode, priority, .. } = self.running[i];
            if priority != class || tokens - computed == 1 || self.turns[i] != Turn::Rows(0) {
                continue;
            }
            let reachable = (blocks + self.blocks_free) * self.limits.block_tokens - computed;
            let wanted = tokens - computed - usize::from(!may_decode);
            let rows = wanted.min(self.chunk_budget()).min(reachable);
            let missing = self.blocks_for(computed + rows).saturating_sub(blocks);
            self.take(i, rows, missing);
        }
    }

    /// Rows of those who lacked more than one token, as planned so far.
    fn catching_up(&self) -> usize {
        let behind = |i: &usize| self.running[*i].tokens - self.running[*i].computed > 1;
        self.alive().filter(behind).map(|i| self.rows(i)).sum()
    }

    /// What may still catch up in this step.
    fn chunk_budget(&self) -> usize {
        let planned: usize = self.alive().map(|i| self.rows(i)).sum();
        let catching_up = self.catching_up();
        // Whatever else was taken from the budget went to those who join.
        let joining = self.limits.step_tokens_max - self.budget - planned;
        match planned - catching_up {
            0 => self.budget,
            _ => self.budget.min(self.limits.chunk_tokens_max.saturating_sub(catching_up + joining)),
        }
    }

    fn take(&mut self, i: usize, rows: usize, blocks: usize) {
        self.turns[i] = Turn::Rows(self.rows(i) + rows);
        self.budget -= rows;
        self.blocks_free -= blocks;
    }

    /// Who goes first when blocks run out: the lowest class, in it who sits, then who has computed least, of these the
    /// last.
    fn victim(&self) -> Option<usize> {
        let order = |i: &usize| {
            let demand = &self.running[*i];
            (demand.priority, !demand.sits(), demand.computed, Reverse(*i))
        };
        self.alive().min_by_key(order)
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

    fn preempted(&self) -> usize {
        self.turns.iter().filter(|turn| **turn == Turn::Preempted).count()
    }

    /// Those of a class who join. Whether those behind them may as well.
    fn admissions(
        &mut self,
        class: Priority,
        waiting: &mut Peekable<impl Iterator<Item = (usize, Candidate)>>,
        admitted: &mut Vec<(usize, usize)>,
    ) -> bool {
        loop {
            let left = self.chunk_budget();
            let is_full = self.running.len() + admitted.len() >= self.limits.sequences_max;
            if left == 0 || is_full && !self.all_sit {
                return false;
            }
            let Some((at, candidate)) = waiting.next_if(|(_, candidate)| candidate.priority == class) else {
                return true;
            };
            let Candidate { tokens, may_decode, found, found_free, behind, .. } = candidate;
            let waits = match behind {
                None => false,
                Some(Leader::Running) => true,
                Some(Leader::Waiting(leader)) => admitted.iter().any(|(at, _)| *at == leader),
            };
            if waits || !may_decode {
                continue;
            }
            // What the running sequences still need for the tokens that they have is not given away, and one
            // block each is left for their next ones.
            let needs = |i: usize| self.blocks_for(self.running[i].tokens).saturating_sub(self.held(i)) + 1;
            let promised: usize = self.alive().map(needs).sum();
            let need = self.blocks_for(tokens + 1) - found + found_free;
            let has_no_blocks =
                need + promised > self.blocks_free && !(need <= self.blocks_free && self.running.is_empty());
            if is_full || has_no_blocks {
                self.kept_out = self.all_sit.then_some(class);
                return false;
            }
            let rows = (tokens - found * self.limits.block_tokens).min(left);
            self.budget -= rows;
            self.blocks_free -= need;
            admitted.push((at, rows));
        }
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
