//! Requests that another engine had begun: what is told of them, before and after, is what one engine alone would tell.

use super::*;
use crate::{
    domain::{EventBody, GrammarSource, Told, ToldChoice},
    grammar::{Constraint, Grammars},
};

/// What was told of one choice: its events but for the end, and the end.
#[derive(Default)]
struct Story {
    events: Vec<EventBody>,
    end: Option<(FinishReason, Option<StoppedBy>, Usage, [u8; 32])>,
}

/// Everything, whichever way it was cut into events.
#[derive(Debug, Default, PartialEq)]
struct Whole {
    prompt: Vec<TokenDetail>,
    text: String,
    ids: Vec<u32>,
    details: Vec<TokenDetail>,
}

impl Story {
    fn of(runner: &mut Runner, request: &EngineRequest) -> Self {
        let mut story = Self::default();
        submit(runner, std::slice::from_ref(request));
        for _ in 0..10_000 {
            for event in std::mem::take(&mut runner.events) {
                assert!(story.end.is_none(), "it speaks after its end");
                match event.body {
                    EngineEventBody::Prompt { tokens } => story.events.push(EventBody::Prompt { tokens }),
                    EngineEventBody::Delta { text, ids, details } => {
                        story.events.push(EventBody::Delta { choice: 0, text, ids, details });
                    }
                    EngineEventBody::Finished { reason, stopped_by, usage, digest } => {
                        story.end = Some((reason, stopped_by, usage, digest));
                    }
                    other => panic!("{other:?}"),
                }
            }
            if runner.is_idle() {
                return story;
            }
            runner.step().unwrap();
        }
        panic!("the runner does not get anywhere");
    }

    fn whole(&self) -> Whole {
        let mut whole = Whole::default();
        for event in &self.events {
            match event {
                EventBody::Prompt { tokens } => whole.prompt.extend_from_slice(tokens),
                EventBody::Delta { text, ids, details, .. } => {
                    whole.text += text;
                    whole.ids.extend(ids);
                    whole.details.extend_from_slice(details);
                }
                other => panic!("{other:?}"),
            }
        }
        whole
    }
}

/// The request for whoever goes on behind these events.
fn behind(request: &EngineRequest, events: &[EventBody], constraint: Option<Constraint>) -> EngineRequest {
    let mut told = Told::default();
    events.iter().for_each(|event| told.add(event));
    let ToldChoice { ids, text_bytes, .. } = told.choices.pop().unwrap_or_default();
    let mut constraint = constraint;
    let read = |constraint: &mut Constraint| {
        ids.iter().fold(false, |_, id| constraint.accept(*id).expect("it was allowed before"))
    };
    let is_complete = constraint.as_mut().is_some_and(read);
    let left = request.output_tokens_max - ids.len() as u32;
    let resumed = Resumed { tokens: ids, text_bytes, is_complete, prompt_tokens: told.prompt_tokens };
    EngineRequest { resumed, constraint, allowed_tokens: left, ..request.clone() }
}

fn assert_resumes(request: &EngineRequest, constraint: Option<&Constraint>, speculation: Speculation) {
    let settings = || Settings { speculation, ..settings(60) };
    let fresh = EngineRequest { constraint: constraint.cloned(), ..request.clone() };
    let undisturbed = Story::of(&mut runner(settings()).0, &fresh);
    let whole = undisturbed.whole();
    for cut in 0..=undisturbed.events.len() {
        let before = &undisturbed.events[..cut];
        let second = Story::of(&mut runner(settings()).0, &behind(request, before, constraint.cloned()));
        let mut both = before.to_vec();
        both.extend(second.events);
        let both = Story { events: both, end: second.end };
        assert_eq!(both.whole(), whole, "cut behind {cut} of {request:?}");
        let (ended, expected) = (both.end.as_ref().expect("an end"), undisturbed.end.as_ref().expect("an end"));
        let usage = Usage { cached_tokens: expected.2.cached_tokens, ..ended.2 };
        assert_eq!((ended.0, &ended.1, usage, ended.3), (expected.0, &expected.1, expected.2, expected.3));
        // And a third one behind that.
        let again = cut + (both.events.len() - cut) / 2;
        let third = Story::of(&mut runner(settings()).0, &behind(request, &both.events[..again], constraint.cloned()));
        let mut all = both.events[..again].to_vec();
        all.extend(third.events);
        assert_eq!(Story { events: all, end: None }.whole(), whole, "cut behind {cut} and {again} of {request:?}");
    }
}

#[test]
fn whoever_goes_on_tells_what_the_first_one_would_have() {
    for seed in 0..300u32 {
        let mut request = request("r", &prompt(seed.into(), 3 + seed as usize % 20), 1 + seed % 24);
        (request.sampling.temperature, request.sampling.seed) = ((seed % 3) as f32 * 0.5, seed.into());
        request.stops.ignore_eos = seed % 4 == 0;
        wish_for(&mut request, seed.wrapping_mul(2_654_435_761));
        let speculation = if seed % 2 == 0 { Speculation::Off } else { Speculation::Always };
        assert_resumes(&request, None, speculation);
    }
}

#[test]
fn whoever_goes_on_is_where_the_grammar_was() {
    let grammars = Grammars::new(vocabulary());
    for (index, lark) in [r#"start: /([abc]+ d[fgh]+)+/"#, r#"start: "a" "b" /[a-c]{3}/ " d""#, r#"start: /a+é?j*/"#]
        .into_iter()
        .enumerate()
    {
        let source = serde_json::json!({ "grammars": [{ "name": "start", "lark_grammar": lark }] });
        let constraint = grammars.compile("lane", &GrammarSource(source.to_string())).unwrap();
        for seed in 0..20 {
            let mut request = request("r", &prompt(seed, 9), 24);
            (request.sampling.temperature, request.sampling.seed) = (1.0, seed);
            request.stops.ignore_eos = false;
            let speculation =
                if (seed + index as u64).is_multiple_of(2) { Speculation::Off } else { Speculation::Always };
            assert_resumes(&request, Some(&constraint), speculation);
        }
    }
}
