//! The shared queue: bounded, fair, fenced.

use std::{
    collections::{HashMap, HashSet},
    slice::from_ref,
    time::Duration,
};

use lightcone::{
    domain::{
        Claim, GrammarSource, Job, ModelId, NanoUsd, NodeId, Price, Priority, ReplyTo, RequestId, SamplingParams,
        Stops, Telling,
    },
    queue::{Disowned, GivenUp, PublishError, Queue, QueueLimits, Renewed, Room},
};

use crate::support::{house::at_once, valkey::Valkey};

const LONG: Duration = Duration::from_secs(600);

fn model() -> ModelId {
    "tzafon.sm-1".into()
}

fn job(tenant: &str, prompt_tokens: usize) -> Job {
    Job {
        request: RequestId::generate(),
        tenant: tenant.into(),
        key: "key_1".into(),
        model: model(),
        prompt: (0..prompt_tokens as u32).collect(),
        output_tokens_max: 16,
        sampling: SamplingParams {
            temperature: 0.7,
            top_p: 0.9,
            top_k: 40,
            seed: u64::MAX,
            logit_bias: vec![(5, -1.5)],
            ..SamplingParams::default()
        },
        choices: 2,
        stops: Stops { strings: vec!["\n\n".to_owned(), "\0".to_owned()], tokens: vec![7], ..Stops::default() },
        telling: Telling { logprobs: Some(3), ..Telling::default() },
        grammar: Some(GrammarSource("{}".to_owned())),
        cache_salt: "salt".to_owned(),
        priority: Priority::default(),
        price: Price::flat(NanoUsd::new(200), NanoUsd::new(300)),
        price_version: "2026-11".to_owned(),
        hold: NanoUsd::new(6_800),
        allowed_tokens: 32,
        reply_to: ReplyTo { node: NodeId::generate(), relay: Some("127.0.0.1:1".to_owned()) },
        enqueued_unix_ms: 5_000,
        deadline_unix_ms: 65_000,
    }
}

async fn queue_of(valkey: &Valkey, depth_max: usize, claim_lease: Duration) -> Queue {
    Queue::new(
        valkey.store().await,
        QueueLimits { depth_max, claim_lease, takeover_max: LONG, start_max: Duration::from_secs(600), losses_max: 2 },
    )
}

async fn publish(queue: &Queue, job: &Job) -> RequestId {
    queue.publish(job).await.expect("there is room");
    job.request.clone()
}

/// Nothing that others have begun.
fn to_begin(to_begin: usize) -> Room {
    Room { to_take_over: 0, to_begin }
}

/// Only that.
fn to_take_over(to_take_over: usize) -> Room {
    Room { to_take_over, to_begin: 0 }
}

/// `losses_max` of 2.
async fn patient(valkey: &Valkey, claim_lease: Duration, takeover_max: Duration) -> Queue {
    let limits =
        QueueLimits { depth_max: 100, claim_lease, takeover_max, start_max: Duration::from_secs(600), losses_max: 2 };
    Queue::new(valkey.store().await, limits)
}

fn lost_ones(expired: &[Claim]) -> Vec<(RequestId, u32, u32)> {
    expired.iter().map(|claim| (claim.job.request.clone(), claim.attempt, claim.losses)).collect()
}

fn requests(claims: &[Claim]) -> Vec<RequestId> {
    claims.iter().map(|claim| claim.job.request.clone()).collect()
}

fn tenants(claims: &[Claim]) -> Vec<&str> {
    claims.iter().map(|claim| claim.job.tenant.as_str()).collect()
}

/// Claims are only swept by someone whose connection is older than a lease.
async fn until_one_is_taken_over(queue: &Queue, owner: &NodeId) -> Claim {
    for _ in 0..500 {
        assert_eq!(lost_ones(&queue.expired(&model()).await.unwrap()), []);
        if let Some(claim) = queue.claim(&model(), owner, to_take_over(1)).await.unwrap().pop() {
            return claim;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("nothing was taken over");
}

async fn until_expired(queue: &Queue) -> Vec<(RequestId, u32, u32)> {
    for _ in 0..500 {
        let expired = queue.expired(&model()).await.unwrap();
        if !expired.is_empty() {
            return lost_ones(&expired);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("nothing expired");
}

#[tokio::test]
async fn a_job_arrives_as_it_was_sent_and_in_order_of_arrival() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 100, LONG).await;
    let jobs: Vec<Job> = (1..=5).map(|tokens| job("a", tokens * 100)).collect();
    for job in &jobs {
        publish(&queue, job).await;
    }
    // Published twice is published once.
    publish(&queue, &jobs[0]).await;
    assert_eq!(queue.depth(&model()).await.unwrap(), 5);
    let me = NodeId::generate();
    let first = queue.claim(&model(), &me, to_begin(2)).await.unwrap();
    let rest = queue.claim(&model(), &me, to_begin(32)).await.unwrap();
    let claims: Vec<Claim> = first.into_iter().chain(rest).collect();
    let expected: Vec<Claim> =
        jobs.into_iter().map(|job| Claim { job, owner: me.clone(), attempt: 1, losses: 0 }).collect();
    assert_eq!(claims, expected);
    assert_eq!(queue.depth(&model()).await.unwrap(), 0);
    assert_eq!(queue.claim(&model(), &me, to_begin(32)).await.unwrap(), []);
    assert_eq!(queue.claim(&"another-model".into(), &me, to_begin(32)).await.unwrap(), []);
}

#[tokio::test]
async fn a_tenant_with_a_hundred_queued_requests_does_not_delay_the_one_of_another() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 512, LONG).await;
    for _ in 0..100 {
        publish(&queue, &job("heavy", 50)).await;
    }
    let me = NodeId::generate();
    assert_eq!(queue.claim(&model(), &me, to_begin(10)).await.unwrap().len(), 10);
    publish(&queue, &job("light", 50)).await;
    let next = queue.claim(&model(), &me, to_begin(2)).await.unwrap();
    assert!(tenants(&next).contains(&"light"), "{:?}", tenants(&next));
}

#[tokio::test]
async fn between_busy_tenants_tokens_are_shared_and_not_requests() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 512, LONG).await;
    for _ in 0..40 {
        publish(&queue, &job("short", 10)).await;
        publish(&queue, &job("long", 100)).await;
    }
    let me = NodeId::generate();
    let mut received = HashMap::<String, usize>::new();
    for _ in 0..22 {
        let claim = queue.claim(&model(), &me, to_begin(1)).await.unwrap().remove(0);
        *received.entry(claim.job.tenant.to_string()).or_default() += claim.job.prompt.len();
    }
    assert!(received["short"].abs_diff(received["long"]) <= 100, "{received:?}");
}

#[tokio::test]
async fn tokens_put_out_count_as_much_as_tokens_read() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 512, LONG).await;
    for _ in 0..5 {
        publish(&queue, &job("talkative", 10)).await;
        publish(&queue, &job("terse", 10)).await;
    }
    let me = NodeId::generate();
    for claim in queue.claim(&model(), &me, to_begin(2)).await.unwrap() {
        let tokens = if claim.job.tenant.as_str() == "talkative" { 35 } else { 0 };
        assert!(queue.acknowledge(&model(), &me, &claim.job.request, claim.attempt, tokens).await.unwrap());
    }
    let next = queue.claim(&model(), &me, to_begin(3)).await.unwrap();
    assert_eq!(tenants(&next), ["terse"; 3]);
}

#[tokio::test]
async fn a_tenant_saves_up_nothing_while_it_is_idle() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 512, LONG).await;
    let me = NodeId::generate();
    for _ in 0..50 {
        publish(&queue, &job("busy", 100)).await;
    }
    queue.claim(&model(), &me, to_begin(30)).await.unwrap();
    for _ in 0..20 {
        publish(&queue, &job("back", 100)).await;
    }
    let next = queue.claim(&model(), &me, to_begin(20)).await.unwrap();
    let back = tenants(&next).iter().filter(|tenant| **tenant == "back").count();
    assert!((9..=11).contains(&back), "{back} of 20");
}

#[tokio::test]
async fn a_full_queue_refuses_and_says_when_to_come_back() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 4, LONG).await;
    for tenant in ["a", "a", "a", "b"] {
        publish(&queue, &job(tenant, 5)).await;
    }
    let refused = job("c", 5);
    let refusal = queue.publish(&refused).await;
    assert!(matches!(refusal, Err(PublishError::Full { retry_after_ms: 100..=10_000 })), "{refusal:?}");
    assert_eq!(queue.depth(&model()).await.unwrap(), 4);
    // Claimed requests do not count, and the refused one left nothing behind.
    queue.claim(&model(), &NodeId::generate(), to_begin(1)).await.unwrap();
    publish(&queue, &refused).await;
}

#[tokio::test]
async fn one_tenant_cannot_take_the_last_places_of_a_queue() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 90, LONG).await;
    let mut taken = 0;
    while queue.publish(&job("greedy", 5)).await.is_ok() {
        taken += 1;
    }
    assert_eq!(taken, 80);
    for _ in 0..8 {
        publish(&queue, &job("modest", 5)).await;
    }
}

#[tokio::test]
async fn only_the_owner_of_the_attempt_may_renew_or_acknowledge() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 100, LONG).await;
    let (me, other) = (NodeId::generate(), NodeId::generate());
    let request = publish(&queue, &job("a", 5)).await;
    queue.claim(&model(), &me, to_begin(1)).await.unwrap();
    for (owner, attempt) in [(&other, 1), (&me, 0), (&me, 2)] {
        let claims = [(request.clone(), attempt)];
        let renewed = queue.renew(&model(), owner, &claims).await.unwrap();
        assert_eq!(renewed, Renewed { lost: vec![request.clone()], gone: vec![] });
        assert!(!queue.acknowledge(&model(), owner, &request, attempt, 1).await.unwrap());
        let given_up = queue.give_up(&model(), owner, &GivenUp::HandedOver, &claims).await.unwrap();
        assert_eq!(given_up, from_ref(&request));
    }
    assert_eq!(queue.renew(&model(), &me, &[(request.clone(), 1)]).await.unwrap(), Renewed::default());
    assert!(queue.acknowledge(&model(), &me, &request, 1, 1).await.unwrap());
    assert!(!queue.acknowledge(&model(), &me, &request, 1, 1).await.unwrap());
}

#[tokio::test]
async fn a_zombie_that_wakes_after_its_lease_can_do_nothing() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 100, Duration::from_millis(20)).await;
    let zombie = NodeId::generate();
    let request = publish(&queue, &job("a", 5)).await;
    queue.claim(&model(), &zombie, to_begin(1)).await.unwrap();
    let heir = NodeId::generate();
    let claim = until_one_is_taken_over(&queue, &heir).await;
    assert_eq!((&claim.job.request, &claim.owner, claim.attempt), (&request, &heir, 2));
    let renewed = queue.renew(&model(), &zombie, &[(request.clone(), 1)]).await.unwrap();
    assert_eq!(renewed.lost, from_ref(&request));
    let before = Claim { owner: zombie.clone(), attempt: 1, losses: 0, ..claim };
    assert!(!queue.restore(&before).await.unwrap());
    assert!(!queue.acknowledge(&model(), &zombie, &request, 1, 5).await.unwrap());
    assert!(queue.acknowledge(&model(), &heir, &request, 2, 5).await.unwrap());
}

#[tokio::test]
async fn an_owner_that_renews_late_keeps_what_nobody_has_taken_over() {
    let valkey = Valkey::start();
    let (brief, queue) = (queue_of(&valkey, 100, Duration::from_millis(20)).await, queue_of(&valkey, 100, LONG).await);
    let me = NodeId::generate();
    let request = publish(&queue, &job("a", 5)).await;
    brief.claim(&model(), &me, to_begin(1)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(lost_ones(&brief.expired(&model()).await.unwrap()), []);
    assert_eq!(queue.renew(&model(), &me, &[(request.clone(), 1)]).await.unwrap(), Renewed::default());
    assert_eq!(queue.claim(&model(), &NodeId::generate(), to_take_over(1)).await.unwrap(), []);
    // It was no loss: two others may still be lost with it.
    for attempt in 1..=2 {
        assert_eq!(queue.disown(&model(), &request, attempt).await.unwrap(), Disowned::Waits);
        let takers = queue.claim(&model(), &NodeId::generate(), to_take_over(1)).await.unwrap();
        assert_eq!(takers.len(), usize::from(attempt == 1));
    }
    assert_eq!(lost_ones(&queue.expired(&model()).await.unwrap()), [(request, 2, 2)]);
}

#[tokio::test]
async fn what_has_lost_its_worker_goes_before_what_waits_and_not_to_one_that_cannot_reach_its_edge() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 100, LONG).await;
    let (me, other) = (NodeId::generate(), NodeId::generate());
    let lost: Vec<_> = [publish(&queue, &job("a", 5)).await, publish(&queue, &job("a", 5)).await].into();
    queue.claim(&model(), &me, to_begin(2)).await.unwrap();
    let waiting = publish(&queue, &job("b", 5)).await;
    let unreached = GivenUp::Unreached(Duration::from_millis(400));
    let claims: Vec<_> = lost.iter().map(|request| (request.clone(), 1)).collect();
    assert_eq!(queue.give_up(&model(), &me, &unreached, &claims).await.unwrap(), []);
    let room = Room { to_take_over: 5, to_begin: 1 };
    assert_eq!(requests(&queue.claim(&model(), &me, room).await.unwrap()), [waiting]);
    let taken = queue.claim(&model(), &other, Room { to_take_over: 1, to_begin: 5 }).await.unwrap();
    assert_eq!((taken.len(), taken[0].attempt, lost.contains(&taken[0].job.request)), (1, 2, true));
    // After a while it may try again: where there is nobody else, somebody must.
    let mine = until_one_is_taken_over(&queue, &me).await;
    assert_eq!((mine.attempt, lost.contains(&mine.job.request)), (2, true));
    assert_ne!(mine.job.request, taken[0].job.request);
}

#[tokio::test]
async fn a_request_with_which_two_workers_were_lost_is_not_given_to_a_third() {
    let valkey = Valkey::start();
    let queue = patient(&valkey, LONG, LONG).await;
    let request = publish(&queue, &job("a", 5)).await;
    let (first, second, third) = (NodeId::generate(), NodeId::generate(), NodeId::generate());
    queue.claim(&model(), &first, to_begin(1)).await.unwrap();
    assert_eq!(
        queue.give_up(&model(), &first, &GivenUp::Lost { trial: None }, &[(request.clone(), 1)]).await.unwrap(),
        []
    );
    // One that goes away in order has not been lost.
    assert_eq!(queue.claim(&model(), &second, to_take_over(1)).await.unwrap()[0].attempt, 2);
    assert_eq!(queue.give_up(&model(), &second, &GivenUp::HandedOver, &[(request.clone(), 2)]).await.unwrap(), []);
    assert_eq!(queue.claim(&model(), &second, to_take_over(1)).await.unwrap()[0].attempt, 3);
    assert_eq!(queue.disown(&model(), &request, 2).await.unwrap(), Disowned::Elsewhere);
    assert_eq!(queue.disown(&model(), &request, 3).await.unwrap(), Disowned::Waits);
    assert_eq!(queue.claim(&model(), &third, to_take_over(1)).await.unwrap(), []);
    assert_eq!(lost_ones(&queue.expired(&model()).await.unwrap()), [(request.clone(), 3, 2)]);
    assert_eq!(queue.disown(&model(), &request, 3).await.unwrap(), Disowned::Absent);
}

#[tokio::test]
async fn a_worker_that_is_lost_while_it_tries_one_out_is_the_loss_of_that_one_alone() {
    let valkey = Valkey::start();
    let queue = patient(&valkey, LONG, LONG).await;
    let mut requests = Vec::new();
    for _ in 0..4 {
        requests.push(publish(&queue, &job("a", 5)).await);
    }
    let owners: Vec<_> = (0..5).map(|_| NodeId::generate()).collect();
    queue.claim(&model(), &owners[0], to_begin(4)).await.unwrap();
    let losses = |claims: Vec<Claim>| {
        let of = |request: &RequestId| claims.iter().find(|claim| claim.job.request == *request);
        requests.iter().map(|request| of(request).map(|claim| claim.losses)).collect::<Vec<_>>()
    };
    let named = |attempt: u32| requests.iter().map(|request| (request.clone(), attempt)).collect::<Vec<_>>();
    let all = to_take_over(9);
    queue.give_up(&model(), &owners[0], &GivenUp::Lost { trial: None }, &named(1)).await.unwrap();
    assert_eq!(losses(queue.claim(&model(), &owners[1], all).await.unwrap()), [Some(1); 4]);
    // As its worker, its edge, or the sweeper finds out.
    let trying = GivenUp::Lost { trial: Some(requests[2].clone()) };
    queue.give_up(&model(), &owners[1], &trying, &named(2)).await.unwrap();
    let taken = losses(queue.claim(&model(), &owners[2], all).await.unwrap());
    assert_eq!(taken, [Some(1), Some(1), None, Some(1)]);
    assert_eq!(lost_ones(&queue.expired(&model()).await.unwrap()), [(requests[2].clone(), 2, 2)]);
    queue.try_out(&model(), &owners[2], Some(&requests[0])).await.unwrap();
    for (request, attempt) in named(3) {
        queue.disown(&model(), &request, attempt).await.unwrap();
    }
    let brief = patient(&valkey, Duration::from_millis(20), LONG).await;
    let taken = losses(brief.claim(&model(), &owners[3], all).await.unwrap());
    assert_eq!(taken, [None, Some(1), None, Some(1)]);
    assert_eq!(lost_ones(&queue.expired(&model()).await.unwrap()), [(requests[0].clone(), 3, 2)]);
    brief.try_out(&model(), &owners[3], Some(&requests[1])).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(lost_ones(&brief.expired(&model()).await.unwrap()), [(requests[1].clone(), 4, 2)]);
    let taken = losses(queue.claim(&model(), &owners[4], all).await.unwrap());
    assert_eq!(taken, [None, None, None, Some(1)]);
    // Nothing is tried out any more.
    queue.try_out(&model(), &owners[4], Some(&requests[0])).await.unwrap();
    queue.try_out(&model(), &owners[4], None).await.unwrap();
    queue.disown(&model(), &requests[3], 5).await.unwrap();
    assert_eq!(lost_ones(&queue.expired(&model()).await.unwrap()), [(requests[3].clone(), 5, 2)]);
}

#[tokio::test]
async fn a_request_that_nobody_takes_over_in_time_expires() {
    let valkey = Valkey::start();
    let queue = patient(&valkey, LONG, Duration::from_millis(100)).await;
    let request = publish(&queue, &job("a", 5)).await;
    queue.claim(&model(), &NodeId::generate(), to_begin(1)).await.unwrap();
    assert_eq!(queue.disown(&model(), &request, 1).await.unwrap(), Disowned::Waits);
    assert_eq!(until_expired(&queue).await, [(request.clone(), 1, 1)]);
    // Nor does one wait longer because its edge is passed on and on.
    let queue = patient(&valkey, LONG, Duration::from_millis(200)).await;
    let request = publish(&queue, &job("a", 5)).await;
    let me = NodeId::generate();
    queue.claim(&model(), &me, to_begin(1)).await.unwrap();
    assert_eq!(queue.give_up(&model(), &me, &GivenUp::HandedOver, &[(request.clone(), 1)]).await.unwrap(), []);
    let begun = std::time::Instant::now();
    let mut attempt = 1;
    while let Some(claim) = queue.claim(&model(), &me, to_take_over(1)).await.unwrap().pop() {
        assert!(begun.elapsed() < Duration::from_secs(5));
        attempt = claim.attempt;
        let unreached = GivenUp::Unreached(Duration::ZERO);
        assert_eq!(queue.give_up(&model(), &me, &unreached, &[(request.clone(), attempt)]).await.unwrap(), []);
    }
    assert!(attempt > 2);
    assert_eq!(until_expired(&queue).await, [(request, attempt, 0)]);
}

#[tokio::test]
async fn what_the_store_has_lost_of_a_claim_its_owner_puts_back() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 100, LONG).await;
    let (me, other) = (NodeId::generate(), NodeId::generate());
    let request = publish(&queue, &job("a", 5)).await;
    let mine = queue.claim(&model(), &me, to_begin(1)).await.unwrap().remove(0);
    let flush = async || redis::cmd("FLUSHDB").exec_async(&mut valkey.raw().await).await.unwrap();
    let gone = Renewed { lost: vec![], gone: vec![request.clone()] };
    // All of it.
    flush().await;
    assert_eq!(queue.renew(&model(), &me, &[(request.clone(), 1)]).await.unwrap(), gone);
    assert!(queue.restore(&mine).await.unwrap());
    assert!(queue.restore(&mine).await.unwrap(), "its own");
    assert_eq!(queue.renew(&model(), &me, &[(request.clone(), 1)]).await.unwrap(), Renewed::default());
    // The claim alone: it waits again.
    flush().await;
    publish(&queue, &mine.job).await;
    assert_eq!(queue.renew(&model(), &me, &[(request.clone(), 1)]).await.unwrap(), gone);
    assert!(queue.restore(&mine).await.unwrap());
    assert_eq!(queue.depth(&model()).await.unwrap(), 0);
    assert_eq!(queue.claim(&model(), &other, to_begin(1)).await.unwrap(), []);
    // Once somebody else has begun it, it is his.
    flush().await;
    publish(&queue, &mine.job).await;
    assert_eq!(queue.claim(&model(), &other, to_begin(1)).await.unwrap().len(), 1);
    let renewed = queue.renew(&model(), &me, &[(request.clone(), 1)]).await.unwrap();
    assert_eq!(renewed, Renewed { lost: vec![request.clone()], gone: vec![] });
    assert!(!queue.restore(&mine).await.unwrap());
    // A later attempt is put back as what it is.
    assert_eq!(queue.disown(&model(), &request, 1).await.unwrap(), Disowned::Waits);
    let later = queue.claim(&model(), &me, to_take_over(1)).await.unwrap().remove(0);
    flush().await;
    assert!(queue.restore(&later).await.unwrap());
    assert!(!queue.acknowledge(&model(), &me, &request, 1, 1).await.unwrap());
    assert!(queue.acknowledge(&model(), &me, &request, 2, 1).await.unwrap());
}

#[tokio::test]
async fn a_renewed_claim_outlives_its_first_lease() {
    let valkey = Valkey::start();
    let claiming = queue_of(&valkey, 100, Duration::from_millis(300)).await;
    let renewing = queue_of(&valkey, 100, LONG).await;
    let me = NodeId::generate();
    let (kept, lost) = (publish(&claiming, &job("a", 5)).await, publish(&claiming, &job("a", 5)).await);
    claiming.claim(&model(), &me, to_begin(2)).await.unwrap();
    assert_eq!(renewing.renew(&model(), &me, &[(kept.clone(), 1)]).await.unwrap(), Renewed::default());
    let taken = until_one_is_taken_over(&claiming, &NodeId::generate()).await;
    assert_eq!(taken.job.request, lost);
    assert!(claiming.acknowledge(&model(), &me, &kept, 1, 1).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_expires_is_told_to_exactly_one_sweeper() {
    let valkey = Valkey::start();
    let queue = patient(&valkey, LONG, Duration::from_millis(1)).await;
    let mut claims = Vec::new();
    for _ in 0..50 {
        claims.push((publish(&queue, &job("a", 5)).await, 1));
    }
    let owner = NodeId::generate();
    queue.claim(&model(), &owner, to_begin(50)).await.unwrap();
    assert_eq!(queue.give_up(&model(), &owner, &GivenUp::Lost { trial: None }, &claims).await.unwrap(), []);
    tokio::time::sleep(Duration::from_millis(5)).await;
    let told = at_once(16, |_| {
        let queue = queue.clone();
        async move { lost_ones(&queue.expired(&model()).await.unwrap()) }
    })
    .await;
    let all: Vec<_> = told.into_iter().flatten().collect();
    assert_eq!((all.len(), all.iter().collect::<HashSet<_>>().len()), (50, 50));
}

#[tokio::test]
async fn a_request_past_its_deadline_is_never_served_and_is_told_of() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 100, LONG).await;
    let late = Job { deadline_unix_ms: 5_000, ..job("a", 5) };
    let in_time = job("a", 5);
    publish(&queue, &late).await;
    publish(&queue, &in_time).await;
    let claims = queue.claim(&model(), &NodeId::generate(), to_begin(10)).await.unwrap();
    assert_eq!(requests(&claims), [in_time.request]);
    let expired = queue.expired(&model()).await.unwrap();
    assert_eq!(lost_ones(&expired), [(late.request, 0, 0)]);
    assert_eq!(expired[0].owner.as_str(), "");
    assert_eq!(lost_ones(&queue.expired(&model()).await.unwrap()), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_claimers_never_get_the_same_request() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 1024, LONG).await;
    for index in 0..300 {
        publish(&queue, &job(["a", "b", "c"][index % 3], 1 + index % 17)).await;
    }
    let taken = at_once(8, |_| {
        let queue = queue.clone();
        async move {
            let (me, mut mine) = (NodeId::generate(), Vec::new());
            loop {
                let claims = queue.claim(&model(), &me, to_begin(7)).await.unwrap();
                if claims.is_empty() {
                    return mine;
                }
                mine.extend(requests(&claims));
            }
        }
    })
    .await;
    let all: Vec<RequestId> = taken.into_iter().flatten().collect();
    assert_eq!((all.len(), all.iter().collect::<HashSet<_>>().len()), (300, 300));
}

#[tokio::test]
async fn only_what_nobody_claimed_can_be_withdrawn_and_only_by_its_tenant() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 100, LONG).await;
    let (first, second) = (publish(&queue, &job("a", 5)).await, publish(&queue, &job("a", 5)).await);
    queue.claim(&model(), &NodeId::generate(), to_begin(1)).await.unwrap();
    assert!(!queue.withdraw(&model(), &"a".into(), &first).await.unwrap());
    assert!(!queue.withdraw(&model(), &"b".into(), &second).await.unwrap());
    assert!(queue.withdraw(&model(), &"a".into(), &second).await.unwrap());
    assert!(!queue.withdraw(&model(), &"a".into(), &second).await.unwrap());
    assert_eq!(queue.depth(&model()).await.unwrap(), 0);
}

#[tokio::test]
async fn a_claim_given_back_is_first_in_line_again_as_another_attempt() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 100, LONG).await;
    let (first, second) = (publish(&queue, &job("a", 5)).await, publish(&queue, &job("a", 5)).await);
    let (me, other) = (NodeId::generate(), NodeId::generate());
    queue.claim(&model(), &me, to_begin(1)).await.unwrap();
    assert_eq!(queue.give_up(&model(), &me, &GivenUp::HandedOver, &[(first.clone(), 1)]).await.unwrap(), []);
    let claims = queue.claim(&model(), &other, Room { to_take_over: 1, to_begin: 1 }).await.unwrap();
    assert_eq!(requests(&claims), [first.clone(), second]);
    assert_eq!(claims[0].attempt, 2);
    assert!(!queue.acknowledge(&model(), &me, &first, 1, 1).await.unwrap());
    assert!(queue.acknowledge(&model(), &other, &first, 2, 1).await.unwrap());
}

#[tokio::test]
async fn a_claimer_is_woken_by_a_publication_also_after_the_store_was_away() {
    let mut valkey = Valkey::start();
    let queue = queue_of(&valkey, 100, LONG).await;
    let mut wakeups = queue.wakeups(&model());
    let soon = Duration::from_secs(10);
    // The first notice says that the subscription stands.
    tokio::time::timeout(soon, wakeups.changed()).await.expect("subscribed");
    publish(&queue, &job("a", 5)).await;
    tokio::time::timeout(soon, wakeups.changed()).await.expect("woken");
    valkey.restart();
    tokio::time::timeout(soon, wakeups.changed()).await.expect("subscribed again");
    let fresh = queue_of(&valkey, 100, LONG).await;
    publish(&fresh, &job("a", 5)).await;
    tokio::time::timeout(soon, wakeups.changed()).await.expect("woken again");
}

#[tokio::test]
async fn nothing_is_left_in_the_store_when_everything_has_ended() {
    let valkey = Valkey::start();
    let queue = patient(&valkey, LONG, Duration::from_millis(1)).await;
    let me = NodeId::generate();
    for index in 0..60 {
        let tenant = format!("tenant-{}", index % 20);
        let request = publish(&queue, &job(&tenant, 5)).await;
        match index % 3 {
            0 => assert!(queue.withdraw(&model(), &tenant.as_str().into(), &request).await.unwrap()),
            1 => {
                let claim = queue.claim(&model(), &me, to_begin(1)).await.unwrap().remove(0);
                assert!(queue.acknowledge(&model(), &me, &claim.job.request, claim.attempt, 9).await.unwrap());
            }
            _ => {
                let claim = queue.claim(&model(), &me, to_begin(1)).await.unwrap().remove(0);
                queue.disown(&model(), &claim.job.request, 1).await.unwrap();
            }
        }
    }
    tokio::time::sleep(Duration::from_millis(10)).await;
    queue.expired(&model()).await.unwrap();
    let mut raw = valkey.raw().await;
    let mut left: Vec<String> = redis::cmd("KEYS").arg("lc:*").query_async(&mut raw).await.unwrap();
    left.sort();
    // Pace and floor of the queue, a count for the few tenants that stand above the floor, and the mark of the layout.
    left.retain(|key| !key.ends_with(":meta") && !key.ends_with(":served") && key != "lc:layout");
    assert_eq!(left, Vec::<String>::new());
}

#[tokio::test]
async fn a_node_that_is_alone_takes_out_whatever_the_last_one_left_at_once() {
    let valkey = Valkey::start();
    let queue = queue_of(&valkey, 512, LONG).await;
    for _ in 0..300 {
        publish(&queue, &job("a", 5)).await;
    }
    let owner = NodeId::generate();
    let claimed = queue.claim(&model(), &owner, to_begin(3)).await.unwrap();
    assert_eq!(lost_ones(&queue.expired(&model()).await.unwrap()), [], "no lease or deadline has run out");
    let left_over = queue.left_over(&model()).await.unwrap();
    assert_eq!(left_over.len(), 300);
    assert_eq!(left_over.iter().filter(|claim| claim.attempt == 1).count(), claimed.len());
    assert_eq!(queue.depth(&model()).await.unwrap(), 0);
    assert!(!queue.acknowledge(&model(), &owner, &claimed[0].job.request, 1, 5).await.unwrap());
}

/// What is to be begun within this time.
async fn punctual(valkey: &Valkey, start_max: Duration) -> Queue {
    let limits = QueueLimits { depth_max: 1000, start_max, claim_lease: LONG, takeover_max: LONG, losses_max: 2 };
    Queue::new(valkey.store().await, limits)
}

async fn retry_of(queue: &Queue, tenant: &str) -> Option<u64> {
    match queue.publish(&job(tenant, 5)).await {
        Ok(()) => None,
        Err(PublishError::Full { retry_after_ms }) => Some(retry_after_ms),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn what_would_wait_for_too_long_at_the_pace_of_late_is_refused_and_told_when_it_would_not() {
    let valkey = Valkey::start();
    let queue = punctual(&valkey, Duration::from_millis(500)).await;
    let me = NodeId::generate();
    // As long as nobody has had to wait, there is no pace but that of those who ask.
    for _ in 0..3 {
        publish(&queue, &job("early", 5)).await;
        queue.claim(&model(), &me, to_begin(1)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    for _ in 0..60 {
        assert_eq!(retry_of(&queue, "greedy").await, None);
    }
    // One in about 50 ms: ten of them wait for about as long as is allowed.
    for _ in 0..12 {
        queue.claim(&model(), &me, to_begin(1)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let late = retry_of(&queue, "greedy").await.expect("48 are before it");
    assert!((1_000..4_000).contains(&late), "{late}");
    // Nobody else has to wait for them, but for his turn.
    assert_eq!(retry_of(&queue, "modest").await, None);
    while queue.depth(&model()).await.unwrap() > 4 {
        queue.claim(&model(), &me, to_begin(1)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(retry_of(&queue, "greedy").await, None);
    // When nobody claims any more, the pace falls by itself.
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert!(retry_of(&queue, "greedy").await.is_some_and(|late| late >= 100));
}
