//! The line of requests that wait for a place in the batch. Pure: times are arguments.
//!
//! The higher class goes first; within a class lanes take turns, and within a lane it is first come, first
//! served. Who waits for long rises, a class for every [`AGING`], so that nobody waits for ever. Bounded by
//! what the engine's owner submits.

use std::{
    cmp::Reverse,
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::domain::Priority;

/// Waiting that is worth a class.
pub const AGING: Duration = Duration::from_secs(3);

pub struct Line<T> {
    /// In order of service.
    places: Vec<(Ticket, T)>,
    /// The last turn given to each lane, by class, that has one ahead.
    lanes: HashMap<(Arc<str>, Priority), u64>,
    /// Turns up to this one have been served.
    turn: u64,
    arrivals: u64,
}

/// A place in the line. Who is sent back to waiting takes the place that it had.
#[derive(Clone, Debug)]
pub struct Ticket {
    /// The class that it has risen to.
    pub priority: Priority,
    turn: u64,
    arrival: u64,
    rises_at: Instant,
}

impl Ticket {
    fn order(&self) -> (Reverse<Priority>, u64, u64) {
        (Reverse(self.priority), self.turn, self.arrival)
    }
}

impl<T> Line<T> {
    pub fn new() -> Self {
        Self { places: Vec::new(), lanes: HashMap::new(), turn: 0, arrivals: 0 }
    }

    /// Takes a place at the end of its lane.
    pub fn join(&mut self, lane: &Arc<str>, priority: Priority, now: Instant, item: T) {
        // A lane that waits gets one turn a round; one that comes now starts with the round that is on.
        let last = self.lanes.entry((Arc::clone(lane), priority)).or_insert(0);
        *last = self.turn.max(*last) + 1;
        self.arrivals += 1;
        let ticket = Ticket { priority, turn: *last, arrival: self.arrivals, rises_at: now + AGING };
        self.rejoin(ticket, item);
    }

    /// Takes the place that it had before.
    pub fn rejoin(&mut self, ticket: Ticket, item: T) {
        let at = self.places.partition_point(|(other, _)| other.order() < ticket.order());
        self.places.insert(at, (ticket, item));
    }

    /// Lets those rise who have waited for long.
    pub fn age(&mut self, now: Instant) {
        let mut has_risen = false;
        for (ticket, _) in &mut self.places {
            while ticket.rises_at <= now && ticket.priority < Priority::High {
                ticket.priority = ticket.priority.next();
                ticket.rises_at += AGING;
                has_risen = true;
            }
        }
        if has_risen {
            self.places.sort_by_key(|(ticket, _)| ticket.order());
        }
    }

    /// Takes out who is at `at`, for its turn.
    pub fn serve(&mut self, at: usize) -> (Ticket, T) {
        let place = self.places.remove(at);
        self.turn = self.turn.max(place.0.turn);
        let turn = self.turn;
        self.lanes.retain(|_, last| *last > turn);
        place
    }

    /// Takes out everybody of whom `gone` is true, without a turn.
    pub fn leave(&mut self, gone: impl Fn(&T) -> bool) -> Vec<T> {
        self.places.extract_if(.., |(_, item)| gone(item)).map(|(_, item)| item).collect()
    }

    /// In order of service.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&Ticket, &T)> {
        self.places.iter().map(|(ticket, item)| (ticket, item))
    }

    pub fn get(&self, at: usize) -> Option<&(Ticket, T)> {
        self.places.get(at)
    }

    pub fn len(&self) -> usize {
        self.places.len()
    }

    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use Priority::{High, Low, Normal};

    /// A line of (lane, class) in this order of arrival; items are their numbers.
    fn line(now: Instant, all: &[(&str, Priority)]) -> Line<usize> {
        let mut line = Line::new();
        for (i, (lane, priority)) in all.iter().enumerate() {
            line.join(&(*lane).into(), *priority, now, i);
        }
        line
    }

    fn served(mut line: Line<usize>) -> Vec<usize> {
        std::iter::from_fn(|| (!line.is_empty()).then(|| line.serve(0).1)).collect()
    }

    #[test]
    fn the_higher_class_goes_first_and_in_a_class_lanes_take_turns() {
        let all = [("a", Normal), ("a", Normal), ("a", Normal), ("b", Normal), ("b", Low), ("c", High), ("b", Normal)];
        assert_eq!(served(line(Instant::now(), &all)), [5, 0, 3, 1, 6, 2, 4]);
    }

    #[test]
    fn who_comes_late_joins_the_round_that_is_on_and_saves_up_nothing() {
        let now = Instant::now();
        let mut line = line(now, &[("a", Normal); 4]);
        assert_eq!((line.serve(0).1, line.serve(0).1), (0, 1));
        line.join(&"b".into(), Normal, now, 10);
        line.join(&"b".into(), Normal, now, 11);
        assert_eq!(served(line), [2, 10, 3, 11]);
    }

    #[test]
    fn who_waits_for_long_rises_and_is_then_ahead_of_who_came_later() {
        let now = Instant::now();
        let mut line = line(now, &[("a", Low), ("b", Normal)]);
        line.age(now + AGING / 2);
        assert_eq!(line.iter().map(|(_, i)| *i).collect::<Vec<_>>(), [1, 0]);
        let later = now + 2 * AGING;
        line.age(later);
        line.join(&"c".into(), High, later, 2);
        assert_eq!(line.iter().map(|(ticket, _)| ticket.priority).collect::<Vec<_>>(), [High; 3]);
        assert_eq!(served(line), [0, 1, 2]);
    }

    #[test]
    fn who_is_sent_back_takes_the_place_that_it_had() {
        let now = Instant::now();
        let mut line = line(now, &[("a", Normal), ("a", Normal), ("b", Normal)]);
        let (ticket, first) = line.serve(0);
        line.rejoin(ticket, first);
        line.leave(|i| *i == 2);
        assert_eq!(served(line), [0, 1]);
    }

    #[test]
    fn lanes_without_anybody_waiting_are_forgotten() {
        let now = Instant::now();
        let mut line = Line::new();
        for i in 0..1000 {
            line.join(&format!("lane {i}").into(), Normal, now, i);
            line.serve(0);
        }
        assert!(line.lanes.len() <= 1);
    }
}
