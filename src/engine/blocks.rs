//! The KV blocks: a fixed number of them, lent to sequences, given back by `Drop`, and remembered by name.
//!
//! A full block can be published under the name of what stands in it (see [`super::prefix`]). Others then use
//! it as well, and when its last user is gone it is kept until its place is needed. A published block is
//! never written again. Kept blocks count as free.
//!
//! Promises that what is remembered has no holes: whoever finds a block finds all before it. For that, a
//! table gives its blocks back last first, so that of kept blocks a later one is always older and goes
//! before an earlier one. And that no lane pushes another out of its equal share: room is made at the
//! cost of the lane that keeps most, unless something has been kept unused for too long.

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use super::prefix::BlockName;

/// A block that nobody has used for so long makes room first, whose ever it is.
const KEPT_MAX: Duration = Duration::from_secs(600);

/// Blocks of `block_tokens` tokens each. Lives on the engine's thread.
pub struct BlockPool {
    state: Rc<RefCell<State>>,
}

/// The blocks of one sequence, in order of position.
pub struct BlockTable {
    state: Rc<RefCell<State>>,
    lane: Arc<str>,
    ids: Vec<u32>,
    /// How many of them, from the first on, stand under their name.
    published: usize,
}

/// What of a sequence's prefix is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    pub blocks: usize,
    /// Those of them that nobody uses now, and that therefore count as free.
    pub kept: usize,
}

struct State {
    block_tokens: usize,
    remembers: bool,
    blocks: Vec<Block>,
    /// Blocks in which nothing of use stands.
    blank: Vec<u32>,
    named: HashMap<BlockName, u32>,
    /// Named blocks without a user, by lane and by when they were given back.
    kept: HashMap<Arc<str>, BTreeMap<u64, u32>>,
    kept_count: usize,
    /// Counts what was given back.
    clock: u64,
    now: Duration,
}

#[derive(Clone, Default)]
struct Block {
    users: u32,
    name: Option<(BlockName, Arc<str>)>,
    given_back: u64,
    given_back_at: Duration,
}

impl BlockPool {
    /// Without `remembers`, nothing is ever found.
    pub fn new(total: usize, block_tokens: usize, remembers: bool) -> Self {
        let state = State {
            block_tokens,
            remembers,
            blocks: vec![Block::default(); total],
            // Lowest first, so that a quiet node touches little of the cache's memory.
            blank: (0..total as u32).rev().collect(),
            named: HashMap::new(),
            kept: HashMap::new(),
            kept_count: 0,
            clock: 0,
            now: Duration::ZERO,
        };
        Self { state: Rc::new(RefCell::new(state)) }
    }

    /// Blocks that can be lent, kept ones among them.
    pub fn free(&self) -> usize {
        self.state.borrow().free()
    }

    pub fn total(&self) -> usize {
        self.state.borrow().blocks.len()
    }

    /// Time since the start, for the age of what is kept.
    pub fn set_time(&self, now: Duration) {
        self.state.borrow_mut().now = now;
    }

    pub fn table(&self, lane: &Arc<str>) -> BlockTable {
        BlockTable { state: Rc::clone(&self.state), lane: Arc::clone(lane), ids: Vec::new(), published: 0 }
    }

    /// How many of `names`, from the first on, can be adopted.
    pub fn find(&self, names: &[BlockName]) -> Found {
        let state = self.state.borrow();
        // What is found has no holes, and whoever uses a block uses all before it.
        let blocks = names.partition_point(|name| state.named.contains_key(name));
        let used = names[..blocks].partition_point(|name| state.blocks[state.named[name] as usize].users > 0);
        Found { blocks, kept: blocks - used }
    }
}

impl BlockTable {
    /// Makes room for `tokens` tokens. Takes nothing when the pool has too few blocks.
    #[must_use]
    pub fn grow_to(&mut self, tokens: usize) -> bool {
        let mut state = self.state.borrow_mut();
        let missing = tokens.div_ceil(state.block_tokens).saturating_sub(self.ids.len());
        if state.free() < missing {
            return false;
        }
        for _ in 0..missing {
            let id = state.take();
            state.blocks[id as usize].users = 1;
            self.ids.push(id);
        }
        true
    }

    /// Begins a table, which must be empty, with the blocks of these names, which must have been found.
    pub fn adopt(&mut self, names: &[BlockName]) {
        assert!(self.ids.is_empty(), "a prefix can only stand at the beginning");
        let mut state = self.state.borrow_mut();
        for name in names {
            let id = state.named[name];
            state.use_named(id);
            self.ids.push(id);
        }
        self.published = names.len();
    }

    /// Remembers the first blocks, which must be full, by their names. Where a block of the same name is
    /// there already, it takes the place of the table's own: the same tokens after the same tokens have the
    /// same keys and values to the bit.
    pub fn publish(&mut self, names: &[BlockName]) {
        let mut state = self.state.borrow_mut();
        if !state.remembers {
            return;
        }
        for (at, name) in names.iter().enumerate().skip(self.published) {
            let own = self.ids[at];
            match state.named.get(name).copied() {
                Some(other) => {
                    state.use_named(other);
                    self.ids[at] = other;
                    state.give_back(own);
                }
                None => {
                    state.named.insert(*name, own);
                    state.blocks[own as usize].name = Some((*name, Arc::clone(&self.lane)));
                }
            }
        }
        self.published = self.published.max(names.len());
    }

    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// How many blocks nobody else uses: so many become free when this table goes.
    pub fn own(&self) -> usize {
        let state = self.state.borrow();
        self.ids.len() - self.ids.partition_point(|id| state.blocks[*id as usize].users > 1)
    }

    /// Gives all blocks back.
    pub fn clear(&mut self) {
        let mut state = self.state.borrow_mut();
        for id in self.ids.drain(..).rev() {
            state.give_back(id);
        }
        self.published = 0;
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        self.clear();
    }
}

impl State {
    fn free(&self) -> usize {
        self.blank.len() + self.kept_count
    }

    /// A block in which nothing stands that anybody wants. There must be a free one.
    fn take(&mut self) -> u32 {
        if let Some(id) = self.blank.pop() {
            return id;
        }
        let id = self.least_wanted();
        self.unkeep(id);
        if let Some((name, _)) = self.blocks[id as usize].name.take() {
            self.named.remove(&name);
        }
        id
    }

    /// The kept block to forget: the oldest, if it is too old, else the oldest of the lane that keeps most.
    fn least_wanted(&self) -> u32 {
        let oldest_of = |kept: &BTreeMap<u64, u32>| *kept.first_key_value().expect("lanes that keep nothing go").1;
        let age = |id: &u32| self.blocks[*id as usize].given_back;
        let oldest = self.kept.values().map(oldest_of).min_by_key(age).expect("a block is free");
        if self.now.saturating_sub(self.blocks[oldest as usize].given_back_at) > KEPT_MAX {
            return oldest;
        }
        let most = self.kept.values().map(BTreeMap::len).max().unwrap_or(0);
        let of_most = self.kept.values().filter(|kept| kept.len() == most).map(oldest_of);
        of_most.min_by_key(age).unwrap_or(oldest)
    }

    fn use_named(&mut self, id: u32) {
        if self.blocks[id as usize].users == 0 {
            self.unkeep(id);
        }
        self.blocks[id as usize].users += 1;
    }

    fn unkeep(&mut self, id: u32) {
        let block = &self.blocks[id as usize];
        let (_, lane) = block.name.as_ref().expect("what is kept has a name");
        let kept = self.kept.get_mut(lane).expect("what is kept is in its lane's list");
        kept.remove(&block.given_back);
        if kept.is_empty() {
            let lane = Arc::clone(lane);
            self.kept.remove(&lane);
        }
        self.kept_count -= 1;
    }

    fn give_back(&mut self, id: u32) {
        self.clock += 1;
        let (clock, now) = (self.clock, self.now);
        let block = &mut self.blocks[id as usize];
        block.users -= 1;
        if block.users > 0 {
            return;
        }
        (block.given_back, block.given_back_at) = (clock, now);
        match &block.name {
            Some((_, lane)) => {
                self.kept.entry(Arc::clone(lane)).or_default().insert(clock, id);
                self.kept_count += 1;
            }
            None => self.blank.push(id),
        }
    }
}

#[cfg(test)]
mod tests;
