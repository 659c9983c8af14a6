//! Whom to look after, and when. Pure: the caller says what time it is.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::Duration,
};

use tokio::time::Instant;

use crate::domain::TenantId;

/// Each tenant stands in it once at most, and whoever is being visited is not visited a second time meanwhile.
#[derive(Default)]
pub struct Agenda {
    due: HashMap<TenantId, Instant>,
    order: BTreeSet<(Instant, TenantId)>,
    visited: HashSet<TenantId>,
}

impl Agenda {
    /// A visit is due at `at`, unless one is due before.
    pub fn ask(&mut self, tenant: TenantId, at: Instant) {
        if let Some(&known) = self.due.get(&tenant) {
            if known <= at {
                return;
            }
            self.order.remove(&(known, tenant.clone()));
        }
        self.due.insert(tenant.clone(), at);
        // Whoever is away is put in order when the visit is over.
        if !self.visited.contains(&tenant) {
            self.order.insert((at, tenant));
        }
    }

    /// When the next visit is due.
    pub fn next_at(&self) -> Option<Instant> {
        self.order.first().map(|(at, _)| *at)
    }

    /// Whoever has been due for longest, to be visited now.
    pub fn begin(&mut self, now: Instant) -> Option<TenantId> {
        self.order.first().filter(|(at, _)| *at <= now)?;
        let (_, tenant) = self.order.pop_first()?;
        self.due.remove(&tenant);
        self.visited.insert(tenant.clone());
        Some(tenant)
    }

    /// The visit is over; another one is wanted `after` this, if any.
    pub fn end(&mut self, tenant: TenantId, now: Instant, after: Option<Duration>) {
        self.visited.remove(&tenant);
        if let Some(&asked) = self.due.get(&tenant) {
            self.order.insert((asked, tenant.clone()));
        }
        if let Some(after) = after {
            self.ask(tenant, now + after);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tenants_are_visited_in_the_order_in_which_they_are_due_and_one_at_a_time() {
        let (mut agenda, start) = (Agenda::default(), Instant::now());
        let second = Duration::from_secs(1);
        let [a, b, c] = ["a", "b", "c"].map(TenantId::from);
        agenda.ask(b.clone(), start + second);
        agenda.ask(a.clone(), start);
        agenda.ask(a.clone(), start + 5 * second);
        agenda.ask(c.clone(), start + 3 * second);
        agenda.ask(c.clone(), start + 2 * second);
        assert_eq!(agenda.begin(start), Some(a.clone()));
        assert_eq!((agenda.begin(start), agenda.next_at()), (None, Some(start + second)));
        // Asked for again while it is visited: once more, but not at the same time.
        agenda.ask(a.clone(), start);
        assert_eq!(agenda.begin(start), None);
        agenda.end(a.clone(), start, Some(10 * second));
        assert_eq!(agenda.begin(start), Some(a.clone()));
        agenda.end(a.clone(), start, None);
        let later = start + 2 * second;
        assert_eq!([agenda.begin(later), agenda.begin(later), agenda.begin(later)], [Some(b.clone()), Some(c), None]);
        agenda.end(b.clone(), later, Some(second));
        assert_eq!((agenda.begin(later), agenda.next_at()), (None, Some(later + second)));
        assert_eq!(agenda.begin(later + second), Some(b));
        assert_eq!(agenda.next_at(), None);
    }
}
