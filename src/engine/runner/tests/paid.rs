//! Requests that may decode only what is paid for so far.

use super::*;
use crate::{
    domain::{FundsEnd, GrammarSource},
    grammar::Grammars,
};

/// All choices of a request, which ask for more when half of eight tokens are left.
fn choices(id: &str, count: u32, prompt: &[u32], output: u32, allowed_tokens: u32) -> Vec<EngineRequest> {
    let choice = |choice| {
        let mut request = EngineRequest { choice, allowed_tokens, step_tokens: 8, ..request(id, prompt, output) };
        (request.sampling.temperature, request.sampling.seed) = (1.0, 7 + u64::from(choice));
        request
    };
    (0..count).map(choice).collect()
}

fn allow(runner: &mut Runner, id: &str, tokens: u32, last: Option<FundsEnd>) {
    tell(runner, vec![Mail::Allow(id.into(), tokens, last)]);
}

fn step(runner: &mut Runner, heard: &mut Heard) {
    runner.step().unwrap();
    heard.listen(runner);
}

/// Steps until nobody can go on.
fn settle_down(runner: &mut Runner, heard: &mut Heard) {
    for _ in 0..10_000 {
        if runner.is_idle() {
            return;
        }
        step(runner, heard);
        if runner.sits {
            return;
        }
    }
    panic!("the runner does not come to rest");
}

/// Tokens of all choices of a request.
fn spent(runner: &Runner, heard: &Heard, choices: &[EngineRequest]) -> u32 {
    let ended = |choice: &EngineRequest| heard.ended.get(&name(&choice.request, choice.choice));
    let ended: u32 = choices.iter().filter_map(ended).flatten().map(|(_, usage)| usage.completion_tokens).sum();
    let open = runner.sequences().filter(|sequence| sequence.spec.request == choices[0].request);
    ended + open.map(|sequence| sequence.answer().len() as u32).sum::<u32>()
}

impl Heard {
    /// The answer is that of a request that wanted no more tokens than it got.
    fn check_part(&self, request: &EngineRequest) {
        let id = &name(&request.request, request.choice);
        let (reason, usage) = self.ended[id].as_ref().unwrap();
        assert_eq!(*reason, FinishReason::Length, "{id}");
        match usage.completion_tokens {
            0 => assert_eq!(self.texts.get(id).map_or("", String::as_str), ""),
            output_tokens_max => self.check(&EngineRequest { output_tokens_max, ..request.clone() }),
        }
    }
}

#[test]
fn exactly_as_many_tokens_are_decoded_as_are_paid_for_however_many_choices_share_them() {
    for speculation in [Speculation::Off, Speculation::Always] {
        for (count, allowed) in (1..=3).flat_map(|count| (1..=30).map(move |allowed| (count, allowed))) {
            for is_told_early in [false, true] {
                let settings = Settings { speculation, step_tokens_max: 32, ..settings(60) };
                let (mut runner, mut heard) = (runner(settings).0, Heard::default());
                let all = choices("r", count, &prompt(allowed.into(), 6), 40, allowed);
                submit(&mut runner, &all);
                heard.listen(&mut runner);
                while !runner.is_idle() {
                    if is_told_early && !heard.needs.is_empty() || runner.sits {
                        assert!(!runner.sits || spent(&runner, &heard, &all) == allowed);
                        heard.needs.clear();
                        allow(&mut runner, "r", 0, Some(FundsEnd::Balance));
                        heard.listen(&mut runner);
                    } else {
                        step(&mut runner, &mut heard);
                    }
                }
                assert_eq!(spent(&runner, &heard, &all), allowed);
                for choice in &all {
                    heard.check_part(choice);
                    let stopped_by = &heard.stopped_by[&name(&choice.request, choice.choice)];
                    assert_eq!(*stopped_by, StoppedBy::Funds(FundsEnd::Balance));
                }
                assert_eq!(runner.pool.free(), runner.pool.total());
            }
        }
    }
}

#[test]
fn where_no_more_ever_comes_the_end_is_one_of_length() {
    let (mut runner, _) = runner(settings(60));
    let short = EngineRequest { allowed_tokens: 5, ..request("r", &prompt(1, 6), 20) };
    submit(&mut runner, std::slice::from_ref(&short));
    let mut heard = Heard::default();
    finish(&mut runner, &mut heard);
    heard.check(&EngineRequest { output_tokens_max: 5, ..short });
    assert!(heard.stopped_by.is_empty() && heard.needs.is_empty());
}

#[test]
fn who_pauses_and_goes_on_says_what_it_would_have_said_without_a_pause() {
    let mut pauses_of_all = 0;
    for (round, speculation) in (0..24).flat_map(|round| [(round, Speculation::Off), (round, Speculation::Always)]) {
        // The prompt comes in chunks.
        let settings = Settings { speculation, step_tokens_max: 7, ..settings(60) };
        let (mut runner, mut heard) = (runner(settings).0, Heard::default());
        let mut all = choices("r", 1 + round % 3, &prompt(round.into(), 5 + round as usize), 30, 1 + round % 4);
        all.iter_mut().for_each(|choice| wish_for(choice, round.wrapping_mul(0x9e37_79b9)));
        submit(&mut runner, &all);
        let mut pauses = 0;
        while !runner.is_idle() {
            settle_down(&mut runner, &mut heard);
            pauses += 1;
            // Asked for once, however long it takes.
            for _ in 0..3 {
                if !runner.is_idle() {
                    step(&mut runner, &mut heard);
                }
            }
            assert!(heard.needs.len() <= pauses, "{:?}", heard.needs);
            allow(&mut runner, "r", 1 + round % 5, None);
            heard.listen(&mut runner);
        }
        pauses_of_all += pauses;
        all.iter().for_each(|choice| heard.check(choice));
    }
    assert!(pauses_of_all > 200, "{pauses_of_all}");
}

#[test]
fn a_form_survives_pauses() {
    let lark = r#"start: /([abc]+ d[fgh]+)+/"#;
    let source = serde_json::json!({ "grammars": [{ "name": "start", "lark_grammar": lark }] });
    let grammars = Grammars::new(vocabulary());
    let constraint = || Some(grammars.compile("lane", &GrammarSource(source.to_string())).unwrap());
    let answer = |allowed_tokens| {
        let (mut runner, mut heard) = (runner(settings(60)).0, Heard::default());
        let [mut request]: [_; 1] = choices("r", 1, &prompt(3, 9), 40, allowed_tokens).try_into().unwrap();
        request.constraint = constraint();
        (request.stops.ignore_eos, request.sampling.min_tokens) = (false, 40);
        submit(&mut runner, &[request]);
        while !runner.is_idle() {
            settle_down(&mut runner, &mut heard);
            allow(&mut runner, "r", allowed_tokens, None);
        }
        (heard.texts.remove("r"), heard.usage("r").completion_tokens)
    };
    let undisturbed = answer(40);
    assert_eq!(undisturbed.1, 40);
    assert_eq!(answer(3), undisturbed);
}

#[test]
fn others_go_on_while_one_waits_and_it_can_be_cancelled_then() {
    let (mut runner, mut heard) = (runner(settings(60)).0, Heard::default());
    let [paused]: [_; 1] = choices("paused", 1, &prompt(1, 9), 30, 3).try_into().unwrap();
    let other = request("other", &prompt(2, 9), 30);
    submit(&mut runner, &[paused.clone(), other.clone()]);
    settle_down(&mut runner, &mut heard);
    heard.check(&other);
    assert_eq!(runner.running.len(), 1);
    let used = runner.pool.total() - runner.pool.free();
    assert!(used > 0, "it keeps its blocks");
    cancel(&mut runner, "paused");
    heard.listen(&mut runner);
    assert!(runner.is_idle());
    assert_eq!(heard.ended["paused"].as_ref().unwrap().0, FinishReason::Cancelled);
    heard.check(&paused);
    assert_eq!((heard.usage("paused").completion_tokens, runner.pool.free()), (3, runner.pool.total()));
    // Of what has ended nobody knows any more.
    allow(&mut runner, "paused", 9, None);
    allow(&mut runner, "unknown", 9, Some(FundsEnd::Balance));
    assert!(runner.events.is_empty());
}

#[test]
fn who_waits_for_tokens_gives_way_when_its_blocks_are_needed_and_goes_on_as_if_it_had_not() {
    for last in [None, Some(FundsEnd::SpendLimit)] {
        // The other grows beside it, or finds no room to begin.
        for (prompt_tokens, output) in [(16, 50), (50, 10)] {
            let (mut runner, mut heard) = (runner(settings(21)).0, Heard::default());
            let [paused]: [_; 1] = choices("paused", 1, &prompt(1, 36), 30, 3).try_into().unwrap();
            submit(&mut runner, std::slice::from_ref(&paused));
            settle_down(&mut runner, &mut heard);
            let other = request("other", &prompt(2, prompt_tokens), output);
            submit(&mut runner, std::slice::from_ref(&other));
            settle_down(&mut runner, &mut heard);
            heard.check(&other);
            assert_eq!((runner.running.len(), runner.waiting.len()), (0, 1));
            assert_eq!(runner.counts.preemptions.get(), 1);
            allow(&mut runner, "paused", if last.is_none() { 27 } else { 0 }, last);
            finish(&mut runner, &mut heard);
            match last {
                None => heard.check(&paused),
                Some(_) => heard.check_part(&paused),
            }
            assert_eq!(heard.usage("paused").completion_tokens, if last.is_none() { 30 } else { 3 });
        }
    }
}

#[test]
fn who_waits_for_tokens_leaves_its_place_to_its_own_class_and_to_those_above() {
    for (priority, leaves) in [(Priority::Low, false), (Priority::Normal, true), (Priority::High, true)] {
        let (mut runner, mut heard) = (runner(Settings { sequences_max: 1, ..settings(60) }).0, Heard::default());
        let paused = choices("paused", 1, &prompt(1, 9), 30, 3);
        submit(&mut runner, &paused);
        settle_down(&mut runner, &mut heard);
        let other = EngineRequest { priority, ..request("other", &prompt(2, 9), 5) };
        submit(&mut runner, std::slice::from_ref(&other));
        settle_down(&mut runner, &mut heard);
        assert_eq!(heard.ended.contains_key("other"), leaves);
        allow(&mut runner, "paused", 27, None);
        finish(&mut runner, &mut heard);
        heard.check(&paused[0]);
        heard.check(&other);
    }
}

#[test]
fn a_choice_for_which_nothing_is_left_does_not_begin_and_is_in_nobodys_way() {
    let (mut runner, mut heard) = (runner(Settings { sequences_max: 2, ..settings(60) }).0, Heard::default());
    let pair = choices("r", 2, &prompt(1, 6), 20, 1);
    let other = request("other", &prompt(2, 6), 5);
    submit(&mut runner, &[&pair[..], std::slice::from_ref(&other)].concat());
    step(&mut runner, &mut heard);
    assert_eq!((runner.running.len(), runner.waiting.len()), (2, 1));
    settle_down(&mut runner, &mut heard);
    heard.check(&other);
    allow(&mut runner, "r", 0, Some(FundsEnd::Balance));
    heard.listen(&mut runner);
    assert!(runner.is_idle());
    assert_eq!((heard.usage("r").completion_tokens, heard.usage("r.1").completion_tokens), (1, 0));
    pair.iter().for_each(|choice| heard.check_part(choice));
}

#[test]
fn a_request_that_is_offered_again_has_nothing_of_what_its_earlier_attempt_was_allowed() {
    let (mut runner, mut heard) = (runner(settings(60)).0, Heard::default());
    submit(&mut runner, &choices("r", 3, &prompt(1, 6), 20, 50));
    runner.step().unwrap();
    runner.events.clear();
    let again = choices("r", 2, &prompt(1, 6), 20, 5);
    submit(&mut runner, &again);
    settle_down(&mut runner, &mut heard);
    assert_eq!((spent(&runner, &heard, &again), runner.sequences().count()), (5, 2));
}

#[test]
fn a_thread_whose_requests_all_wait_for_tokens_rests_and_does_not_look_frozen() {
    let (told, tell) = std::sync::mpsc::channel();
    let (sink, mut messages) = mpsc::channel(64);
    let thread = std::thread::spawn(move || {
        let (mut runner, _) = runner(settings(60));
        told.send(Arc::clone(&runner.shared)).unwrap();
        runner.run(&sink)
    });
    let shared = tell.recv().unwrap();
    let handle = EngineHandle::new(Arc::clone(&shared));
    handle.submit(choices("r", 1, &prompt(1, 6), 20, 3)).unwrap();
    let mut heard = |wanted: fn(&EngineEventBody) -> bool| {
        while let Some(EngineMessage::Step(events)) = messages.blocking_recv() {
            if events.iter().any(|event| wanted(&event.body)) {
                return;
            }
        }
        panic!("the engine has ended");
    };
    heard(|body| matches!(body, EngineEventBody::NeedsTokens { .. }));
    while handle.load().steps < 3 {
        std::thread::yield_now();
    }
    let (begun, steps) = (Instant::now(), handle.load().steps);
    while handle.load().steps < steps + 4 {
        assert!(begun.elapsed() < Duration::from_secs(60), "it looks frozen");
        std::thread::sleep(Duration::from_millis(5));
    }
    // Of the four, one may have been a token's, and one was under way.
    assert!(begun.elapsed() > LOOK_EVERY * 3 / 2, "it spins: {:?}", begun.elapsed());
    handle.allow(&"r".into(), 17, None);
    heard(|body| matches!(body, EngineEventBody::Finished { usage, .. } if usage.completion_tokens == 20));
    drop(handle);
    thread.join().unwrap().unwrap();
}

#[derive(Clone, Debug)]
enum Deed {
    Submit { choices: u32, prompt: usize, output: u32, allowed: u32, portion: u32, class: u8, eos: bool, wish: u32 },
    Allow { at: usize, tokens: u32, last: bool },
    Cancel(usize),
    Step(usize),
}

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    let submit = (1u32..4, 1usize..30, 1u32..25, 0u32..20, 0u32..10, 0u8..3, any::<bool>(), any::<u32>()).prop_map(
        |(choices, prompt, output, allowed, portion, class, eos, wish)| Deed::Submit {
            choices,
            prompt,
            output,
            allowed,
            portion,
            class,
            eos,
            wish,
        },
    );
    let allow = (0usize..8, 0u32..12, prop::bool::weighted(0.2)).prop_map(|(at, tokens, last)| Deed::Allow {
        at,
        tokens,
        last,
    });
    let deed = prop_oneof![
        3 => submit,
        4 => allow,
        1 => (0usize..10).prop_map(Deed::Cancel),
        4 => (1usize..8).prop_map(Deed::Step),
    ];
    prop::collection::vec(deed, 1..40)
}

/// What a person with a pencil knows of a request.
struct Account {
    choices: Vec<EngineRequest>,
    allowed: u32,
    is_last: bool,
    is_asked: bool,
}

impl Account {
    fn id(&self) -> &RequestId {
        &self.choices[0].request
    }

    fn audit(&mut self, runner: &Runner, heard: &Heard) {
        let spent = spent(runner, heard, &self.choices);
        assert!(spent <= self.allowed, "{}: {spent} of {}", self.id(), self.allowed);
        let left = self.allowed - spent;
        let id = self.id().clone();
        let open = || runner.sequences().filter(|sequence| sequence.spec.request == id);
        let usable: u32 = open().map(|sequence| sequence.output_left() as u32).sum();
        let step = self.choices[0].step_tokens;
        let is_low = !self.is_last && 2 * left <= step && usable > left;
        for (_, wanted) in heard.needs.iter().filter(|(request, _)| *request == id) {
            assert!(is_low && !self.is_asked, "{id} asks for {wanted}, with {left} left");
            assert_eq!(*wanted, step.min(usable - left));
            self.is_asked = true;
        }
        assert!(!is_low || self.is_asked, "{id} does not ask, with {left} left");
        assert!(!self.is_last || left > 0 || open().count() == 0, "{id} goes on without money");
    }
}

/// Nobody rests who could go on, unless somebody of a higher class has its place.
fn audit_rest(runner: &Runner) {
    for (ticket, sequence) in runner.waiting.iter() {
        let is_above = |running: &Running| running.ticket.priority > ticket.priority;
        let is_kept_out = !runner.running.is_empty() && runner.running.iter().all(is_above);
        assert!(sequence.share.is_empty() || is_kept_out, "{} could go on", sequence.spec.request);
    }
    assert!(runner.running.iter().all(|running| running.sequence.share.is_empty()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn what_is_decoded_told_and_asked_for_is_what_a_plain_count_says(
        deeds in deeds(),
        blocks in 21usize..50,
        sequences_max in 1usize..6,
        step_tokens_max in 6usize..40,
        prefix_cache: bool,
        speculates: bool,
    ) {
        let speculation = if speculates { Speculation::Always } else { Speculation::Off };
        let settings = Settings { sequences_max, step_tokens_max, prefix_cache, speculation, ..settings(blocks) };
        let (mut runner, mut heard) = (runner(settings).0, Heard::default());
        let mut accounts = Vec::<Account>::new();
        let audit = |runner: &mut Runner, heard: &mut Heard, accounts: &mut [Account]| {
            heard.listen(runner);
            accounts.iter_mut().for_each(|account| account.audit(runner, heard));
            heard.needs.clear();
        };
        let pay = |runner: &mut Runner, account: &mut Account, tokens: u32, is_last: bool| {
            let is_open = runner.sequences().any(|sequence| sequence.spec.request == *account.id());
            account.allowed += if is_open { tokens } else { 0 };
            account.is_last |= is_last;
            account.is_asked = false;
            allow(runner, account.id().as_str(), tokens, is_last.then_some(FundsEnd::SpendLimit));
        };
        for deed in deeds {
            match deed {
                Deed::Submit { choices: count, prompt: tokens, output, allowed, portion, class, eos, wish } => {
                    let id = accounts.len().to_string();
                    let mut all = choices(&id, count, &prompt(u64::from(wish >> 30), tokens), output, allowed);
                    for choice in &mut all {
                        choice.step_tokens = portion;
                        choice.priority = [Priority::Low, Priority::Normal, Priority::High][usize::from(class)];
                        choice.stops.ignore_eos = !eos;
                        wish_for(choice, wish);
                    }
                    submit(&mut runner, &all);
                    accounts.push(Account { choices: all, allowed, is_last: portion == 0, is_asked: false });
                }
                Deed::Allow { at, tokens, last } => {
                    if let Some(account) = accounts.iter_mut().rev().nth(at) {
                        pay(&mut runner, account, tokens, last);
                    }
                }
                Deed::Cancel(at) => cancel(&mut runner, &at.to_string()),
                Deed::Step(count) => {
                    for _ in 0..count {
                        if !runner.is_idle() {
                            runner.step().unwrap();
                            audit(&mut runner, &mut heard, &mut accounts);
                        }
                    }
                }
            }
            audit(&mut runner, &mut heard, &mut accounts);
        }
        let mut rests = 0;
        for _ in 0..10_000 {
            if runner.is_idle() {
                break;
            }
            runner.step().unwrap();
            audit(&mut runner, &mut heard, &mut accounts);
            if runner.sits {
                rests += 1;
                audit_rest(&runner);
                for account in &mut accounts {
                    pay(&mut runner, account, 2, rests > 10);
                }
                audit(&mut runner, &mut heard, &mut accounts);
            }
        }
        assert!(runner.is_idle());
        assert_eq!(runner.pool.free(), runner.pool.total());
        for account in &accounts {
            for choice in &account.choices {
                let id = name(account.id(), choice.choice);
                let (reason, usage) = heard.ended[&id].as_ref().unwrap();
                let is_cut = *reason == FinishReason::Length && usage.completion_tokens < choice.output_tokens_max;
                if is_cut {
                    prop_assert_eq!(spent(&runner, &heard, &account.choices), account.allowed);
                    heard.check_part(choice);
                } else {
                    heard.check(choice);
                }
                let by_funds = matches!(heard.stopped_by.get(&id), Some(StoppedBy::Funds(FundsEnd::SpendLimit)));
                prop_assert!(is_cut == by_funds || choice.step_tokens == 0);
            }
        }
    }
}
