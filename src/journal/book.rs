//! What a journal says, in memory: the requests that were begun and not closed.

use std::collections::HashMap;

use super::{
    Begun, Ended, Unsettled,
    frame::{PROGRESS_MAX, Record},
};
use crate::domain::RequestId;

#[derive(Default)]
pub struct Book {
    open: HashMap<u64, Unsettled>,
    indices: HashMap<RequestId, u64>,
    next_index: u64,
}

impl Book {
    /// Records of requests that it does not know (any more) change nothing.
    pub fn apply(&mut self, record: Record) {
        match record {
            Record::Begun { index, begun } => {
                self.next_index = self.next_index.max(index + 1);
                // Claimed again by the same process: only the later claim is anybody's.
                if let Some(earlier) = self.indices.insert(begun.request.clone(), index) {
                    self.open.remove(&earlier);
                }
                self.open.insert(index, Unsettled { begun, completion_tokens: 0, ended: None });
            }
            Record::Progress(tokens) => {
                for (index, tokens) in tokens {
                    if let Some(open) = self.open.get_mut(&index) {
                        open.completion_tokens = open.completion_tokens.max(tokens);
                    }
                }
            }
            Record::Ended { index, ended } => {
                if let Some(open) = self.open.get_mut(&index) {
                    open.ended = Some(ended);
                }
            }
            Record::Closed { index } => {
                if let Some(closed) = self.open.remove(&index) {
                    self.indices.remove(&closed.begun.request);
                }
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    pub fn begin(&self, begun: &Begun) -> Record {
        Record::Begun { index: self.next_index, begun: begun.clone() }
    }

    /// Those of `tokens` that say something new, in records that fit a frame.
    pub fn progress(&self, tokens: &[(RequestId, u32)]) -> Vec<Record> {
        let news = |(request, tokens): &(RequestId, u32)| {
            let index = *self.indices.get(request)?;
            (*tokens > self.open.get(&index)?.completion_tokens).then_some((index, *tokens))
        };
        let news: Vec<_> = tokens.iter().filter_map(news).collect();
        match news.len() {
            0 => Vec::new(),
            // Nearly always.
            1..=PROGRESS_MAX => vec![Record::Progress(news)],
            _ => news.chunks(PROGRESS_MAX).map(|part| Record::Progress(part.to_vec())).collect(),
        }
    }

    pub fn end(&self, ended: &Ended) -> Option<Record> {
        let index = *self.indices.get(&ended.request)?;
        Some(Record::Ended { index, ended: ended.clone() })
    }

    pub fn close(&self, request: &RequestId) -> Option<Record> {
        self.indices.get(request).map(|index| Record::Closed { index: *index })
    }

    /// In the order in which they were begun.
    pub fn unfinished(&self) -> Vec<Unsettled> {
        self.in_order().into_iter().map(|(_, open)| open.clone()).collect()
    }

    /// The records that say all of this anew.
    pub fn records(&self) -> Vec<Record> {
        let in_order = self.in_order();
        let mut records = Vec::with_capacity(2 * in_order.len());
        for (index, open) in &in_order {
            records.push(Record::Begun { index: *index, begun: open.begun.clone() });
        }
        for part in in_order.chunks(PROGRESS_MAX) {
            records.push(Record::Progress(part.iter().map(|(index, open)| (*index, open.completion_tokens)).collect()));
        }
        for (index, open) in in_order {
            records.extend(open.ended.clone().map(|ended| Record::Ended { index, ended }));
        }
        records
    }

    fn in_order(&self) -> Vec<(u64, &Unsettled)> {
        let mut open: Vec<_> = self.open.iter().map(|(index, open)| (*index, open)).collect();
        open.sort_unstable_by_key(|(index, _)| *index);
        open
    }
}
