//! What the usage counters and the counters of spend must say, as the entries make it. Pure: knows no store.

use std::collections::{BTreeMap, HashMap};

use super::{
    books::{Books, OpenHold},
    entry::{Entry, whole},
};
use crate::domain::{Day, Month};

pub(super) const HOUR_MS: u64 = 3_600_000;

/// Sums by field, as a hash of the store has them.
type Sums = BTreeMap<String, i128>;
/// A hash of the store.
pub(super) type Hash = HashMap<String, String>;

#[derive(Clone, Default)]
pub(super) struct Counters {
    /// By hour since 1970 and `<model> <key> <what>`, between separators.
    hours: BTreeMap<u64, Sums>,
    /// By day and `<who>:<what>`.
    days: BTreeMap<Day, Sums>,
}

/// Counters of the store at the instant of a snapshot.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Counted {
    /// The store's clock.
    pub unix_ms: u64,
    /// Of the hour of the last entry.
    pub hour: Hash,
    /// Of the day and the month of `unix_ms`.
    pub day: Hash,
    pub month: Hash,
}

impl Counters {
    /// A request was admitted.
    pub fn admit(&mut self, entry: &Entry) {
        self.add(Day::of(admitted_unix_ms(entry)), entry.key.as_str(), "requests", 1);
    }

    /// A request was charged, which counts for the day of its hold.
    pub fn charge(&mut self, entry: &Entry, held_unix_ms: u64) {
        let amount = i128::from(entry.amount.nano());
        let sums = self.hours.entry(entry.unix_ms / HOUR_MS).or_default();
        let name = format!("{}\x1f{}\x1f", entry.model, entry.key);
        for (what, count) in [
            ("requests", 1),
            ("prompt", entry.usage.prompt_tokens.into()),
            ("completion", entry.usage.completion_tokens.into()),
            ("cached", entry.usage.cached_tokens.into()),
            ("amount", amount),
        ] {
            *sums.entry(format!("{name}{what}")).or_default() += count;
        }
        self.add(Day::of(held_unix_ms), entry.key.as_str(), "spend", amount);
    }

    fn add(&mut self, day: Day, key: &str, what: &str, count: i128) {
        let sums = self.days.entry(day).or_default();
        *sums.entry(format!("t:{what}")).or_default() += count;
        *sums.entry(format!("k:{key}:{what}")).or_default() += count;
    }

    pub fn first_hour(&self) -> Option<u64> {
        self.hours.keys().next().copied()
    }

    pub fn check_hour(&self, hour: u64, stored: &Hash) -> Vec<String> {
        let nothing = Sums::new();
        let made = self.hours.get(&hour).unwrap_or(&nothing);
        compare(&format!("usage of hour {hour}"), made, stored, |_| true)
    }

    /// `since`: entries up to then lie in an archive, so that nothing is known of a day or month in which they are.
    pub fn check_periods(&self, books: &Books, counted: &Counted, since: Option<u64>) -> Vec<String> {
        let (day, month) = (Day::of(counted.unix_ms), Month::of(counted.unix_ms));
        let mut all = self.clone();
        for OpenHold { amount, unix_ms, terms } in books.open.values() {
            all.add(Day::of(*unix_ms), terms.key.as_str(), "spend", i128::from(*amount));
        }
        let mut faults = Vec::new();
        if since.is_none_or(|since| since < day.begins_unix_ms()) {
            let made = all.days.remove(&day).unwrap_or_default();
            // Tokens count with what was asked for, which no entry says.
            let is_known = |field: &str| field.ends_with(":spend") || field.ends_with(":requests");
            faults.extend(compare(&format!("day {day}"), &made, &counted.day, is_known));
            all.days.insert(day, made);
        }
        if since.is_none_or(|since| since < month.begins_unix_ms()) {
            let mut made = Sums::new();
            let of_month = all.days.iter().filter(|(day, _)| Month::of(day.begins_unix_ms()) == month);
            for (field, count) in of_month.flat_map(|(_, sums)| sums).filter(|(field, _)| field.ends_with(":spend")) {
                *made.entry(field.clone()).or_default() += count;
            }
            faults.extend(compare(&format!("month {month}"), &made, &counted.month, |field| field.ends_with(":spend")));
        }
        faults
    }
}

/// A time on the day that a request counts for: not that of its entry where the clock had gone back.
pub(super) fn admitted_unix_ms(hold: &Entry) -> u64 {
    hold.note.strip_prefix("day ").and_then(Day::from_digits).map_or(hold.unix_ms, Day::begins_unix_ms)
}

/// Every difference; what is not there is 0.
fn compare(what: &str, made: &Sums, stored: &Hash, is_known: impl Fn(&str) -> bool) -> Vec<String> {
    let mut faults = Vec::new();
    for (field, made) in made.iter().filter(|(field, _)| is_known(field)) {
        let counted = stored.get(field).map_or("0", String::as_str);
        if whole::<i128>(counted, "") != Ok(*made) {
            let field = field.replace('\x1f', " ");
            faults.push(format!("{what} counts {counted} for `{field}` where the entries make it {made}"));
        }
    }
    let mut unmade: Vec<_> = stored.iter().filter(|(field, _)| is_known(field) && !made.contains_key(*field)).collect();
    unmade.sort();
    for (field, counted) in unmade.into_iter().filter(|(_, counted)| *counted != "0") {
        let field = field.replace('\x1f', " ");
        faults.push(format!("{what} counts {counted} for `{field}` where the entries have nothing"));
    }
    faults
}
