use super::*;
use crate::domain::ToldChoice;

fn hub(buffer_events: usize) -> ReplyHub {
    ReplyHub::new(NodeId::from("node_edge"), buffer_events, None, Arc::new(Metrics::new()))
}

fn open(hub: &ReplyHub, request: &RequestId) -> ReplyStream {
    hub.open(request, &ModelId::from("model"))
}

fn event(request: &RequestId, attempt: u32, seq: u32, body: EventBody) -> TokenEvent {
    TokenEvent { request: request.clone(), attempt, seq, body }
}

fn accepted(request: &RequestId, attempt: u32) -> TokenEvent {
    event(request, attempt, 0, EventBody::Accepted)
}

/// Its text is its number.
fn delta(request: &RequestId, attempt: u32, seq: u32) -> TokenEvent {
    event(request, attempt, seq, EventBody::text(seq.to_string(), 1))
}

fn finished(request: &RequestId, attempt: u32, seq: u32) -> TokenEvent {
    event(request, attempt, seq, EventBody::Finished { reason: FinishReason::Stop, usage: Usage::default() })
}

fn superseded(request: &RequestId, attempt: u32) -> Feedback {
    Feedback::Superseded { request: request.clone(), attempt }
}

fn orphan(request: &RequestId, attempt: u32) -> Orphan {
    Orphan { request: request.clone(), model: ModelId::from("model"), attempt }
}

/// So many tokens of one choice, each of one byte of text.
fn told(tokens: u32) -> Told {
    let choice = ToldChoice { ids: vec![0; tokens as usize], text_bytes: tokens, ended: None };
    Told { prompt_tokens: 0, choices: if tokens == 0 { vec![] } else { vec![choice] } }
}

fn is_failed(event: &TokenEvent, wanted: FailureCode) -> bool {
    matches!(event.body, EventBody::Failed { code, .. } if code == wanted)
}

async fn rest(mut stream: ReplyStream) -> Vec<TokenEvent> {
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(event);
    }
    events
}

#[tokio::test]
async fn a_stream_yields_its_events_in_order_and_its_worker_hears_that_the_last_one_came() {
    let (hub, request, (link, _feedbacks)) = (hub(8), RequestId::from("r"), WorkerLink::new());
    let stream = open(&hub, &request);
    let events = vec![accepted(&request, 1), delta(&request, 1, 1), finished(&request, 1, 2)];
    assert_eq!(hub.deliver(events.clone(), &link), [Feedback::Heard(request.clone())]);
    assert_eq!(hub.open_count(), 0);
    assert_eq!(rest(stream).await, events);
    // It may not have heard that, and ask again.
    assert_eq!(hub.deliver(vec![finished(&request, 1, 2)], &link), [Feedback::Heard(request)]);
}

#[tokio::test]
async fn a_repeated_event_is_delivered_once_and_a_gap_makes_its_worker_one_that_is_lost() {
    let (hub, request, (link, _feedbacks)) = (hub(8), RequestId::from("r"), WorkerLink::new());
    let mut stream = open(&hub, &request);
    let twice = vec![accepted(&request, 1), delta(&request, 1, 1), delta(&request, 1, 1)];
    assert!(hub.deliver(twice, &link).is_empty());
    assert_eq!(hub.deliver(vec![delta(&request, 1, 3), delta(&request, 1, 4)], &link), [superseded(&request, 1)]);
    assert_eq!(hub.orphans().await, [orphan(&request, 1)]);
    assert_eq!((stream.next().await.unwrap().seq, stream.next().await.unwrap().seq), (0, 1));
    assert_eq!(hub.open_count(), 1, "another worker may go on with it");
}

#[tokio::test]
async fn a_reader_that_lags_behind_is_cut_and_its_worker_told_to_stop() {
    let (hub, slow, brisk) = (hub(3), RequestId::from("slow"), RequestId::from("brisk"));
    let (link, _feedbacks) = WorkerLink::new();
    let (slow_stream, mut brisk_stream) = (open(&hub, &slow), open(&hub, &brisk));
    hub.deliver(vec![accepted(&slow, 1), accepted(&brisk, 1)], &link);
    brisk_stream.next().await.unwrap();
    for seq in 1..5 {
        let feedback = hub.deliver(vec![delta(&slow, 1, seq), delta(&brisk, 1, seq)], &link);
        let expected = if seq >= 3 { vec![Feedback::Cancel(slow.clone())] } else { vec![] };
        assert_eq!(feedback, expected);
        assert_eq!(brisk_stream.next().await.unwrap().seq, seq);
    }
    let events = rest(slow_stream).await;
    assert_eq!(events.len(), 4);
    assert!(is_failed(&events[3], FailureCode::SlowConsumer));
    assert_eq!(hub.inner.metrics.slow_streams_cut.get(), 1);
}

#[tokio::test]
async fn dropping_a_stream_cancels_at_its_worker_or_at_whoever_accepts_later() {
    let (hub, known, queued) = (hub(8), RequestId::from("known"), RequestId::from("queued"));
    let (link, mut feedbacks) = WorkerLink::new();
    let (known_stream, queued_stream) = (open(&hub, &known), open(&hub, &queued));
    hub.deliver(vec![accepted(&known, 1)], &link);
    drop(known_stream);
    drop(queued_stream);
    assert_eq!(feedbacks.next().await, [Feedback::Cancel(known)]);
    assert_eq!(hub.deliver(vec![accepted(&queued, 1)], &link), [Feedback::Cancel(queued)]);
}

#[tokio::test]
async fn a_stream_that_ended_is_not_cancelled() {
    let (hub, request, (link, feedbacks)) = (hub(8), RequestId::from("r"), WorkerLink::new());
    let stream = open(&hub, &request);
    hub.deliver(vec![accepted(&request, 1), finished(&request, 1, 1)], &link);
    drop(stream);
    assert!(feedbacks.inner.waiting.lock().is_empty());
}

#[tokio::test]
async fn a_lost_link_orphans_its_own_requests_and_another_worker_goes_on_where_it_was() {
    let (hub, mine, other) = (hub(16), RequestId::from("mine"), RequestId::from("other"));
    let ((first, mut heard_first), (second, _heard)) = (WorkerLink::new(), WorkerLink::new());
    let (stream, _other_stream) = (open(&hub, &mine), open(&hub, &other));
    hub.deliver(vec![accepted(&mine, 1), delta(&mine, 1, 1), delta(&mine, 1, 2)], &first);
    hub.deliver(vec![accepted(&other, 1)], &second);
    hub.link_lost(&first);
    let orphans = hub.orphans().await;
    assert_eq!(orphans, [orphan(&mine, 1)]);
    assert!(hub.is_orphan(&orphans[0]));
    let resume = Feedback::Resume { request: mine.clone(), attempt: 2, told: told(2) };
    assert_eq!(hub.deliver(vec![accepted(&mine, 2)], &second), [resume]);
    assert!(!hub.is_orphan(&orphans[0]));
    // The first one comes back, with what it has decoded meanwhile.
    assert_eq!(hub.deliver(vec![delta(&mine, 1, 3), finished(&mine, 1, 4)], &first), [superseded(&mine, 1)]);
    assert_eq!(hub.deliver(vec![accepted(&mine, 1)], &first), [superseded(&mine, 1)]);
    hub.deliver(vec![delta(&mine, 2, 1), finished(&mine, 2, 2)], &second);
    let seen: Vec<_> = rest(stream).await.iter().map(|event| (event.attempt, event.seq)).collect();
    assert_eq!(seen, [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]);
    assert!(futures::FutureExt::now_or_never(heard_first.next()).is_none(), "its link was gone before the takeover");
}

#[tokio::test]
async fn a_worker_from_whom_a_request_is_taken_hears_of_it() {
    let (hub, request) = (hub(16), RequestId::from("r"));
    let ((frozen, mut heard), (second, _heard)) = (WorkerLink::new(), WorkerLink::new());
    let _stream = open(&hub, &request);
    hub.deliver(vec![accepted(&request, 1), delta(&request, 1, 1)], &frozen);
    hub.deliver(vec![accepted(&request, 2)], &second);
    assert_eq!(heard.next().await, [superseded(&request, 1)]);
    // A third never had an event before it, but the second one's are no longer wanted all the same.
    let ((third, _heard), late) = (WorkerLink::new(), vec![delta(&request, 2, 1)]);
    hub.deliver(vec![accepted(&request, 3)], &third);
    assert_eq!(hub.deliver(late, &second), [superseded(&request, 2)]);
}

#[tokio::test]
async fn a_client_that_left_is_billed_by_whoever_takes_over_for_what_it_was_told() {
    let (hub, request) = (hub(16), RequestId::from("r"));
    let ((first, _h1), (second, _h2)) = (WorkerLink::new(), WorkerLink::new());
    let stream = open(&hub, &request);
    hub.deliver(vec![accepted(&request, 1), delta(&request, 1, 1), delta(&request, 1, 2)], &first);
    drop(stream);
    hub.link_lost(&first);
    let (resume, cancel) =
        (Feedback::Resume { request: request.clone(), attempt: 2, told: told(2) }, Feedback::Cancel(request.clone()));
    assert_eq!(hub.deliver(vec![accepted(&request, 2)], &second), [resume, cancel]);
    assert_eq!(hub.deliver(vec![finished(&request, 2, 1)], &second), [Feedback::Heard(request)]);
}

#[tokio::test]
async fn one_that_was_cancelled_is_cancelled_at_whoever_takes_it_over() {
    let (hub, request) = (hub(16), RequestId::from("r"));
    let ((first, mut heard), (second, _h2)) = (WorkerLink::new(), WorkerLink::new());
    let _stream = open(&hub, &request);
    hub.deliver(vec![accepted(&request, 1), delta(&request, 1, 1)], &first);
    assert!(hub.cancel(&request));
    assert_eq!(heard.next().await, [Feedback::Cancel(request.clone())]);
    hub.link_lost(&first);
    let feedback = hub.deliver(vec![accepted(&request, 2)], &second);
    let resume = Feedback::Resume { request: request.clone(), attempt: 2, told: told(1) };
    assert_eq!(feedback, [resume, Feedback::Cancel(request)]);
}

#[tokio::test]
async fn a_request_that_nobody_will_go_on_with_fails() {
    let (hub, request, (link, _feedbacks)) = (hub(8), RequestId::from("r"), WorkerLink::new());
    let stream = open(&hub, &request);
    hub.deliver(vec![accepted(&request, 1)], &link);
    hub.link_lost(&link);
    let orphans = hub.orphans().await;
    hub.abandon(&orphan(&request, 0));
    assert_eq!(hub.open_count(), 1, "of an older attempt");
    hub.abandon(&orphans[0]);
    assert!(is_failed(rest(stream).await.last().unwrap(), FailureCode::WorkerLost));
}

#[tokio::test]
async fn a_failure_found_by_another_node_ends_the_stream_and_stops_the_worker_that_had_it() {
    let (hub, request) = (hub(8), RequestId::from("r"));
    let ((worker, mut heard), (sweeper, _none)) = (WorkerLink::new(), WorkerLink::new());
    let stream = open(&hub, &request);
    hub.deliver(vec![accepted(&request, 2)], &worker);
    let failure = |attempt| {
        let body = EventBody::Failed { code: FailureCode::WorkerFailed, message: "lease".to_owned() };
        event(&request, attempt, u32::MAX, body)
    };
    assert!(hub.deliver(vec![failure(1)], &sweeper).is_empty(), "of an older attempt");
    assert_eq!(hub.deliver(vec![failure(2)], &sweeper), [Feedback::Heard(request.clone())]);
    assert_eq!(heard.next().await, [superseded(&request, 2)]);
    assert_eq!(rest(stream).await.len(), 2);
}
