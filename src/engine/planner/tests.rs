use proptest::prelude::*;

use super::*;
use Priority::{High, Low, Normal};

const LIMITS: Limits =
    Limits { sequences_max: 4, step_tokens_max: 64, chunk_tokens_max: 20, block_tokens: 16, blocks_total: 1000 };

fn at(tokens: usize, computed: usize) -> Demand {
    let blocks = computed.div_ceil(16);
    Demand { tokens, computed, blocks, own_blocks: blocks, drafts: 0, may_decode: true, priority: Normal }
}

fn new(tokens: usize) -> Candidate {
    Candidate { tokens, may_decode: true, priority: Normal, found: 0, found_free: 0, behind: None }
}

fn none() -> std::iter::Empty<Candidate> {
    std::iter::empty()
}

fn rows(plan: &Plan) -> Vec<usize> {
    plan.running.iter().map(|turn| if let Turn::Rows(rows) = turn { *rows } else { usize::MAX }).collect()
}

#[test]
fn a_long_prompt_never_keeps_the_others_from_their_next_token() {
    let running = [at(4000, 640), at(100, 99), at(50, 49)];
    assert_eq!(rows(&plan(&running, none(), 1000, &LIMITS)), [20, 1, 1]);
}

#[test]
fn a_prompt_takes_the_whole_step_where_nobody_decodes() {
    assert_eq!(rows(&plan(&[at(4000, 640)], none(), 1000, &LIMITS)), [64]);
    let first = plan(&[], [new(50), new(500)].into_iter(), 1000, &LIMITS);
    assert_eq!(first.admitted, [(0, 50), (1, 14)]);
}

#[test]
fn prompts_of_the_higher_class_catch_up_first() {
    let running = [at(400, 0), Demand { priority: High, ..at(30, 0) }, at(9, 8)];
    assert_eq!(rows(&plan(&running, none(), 1000, &LIMITS)), [0, 20, 1]);
}

#[test]
fn who_joins_goes_before_a_running_prompt_of_a_lower_class_and_after_one_of_its_own() {
    let running = [at(400, 0), at(9, 8)];
    let high = Candidate { priority: High, ..new(12) };
    let first = plan(&running, [high, new(5)].into_iter(), 1000, &LIMITS);
    assert_eq!((rows(&first), first.admitted), (vec![8, 1], vec![(0, 12)]));
    let second = plan(&running, [new(5)].into_iter(), 1000, &LIMITS);
    assert_eq!((rows(&second), second.admitted), (vec![20, 1], vec![]));
}

#[test]
fn waiting_requests_join_in_order_and_only_when_their_whole_prompt_fits() {
    let waiting = [new(15), new(500), new(1)];
    let plan = plan(&[at(20, 19)], waiting.into_iter(), 10, &LIMITS);
    assert_eq!((rows(&plan), plan.admitted), (vec![1], vec![(0, 15)]));
}

#[test]
fn what_is_found_is_neither_computed_nor_taken_again() {
    // 500 tokens are 32 blocks, 30 of which are found, 5 of them unused.
    let candidate = Candidate { found: 30, found_free: 5, ..new(500) };
    assert_eq!(plan(&[], [candidate].into_iter(), 7, &LIMITS).admitted, [(0, 20)]);
    assert_eq!(plan(&[], [candidate].into_iter(), 6, &LIMITS).admitted, []);
}

#[test]
fn who_shares_a_prefix_that_is_being_computed_waits_for_it_and_lets_others_pass() {
    let behind = |leader| Candidate { behind: Some(leader), ..new(5) };
    let waiting = [new(10), behind(Leader::Waiting(0)), new(5), behind(Leader::Running), behind(Leader::Waiting(1))];
    // The one behind the second, who does not join now, need not wait for it.
    assert_eq!(plan(&[], waiting.into_iter(), 100, &LIMITS).admitted, [(0, 10), (2, 5), (4, 5)]);
}

#[test]
fn when_blocks_run_out_the_lowest_class_gives_way_then_who_has_computed_least() {
    let running = [at(17, 16), at(33, 32), at(49, 48)];
    let turns = |running: &[Demand]| plan(running, [new(1)].into_iter(), 1, &LIMITS);
    let first = turns(&running);
    assert_eq!((first.running, first.admitted), (vec![Turn::Preempted, Turn::Rows(1), Turn::Rows(1)], vec![]));
    let low = [running[0], running[1], Demand { priority: Low, ..running[2] }];
    assert_eq!(turns(&low).running, [Turn::Rows(1), Turn::Rows(1), Turn::Preempted]);
    // Who alone has a higher class keeps its place although it has computed least.
    let high = [Demand { priority: High, ..running[0] }, running[1], running[2]];
    assert_eq!(turns(&high).running, [Turn::Rows(1), Turn::Preempted, Turn::Rows(1)]);
}

#[test]
fn the_last_one_left_gets_what_the_others_had_in_common() {
    let shared = Demand { own_blocks: 0, ..at(33, 32) };
    let limits = Limits { blocks_total: 5, ..LIMITS };
    let plan = plan(&[shared, shared, at(49, 48)], none(), 0, &limits);
    assert_eq!(plan.running, [Turn::Preempted, Turn::Preempted, Turn::Rows(1)]);
}

#[test]
fn drafts_get_what_is_left_and_only_while_nobody_catches_up() {
    let guess = Demand { drafts: 7, ..at(20, 19) };
    assert_eq!(rows(&plan(&[guess, at(9, 8)], none(), 100, &LIMITS)), [8, 1]);
    assert_eq!(rows(&plan(&[guess, at(90, 8)], none(), 100, &LIMITS)), [1, 20]);
    assert_eq!(rows(&plan(&[guess], [new(5)].into_iter(), 100, &LIMITS)), [1]);
    let narrow = Limits { step_tokens_max: 4, ..LIMITS };
    assert_eq!(rows(&plan(&[guess, guess], none(), 100, &narrow)), [3, 1]);
    // Its last block has room for twelve tokens in all, and the free one is left for the next.
    let tight = Demand { drafts: 7, ..at(30, 29) };
    assert_eq!(rows(&plan(&[tight], none(), 1, &LIMITS)), [3]);
    assert_eq!(rows(&plan(&[tight], none(), 2, &LIMITS)), [8]);
}

/// Who may not have its next token.
fn sitting(demand: Demand) -> Demand {
    Demand { may_decode: false, ..demand }
}

#[test]
fn who_may_not_decode_computes_all_but_the_last_row_and_then_sits() {
    assert_eq!(rows(&plan(&[sitting(at(20, 10)), at(9, 8)], none(), 100, &LIMITS)), [9, 1]);
    assert_eq!(rows(&plan(&[sitting(at(20, 19)), at(9, 8)], none(), 100, &LIMITS)), [0, 1]);
    // It is not stuck: it would not move with more blocks either.
    assert_eq!(rows(&plan(&[sitting(at(17, 16))], none(), 0, &LIMITS)), [0]);
}

#[test]
fn of_a_class_those_who_sit_give_way_first() {
    let running = [at(17, 16), sitting(at(49, 48)), at(33, 32)];
    let expected = [Turn::Rows(1), Turn::Preempted, Turn::Rows(1)];
    assert_eq!(plan(&running, none(), 0, &LIMITS).running, expected);
    let high = [running[0], Demand { priority: High, ..running[1] }, running[2]];
    assert_eq!(plan(&high, none(), 0, &LIMITS).running, [Turn::Preempted, Turn::Rows(0), Turn::Rows(1)]);
}

#[test]
fn where_all_sit_one_gives_way_to_who_could_go_on_unless_that_is_of_a_lower_class() {
    let running = [sitting(at(33, 32)), sitting(at(17, 16))];
    let full = Limits { sequences_max: 2, ..LIMITS };
    let turns = |candidate: Candidate, blocks: usize, limits: &Limits| {
        let plan = plan(&running, [candidate].into_iter(), blocks, limits);
        assert_eq!(plan.admitted, []);
        plan.running
    };
    let (stay, leave) = ([Turn::Rows(0); 2], [Turn::Rows(0), Turn::Preempted]);
    assert_eq!(turns(new(5), 100, &full), leave);
    assert_eq!(turns(new(50), 2, &LIMITS), leave);
    assert_eq!(turns(Candidate { priority: Low, ..new(5) }, 100, &full), stay);
    assert_eq!(turns(Candidate { may_decode: false, ..new(5) }, 100, &full), stay);
    assert_eq!(turns(Candidate { behind: Some(Leader::Running), ..new(5) }, 100, &full), stay);
    // One who moves is enough: nobody goes.
    let moving = plan(&[running[0], at(9, 8)], [new(5)].into_iter(), 100, &full);
    assert_eq!((rows(&moving), moving.admitted), (vec![0, 1], vec![]));
}

#[test]
fn who_may_not_decode_does_not_join_and_is_in_nobodys_way() {
    let waiting = [Candidate { may_decode: false, ..new(5) }, new(6)];
    assert_eq!(plan(&[], waiting.into_iter(), 100, &LIMITS).admitted, [(1, 6)]);
}

fn demand() -> impl Strategy<Value = Demand> {
    let priority = prop::sample::select(vec![Low, Normal, High]);
    (prop_oneof![Just(1usize), 1usize..400], 0usize..400, 0usize..8, prop::bool::weighted(0.7), priority).prop_map(
        |(more, computed, drafts, may_decode, priority)| Demand {
            drafts,
            may_decode,
            priority,
            ..at(computed + more, computed)
        },
    )
}

proptest! {
    #[test]
    fn every_plan_keeps_its_bounds_and_moves_something_forward(
        running in prop::collection::vec(demand(), 0..4),
        waits in prop::collection::vec((1usize..400, 0usize..30, any::<bool>(), any::<bool>()), 0..6),
        spare in 0usize..30,
        chunk_tokens_max in 1usize..64,
    ) {
        let held: usize = running.iter().map(|d| d.blocks).sum();
        // As at load time: one sequence of the longest length always fits.
        let free = (800usize.div_ceil(16) + 1).saturating_sub(held).max(spare);
        let limits = Limits { chunk_tokens_max, blocks_total: held + free, ..LIMITS };
        let waiting = waits.iter().enumerate().map(|(i, (tokens, found, waits, may_decode))| {
            let found = (*found).min((tokens - 1) / 16);
            let behind = waits.then(|| if i == 0 { Leader::Running } else { Leader::Waiting(i - 1) });
            Candidate { found, behind, may_decode: *may_decode, ..new(*tokens) }
        });
        let plan = plan(&running, waiting.clone(), free, &limits);
        prop_assert_eq!(plan.running.len(), running.len());
        let (mut rows, mut chunk_rows, mut decodes, mut taken, mut freed) = (0, 0, 0, 0, 0);
        for (turn, d) in plan.running.iter().zip(&running) {
            match turn {
                Turn::Preempted => freed += d.blocks,
                Turn::Rows(n) => {
                    rows += n;
                    let lacking = d.tokens - d.computed;
                    prop_assert!(*n <= lacking || (lacking == 1 && *n <= 1 + d.drafts));
                    prop_assert!(d.may_decode || *n < lacking);
                    *(if lacking == 1 { &mut decodes } else { &mut chunk_rows }) += n;
                    taken += (d.computed + n).div_ceil(16).saturating_sub(d.blocks);
                }
            }
        }
        let candidates: Vec<Candidate> = waiting.collect();
        for (at, n) in &plan.admitted {
            let c = candidates[*at];
            prop_assert!(c.may_decode && *n >= 1 && *n <= c.tokens - 16 * c.found);
            rows += n;
            chunk_rows += n;
            taken += (16 * c.found + n).div_ceil(16) - c.found;
        }
        let preempted = plan.running.iter().filter(|turn| **turn == Turn::Preempted).count();
        prop_assert!(rows <= limits.step_tokens_max);
        prop_assert!(decodes == 0 || chunk_rows <= chunk_tokens_max);
        prop_assert!(running.len() + plan.admitted.len() <= limits.sequences_max);
        prop_assert!(plan.admitted.is_empty() || preempted == 0);
        prop_assert!(plan.admitted.is_sorted());
        let sitting = running.iter().filter(|d| d.sits()).count();
        let is_change = rows > 0 || preempted > 0 && sitting > 0;
        prop_assert!(sitting == running.len() || is_change, "a step that changes nothing would loop forever");
        prop_assert!(taken <= free + freed);
        if preempted > 0 {
            let worst_kept = plan.running.iter().zip(&running).filter(|(t, _)| **t != Turn::Preempted)
                .map(|(_, d)| (d.priority, !d.sits(), d.computed)).min();
            let best_gone = plan.running.iter().zip(&running).filter(|(t, _)| **t == Turn::Preempted)
                .map(|(_, d)| (d.priority, !d.sits(), d.computed)).max();
            prop_assert!(worst_kept >= best_gone);
        }
    }
}
