//! One request inside the engine: its tokens, its KV blocks, and its text.

use sha2::{Digest, Sha256};

use super::{
    EngineEvent, EngineEventBody, EngineRequest, Resumed,
    allowance::Share,
    blocks::{BlockPool, BlockTable},
    draft::Drafter,
    logits::Shaper,
    planner::Demand,
    prefix::{BlockName, Chain},
    text::{Progress, TextAssembler},
};
use crate::{
    domain::{FinishReason, FundsEnd, Priority, StoppedBy, TokenDetail, Usage},
    grammar::Constraint,
    model::Vocabulary,
};

pub struct Sequence {
    pub spec: EngineRequest,
    /// What is paid for of its answer.
    pub share: Share,
    /// Whether a token is set aside for it in the step that is being planned or run.
    pub may_decode: bool,
    /// Prompt and output; while a step verifies drafts, these as well.
    pub tokens: Vec<u32>,
    pub computed: usize,
    pub blocks: BlockTable,
    pub chain: Chain,
    pub drafter: Drafter,
    /// Guessed for the step that is being planned or run.
    pub drafts: Vec<u32>,
    /// Of requests that have one, but for while its mask is worked out.
    pub constraint: Option<Box<Constraint>>,
    pub shaper: Option<Shaper>,
    /// Prompt tokens that were there when it was first served.
    cached_tokens: Option<u32>,
    /// Prompt tokens that have been told of.
    prompt_told: usize,
    prompt_details: Vec<TokenDetail>,
    text: TextAssembler,
    /// Text of this step that is certain.
    said: String,
    /// Bytes of what will be certain next that were told of before it was resumed.
    heard: usize,
    /// Decoded tokens that no event has told of yet.
    untold: Vec<Untold>,
    /// Bytes that the tokens so far decode to.
    decoded_bytes: usize,
}

struct Untold {
    token: u32,
    /// Length of the decoded bytes before it.
    from: usize,
    detail: Option<TokenDetail>,
}

/// How an answer ended.
pub struct Ending {
    pub reason: FinishReason,
    pub stopped_by: Option<StoppedBy>,
}

impl Sequence {
    /// With the ending of one that had ended where it is resumed.
    pub fn new(
        mut spec: EngineRequest,
        share: Share,
        pool: &BlockPool,
        block_tokens: usize,
        vocabulary: &Vocabulary,
    ) -> (Self, Option<Ending>) {
        let stops = std::mem::take(&mut spec.stops.strings);
        let mut ends = spec.stops.tokens.clone();
        if !spec.stops.ignore_eos {
            ends.extend_from_slice(&vocabulary.eos);
        }
        let resumed = std::mem::take(&mut spec.resumed);
        let mut sequence = Self {
            share,
            may_decode: false,
            tokens: spec.prompt.clone(),
            computed: 0,
            blocks: pool.table(&spec.lane),
            chain: Chain::new(&spec.lane, &spec.cache_salt, block_tokens),
            drafter: Drafter::new(),
            drafts: Vec::new(),
            constraint: spec.constraint.take().map(Box::new),
            shaper: Shaper::new(&spec.sampling, &spec.prompt, ends),
            cached_tokens: None,
            prompt_told: 1 + resumed.prompt_tokens as usize,
            prompt_details: Vec::new(),
            text: TextAssembler::new(stops, spec.stops.are_shown, spec.stops.until.clone()),
            said: String::new(),
            heard: 0,
            untold: Vec::new(),
            decoded_bytes: 0,
            spec,
        };
        let ending = sequence.resume(&resumed, vocabulary);
        sequence.chain.extend(&sequence.tokens);
        (sequence, ending)
    }

    /// Reads tokens of the answer that its client knows already.
    fn resume(&mut self, resumed: &Resumed, vocabulary: &Vocabulary) -> Option<Ending> {
        let mut ending = None;
        for token in &resumed.tokens {
            ending = ending.or(self.read(*token, None, vocabulary));
        }
        if ending.is_none() && resumed.is_complete {
            ending = Some(self.complete());
        }
        self.heard = (resumed.text_bytes as usize).saturating_sub(self.said.len());
        self.said.clear();
        self.untold.clear();
        ending
    }

    pub fn demand(&self, priority: Priority) -> Demand {
        Demand {
            tokens: self.tokens.len(),
            computed: self.computed,
            blocks: self.blocks.ids().len(),
            own_blocks: self.blocks.own(),
            drafts: self.drafts.len(),
            may_decode: self.may_decode,
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

    /// Whether it lacks nothing but the token that comes next.
    pub fn is_at_its_end(&self) -> bool {
        self.tokens.len() - self.computed == 1
    }

    /// Whether it could only go on with a token that nobody has paid for yet.
    pub fn waits_for_tokens(&self) -> bool {
        self.is_at_its_end() && !self.may_decode
    }

    /// The blocks that it may take from others: none where every row of the prompt is to be told of.
    pub fn usable(&self) -> &[BlockName] {
        if self.prompt_rows(1) > 0 { &[] } else { self.chain.usable(self.tokens.len()) }
    }

    /// Takes the blocks of its prefix that are there. Answers with how many prompt tokens these hold if it is
    /// served for the first time.
    pub fn begin(&mut self, pool: &BlockPool, block_tokens: usize) -> Option<u32> {
        let usable = self.usable().to_vec();
        let found = pool.find(&usable).blocks;
        self.blocks.adopt(&usable[..found]);
        self.computed = found * block_tokens;
        if self.cached_tokens.is_some() {
            return None;
        }
        self.cached_tokens = Some(self.computed.min(self.spec.prompt.len()) as u32);
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

    /// The tokens of its answer.
    pub fn answer(&self) -> &[u32] {
        &self.tokens[self.spec.prompt.len()..]
    }

    /// Adds a decoded token, and what is to be told of it. The ending when the answer is over with it.
    pub fn accept(&mut self, token: u32, detail: Option<TokenDetail>, vocabulary: &Vocabulary) -> Option<Ending> {
        self.share.take();
        self.read(token, detail, vocabulary)
    }

    fn read(&mut self, token: u32, detail: Option<TokenDetail>, vocabulary: &Vocabulary) -> Option<Ending> {
        self.tokens.push(token);
        if let Some(shaper) = &mut self.shaper {
            shaper.accept(token);
        }
        self.untold.push(Untold { token, from: self.decoded_bytes, detail });
        let stop = |stopped_by| Some(Ending { reason: FinishReason::Stop, stopped_by });
        let is_stop = self.spec.stops.tokens.contains(&token) && !self.text.is_past_stops();
        if !self.spec.stops.ignore_eos && vocabulary.is_eos(token) || is_stop && !self.spec.stops.are_shown {
            self.said += &self.text.finish();
            if let Some(detail) = self.untold.last_mut().and_then(|last| last.detail.as_mut()) {
                detail.is_hidden = true;
            }
            return stop(is_stop.then_some(StoppedBy::Token(token)));
        }
        let bytes = match self.spec.telling.control_text {
            true => vocabulary.spelled(token),
            false => vocabulary.bytes(token),
        };
        self.decoded_bytes += bytes.len();
        let may_stop = self.answer().len() > self.spec.sampling.min_tokens as usize;
        match self.text.push(bytes, may_stop) {
            Progress::Stopped { text, by, dropped } => {
                self.said += &text;
                let shown = self.decoded_bytes.saturating_sub(dropped);
                for Untold { from, detail, .. } in &mut self.untold {
                    detail.iter_mut().for_each(|detail| detail.is_hidden = *from >= shown);
                }
                stop(Some(StoppedBy::Text(by)))
            }
            Progress::Text(text) => {
                self.said += &text;
                if is_stop {
                    self.said += &self.text.finish();
                    return stop(Some(StoppedBy::Token(token)));
                }
                if self.output_left() > 0 {
                    return None;
                }
                self.said += &self.text.finish();
                Some(Ending { reason: FinishReason::Length, stopped_by: None })
            }
        }
    }

    /// Nothing can follow.
    pub fn cut(&mut self) -> Ending {
        self.said += &self.text.finish();
        Ending { reason: FinishReason::Length, stopped_by: None }
    }

    /// The ending if all is decoded that will ever be paid for.
    pub fn run_out(&mut self) -> Option<Ending> {
        let why: Option<FundsEnd> = self.share.end()?;
        Some(Ending { stopped_by: why.map(StoppedBy::Funds), ..self.cut() })
    }

    /// Nothing may follow what its grammar has read.
    pub fn complete(&mut self) -> Ending {
        self.said += &self.text.finish();
        Ending { reason: FinishReason::Stop, stopped_by: None }
    }

    /// How many of the next `rows` rows are to be told of as the prompt's: each tells of the token after it.
    pub fn prompt_rows(&self, rows: usize) -> usize {
        if self.spec.telling.prompt_logprobs.is_none() {
            return 0;
        }
        (self.spec.prompt.len() - 1).saturating_sub(self.computed).min(rows)
    }

    /// The prompt's token after position `at`, if nothing has been told of it.
    pub fn untold(&self, at: usize) -> Option<u32> {
        (at + 1 == self.prompt_told).then(|| self.spec.prompt.get(at + 1).copied()).flatten()
    }

    pub fn tell_of_prompt(&mut self, detail: TokenDetail) {
        self.prompt_told += 1;
        self.prompt_details.push(detail);
    }

    /// Says what the step brought, if anything.
    pub fn speak(&mut self, has_ended: bool, events: &mut Vec<EngineEvent>) {
        if !self.prompt_details.is_empty() {
            let tokens = std::mem::take(&mut self.prompt_details);
            events.push(self.event(EngineEventBody::Prompt { tokens }));
        }
        if self.heard > 0 {
            let heard = self.heard.min(self.said.len());
            // It is always one, as long as engines decode the same.
            let heard = self.said.ceil_char_boundary(heard);
            self.said.drain(..heard);
            self.heard = self.heard.saturating_sub(heard);
        }
        if !self.said.is_empty() || has_ended && !self.untold.is_empty() {
            let text = std::mem::take(&mut self.said);
            // A token whose text waits may yet turn out to be part of what stops the answer.
            let certain = if has_ended { usize::MAX } else { self.decoded_bytes.saturating_sub(self.text.waiting()) };
            let told = self.untold.iter().take_while(|untold| untold.from < certain).count();
            let mut ids = Vec::with_capacity(told);
            let mut details = Vec::new();
            for Untold { token, detail, .. } in self.untold.drain(..told) {
                ids.push(token);
                details.extend(detail);
            }
            events.push(self.event(EngineEventBody::Delta { text, ids, details }));
        }
    }

    /// The last event.
    pub fn finished(&self, Ending { reason, stopped_by }: Ending) -> EngineEventBody {
        let mut digest = Sha256::new();
        self.answer().iter().for_each(|token| digest.update(token.to_le_bytes()));
        EngineEventBody::Finished { reason, stopped_by, usage: self.usage(), digest: digest.finalize().into() }
    }

    pub fn event(&self, body: EngineEventBody) -> EngineEvent {
        EngineEvent { request: self.spec.request.clone(), choice: self.spec.choice, body }
    }
}
