//! The runner on a model that knows what should stand in every KV slot, and says so when it does not.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    rc::Rc,
    sync::LazyLock,
};

use proptest::prelude::*;
use sha2::{Digest, Sha256};

use super::*;
use crate::{
    domain::{FinishReason, Priority, SamplingParams, StoppedBy, Stops, Telling, TokenDetail, Usage},
    engine::{
        Resumed, sampler,
        text::{Progress, TextAssembler},
    },
};

const BLOCK: usize = 4;
const WORDS: [&str; 12] = ["</s>", "a", "b", "c", " d", "e ", "f", "g", "h", "é", "j", "kk"];
/// A prompt that holds it makes the model compute what is no number.
const POISON: u32 = 11;

/// What a slot holds after the token that ends `prefix`.
fn mark(prefix: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    prefix.hash(&mut hasher);
    hasher.finish()
}

/// The model's opinion on what follows `tokens`: mostly a matter of the last two, so that its texts repeat
/// themselves now and then.
fn opinion(tokens: &[u32]) -> Vec<f32> {
    let last = &tokens[tokens.len().saturating_sub(2)..];
    let odd = mark(tokens).is_multiple_of(7);
    let score = |token: u32| (mark(&[last, &[token, u32::from(odd)]].concat()) % 1000) as f32 / 150.0;
    (0..WORDS.len() as u32).map(|token| score(token) - if token == 0 { 1.5 } else { 0.0 }).collect()
}

#[derive(Default)]
struct Record {
    /// How often a slot was computed for each prefix.
    computed: HashMap<u64, usize>,
    rows: Vec<usize>,
}

/// Keeps what is written to each slot and checks what is read.
struct Witness {
    slots: Vec<u64>,
    logits: Vec<f32>,
    record: Rc<RefCell<Record>>,
}

impl Forward for Witness {
    fn vocabulary(&self) -> usize {
        WORDS.len()
    }

    fn forward(&mut self, batch: &Batch) -> Result<&[f32], EngineError> {
        let mut record = self.record.borrow_mut();
        record.rows.push(batch.rows());
        let slot = |s: &BatchSequence, position: usize| s.blocks[position / BLOCK] as usize * BLOCK + position % BLOCK;
        for (i, s) in batch.sequences.iter().enumerate() {
            let end = s.computed + s.rows;
            assert!(s.rows > 0 && end <= s.tokens.len() && s.logits_rows <= s.rows);
            for position in s.computed..end {
                let block = s.blocks[position / BLOCK];
                let others = batch.sequences.iter().enumerate().filter(|(j, _)| *j != i);
                assert!(others.clone().all(|(_, other)| !other.blocks.contains(&block)), "a shared block is written");
                let mark = mark(&s.tokens[..=position]);
                self.slots[slot(s, position)] = mark;
                *record.computed.entry(mark).or_default() += 1;
            }
        }
        self.logits.clear();
        for s in &batch.sequences {
            let end = s.computed + s.rows;
            for position in 0..end {
                assert_eq!(self.slots[slot(s, position)], mark(&s.tokens[..=position]), "a slot holds something else");
            }
            for position in end - s.logits_rows..end {
                let known = &s.tokens[..=position];
                self.logits.extend(opinion(known));
                if known[..s.prompt_tokens.min(known.len())].contains(&POISON) {
                    *self.logits.last_mut().unwrap() = f32::NAN;
                }
            }
        }
        Ok(&self.logits)
    }
}

fn vocabulary() -> Arc<Vocabulary> {
    Arc::new(Vocabulary::of_text(WORDS.map(str::to_owned).to_vec(), vec![0]))
}

fn settings(blocks: usize) -> Settings {
    Settings {
        context_tokens_max: 80,
        sequences_max: 4,
        step_tokens_max: 16,
        block_tokens: BLOCK,
        blocks,
        prefix_cache: true,
        speculation: Speculation::Off,
    }
}

/// Stands still: no answer depends on the time, and no test does.
fn clock() -> Instant {
    static NOW: LazyLock<Instant> = LazyLock::new(Instant::now);
    *NOW
}

fn runner(settings: Settings) -> (Runner, Rc<RefCell<Record>>) {
    let record = Rc::<RefCell<Record>>::default();
    let witness = Witness { slots: vec![0; settings.blocks * BLOCK], logits: Vec::new(), record: Rc::clone(&record) };
    let metrics = Metrics::new();
    let (gauges, counts) = (Gauges::new(&metrics, "test"), Counts::new(&metrics, "test"));
    let shared = Arc::new(Shared::new(64));
    (Runner::new(Box::new(witness), vocabulary(), settings, clock, shared, gauges, counts), record)
}

fn request(id: &str, prompt: &[u32], output_tokens_max: u32) -> EngineRequest {
    EngineRequest {
        choice: 0,
        request: id.into(),
        prompt: prompt.to_vec(),
        resumed: Resumed::default(),
        output_tokens_max,
        sampling: SamplingParams { temperature: 0.0, seed: 1, ..SamplingParams::default() },
        stops: Stops { ignore_eos: true, ..Stops::default() },
        telling: Telling::default(),
        constraint: None,
        priority: Priority::Normal,
        lane: "lane".into(),
        cache_salt: vec![],
        allowed_tokens: output_tokens_max,
        step_tokens: 0,
    }
}

/// `count` tokens that say nothing twice soon.
fn prompt(seed: u64, count: usize) -> Vec<u32> {
    (0..count as u64).map(|i| 1 + (mark(&[seed as u32, i as u32]) % 10) as u32).collect()
}

/// The answer, without an engine.
fn expected(request: &EngineRequest) -> (String, FinishReason, u32) {
    let (tokens, text, reason) = decoded(request);
    (text, reason, tokens.len() as u32)
}

/// Token by token.
fn decoded(request: &EngineRequest) -> (Vec<u32>, String, FinishReason) {
    let vocabulary = vocabulary();
    let (mut tokens, mut said) = (request.prompt.clone(), String::new());
    let mut text = TextAssembler::new(request.stops.strings.clone(), request.stops.are_shown, String::new());
    let mut scratch = sampler::Scratch::default();
    loop {
        let token = sampler::sample(&wished(request, &tokens), &request.sampling, tokens.len(), &mut scratch);
        tokens.push(token);
        let answer = || tokens[request.prompt.len()..].to_vec();
        let decoded = answer().len() as u32;
        let is_stop = request.stops.tokens.contains(&token);
        if token == 0 && !request.stops.ignore_eos || is_stop && !request.stops.are_shown {
            return (answer(), said + &text.finish(), FinishReason::Stop);
        }
        match text.push(vocabulary.bytes(token), decoded > request.sampling.min_tokens) {
            Progress::Stopped { text, .. } => return (answer(), said + &text, FinishReason::Stop),
            Progress::Text(more) => said += &more,
        }
        if is_stop {
            return (answer(), said + &text.finish(), FinishReason::Stop);
        }
        if decoded == request.output_tokens_max {
            return (answer(), said + &text.finish(), FinishReason::Length);
        }
    }
}

/// The model's opinion, as the request has it changed.
fn wished(request: &EngineRequest, tokens: &[u32]) -> Vec<f32> {
    let (wishes, answer) = (&request.sampling, &tokens[request.prompt.len()..]);
    let mut liked = opinion(tokens);
    for (token, logit) in (0u32..).zip(&mut liked) {
        let count = answer.iter().filter(|other| **other == token).count() as f32;
        if wishes.repetition_penalty != 1.0 && tokens.contains(&token) {
            let penalty = wishes.repetition_penalty;
            *logit *= if *logit > 0.0 { 1.0 / penalty } else { penalty };
        }
        if count > 0.0 {
            *logit -= wishes.frequency_penalty * count + wishes.presence_penalty;
        }
        *logit += wishes.logit_bias.iter().find(|(other, _)| *other == token).map_or(0.0, |(_, bias)| *bias);
    }
    let mut left = liked.clone();
    for (token, logit) in (0u32..).zip(&mut left) {
        let ends = token == 0 && !request.stops.ignore_eos || request.stops.tokens.contains(&token);
        let is_early = ends && answer.len() < wishes.min_tokens as usize;
        let is_bad = wishes
            .bad_words
            .iter()
            .any(|word| word.last() == Some(&token) && answer.ends_with(&word[..word.len() - 1]));
        if is_early || is_bad || wishes.allowed_tokens.as_ref().is_some_and(|allowed| !allowed.contains(&token)) {
            *logit = f32::NEG_INFINITY;
        }
    }
    if left.iter().any(|logit| *logit > f32::NEG_INFINITY) { left } else { liked }
}

/// The logprob of `token` behind `tokens`, in double precision.
fn logprob(tokens: &[u32], token: u32) -> f64 {
    let logits = opinion(tokens);
    let total: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
    f64::from(logits[token as usize]) - total.ln()
}

/// The name of a choice.
fn name(request: &RequestId, choice: u32) -> String {
    if choice == 0 { request.to_string() } else { format!("{request}.{choice}") }
}

/// What was heard of each choice.
#[derive(Default)]
struct Heard {
    texts: BTreeMap<String, String>,
    details: BTreeMap<String, Vec<TokenDetail>>,
    prompts: BTreeMap<String, Vec<TokenDetail>>,
    ended: BTreeMap<String, Result<(FinishReason, Usage), String>>,
    stopped_by: BTreeMap<String, StoppedBy>,
    digests: BTreeMap<String, [u8; 32]>,
    /// Requests that need so many tokens more.
    needs: Vec<(RequestId, u32)>,
}

impl Heard {
    fn listen(&mut self, runner: &mut Runner) {
        for event in std::mem::take(&mut runner.events) {
            let id = name(&event.request, event.choice);
            let EngineEvent { request, body, .. } = event;
            assert!(
                matches!(body, EngineEventBody::NeedsTokens { .. }) || !self.ended.contains_key(&id),
                "{id} speaks after its end"
            );
            match body {
                EngineEventBody::NeedsTokens { wanted } => self.needs.push((request, wanted)),
                EngineEventBody::Prompt { tokens } => self.prompts.entry(id).or_default().extend(tokens),
                EngineEventBody::Delta { text, details, .. } => {
                    *self.texts.entry(id.clone()).or_default() += &text;
                    self.details.entry(id).or_default().extend(details);
                }
                EngineEventBody::Finished { reason, stopped_by, usage, digest } => {
                    self.stopped_by.extend(stopped_by.map(|stopped_by| (id.clone(), stopped_by)));
                    self.digests.insert(id.clone(), digest);
                    self.ended.insert(id, Ok((reason, usage)));
                }
                EngineEventBody::Failed { message } => drop(self.ended.insert(id, Err(message))),
            }
        }
    }

    fn usage(&self, id: &str) -> Usage {
        self.ended[id].as_ref().unwrap().1
    }

    fn check(&self, request: &EngineRequest) {
        let id = &name(&request.request, request.choice);
        let (answer, text, reason) = decoded(request);
        let tokens = answer.len() as u32;
        let (got, usage) = self.ended[id].as_ref().unwrap();
        let bytes = answer[..usage.completion_tokens as usize].iter().flat_map(|token| token.to_le_bytes());
        assert_eq!(self.digests[id][..], Sha256::digest(bytes.collect::<Vec<_>>())[..], "{id}");
        let said = self.texts.get(id).map_or("", String::as_str);
        if *got == FinishReason::Cancelled {
            assert!(text.starts_with(said), "{id}: {said:?} does not begin {text:?}");
            return;
        }
        assert_eq!((said, *got, usage.completion_tokens), (text.as_str(), reason, tokens), "{id}");
        assert_eq!(usage.prompt_tokens as usize, request.prompt.len());
        assert!(usage.cached_tokens < usage.prompt_tokens && usage.cached_tokens.is_multiple_of(BLOCK as u32));
        self.check_details(request, usage.completion_tokens as usize);
    }

    fn check_details(&self, request: &EngineRequest, decoded: usize) {
        let id = &name(&request.request, request.choice);
        let told = self.details.get(id).map_or(&[][..], Vec::as_slice);
        assert_eq!(told.len(), if request.telling.tells_tokens() { decoded } else { 0 }, "{id}");
        let mut tokens = request.prompt.clone();
        for detail in told {
            if let Some(top) = request.telling.logprobs {
                assert!((f64::from(detail.logprob) - logprob(&tokens, detail.token)).abs() < 1e-4, "{id}");
                assert_eq!(detail.top.len(), top as usize);
            }
            tokens.push(detail.token);
        }
        let prompt = self.prompts.get(id).map_or(&[][..], Vec::as_slice);
        let wanted = request.telling.prompt_logprobs.map_or(0, |_| request.prompt.len() - 1);
        assert_eq!(prompt.len(), wanted, "{id}");
        for (detail, at) in prompt.iter().zip(1..) {
            assert_eq!(detail.token, request.prompt[at]);
            assert!((f64::from(detail.logprob) - logprob(&request.prompt[..at], detail.token)).abs() < 1e-4);
        }
    }
}

fn tell(runner: &mut Runner, mail: Vec<Mail>) {
    runner.take_in(News { mail, shutdown: false });
}

/// Those of the same name are choices of one request.
fn submit(runner: &mut Runner, requests: &[EngineRequest]) {
    let choices = requests.chunk_by(|a, b| a.request == b.request);
    tell(runner, choices.map(|choices| Mail::Submit(choices.to_vec())).collect());
}

fn cancel(runner: &mut Runner, id: &str) {
    tell(runner, vec![Mail::Cancel(id.into())]);
}

/// Steps until nothing is left.
fn finish(runner: &mut Runner, heard: &mut Heard) {
    for _ in 0..10_000 {
        if runner.is_idle() {
            heard.listen(runner);
            assert_eq!(runner.pool.free(), runner.pool.total());
            return;
        }
        runner.step().unwrap();
        heard.listen(runner);
    }
    panic!("the runner does not get anywhere");
}

fn served(runner: &mut Runner, requests: &[EngineRequest]) -> Heard {
    let mut heard = Heard::default();
    submit(runner, requests);
    finish(runner, &mut heard);
    requests.iter().for_each(|request| heard.check(request));
    heard
}

#[test]
fn a_prefix_that_was_served_is_not_computed_again_and_is_told_to_the_block() {
    let (mut runner, record) = runner(settings(60));
    let first = request("first", &prompt(1, 22), 6);
    assert_eq!(served(&mut runner, std::slice::from_ref(&first)).usage("first").cached_tokens, 0);
    let computed: usize = record.borrow().rows.iter().sum();
    // The same again: five full blocks of 22 tokens.
    let again = request("again", &first.prompt, 6);
    assert_eq!(served(&mut runner, &[again]).usage("again").cached_tokens, 20);
    assert_eq!(record.borrow().rows.iter().sum::<usize>(), computed + 22 - 20 + 5);
    // A prompt that is all there still computes its last block.
    let short = request("short", &first.prompt[..20], 6);
    assert_eq!(served(&mut runner, &[short]).usage("short").cached_tokens, 16);
    // The next turn of the talk finds the answer as well.
    let mut talk = first.prompt.clone();
    let mut scratch = sampler::Scratch::default();
    (0..5).for_each(|_| talk.push(sampler::sample(&opinion(&talk), &first.sampling, talk.len(), &mut scratch)));
    talk.extend([3, 4, 5]);
    assert_eq!(served(&mut runner, &[request("talk", &talk, 6)]).usage("talk").cached_tokens, 24);
}

#[test]
fn another_lane_another_salt_and_a_cache_that_is_off_find_nothing() {
    let first = request("first", &prompt(1, 22), 2);
    let lane = EngineRequest { lane: "other".into(), ..request("lane", &first.prompt, 2) };
    let salt = EngineRequest { cache_salt: b"salt".to_vec(), ..request("salt", &first.prompt, 2) };
    let (mut on, _) = runner(settings(60));
    served(&mut on, std::slice::from_ref(&first));
    let heard = served(&mut on, &[lane, salt]);
    assert_eq!((heard.usage("lane").cached_tokens, heard.usage("salt").cached_tokens), (0, 0));
    let (mut off, _) = runner(Settings { prefix_cache: false, ..settings(60) });
    let again = request("again", &first.prompt, 2);
    let heard = served(&mut off, &[first, again]);
    assert_eq!((heard.usage("first").cached_tokens, heard.usage("again").cached_tokens), (0, 0));
}

#[test]
fn requests_that_come_together_compute_their_common_prefix_once() {
    let (mut runner, record) = runner(settings(60));
    let common = prompt(1, 40);
    let requests: Vec<_> =
        (0..4).map(|i| request(&i.to_string(), &[&common[..], &prompt(100 + i, 5)].concat(), 3)).collect();
    let heard = served(&mut runner, &requests);
    for end in 1..=common.len() {
        assert_eq!(record.borrow().computed[&mark(&common[..end])], 1, "token {end}");
    }
    let cached: Vec<u32> = (0..4).map(|i| heard.usage(&i.to_string()).cached_tokens).collect();
    assert_eq!(cached, [0, 40, 40, 40]);
}

#[test]
fn when_the_one_that_computes_a_common_prefix_goes_another_goes_on_where_it_stood() {
    let (mut runner, record) = runner(settings(60));
    let common = prompt(1, 60);
    let requests = [request("first", &common, 3), request("second", &common, 3)];
    submit(&mut runner, &requests);
    runner.step().unwrap();
    runner.step().unwrap();
    assert_eq!((runner.running.len(), runner.waiting.len()), (1, 1));
    cancel(&mut runner, "first");
    let mut heard = Heard::default();
    finish(&mut runner, &mut heard);
    heard.check(&requests[1]);
    assert_eq!(heard.usage("second").cached_tokens, 32);
    assert!(record.borrow().computed.values().all(|times| *times == 1));
}

#[test]
fn nobody_waits_for_the_prefix_of_a_lower_class() {
    let (mut runner, _) = runner(settings(60));
    let common = prompt(1, 60);
    let low = EngineRequest { priority: Priority::Low, ..request("low", &common, 3) };
    let high = EngineRequest { priority: Priority::High, ..request("high", &common, 3) };
    submit(&mut runner, std::slice::from_ref(&low));
    runner.step().unwrap();
    submit(&mut runner, std::slice::from_ref(&high));
    runner.step().unwrap();
    assert_eq!((runner.running.len(), runner.waiting.len()), (2, 0));
    let mut heard = Heard::default();
    finish(&mut runner, &mut heard);
    heard.check(&low);
    heard.check(&high);
}

#[test]
fn a_cancelled_request_takes_no_part_in_the_next_step_wherever_it_was() {
    let (mut runner, record) = runner(Settings { sequences_max: 1, ..settings(60) });
    let requests = [request("runs", &prompt(1, 6), 40), request("waits", &prompt(2, 6), 40)];
    submit(&mut runner, &requests);
    (0..5).for_each(|_| runner.step().unwrap());
    let mut heard = Heard::default();
    let steps = record.borrow().rows.len();
    cancel(&mut runner, "waits");
    cancel(&mut runner, "runs");
    cancel(&mut runner, "unknown");
    finish(&mut runner, &mut heard);
    assert_eq!(record.borrow().rows.len(), steps);
    assert_eq!((heard.usage("runs").completion_tokens, heard.usage("waits").completion_tokens), (5, 0));
    requests.iter().for_each(|request| heard.check(request));
}

#[test]
fn what_is_no_number_fails_its_own_request_and_leaves_the_others_alone() {
    let (mut runner, _) = runner(settings(60));
    let good = request("good", &prompt(1, 9), 20);
    submit(&mut runner, &[request("bad", &[1, 2, POISON, 3], 20), good.clone()]);
    let mut heard = Heard::default();
    finish(&mut runner, &mut heard);
    assert!(heard.ended["bad"].is_err());
    heard.check(&good);
}

#[test]
fn right_guesses_save_steps_and_change_nothing_else() {
    let requests: Vec<_> = (0..3).map(|i| request(&i.to_string(), &prompt(i, 6), 60)).collect();
    let mut steps = Vec::new();
    for speculation in [Speculation::Off, Speculation::Always] {
        let (mut runner, record) = runner(Settings { speculation, step_tokens_max: 32, ..settings(80) });
        served(&mut runner, &requests);
        let (drafted, accepted) = (runner.counts.drafted_tokens.get(), runner.counts.accepted_draft_tokens.get());
        assert_eq!(drafted > 0, speculation == Speculation::Always);
        assert!(accepted <= drafted);
        steps.push(record.borrow().rows.len());
    }
    assert!(steps[1] * 4 < steps[0] * 3, "{steps:?}");
}

#[test]
fn an_answer_ends_inside_right_guesses_exactly_where_it_would_have_without() {
    for ending in 0..40 {
        let mut request = request("r", &prompt(ending, 6), 60);
        match ending % 3 {
            0 => request.output_tokens_max = 20 + ending as u32,
            1 => {
                // A stop string out of the middle of the answer.
                let text = expected(&request).0;
                let chars: Vec<char> = text.chars().collect();
                request.stops.strings = vec![chars[chars.len() / 2..][..4].iter().collect()];
            }
            _ => request.stops.ignore_eos = false,
        }
        let (mut runner, _) = runner(Settings { speculation: Speculation::Always, ..settings(80) });
        served(&mut runner, &[request]);
    }
}

#[test]
fn the_choices_of_a_request_are_answers_of_their_own_and_go_together() {
    let (mut runner, _) = runner(settings(60));
    let choices: Vec<EngineRequest> = (0..3u32)
        .map(|choice| {
            let mut request = EngineRequest { choice, allowed_tokens: 36, ..request("r", &prompt(4, 9), 12) };
            (request.sampling.temperature, request.sampling.seed) = (1.0, choice.into());
            request
        })
        .collect();
    submit(&mut runner, &choices);
    let mut texts = BTreeMap::<u32, String>::new();
    let mut ended = 0;
    while !runner.is_idle() {
        runner.step().unwrap();
        for event in std::mem::take(&mut runner.events) {
            match event.body {
                EngineEventBody::Delta { text, .. } => *texts.entry(event.choice).or_default() += &text,
                EngineEventBody::Finished { .. } => ended += 1,
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(ended, 3);
    for request in &choices {
        assert_eq!(texts[&request.choice], expected(request).0);
    }
    submit(&mut runner, &choices);
    runner.step().unwrap();
    cancel(&mut runner, "r");
    assert!(runner.is_idle());
    let cancelled =
        |event: &&EngineEvent| matches!(event.body, EngineEventBody::Finished { reason: FinishReason::Cancelled, .. });
    assert_eq!(runner.events.iter().filter(cancelled).count(), 3);
}

#[derive(Clone, Debug)]
enum Act {
    Submit {
        text: u8,
        prompt: usize,
        tail: u8,
        output: u32,
        temperature: f32,
        class: u8,
        lane: u8,
        eos: bool,
        wish: u32,
    },
    Cancel(usize),
    Step(usize),
}

/// Anything that a request may wish for, by the bits of `wish`; half of the requests wish for nothing.
fn wish_for(request: &mut EngineRequest, wish: u32) {
    let has = |bit: u32| wish & 1 == 1 && wish >> bit & 1 == 1;
    let wishes = &mut request.sampling;
    if has(1) {
        wishes.frequency_penalty = 0.7;
    }
    if has(2) {
        wishes.presence_penalty = -1.0;
    }
    if has(3) {
        wishes.repetition_penalty = 1.5;
    }
    if has(4) {
        wishes.logit_bias = vec![(3, 2.0), (5, -100.0)];
    }
    if has(5) {
        wishes.allowed_tokens = Some(vec![0, 2, 4, 6, 8]);
    }
    if has(6) {
        wishes.bad_words = vec![vec![2], vec![4, 6]];
    }
    if has(7) {
        wishes.min_tokens = 5;
    }
    if has(8) {
        request.stops.tokens = vec![7, 8];
    }
    if has(9) {
        request.stops.strings = vec!["b d".into(), "f".into()];
    }
    request.stops.are_shown = has(10);
    request.telling.logprobs = has(11).then_some(wish >> 20 & 3);
    request.telling.token_ids = has(12);
    request.telling.prompt_logprobs = has(13).then_some(2);
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let submit = (0u8..3, 1usize..40, 0u8..3, 1u32..30, 0u8..3, (0u8..3, 0u8..2), any::<bool>(), any::<u32>())
        .prop_map(|(text, prompt, tail, output, temperature, (class, lane), eos, wish)| {
            let temperature = f32::from(temperature) * 0.5;
            Act::Submit { text, prompt, tail, output, temperature, class, lane, eos, wish }
        });
    let act = prop_oneof![4 => submit, 1 => (0usize..20).prop_map(Act::Cancel), 4 => (1usize..12).prop_map(Act::Step)];
    prop::collection::vec(act, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_answer_is_the_one_that_a_machine_of_its_own_would_give(
        acts in acts(),
        blocks in 21usize..50,
        sequences_max in 1usize..6,
        step_tokens_max in 6usize..40,
        prefix_cache: bool,
        speculates: bool,
    ) {
        let speculation = if speculates { Speculation::Always } else { Speculation::Off };
        let settings = Settings { sequences_max, step_tokens_max, prefix_cache, speculation, ..settings(blocks) };
        let (mut runner, _) = runner(settings);
        let mut heard = Heard::default();
        let mut requests = Vec::new();
        for act in acts {
            match act {
                Act::Submit { text, prompt: tokens, tail, output, temperature, class, lane, eos, wish } => {
                    let tokens = [prompt(text.into(), tokens), prompt(50 + u64::from(tail), usize::from(tail))].concat();
                    let mut request = request(&requests.len().to_string(), &tokens, output);
                    request.sampling.temperature = temperature;
                    request.sampling.seed = requests.len() as u64;
                    request.priority = [Priority::Low, Priority::Normal, Priority::High][usize::from(class)];
                    request.lane = format!("lane {lane}").into();
                    request.stops.ignore_eos = !eos;
                    wish_for(&mut request, wish);
                    submit(&mut runner, std::slice::from_ref(&request));
                    requests.push(request);
                }
                Act::Cancel(at) => cancel(&mut runner, &at.to_string()),
                Act::Step(count) => {
                    for _ in 0..count {
                        if !runner.is_idle() {
                            runner.step().unwrap();
                        }
                    }
                }
            }
            heard.listen(&mut runner);
        }
        finish(&mut runner, &mut heard);
        prop_assert_eq!(heard.ended.len(), requests.len());
        requests.iter().for_each(|request| heard.check(request));
    }
}

mod paid;
mod resumed;
