//! Usage counters as buckets, and single requests, against the ledger that moved them.

use std::collections::BTreeSet;

use lightcone::{
    admission::{Ask, Principal},
    domain::{ModelId, NanoUsd, RequestId},
    ledger::{
        GenerationState, Refund, ReleaseReason, UsageBucket, UsageError, UsageRange, UsageSums, UsageWidth, UsageWish,
    },
    store::StoreError,
};

use crate::support::{
    house::{House, MODEL, ask, settlement},
    past::{born, used_at},
};

const HOUR: u64 = 3600;
const DAY: u64 = 86_400;

/// One request of so many tokens, from admission to settlement.
async fn use_up(house: &House, principal: &Principal, model: &str, prompt: u32, completion: u32) {
    let ask = Ask { model: ModelId::from(model), ..ask(prompt, completion) };
    let admitted = house.admission.admit(principal, ask).await.expect("admitted");
    house.ledger.settle(&settlement(&admitted, completion)).await.expect("settled");
}

async fn now(house: &House) -> u64 {
    house.ledger.now_unix_ms().await.expect("a time") / 1000
}

async fn today(house: &House) -> UsageRange {
    let now = now(house).await;
    // With an hour more on both sides, should the day change meanwhile.
    UsageRange::new(now - HOUR, now + HOUR, UsageWidth::Hour).expect("a range")
}

fn all(buckets: &[UsageBucket]) -> UsageSums {
    let rows = buckets.iter().flat_map(|bucket| &bucket.rows);
    rows.fold(UsageSums::default(), |sum, row| sum.checked_add(&row.sums).expect("fits"))
}

#[tokio::test]
async fn what_was_used_adds_up_to_what_the_ledger_charged_however_it_is_told_apart() {
    let house = House::with_balance(1_000_000_000).await;
    let other = house.another(1_000_000_000).await;
    let scopes = [lightcone::admission::Scope::Chat].into_iter().collect();
    let second = house.accounts.create_key(&house.tenant, "second", scopes).await.unwrap();
    let second = house.admission.authenticate(&second.secret).await.unwrap();
    let mut posted = 0;
    for (principal, model) in
        [(&house.principal, MODEL), (&house.principal, "b"), (&second, MODEL), (&other, "b"), (&other, "b")]
    {
        posted += 1;
        use_up(&house, principal, model, 10 * posted, posted).await;
    }
    // What is open or was given back is nobody's usage.
    let _open = house.admit(7, 7).await.unwrap();
    let released = house.admit(8, 8).await.unwrap();
    house.ledger.release(&house.tenant, released.request(), ReleaseReason::Withdrawn).await.unwrap();

    let range = today(&house).await;
    let charged = house.balance().await.charged;
    let of_other = house.ledger.balance(&other.tenant).await.unwrap().charged;
    let read = async |wish: &UsageWish| house.ledger.usage(range, wish).await.unwrap();
    let whole = all(&read(&UsageWish::default()).await);
    assert_eq!(whole.amount, charged.checked_add(of_other).unwrap());
    assert_eq!((whole.requests, whole.prompt_tokens, whole.completion_tokens), (5, 150, 15));
    for (by_tenant, by_key, by_model, groups) in [
        (false, false, false, 1),
        (true, false, false, 2),
        (false, true, false, 3),
        (false, false, true, 2),
        (true, true, true, 4),
    ] {
        let buckets = read(&UsageWish { by_tenant, by_key, by_model, ..UsageWish::default() }).await;
        assert_eq!(all(&buckets), whole);
        let told: BTreeSet<_> =
            buckets.iter().flat_map(|b| &b.rows).map(|r| (r.tenant.clone(), r.key.clone(), r.model.clone())).collect();
        assert_eq!(told.len(), groups, "{told:?}");
        for (tenant, key, model) in told {
            assert_eq!((tenant.is_some(), key.is_some(), model.is_some()), (by_tenant, by_key, by_model));
        }
    }
    let tenants = Some(BTreeSet::from([house.tenant.clone()]));
    let own = read(&UsageWish { tenants: tenants.clone(), ..UsageWish::default() }).await;
    assert_eq!(all(&own).amount, charged);
    let models = Some(BTreeSet::from([ModelId::from("b")]));
    let narrow = read(&UsageWish { tenants: tenants.clone(), models, ..UsageWish::default() }).await;
    assert_eq!((all(&narrow).requests, all(&narrow).prompt_tokens), (1, 20));
    let keys = Some(BTreeSet::from([other.key.clone()]));
    assert_eq!(all(&read(&UsageWish { keys: keys.clone(), ..UsageWish::default() }).await).amount, of_other);
    assert_eq!(all(&read(&UsageWish { tenants, keys, ..UsageWish::default() }).await), UsageSums::default());
    let nobody = Some(BTreeSet::from(["ten_nobody".into()]));
    let nothing = read(&UsageWish { tenants: nobody, ..UsageWish::default() }).await;
    assert!(!nothing.is_empty() && nothing.iter().all(|bucket| bucket.rows.is_empty()));
}

#[tokio::test]
async fn usage_lies_in_the_minute_the_hour_and_the_day_in_which_it_was_settled() {
    let house = House::with_balance(1_000_000_000).await;
    // 12 to 36 hours ago, whatever the time of day: minutes are kept for 48.
    let midnight = (now(&house).await - DAY / 2) / DAY * DAY;
    born(&house, &house.tenant, midnight - 2 * DAY).await;
    // On both sides of a minute, an hour and a day, all within what is kept by the minute.
    let times = [midnight - 1, midnight, midnight + 59, midnight + 60, midnight + HOUR - 1, midnight + HOUR];
    for (index, time) in times.into_iter().enumerate() {
        use_up(&house, &house.principal, MODEL, 1 << index, 1).await;
        used_at(&house, &house.tenant, time).await;
    }
    let prompts = async |from: u64, to: u64, width: UsageWidth| -> Vec<(u64, u64, u64)> {
        let range = UsageRange::new(from, to, width).unwrap();
        let buckets = house.ledger.usage(range, &UsageWish::default()).await.unwrap();
        assert_eq!((buckets[0].from, buckets.last().unwrap().to), (range.from(), range.to()));
        let told = |bucket: &UsageBucket| (bucket.from, bucket.to, all(std::slice::from_ref(bucket)).prompt_tokens);
        buckets.iter().map(told).filter(|(_, _, prompt)| *prompt > 0).collect()
    };
    let (begin, end) = (midnight - HOUR, midnight + 2 * HOUR);
    let days = prompts(begin, end, UsageWidth::Day).await;
    assert_eq!(days, [(midnight - DAY, midnight, 1), (midnight, midnight + DAY, 2 + 4 + 8 + 16 + 32)]);
    let hours = prompts(begin, end, UsageWidth::Hour).await;
    assert_eq!(
        hours,
        [
            (midnight - HOUR, midnight, 1),
            (midnight, midnight + HOUR, 2 + 4 + 8 + 16),
            (midnight + HOUR, midnight + 2 * HOUR, 32),
        ]
    );
    let minutes = prompts(begin, end, UsageWidth::Minute).await;
    assert_eq!(
        minutes,
        [
            (midnight - 60, midnight, 1),
            (midnight, midnight + 60, 2 + 4),
            (midnight + 60, midnight + 120, 8),
            (midnight + HOUR - 60, midnight + HOUR, 16),
            (midnight + HOUR, midnight + HOUR + 60, 32),
        ]
    );
    // The end is excluded, and what a bucket has is not split.
    assert_eq!(prompts(midnight, midnight + 60, UsageWidth::Minute).await, [(midnight, midnight + 60, 6)]);
    assert_eq!(prompts(midnight + 30, midnight + 31, UsageWidth::Minute).await, [(midnight, midnight + 60, 6)]);
}

#[tokio::test]
async fn what_is_not_kept_any_more_is_refused_and_is_no_zero() {
    let house = House::with_balance(1_000_000_000).await;
    let now = now(&house).await;
    let read = async |from: u64, to: u64, width: UsageWidth| {
        house.ledger.usage(UsageRange::new(from, to, width).unwrap(), &UsageWish::default()).await
    };
    // Nothing of a young tenant is lost, however far back one looks.
    assert!(read(now - 500 * DAY, now - 499 * DAY, UsageWidth::Day).await.unwrap()[0].rows.is_empty());
    assert!(read(now - 3 * DAY, now - 3 * DAY + HOUR, UsageWidth::Minute).await.unwrap()[0].rows.is_empty());
    born(&house, &house.tenant, now - 450 * DAY).await;
    let forgotten = |answer: Result<_, UsageError>| matches!(answer, Err(UsageError::Forgotten { .. }));
    assert!(forgotten(read(now - 420 * DAY, now - 419 * DAY, UsageWidth::Day).await));
    assert!(forgotten(read(now - 3 * DAY, now, UsageWidth::Minute).await));
    assert!(read(now - 399 * DAY, now, UsageWidth::Day).await.is_ok());
    assert!(read(now - 2 * DAY + HOUR, now, UsageWidth::Minute).await.is_ok());
    // Before it was born there is nothing to lose.
    assert!(read(now - 460 * DAY, now - 455 * DAY, UsageWidth::Day).await.is_ok());
}

#[tokio::test]
async fn a_counter_that_cannot_be_read_is_an_error_and_no_zero() {
    let house = House::with_balance(1_000_000).await;
    use_up(&house, &house.principal, MODEL, 1, 1).await;
    let mut raw = house.valkey.raw().await;
    let hour = now(&house).await / HOUR;
    for hour in [hour - 1, hour] {
        let counter = format!("lc:{{t:{}}}:usage:hour:{hour}", house.tenant);
        redis::cmd("HSET").arg(counter).arg("m\x1fk\x1famount").arg("lots").exec_async(&mut raw).await.unwrap();
    }
    born(&house, &house.tenant, (hour - 2) * HOUR).await;
    let read = house.ledger.usage(today(&house).await, &UsageWish::default()).await;
    assert!(matches!(&read, Err(UsageError::Store(StoreError::Damaged(what))) if what.contains("lots")), "{read:?}");
}

#[tokio::test]
async fn a_request_is_known_from_its_hold_to_its_refund() {
    let house = House::with_balance(1_000_000).await;
    let find = async |request: &RequestId| house.ledger.generation(&house.tenant, request).await.unwrap();
    let admitted = house.admit(10, 10).await.unwrap();
    let running = find(admitted.request()).await.unwrap();
    assert_eq!(running.state, GenerationState::Running { held: admitted.hold() });
    assert_eq!((&running.terms.key, &running.terms.model), (admitted.key(), admitted.model()));
    assert_eq!((running.terms.price, running.terms.price_version.as_str()), (admitted.price(), "2026-11"));
    assert!(running.created_unix_ms.unwrap().abs_diff(now(&house).await * 1000) < 60_000);

    let bill = settlement(&admitted, 4);
    house.ledger.settle(&bill).await.unwrap();
    let refund = |nano, reference: &str| Refund {
        request: admitted.request().clone(),
        amount: NanoUsd::new(nano),
        reference: reference.to_owned(),
        note: String::new(),
    };
    for (given_back, reference) in [(0, ""), (200, "a"), (3_000, "b")] {
        if given_back > 0 {
            house.ledger.refund(&house.tenant, &refund(given_back, reference)).await.unwrap();
        }
        let charged = find(admitted.request()).await.unwrap();
        assert_eq!(charged.terms, running.terms);
        let GenerationState::Charged { entry, refunded, written_off } = charged.state else { panic!("{charged:?}") };
        assert_eq!((entry.amount, entry.usage, entry.note.as_str()), (NanoUsd::new(3_200), bill.usage, "stop"));
        let total = if given_back == 3_000 { 3_200 } else { given_back };
        assert_eq!((refunded.nano(), written_off.nano()), (total, 0));
    }

    let released = house.admit(10, 10).await.unwrap();
    house.ledger.release(&house.tenant, released.request(), ReleaseReason::WorkerLost).await.unwrap();
    let free = find(released.request()).await.unwrap();
    let GenerationState::Released { entry } = &free.state else { panic!("{free:?}") };
    assert_eq!((entry.note.as_str(), entry.amount), ("worker_lost", released.hold()));

    // Its journal was found, and the balance was spent meanwhile.
    let left = house.balance().await.balance.nano() - 700;
    house.ledger.adjust(&house.tenant, NanoUsd::new(-left), "spent", "").await.unwrap();
    assert!(house.ledger.settle(&settlement(&released, 4)).await.unwrap().late);
    let late = find(released.request()).await.unwrap();
    let GenerationState::Charged { entry, written_off, .. } = &late.state else { panic!("{late:?}") };
    assert_eq!((entry.amount.nano(), entry.hold.nano(), written_off.nano()), (3_200, 0, 2_500));
    house.assert_balanced().await;

    // Neither another tenant's nor other things that the ledger remembers by name.
    let other = house.another(1_000_000).await;
    assert_eq!(house.ledger.generation(&other.tenant, admitted.request()).await.unwrap(), None);
    for name in ["grant opening", "refund a", &format!("refundable {}", admitted.request()), "", "chatcmpl-x"] {
        let request = RequestId::from(name);
        assert_eq!(find(&request).await, None, "{name}");
    }
}
