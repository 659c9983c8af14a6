//! What the actors of one node say of themselves, each at its own place.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::{ActorCard, MailboxCard};
use crate::telemetry::unix_ms;

/// What a fault may be long in a card; the log has all of it.
const FAULT_CHARACTERS_MAX: usize = 200;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActorState {
    Starting,
    Ready,
    /// Has work and does not get on with it.
    Stalled,
    /// Failed, and started again soon.
    Restarting,
    /// Failed too often; slow attempts go on.
    Unavailable,
    /// Ended in order.
    Stopped,
}

/// All actors of one node.
#[derive(Default)]
pub struct Board {
    actors: Mutex<BTreeMap<String, Arc<Actor>>>,
}

/// One of them. It outlives the actor's incarnations.
pub struct Actor {
    said: Mutex<Said>,
    beat_unix_ms: AtomicU64,
    mailbox: Option<Arc<Mailbox>>,
}

struct Said {
    state: ActorState,
    since_unix_ms: u64,
    restarts: u64,
    last_fault: Option<String>,
}

/// How full a mailbox is that takes only so much.
pub struct Mailbox {
    waiting: AtomicUsize,
    max: usize,
    refused: AtomicU64,
}

impl Board {
    /// The actor at this place, which is the same for all its incarnations.
    pub fn actor(&self, place: &str) -> Arc<Actor> {
        self.with_mailbox(place, None)
    }

    pub fn with_mailbox(&self, place: &str, mailbox: Option<Arc<Mailbox>>) -> Arc<Actor> {
        let mut actors = self.actors.lock();
        let new = || {
            let said = Said { state: ActorState::Starting, since_unix_ms: unix_ms(), restarts: 0, last_fault: None };
            Arc::new(Actor { said: Mutex::new(said), beat_unix_ms: AtomicU64::new(unix_ms()), mailbox })
        };
        Arc::clone(actors.entry(place.to_owned()).or_insert_with(new))
    }

    /// As they are now, in the order of the tree.
    pub fn cards(&self) -> Vec<ActorCard> {
        let actors: Vec<_> =
            self.actors.lock().iter().map(|(place, actor)| (place.clone(), Arc::clone(actor))).collect();
        actors.into_iter().map(|(place, actor)| actor.card(place)).collect()
    }
}

impl Actor {
    pub fn is(&self, state: ActorState) {
        let mut said = self.said.lock();
        if said.state != state {
            (said.state, said.since_unix_ms) = (state, unix_ms());
        }
        self.beat();
    }

    /// It failed, and is started again.
    pub fn failed(&self, why: &str, is_available: bool) {
        let mut said = self.said.lock();
        said.restarts += 1;
        said.last_fault = Some(why.chars().take(FAULT_CHARACTERS_MAX).collect());
        said.state = if is_available { ActorState::Restarting } else { ActorState::Unavailable };
        said.since_unix_ms = unix_ms();
    }

    /// It has work, and no progress was seen.
    pub fn is_not_getting_on(&self) {
        let mut said = self.said.lock();
        if said.state == ActorState::Ready {
            (said.state, said.since_unix_ms) = (ActorState::Stalled, unix_ms());
        }
    }

    /// It has made progress.
    pub fn beat(&self) {
        self.beat_unix_ms.store(unix_ms(), Relaxed);
    }

    pub fn state(&self) -> ActorState {
        self.said.lock().state
    }

    fn card(&self, actor: String) -> ActorCard {
        let said = self.said.lock();
        ActorCard {
            actor,
            state: said.state,
            since_unix_ms: said.since_unix_ms,
            beat_unix_ms: self.beat_unix_ms.load(Relaxed),
            restarts: said.restarts,
            last_fault: said.last_fault.clone(),
            mailbox: self.mailbox.as_ref().map(|mailbox| mailbox.card()),
        }
    }
}

impl Mailbox {
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { waiting: AtomicUsize::new(0), max, refused: AtomicU64::new(0) })
    }

    /// Takes a place. `false`: there is none.
    pub fn enter(&self) -> bool {
        let entered =
            self.waiting.fetch_update(Relaxed, Relaxed, |waiting| (waiting < self.max).then_some(waiting + 1));
        if entered.is_err() {
            self.refused.fetch_add(1, Relaxed);
        }
        entered.is_ok()
    }

    /// What was in it is being handled, or never will be.
    pub fn leave(&self) {
        let _ = self.waiting.fetch_update(Relaxed, Relaxed, |waiting| waiting.checked_sub(1));
    }

    /// Its actor is another one, whose mailbox is empty.
    pub fn clear(&self) {
        self.waiting.store(0, Relaxed);
    }

    fn card(&self) -> MailboxCard {
        let (waiting, refused) = (self.waiting.load(Relaxed), self.refused.load(Relaxed));
        MailboxCard { waiting, max: self.max, refused }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_actor_keeps_its_place_and_its_count_of_restarts() {
        let board = Board::default();
        board.actor("root").is(ActorState::Ready);
        board.actor("root/sweep").failed(&"x".repeat(1000), true);
        board.actor("root/sweep").failed("again", false);
        let cards = board.cards();
        let seen: Vec<_> = cards.iter().map(|card| (card.actor.as_str(), card.state, card.restarts)).collect();
        assert_eq!(seen, [("root", ActorState::Ready, 0), ("root/sweep", ActorState::Unavailable, 2)]);
        assert_eq!(cards[1].last_fault.as_deref(), Some("again"));
    }

    #[test]
    fn a_mailbox_takes_so_much_and_counts_what_it_refuses() {
        let mailbox = Mailbox::new(2);
        assert_eq!([(); 3].map(|()| mailbox.enter()), [true, true, false]);
        mailbox.leave();
        assert!(mailbox.enter());
        mailbox.clear();
        mailbox.leave();
        assert_eq!(mailbox.card(), MailboxCard { waiting: 0, max: 2, refused: 1 });
    }
}
