//! One request inside the engine: its tokens, its KV blocks, and its text.

use super::{
    EngineEvent, EngineEventBody, EngineRequest,
    blocks::{BlockPool, BlockTable},
    draft::Drafter,
    planner::Demand,
    prefix::Chain,
    text::{Progress, TextAssembler},
};
use crate::{
    domain::{FinishReason, Priority, Usage},
    model::Vocabulary,
};

pub struct Sequence {
    pub spec: EngineRequest,
    /// Prompt and output; while a step verifies drafts, these as well.
    pub tokens: Vec<u32>,
    pub computed: usize,
    pub blocks: BlockTable,
    pub chain: Chain,
    pub drafter: Drafter,
    /// Guessed for the step that is being planned or run.
    pub drafts: Vec<u32>,
    /// Prompt tokens that were there when it was first served.
    cached_tokens: Option<u32>,
    text: TextAssembler,
    /// Text of this step that is certain.
    said: String,
    /// Decoded tokens that no event has counted yet.
    uncounted: u32,
}

impl Sequence {
    pub fn new(mut spec: EngineRequest, pool: &BlockPool, block_tokens: usize) -> Self {
        let mut chain = Chain::new(&spec.lane, &spec.cache_salt, block_tokens);
        chain.extend(&spec.prompt);
        Self {
            tokens: spec.prompt.clone(),
            computed: 0,
            blocks: pool.table(&spec.lane),
            chain,
            drafter: Drafter::new(),
            drafts: Vec::new(),
            cached_tokens: None,
            text: TextAssembler::new(std::mem::take(&mut spec.stop)),
            said: String::new(),
            uncounted: 0,
            spec,
        }
    }

    pub fn demand(&self, priority: Priority) -> Demand {
        Demand {
            tokens: self.tokens.len(),
            computed: self.computed,
            blocks: self.blocks.ids().len(),
            own_blocks: self.blocks.own(),
            drafts: self.drafts.len(),
            priority,
        }
    }

    pub fn usage(&self) -> Usage {
        let prompt = self.spec.prompt.len();
        Usage {
            prompt_tokens: prompt as u32,
            completion_tokens: (self.tokens.len() - prompt) as u32,
            cached_tokens: self.cached_tokens.unwrap_or(0),
        }
    }

    /// Output tokens that it may still get.
    pub fn output_left(&self) -> usize {
        (self.spec.prompt.len() + self.spec.output_tokens_max as usize).saturating_sub(self.tokens.len())
    }

    /// Takes the blocks of its prefix that are there. Answers with how many prompt tokens these hold if it is
    /// served for the first time.
    pub fn begin(&mut self, pool: &BlockPool, block_tokens: usize) -> Option<u32> {
        let usable = self.chain.usable(self.tokens.len());
        let found = pool.find(usable).blocks;
        self.blocks.adopt(&usable[..found]);
        self.computed = found * block_tokens;
        if self.cached_tokens.is_some() {
            return None;
        }
        self.cached_tokens = Some(self.computed as u32);
        self.cached_tokens
    }

    /// Gives everything back that it does not need while it waits.
    pub fn preempt(&mut self) {
        self.blocks.clear();
        self.computed = 0;
        self.drafts.clear();
    }

    /// Puts the drafts behind the tokens, for the step.
    pub fn show_drafts(&mut self) {
        self.tokens.extend_from_slice(&self.drafts);
    }

    /// Takes them away again.
    pub fn take_drafts(&mut self) -> Vec<u32> {
        let drafts = std::mem::take(&mut self.drafts);
        self.tokens.truncate(self.tokens.len() - drafts.len());
        drafts
    }

    /// Lets others use the full blocks that are computed. Only tokens that stay are ever counted as computed
    /// between steps, so what was guessed wrong is never among them.
    pub fn publish(&mut self, block_tokens: usize) {
        self.chain.extend(&self.tokens[..self.computed]);
        self.blocks.publish(&self.chain.names()[..self.computed / block_tokens]);
    }

    /// Adds a decoded token. The reason when the answer is over with it.
    pub fn accept(&mut self, token: u32, vocabulary: &Vocabulary) -> Option<FinishReason> {
        self.tokens.push(token);
        self.uncounted += 1;
        if !self.spec.ignore_eos && vocabulary.is_eos(token) {
            self.said += &self.text.finish();
            return Some(FinishReason::Stop);
        }
        match self.text.push(vocabulary.bytes(token)) {
            Progress::Stopped(text) => {
                self.said += &text;
                Some(FinishReason::Stop)
            }
            Progress::Text(text) => {
                self.said += &text;
                if self.output_left() > 0 {
                    return None;
                }
                self.said += &self.text.finish();
                Some(FinishReason::Length)
            }
        }
    }

    /// Says what the step brought, if anything.
    pub fn speak(&mut self, events: &mut Vec<EngineEvent>) {
        if !self.said.is_empty() {
            let text = std::mem::take(&mut self.said);
            let tokens = std::mem::take(&mut self.uncounted);
            events.push(self.event(EngineEventBody::Delta { text, tokens }));
        }
    }

    pub fn event(&self, body: EngineEventBody) -> EngineEvent {
        EngineEvent { request: self.spec.request.clone(), body }
    }
}
