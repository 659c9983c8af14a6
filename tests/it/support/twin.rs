//! A tenant's account as plain sums in 128 bits: what every call must answer, and what must be on the books after it.
//! Obviously right rather than quick; knows no store.

use std::collections::BTreeMap;

use lightcone::{
    admission::{LimitKind, Party},
    domain::{FundsEnd, Price, Usage},
};

use super::calendar::{day_name, month_of};

/// No single request may cost more.
const EXACT_MAX: i128 = 9_000_000_000_000_000;
/// For so long a request may be charged after its hold was given up.
const LATE_DAYS: i64 = 30;
const MOST: i128 = i64::MAX as i128;
const LEAST: i128 = i64::MIN as i128;

pub type Limits = BTreeMap<LimitKind, u64>;

/// What a call answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Moved { balance: i128, repeated: bool },
    BadAmount,
    OtherReference,
    Overflow,
    Insufficient { balance: i128 },
    NotCharged,
    ExceedsCharge { left: i128 },
    Admitted { hold: i128, tokens: u32, rates: Rates },
    Limited { kind: LimitKind, of: Party, limit: u64, never: bool, rates: Rates },
    Suspended,
    UnknownTier,
    KeyEnded,
    AdmittedBefore,
    Extended { tokens: u32, by: Option<FundsEnd> },
    HoldGone,
    Unknown,
    ExceedsHold { amount: i128, held: i128 },
    OtherTerms,
    Settled { amount: i128, repeated: bool, late: bool },
    Released(bool),
    Swept(usize),
    Done,
}

/// The tightest limit of requests and that of tokens, each with what is left of it.
pub type Rates = (Option<(u64, u64)>, Option<(u64, u64)>);

/// What a request was admitted for, and what it must be settled with.
#[derive(Clone, Debug, PartialEq)]
pub struct Terms {
    pub key: usize,
    pub price: Price,
    pub model: String,
    pub version: String,
}

#[derive(Clone, Debug)]
pub struct Asked {
    pub request: String,
    pub terms: Terms,
    pub prompt: u32,
    pub output_max: u32,
    pub choices: u32,
    pub step: u32,
}

#[derive(Clone, Debug)]
pub struct Hold {
    pub terms: Terms,
    pub amount: i128,
    /// The day that it counts for, with so many tokens.
    day: i64,
    tokens: i128,
    tier: Limits,
    lapsed: bool,
}

#[derive(Clone, Debug)]
enum End {
    Posted {
        amount: i128,
        left: i128,
    },
    /// With the terms where it may still be posted, for thirty days.
    Released {
        late: Option<Terms>,
        days_ago: i64,
    },
}

#[derive(Clone, Debug, Default)]
pub struct Key {
    pub limits: Limits,
    pub revoked: bool,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts {
    pub requests: i128,
    pub tokens: i128,
    pub spend: i128,
}

#[derive(Default)]
pub struct Twin {
    pub balance: i128,
    pub charged: i128,
    pub granted: i128,
    pub refunded: i128,
    pub adjusted: i128,
    pub credit: i128,
    pub keys: Vec<Key>,
    pub limits: Limits,
    pub tiers: BTreeMap<String, Limits>,
    pub tier: String,
    pub suspended: bool,
    pub low: Option<i128>,
    pub holds: BTreeMap<String, Hold>,
    /// By day since 1970 and party: `None` is the tenant, else the key.
    pub days: BTreeMap<(i64, Option<usize>), Counts>,
    pub today: i64,
    /// What the tenant is told of.
    pub events: Vec<(&'static str, String)>,
    pub entries: u64,
    low_told: bool,
    exhausted_told: bool,
    ends: BTreeMap<String, End>,
    /// What was done under each reference.
    references: BTreeMap<String, String>,
    /// By party, limit and its day or month: the limit that the tenant was told of.
    told: BTreeMap<(Option<usize>, LimitKind, String), u64>,
}

struct Window {
    kind: LimitKind,
    of: Party,
    limit: u64,
    used: i128,
    amount: i128,
}

impl Twin {
    pub fn new(keys: usize, tiers: BTreeMap<String, Limits>, today: i64) -> Self {
        Self { keys: vec![Key::default(); keys], tiers, today, ..Self::default() }
    }

    pub fn held(&self) -> i128 {
        self.holds.values().map(|hold| hold.amount).sum()
    }

    pub fn available(&self) -> i128 {
        self.balance + self.credit
    }

    pub fn charged_requests(&self) -> impl Iterator<Item = (&str, i128)> {
        self.ends.iter().filter_map(|(request, end)| match end {
            End::Posted { amount, .. } => Some((request.as_str(), *amount)),
            End::Released { .. } => None,
        })
    }

    pub fn open(&self, party: Option<usize>) -> u64 {
        self.holds.values().filter(|hold| party.is_none_or(|key| hold.terms.key == key)).count() as u64
    }

    pub fn spend_of_month(&self, day: i64, party: Option<usize>) -> i128 {
        let of_month = self.days.iter().filter(|((of, who), _)| *who == party && month_of(*of) == month_of(day));
        of_month.map(|(_, counts)| counts.spend).sum()
    }

    pub fn grant(&mut self, amount: i128, reference: &str, note: &str) -> Outcome {
        if amount <= 0 {
            return Outcome::BadAmount;
        }
        if let Some(before) = self.done_before(format!("grant {reference}"), format!("{amount} {note}")) {
            return before;
        }
        if self.granted + amount > MOST || !self.has_room_for(amount) {
            return Outcome::Overflow;
        }
        self.granted += amount;
        self.move_in(amount, format!("grant {reference}"), format!("{amount} {note}"))
    }

    pub fn adjust(&mut self, amount: i128, reference: &str, note: &str) -> Outcome {
        if amount == 0 || amount == LEAST {
            return Outcome::BadAmount;
        }
        if let Some(before) = self.done_before(format!("adjust {reference}"), format!("{amount} {note}")) {
            return before;
        }
        if amount > 0 && !self.has_room_for(amount)
            || self.adjusted + amount < LEAST
            || self.available() + amount < LEAST
            || self.balance + amount < LEAST
        {
            return Outcome::Overflow;
        }
        if amount < 0 && self.available() + amount < 0 {
            return Outcome::Insufficient { balance: self.balance };
        }
        self.adjusted += amount;
        self.move_in(amount, format!("adjust {reference}"), format!("{amount} {note}"))
    }

    pub fn refund(&mut self, request: &str, amount: i128, reference: &str, note: &str) -> Outcome {
        if amount <= 0 {
            return Outcome::BadAmount;
        }
        let (name, what) = (format!("refund {reference}"), format!("{amount} {request} {note}"));
        if let Some(before) = self.done_before(name.clone(), what.clone()) {
            return before;
        }
        match self.ends.get_mut(request) {
            Some(End::Posted { left, .. }) if amount > *left => Outcome::ExceedsCharge { left: *left },
            Some(End::Posted { left, .. }) => {
                *left -= amount;
                self.refunded += amount;
                self.move_in(amount, name, what)
            }
            _ => Outcome::NotCharged,
        }
    }

    pub fn set_credit(&mut self, amount: i128) -> Outcome {
        if amount < 0 {
            return Outcome::BadAmount;
        }
        if amount == self.credit {
            return Outcome::Moved { balance: self.balance, repeated: true };
        }
        if !self.has_room_for(amount - self.credit) {
            return Outcome::Overflow;
        }
        self.exhausted_told &= amount <= self.credit;
        self.credit = amount;
        self.wrote(1);
        Outcome::Moved { balance: self.balance, repeated: false }
    }

    pub fn set_low(&mut self, low: Option<i128>) -> Outcome {
        // Another amount is told of as well.
        self.low_told &= low == self.low;
        self.low = low;
        self.wrote(0);
        Outcome::Done
    }

    pub fn admit(&mut self, asked: &Asked) -> Outcome {
        let Asked { request, terms, prompt, output_max, .. } = asked;
        if self.suspended {
            return Outcome::Suspended;
        }
        let Some(tier) = self.tiers.get(&self.tier).cloned() else { return Outcome::UnknownTier };
        if self.keys[terms.key].revoked {
            return Outcome::KeyEnded;
        }
        if self.holds.contains_key(request) || self.ends.contains_key(request) {
            return Outcome::AdmittedBefore;
        }
        let choices = asked.choices.min(*output_max);
        let step = if asked.step == 0 { u32::MAX } else { asked.step };
        let wanted = step.max(choices).min(*output_max);
        let (input, output) = (i128::from(terms.price.input.nano()), i128::from(terms.price.output.nano()));
        let fixed = i128::from(*prompt) * input;
        if fixed + i128::from(wanted) * output > EXACT_MAX {
            return Outcome::Overflow;
        }
        let tokens = i128::from(*prompt) + i128::from(*output_max);
        let mut windows = self.windows(terms.key, &tier, tokens);
        let rates = tightest(&windows);
        let room = self.spend_room(terms.key, &tier, self.today);
        let (paid, by) = affordable(i128::from(wanted), fixed, output, room.map(|room| room.0), self.available());
        if paid < i128::from(choices) {
            self.tell_in_way(by, room, terms.key, &tier, self.today);
            let Some((_, kind, of)) = room.filter(|_| by == Some(FundsEnd::SpendLimit)) else {
                return Outcome::Insufficient { balance: self.balance };
            };
            let limit = self.limit(of, terms.key, &tier, kind);
            return Outcome::Limited { kind, of, limit, never: false, rates };
        }
        if let Some(of) = self.crowded(terms.key, &tier) {
            let limit = self.limit(of, terms.key, &tier, LimitKind::RequestsAtOnce);
            return Outcome::Limited { kind: LimitKind::RequestsAtOnce, of, limit, never: false, rates };
        }
        if let Some(full) = windows.iter().find(|window| window.used + window.amount > i128::from(window.limit)) {
            let never = full.amount > i128::from(full.limit);
            let (kind, of, limit) = (full.kind, full.of, full.limit);
            if !never {
                self.tell_limit(kind, of, terms.key, limit, self.today);
            }
            return Outcome::Limited { kind, of, limit, never, rates };
        }
        let amount = fixed + paid * output;
        self.balance -= amount;
        for party in [None, Some(terms.key)] {
            let counts = self.counts(self.today, party);
            counts.requests += 1;
            counts.tokens += tokens;
            counts.spend += amount;
        }
        self.tell_in_way(by, room, terms.key, &tier, self.today);
        let hold = Hold { terms: terms.clone(), amount, day: self.today, tokens, tier, lapsed: false };
        self.holds.insert(request.clone(), hold);
        self.wrote(1);
        windows.iter_mut().for_each(|window| window.used += window.amount);
        Outcome::Admitted { hold: amount, tokens: paid as u32, rates: tightest(&windows) }
    }

    /// What is set aside for an open request.
    pub fn hold(&self, request: &str) -> Option<i64> {
        self.holds.get(request).map(|hold| i64::try_from(hold.amount).expect("an amount"))
    }

    pub fn extend(&mut self, request: &str, wanted: u32) -> Outcome {
        let Some(hold) = self.holds.get(request).cloned() else { return Outcome::HoldGone };
        let output = i128::from(hold.terms.price.output.nano());
        if i128::from(wanted) * output > EXACT_MAX {
            return Outcome::Overflow;
        }
        let room = self.spend_room(hold.terms.key, &hold.tier, hold.day);
        let (paid, by) = affordable(i128::from(wanted), 0, output, room.map(|room| room.0), self.available());
        self.tell_in_way(by, room, hold.terms.key, &hold.tier, hold.day);
        if paid <= 0 {
            return Outcome::Extended { tokens: 0, by };
        }
        let amount = paid * output;
        self.balance -= amount;
        self.holds.get_mut(request).expect("it is open").amount += amount;
        self.count_spend(hold.day, hold.terms.key, amount);
        self.wrote(1);
        Outcome::Extended { tokens: paid as u32, by }
    }

    /// `begun`: by whoever began it, who is believed where the store knows less.
    pub fn settle(&mut self, request: &str, terms: &Terms, usage: Usage, begun: bool) -> Outcome {
        let cost = |price: i64, tokens: u32| i128::from(price) * i128::from(tokens);
        let Price { input, output, cached_input } = terms.price;
        let parts = [
            cost(input.nano(), usage.prompt_tokens - usage.cached_tokens),
            cost(cached_input.nano(), usage.cached_tokens),
            cost(output.nano(), usage.completion_tokens),
        ];
        let (amount, used) =
            (parts.iter().sum(), i128::from(usage.prompt_tokens) + i128::from(usage.completion_tokens));
        if amount > MOST {
            return Outcome::Overflow;
        }
        match self.ends.get(request) {
            Some(End::Posted { amount, .. }) => {
                return Outcome::Settled { amount: *amount, repeated: true, late: false };
            }
            Some(End::Released { late: None, .. }) => return Outcome::HoldGone,
            Some(End::Released { late: Some(admitted_for), days_ago }) => {
                if admitted_for != terms {
                    return Outcome::OtherTerms;
                }
                if *days_ago >= LATE_DAYS {
                    return Outcome::HoldGone;
                }
                return if amount > EXACT_MAX {
                    Outcome::Overflow
                } else {
                    self.settle_late(request, terms, amount, used)
                };
            }
            None => {}
        }
        let Some(hold) = self.holds.get(request).cloned() else {
            return match (begun, amount > EXACT_MAX) {
                (false, _) => Outcome::Unknown,
                (true, true) => Outcome::Overflow,
                (true, false) => self.settle_late(request, terms, amount, used),
            };
        };
        if hold.terms != *terms {
            return Outcome::OtherTerms;
        }
        if amount > hold.amount && !begun {
            return Outcome::ExceedsHold { amount, held: hold.amount };
        }
        if amount > hold.amount {
            if amount > EXACT_MAX {
                return Outcome::Overflow;
            }
            self.release(request, true);
            return self.settle_late(request, terms, amount, used);
        }
        self.holds.remove(request);
        self.balance += hold.amount - amount;
        self.count_spend(hold.day, terms.key, amount - hold.amount);
        self.count_tokens(hold.day, terms.key, used.min(hold.tokens) - hold.tokens);
        self.post(request, amount);
        self.wrote(1);
        Outcome::Settled { amount, repeated: false, late: false }
    }

    fn settle_late(&mut self, request: &str, terms: &Terms, amount: i128, used: i128) -> Outcome {
        let written_off = amount - amount.min(self.available().max(0));
        self.adjusted += written_off;
        self.balance += written_off - amount;
        self.count_spend(self.today, terms.key, amount);
        self.count_tokens(self.today, terms.key, used);
        self.post(request, amount);
        self.wrote(if written_off > 0 { 2 } else { 1 });
        Outcome::Settled { amount, repeated: false, late: true }
    }

    fn post(&mut self, request: &str, amount: i128) {
        self.charged += amount;
        self.ends.insert(request.to_owned(), End::Posted { amount, left: amount });
    }

    /// `late`: whoever had it may still say what it used.
    pub fn release(&mut self, request: &str, late: bool) -> Outcome {
        let Some(hold) = self.holds.remove(request) else { return Outcome::Released(false) };
        self.balance += hold.amount;
        self.count_spend(hold.day, hold.terms.key, -hold.amount);
        self.count_tokens(hold.day, hold.terms.key, -hold.tokens);
        self.ends.insert(request.to_owned(), End::Released { late: late.then_some(hold.terms), days_ago: 0 });
        self.wrote(1);
        Outcome::Released(true)
    }

    pub fn lapse(&mut self, request: &str, lapsed: bool) {
        if let Some(hold) = self.holds.get_mut(request) {
            hold.lapsed = lapsed;
        }
    }

    pub fn sweep(&mut self, most: usize) -> Outcome {
        let lapsed = self.holds.iter().filter(|(_, hold)| hold.lapsed).map(|(request, _)| request.clone());
        let lapsed: Vec<String> = lapsed.take(most).collect();
        for request in &lapsed {
            let _ = self.release(request, true);
        }
        Outcome::Swept(lapsed.len())
    }

    /// So many days pass.
    pub fn age(&mut self, days: i64) {
        let counts = std::mem::take(&mut self.days);
        self.days = counts.into_iter().map(|((day, party), counts)| ((day - days, party), counts)).collect();
        self.holds.values_mut().for_each(|hold| hold.day -= days);
        self.told.clear();
        for end in self.ends.values_mut() {
            if let End::Released { days_ago, .. } = end {
                *days_ago += days;
            }
        }
    }

    fn done_before(&self, name: String, what: String) -> Option<Outcome> {
        match self.references.get(&name)? {
            before if *before == what => Some(Outcome::Moved { balance: self.balance, repeated: true }),
            _ => Some(Outcome::OtherReference),
        }
    }

    fn move_in(&mut self, amount: i128, name: String, what: String) -> Outcome {
        self.balance += amount;
        self.exhausted_told &= amount <= 0;
        self.references.insert(name, what);
        self.wrote(1);
        Outcome::Moved { balance: self.balance, repeated: false }
    }

    /// Whether all that a tenant could ever have to spend, with so much more, still is an amount: also when every hold
    /// is released and every charge given back.
    fn has_room_for(&self, amount: i128) -> bool {
        self.granted + self.adjusted + self.credit + amount <= MOST
    }

    fn limit(&self, of: Party, key: usize, tier: &Limits, kind: LimitKind) -> u64 {
        let own = if of == Party::Key { &self.keys[key].limits } else { &self.limits };
        let of_tier = (of == Party::Tenant).then(|| tier.get(&kind)).flatten();
        own.get(&kind).or(of_tier).copied().unwrap_or(0)
    }

    fn limits(&self, key: usize, tier: &Limits, kind: LimitKind) -> Vec<(Party, Option<usize>, u64)> {
        let parties = [(Party::Tenant, None), (Party::Key, Some(key))];
        let limits = parties.map(|(of, who)| (of, who, self.limit(of, key, tier, kind)));
        limits.into_iter().filter(|(_, _, limit)| *limit > 0).collect()
    }

    fn crowded(&self, key: usize, tier: &Limits) -> Option<Party> {
        let mut limits = self.limits(key, tier, LimitKind::RequestsAtOnce).into_iter();
        limits.find(|(_, who, limit)| self.open(*who) >= *limit).map(|(of, ..)| of)
    }

    /// Tenant before key, requests before tokens.
    fn windows(&self, key: usize, tier: &Limits, tokens: i128) -> Vec<Window> {
        let mut windows = Vec::new();
        for kind in [LimitKind::RequestsPerDay, LimitKind::TokensPerDay] {
            for (of, who, limit) in self.limits(key, tier, kind) {
                let counts = self.days.get(&(self.today, who)).cloned().unwrap_or_default();
                let is_tokens = kind == LimitKind::TokensPerDay;
                let (used, amount) = if is_tokens { (counts.tokens, tokens) } else { (counts.requests, 1) };
                windows.push(Window { kind, of, limit, used, amount });
            }
        }
        windows.sort_by_key(|window| window.of == Party::Key);
        windows
    }

    /// The least that limits of spend leave; of two that leave as little, the first: tenant before key, day before
    /// month.
    fn spend_room(&self, key: usize, tier: &Limits, day: i64) -> Option<(i128, LimitKind, Party)> {
        let mut rooms = Vec::new();
        for kind in [LimitKind::SpendPerDay, LimitKind::SpendPerMonth] {
            for (of, who, limit) in self.limits(key, tier, kind) {
                let spent = match kind {
                    LimitKind::SpendPerDay => self.days.get(&(day, who)).map_or(0, |counts| counts.spend),
                    _ => self.spend_of_month(day, who),
                };
                rooms.push((i128::from(limit) - spent, kind, of));
            }
        }
        rooms.sort_by_key(|(_, kind, of)| (*of == Party::Key, *kind));
        rooms.into_iter().min_by_key(|(room, ..)| *room)
    }

    fn counts(&mut self, day: i64, party: Option<usize>) -> &mut Counts {
        self.days.entry((day, party)).or_default()
    }

    fn count_spend(&mut self, day: i64, key: usize, amount: i128) {
        [None, Some(key)].into_iter().for_each(|party| self.counts(day, party).spend += amount);
    }

    fn count_tokens(&mut self, day: i64, key: usize, tokens: i128) {
        [None, Some(key)].into_iter().for_each(|party| self.counts(day, party).tokens += tokens);
    }

    /// What kept a request from the money that it asked for: told once until there is more, or once a day or month.
    fn tell_in_way(
        &mut self,
        by: Option<FundsEnd>,
        room: Option<(i128, LimitKind, Party)>,
        key: usize,
        tier: &Limits,
        day: i64,
    ) {
        match (by, room) {
            (Some(FundsEnd::Balance), _) if !self.exhausted_told => {
                self.exhausted_told = true;
                self.events.push(("balance.exhausted", String::new()));
            }
            (Some(FundsEnd::SpendLimit), Some((_, kind, of))) => {
                let limit = self.limit(of, key, tier, kind);
                self.tell_limit(kind, of, key, limit, day);
            }
            _ => {}
        }
    }

    fn tell_limit(&mut self, kind: LimitKind, of: Party, key: usize, limit: u64, day: i64) {
        let who = (of == Party::Key).then_some(key);
        let period = if kind == LimitKind::SpendPerMonth { month_of(day) } else { day_name(day) };
        if self.told.insert((who, kind, period), limit) != Some(limit) {
            let of = if of == Party::Key { "key" } else { "tenant" };
            self.events.push(("limit.reached", format!("{of} {kind}")));
        }
    }

    /// So many entries; and whoever wants to know that little is left is told once, and again only after there was
    /// more.
    fn wrote(&mut self, entries: u64) {
        self.entries += entries;
        let Some(low) = self.low else { return };
        let is_low = self.available() + self.held() < low;
        if is_low && !self.low_told {
            self.events.push(("balance.low", low.to_string()));
        }
        self.low_told = is_low;
    }
}

/// Of so many tokens, as many as both the room and the balance pay for beside what is fixed; fewer than none where
/// they do not even pay for that. Then what was in the way: the balance only where it leaves less.
fn affordable(wanted: i128, fixed: i128, price: i128, room: Option<i128>, available: i128) -> (i128, Option<FundsEnd>) {
    let cost = fixed + wanted * price;
    let most = |money: i128| match cost <= money || cost == 0 {
        true => None,
        false if price > 0 => Some((money - fixed).div_euclid(price)),
        false => Some(-1),
    };
    match (room.and_then(most), most(available)) {
        (None, None) => (wanted, None),
        (Some(room), Some(balance)) if balance < room || price == 0 => (balance, Some(FundsEnd::Balance)),
        (Some(room), _) => (room, Some(FundsEnd::SpendLimit)),
        (None, Some(balance)) => (balance, Some(FundsEnd::Balance)),
    }
}

fn tightest(windows: &[Window]) -> Rates {
    let of = |kind: LimitKind| {
        let windows = windows.iter().filter(|window| window.kind == kind);
        let left = windows.map(|window| (i128::from(window.limit) - window.used, window.limit));
        left.min_by_key(|(left, _)| *left).map(|(left, limit)| (limit, left.max(0) as u64))
    };
    (of(LimitKind::RequestsPerDay), of(LimitKind::TokensPerDay))
}
