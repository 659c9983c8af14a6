//! Random sequences of everything that moves money, against a plain account in memory: every answer and, after every
//! step, every balance and counter.
//!
//! `LIGHTCONE_FUZZ_CASES=20000` for a long run, `LIGHTCONE_FUZZ_SEED` for another one.

use std::{cell::RefCell, collections::BTreeMap, time::Duration};

use lightcone::{
    admission::{AdmitError, Ask, LimitKind, Limits, Principal, Rate, Scope},
    domain::{ModelId, MoneyError, Month, NanoUsd, Price, RequestId, TenantId, Usage},
    ledger::{EndReason, Ledger, LedgerError, Moved, Refund, ReleaseReason, Settlement},
    operator::{KeyChanges, OperatorError, TenantChanges, TenantStatus},
    webhooks::EndpointWish,
};
use proptest::{
    prop_assert, prop_assert_eq,
    test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner},
};

use crate::support::{
    aging::age,
    calendar::day_at,
    changes,
    house::House,
    ledger_state,
    steps::{Back, KEYS, PRICES, Pick, Step, steps, tiers},
    twin::{Asked, Outcome, Terms, Twin},
};

const CASES: u64 = 150;
const STEPS_MAX: usize = 80;
/// As `kind_of` tells them apart.
const KINDS_OF_ANSWERS: usize = 36;
/// Longest answer that is settled, in tokens, where the price is nothing.
const ANSWER_MAX: u32 = 100_000;

#[test]
fn every_answer_and_every_balance_is_that_of_a_plain_account() {
    let number = |name: &str, default: u64| std::env::var(name).map_or(default, |text| text.parse().expect("a number"));
    let (cases, seed) = (number("LIGHTCONE_FUZZ_CASES", CASES), number("LIGHTCONE_FUZZ_SEED", 1));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let house = runtime.block_on(async {
        let house = House::with_balance(0).await;
        let mut raw = house.valkey.raw().await;
        // Nothing here is to outlive the server.
        let quick = redis::cmd("CONFIG").arg("SET").arg("appendonly").arg("no").to_owned();
        quick.exec_async(&mut raw).await.expect("CONFIG SET");
        house
    });
    let config = Config { cases: cases as u32, failure_persistence: None, ..Config::default() };
    let mut bytes = [0_u8; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let all = proptest::collection::vec(steps(), 1..STEPS_MAX);
    let answers = RefCell::new(BTreeMap::new());
    if let Err(failure) = runner.run(&all, |steps| runtime.block_on(Case::run(&house, steps, &answers))) {
        panic!("{failure}");
    }
    // Sequences that never get far would agree with anything.
    let answers = answers.into_inner();
    assert!(cases < CASES || answers.len() == KINDS_OF_ANSWERS, "{answers:#?}");
}

/// One tenant and its twin.
struct Case<'a> {
    house: &'a House,
    tenant: TenantId,
    keys: Vec<Principal>,
    twin: Twin,
    /// Every request that was asked for, with the tokens that its hold paid for.
    asked: Vec<(Asked, u32)>,
}

impl<'a> Case<'a> {
    async fn run(
        house: &'a House,
        steps: Vec<Step>,
        answers: &RefCell<BTreeMap<String, u64>>,
    ) -> Result<(), TestCaseError> {
        let mut case = Self::open(house).await;
        for (number, step) in steps.into_iter().enumerate() {
            let today = day_at(house.store.now_unix_ms().await.expect("a time"));
            let (expected, found) = case.take(&step).await;
            if day_at(house.store.now_unix_ms().await.expect("a time")) != case.twin.today || today != case.twin.today {
                return Ok(());
            }
            *answers.borrow_mut().entry(kind_of(&expected)).or_default() += 1;
            prop_assert_eq!(found, expected, "step {} {:?}", number, step);
            let state = ledger_state::State::read(house, &case.tenant, &case.keys, &case.twin).await;
            prop_assert_eq!(state, ledger_state::State::of(&case.twin), "after step {} {:?}", number, step);
        }
        let report = house.ledger.verify().await.expect("a report");
        prop_assert!(report.is_balanced(), "{:#?}", report);
        prop_assert_eq!(report.entries, case.twin.entries);
        case.archive().await?;
        // The next case has the store to itself.
        let mut raw = house.valkey.raw().await;
        redis::cmd("FLUSHALL").exec_async(&mut raw).await.expect("FLUSHALL");
        Ok(())
    }

    async fn open(house: &'a House) -> Self {
        let mut raw = house.valkey.raw().await;
        redis::cmd("FLUSHALL").exec_async(&mut raw).await.expect("FLUSHALL");
        let tenant = house.accounts.create_tenant("twin", NanoUsd::ZERO).await.expect("a tenant").id;
        let told = EndpointWish { url: Some("https://example.com/hook".to_owned()), ..EndpointWish::default() };
        house.accounts.set_webhook(&tenant, &told).await.expect("an endpoint");
        let mut keys = Vec::new();
        for _ in 0..KEYS {
            let scopes = [Scope::Chat].into_iter().collect();
            let key = house.accounts.create_key(&tenant, "twin", scopes).await.expect("a key").record.id;
            keys.push(Principal { tenant: tenant.clone(), key, scopes, tier: String::new(), models: None });
        }
        let limits = |limits: &Limits| limits.iter().collect();
        let mut of_tiers: BTreeMap<_, _> =
            tiers().named.into_iter().map(|(name, tier)| (name, limits(&tier.limits))).collect();
        of_tiers.insert(String::new(), limits(&tiers().standard.limits));
        let today = day_at(house.store.now_unix_ms().await.expect("a time"));
        let twin = Twin::new(KEYS, of_tiers, today);
        Self { house, tenant, keys, twin, asked: Vec::new() }
    }

    /// Archives all months but this one, which changes nothing.
    async fn archive(&self) -> Result<(), TestCaseError> {
        let (folder, ledger) = (tempfile::tempdir().expect("a folder"), &self.house.ledger);
        let now = ledger.now_unix_ms().await.expect("a time");
        let archived = ledger.archive(folder.path(), Month::of(now)).await.expect("archived");
        prop_assert!(archived.faults.is_empty(), "{:#?}", archived);
        for report in [ledger.verify().await, ledger.verify_with(folder.path()).await] {
            let report = report.expect("a report");
            prop_assert!(report.is_balanced(), "after {:?}: {:#?}", archived, report);
            prop_assert_eq!(report.entries, self.twin.entries);
        }
        let state = ledger_state::State::read(self.house, &self.tenant, &self.keys, &self.twin).await;
        prop_assert_eq!(state, ledger_state::State::of(&self.twin), "after {:?}", archived);
        Ok(())
    }

    /// What the twin expects and what the house answers.
    async fn take(&mut self, step: &Step) -> (Outcome, Outcome) {
        let (ledger, tenant) = (&self.house.ledger, self.tenant.clone());
        match step.clone() {
            Step::Grant { amount, reference, note } => (
                self.twin.grant(amount.into(), reference, note),
                moved(ledger.grant(&tenant, NanoUsd::new(amount), reference, note).await),
            ),
            Step::Adjust { amount, reference, note } => (
                self.twin.adjust(amount.into(), reference, note),
                moved(ledger.adjust(&tenant, NanoUsd::new(amount), reference, note).await),
            ),
            Step::Refund { request, amount, reference, note } => {
                let (request, charged) = self.charged(&request);
                let nano = match amount {
                    Back::All => charged,
                    Back::Part(part) => part.index(charged.max(0) as usize + 1) as i64,
                    Back::Nano(nano) => nano,
                };
                let refund = Refund {
                    request: RequestId::from(request.as_str()),
                    amount: NanoUsd::new(nano),
                    reference: reference.to_owned(),
                    note: note.to_owned(),
                };
                (self.twin.refund(&request, nano.into(), reference, note), moved(ledger.refund(&tenant, &refund).await))
            }
            Step::Credit { amount } => (
                self.twin.set_credit(amount.into()),
                moved(ledger.set_credit(&tenant, NanoUsd::new(amount), "line").await),
            ),
            Step::Extend { request, wanted } => {
                let request = self.pick(&request);
                let known = NanoUsd::new(self.twin.hold(&request).unwrap_or(0));
                let answer = ledger.extend(&tenant, &RequestId::from(request.as_str()), wanted, known).await;
                let found = match answer {
                    Ok(extended) => Outcome::Extended { tokens: extended.tokens, by: extended.limited_by },
                    Err(error) => fault(error),
                };
                let expected = self.twin.extend(&request, wanted);
                if let Outcome::Extended { tokens, .. } = expected {
                    self.asked
                        .iter_mut()
                        .filter(|(asked, _)| asked.request == request)
                        .for_each(|(_, paid)| *paid = paid.saturating_add(tokens));
                }
                (expected, found)
            }
            Step::Release { request, why } => {
                let request = self.pick(&request);
                let answer = ledger.release(&tenant, &RequestId::from(request.as_str()), why).await;
                let expected = self.twin.release(&request, why == ReleaseReason::WorkerLost);
                (expected, answer.map_or_else(fault, Outcome::Released))
            }
            Step::Lapse(request) => {
                let request = self.pick(&request);
                self.house.let_lease_of_run_out(&tenant, &RequestId::from(request.as_str())).await;
                self.twin.lapse(&request, true);
                (Outcome::Done, Outcome::Done)
            }
            Step::Renew(request) => {
                let request = self.pick(&request);
                let holds = [(tenant, RequestId::from(request.as_str()))];
                let answer = ledger.renew_holds(&holds).await;
                self.twin.lapse(&request, false);
                (Outcome::Done, answer.map_or_else(fault, |()| Outcome::Done))
            }
            Step::Sweep => {
                // One whose own lease is short, so that it trusts its connection at once.
                let sweeper = Ledger::new(self.house.store.clone(), Duration::from_millis(1));
                let answer = sweeper.sweep_expired_holds().await;
                (self.twin.sweep(usize::MAX), answer.map_or_else(fault, Outcome::Swept))
            }
            Step::Admit { .. } => self.admit(step).await,
            Step::Settle { .. } => self.settle(step).await,
            step => (Outcome::Done, self.administer(step).await),
        }
    }

    async fn admit(&mut self, step: &Step) -> (Outcome, Outcome) {
        let Step::Admit { key, prompt, output_max, choices, step, price, again } = step.clone() else {
            unreachable!("asked for by `take`")
        };
        let request = again.map_or_else(|| RequestId::generate().to_string(), |again| self.pick(&again));
        let (input, output, cached) = PRICES[price];
        let price =
            Price { input: NanoUsd::new(input), output: NanoUsd::new(output), cached_input: NanoUsd::new(cached) };
        let terms = Terms { key, price, model: "m".to_owned(), version: "1".to_owned() };
        let asked = Asked { request, terms, prompt, output_max, choices, step };
        let ask = Ask {
            request: RequestId::from(asked.request.as_str()),
            model: ModelId::from("m"),
            price,
            price_version: "1".to_owned(),
            prompt_tokens: prompt,
            output_tokens_max: output_max,
            choices,
        };
        let admission = self.house.admission.clone().with_tiers(tiers()).with_step(step);
        let found = match admission.admit(&self.keys[key], ask).await {
            Ok(admitted) => {
                let rate = |rate: Option<Rate>| rate.map(|rate| (rate.limit, rate.remaining));
                let rates = (rate(admitted.rates().requests), rate(admitted.rates().tokens));
                Outcome::Admitted { hold: admitted.hold().nano().into(), tokens: admitted.allowed_tokens(), rates }
            }
            Err(error) => refused(error),
        };
        let expected = self.twin.admit(&asked);
        let known = self.asked.iter().any(|(known, _)| known.request == asked.request);
        if let (Outcome::Admitted { tokens, .. }, false) = (&expected, known) {
            self.asked.push((asked, *tokens));
        }
        (expected, found)
    }

    async fn settle(&mut self, step: &Step) -> (Outcome, Outcome) {
        let Step::Settle { request, completion, beyond, cached, other, begun } = step.clone() else {
            unreachable!("asked for by `take`")
        };
        let request = self.pick(&request);
        let known = self.asked.iter().find(|(asked, _)| asked.request == request).cloned();
        let (asked, allowed) = known.unwrap_or_else(|| {
            // As if the store had lost it.
            let price = Price::flat(NanoUsd::new(200), NanoUsd::new(300));
            let terms = Terms { key: 0, price, model: "m".to_owned(), version: "1".to_owned() };
            let request = RequestId::generate().to_string();
            let lost = (Asked { request, terms, prompt: 9, output_max: 50, choices: 1, step: 0 }, 50);
            if begun {
                self.asked.push(lost.clone());
            }
            lost
        });
        let request = asked.request;
        let usage = Usage {
            prompt_tokens: asked.prompt,
            completion_tokens: completion.index(allowed.min(ANSWER_MAX) as usize + 1) as u32 + beyond,
            cached_tokens: cached.index(asked.prompt as usize + 1) as u32,
        };
        let mut terms = asked.terms;
        match other {
            Some(0) => terms.key = (terms.key + 1) % KEYS,
            Some(1) => terms.price.output = NanoUsd::new(terms.price.output.nano() + 1),
            Some(2) => "another".clone_into(&mut terms.model),
            Some(_) => "2".clone_into(&mut terms.version),
            None => {}
        }
        let settlement = Settlement {
            request: RequestId::from(request.as_str()),
            tenant: self.tenant.clone(),
            key: self.keys[terms.key].key.clone(),
            model: ModelId::from(terms.model.as_str()),
            usage,
            price: terms.price,
            price_version: terms.version.clone(),
            reason: EndReason::Stop,
            digest: None,
            attempt: 1,
        };
        let ledger = &self.house.ledger;
        let answer = if begun { ledger.settle_begun(&settlement).await } else { ledger.settle(&settlement).await };
        let found = match answer {
            Ok(settled) => Outcome::Settled {
                amount: settled.amount.nano().into(),
                repeated: settled.repeated,
                late: settled.late,
            },
            Err(error) => fault(error),
        };
        (self.twin.settle(&request, &terms, usage, begun), found)
    }

    /// What a person sets, and what time does.
    async fn administer(&mut self, step: Step) -> Outcome {
        let (accounts, tenant) = (&self.house.accounts, &self.tenant);
        let done = match step {
            Step::LowBalance(low) => {
                self.twin.set_low(low.map(i128::from));
                accounts.change_tenant(tenant, &changes::of_low_balance(low.map(NanoUsd::new))).await.map(drop)
            }
            Step::TenantLimit(kind, value) => {
                set_limit(&mut self.twin.limits, kind, value);
                accounts.change_tenant(tenant, &changes::of_limits(vec![(kind, value)])).await.map(drop)
            }
            Step::KeyLimit(key, kind, value) if !self.twin.keys[key].revoked => {
                set_limit(&mut self.twin.keys[key].limits, kind, value);
                let changes = KeyChanges { limits: vec![(kind, value)], ..KeyChanges::default() };
                accounts.change_key(&self.keys[key].key, &changes).await.map(drop)
            }
            Step::Tier(tier) => {
                tier.clone_into(&mut self.twin.tier);
                let changes = TenantChanges { tier: Some(tier.to_owned()), ..TenantChanges::default() };
                accounts.change_tenant(tenant, &changes).await.map(drop)
            }
            Step::Suspend(suspended) => {
                self.twin.suspended = suspended;
                let status = if suspended { TenantStatus::Suspended } else { TenantStatus::Active };
                let changes = TenantChanges { status: Some(status), ..TenantChanges::default() };
                accounts.change_tenant(tenant, &changes).await.map(drop)
            }
            Step::Revoke(key) => {
                self.twin.keys[key].revoked = true;
                accounts.revoke_key(&self.keys[key].key).await.map(drop)
            }
            Step::Age(days) => {
                self.twin.age(days as i64);
                age(self.house, tenant, days).await;
                Ok(())
            }
            _ => Ok::<(), OperatorError>(()),
        };
        done.expect("a change");
        Outcome::Done
    }

    fn pick(&self, pick: &Pick) -> String {
        let open: Vec<&String> = self.twin.holds.keys().collect();
        let unknown = || "chatcmpl-unknown".to_owned();
        match pick {
            Pick::Open(index) if !open.is_empty() => open[index.index(open.len())].clone(),
            Pick::Open(index) | Pick::Any(index) if !self.asked.is_empty() => {
                self.asked[index.index(self.asked.len())].0.request.clone()
            }
            _ => unknown(),
        }
    }

    /// One that was charged, if there is any, and what it was charged.
    fn charged(&self, pick: &Pick) -> (String, i64) {
        let charged: Vec<_> = self.twin.charged_requests().collect();
        match pick {
            Pick::Open(index) if !charged.is_empty() => {
                let (request, amount) = charged[index.index(charged.len())];
                (request.to_owned(), amount as i64)
            }
            pick => (self.pick(pick), 1),
        }
    }
}

/// Of limits also which one, of extensions also what was in the way.
fn kind_of(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Limited { kind, of, .. } => format!("Limited {kind} {of:?}"),
        Outcome::Extended { by, .. } => format!("Extended {by:?}"),
        Outcome::Moved { repeated, .. } => format!("Moved {repeated}"),
        Outcome::Settled { repeated, late, .. } => format!("Settled {repeated} {late}"),
        other => format!("{other:?}").split([' ', '(']).next().unwrap_or_default().to_owned(),
    }
}

fn set_limit(limits: &mut BTreeMap<LimitKind, u64>, kind: LimitKind, value: Option<u64>) {
    match value {
        Some(value) => drop(limits.insert(kind, value)),
        None => drop(limits.remove(&kind)),
    }
}

fn moved(answer: Result<Moved, LedgerError>) -> Outcome {
    match answer {
        Ok(moved) => Outcome::Moved { balance: moved.balance.nano().into(), repeated: moved.repeated },
        Err(error) => fault(error),
    }
}

fn fault(error: LedgerError) -> Outcome {
    match error {
        LedgerError::BadAmount(_) => Outcome::BadAmount,
        LedgerError::OtherReference(_) => Outcome::OtherReference,
        LedgerError::Money(MoneyError::Overflow) => Outcome::Overflow,
        LedgerError::Insufficient { balance, .. } => Outcome::Insufficient { balance: balance.nano().into() },
        LedgerError::NotCharged(_) => Outcome::NotCharged,
        LedgerError::ExceedsCharge { left, .. } => Outcome::ExceedsCharge { left: left.nano().into() },
        LedgerError::HoldGone(_) => Outcome::HoldGone,
        LedgerError::Unknown(_) => Outcome::Unknown,
        LedgerError::OtherTerms(_) => Outcome::OtherTerms,
        LedgerError::ExceedsHold { amount, held, .. } => {
            Outcome::ExceedsHold { amount: amount.nano().into(), held: held.nano().into() }
        }
        error => panic!("{error}"),
    }
}

fn refused(error: AdmitError) -> Outcome {
    match error {
        AdmitError::InsufficientBalance { balance, .. } => Outcome::Insufficient { balance: balance.nano().into() },
        AdmitError::Limited { kind, of, limit, wait_ms, rates } => {
            let rate = |rate: Option<Rate>| rate.map(|rate| (rate.limit, rate.remaining));
            let rates = (rate(rates.requests), rate(rates.tokens));
            Outcome::Limited { kind, of, limit, never: wait_ms.is_none(), rates }
        }
        AdmitError::Suspended(_) => Outcome::Suspended,
        AdmitError::KeyEnded(_) => Outcome::KeyEnded,
        AdmitError::UnknownTier(_) => Outcome::UnknownTier,
        AdmitError::Repeated(_) => Outcome::AdmittedBefore,
        AdmitError::Money(MoneyError::Overflow) => Outcome::Overflow,
        error => panic!("{error}"),
    }
}
