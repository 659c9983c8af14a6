use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::engine::prefix::Chain;

const BLOCK: usize = 4;

fn lane(name: &str) -> Arc<str> {
    name.into()
}

fn chain(lane: &str, tokens: &[u32]) -> Chain {
    let mut chain = Chain::new(lane, b"", BLOCK);
    chain.extend(tokens);
    chain
}

/// A table with `tokens` computed and published, found or not.
fn served(pool: &BlockPool, name: &str, tokens: &[u32]) -> BlockTable {
    let chain = chain(name, tokens);
    let mut table = pool.table(&lane(name));
    let found = pool.find(chain.usable(tokens.len()));
    table.adopt(&chain.names()[..found.blocks]);
    assert!(table.grow_to(tokens.len()));
    table.publish(chain.names());
    table
}

fn found(pool: &BlockPool, name: &str, tokens: &[u32]) -> Found {
    pool.find(chain(name, tokens).names())
}

#[test]
fn blocks_come_back_when_their_sequence_is_dropped_and_a_growth_that_fails_takes_none() {
    let pool = BlockPool::new(4, 16, true);
    let mut a = pool.table(&lane("a"));
    assert!(a.grow_to(33));
    assert_eq!(pool.free(), 1);
    let mut b = pool.table(&lane("a"));
    assert!(!b.grow_to(17));
    assert_eq!(pool.free(), 1);
    drop(a);
    assert!(b.grow_to(64));
    assert_eq!((pool.free(), b.ids().len()), (0, 4));
}

#[test]
fn a_prefix_is_shared_while_it_is_used_and_kept_afterwards() {
    let pool = BlockPool::new(8, BLOCK, true);
    let tokens: Vec<u32> = (0..13).collect();
    let a = served(&pool, "a", &tokens);
    assert_eq!(found(&pool, "a", &tokens), Found { blocks: 3, kept: 0 });
    let b = served(&pool, "a", &tokens);
    assert_eq!(a.ids()[..3], b.ids()[..3]);
    assert_ne!(a.ids()[3], b.ids()[3]);
    assert_eq!((pool.free(), a.own()), (3, 1));
    drop((a, b));
    assert_eq!((pool.free(), found(&pool, "a", &tokens)), (8, Found { blocks: 3, kept: 3 }));
    assert_eq!(found(&pool, "another", &tokens).blocks, 0);
}

#[test]
fn the_least_recently_used_goes_first_and_of_one_chain_the_tail() {
    let pool = BlockPool::new(6, BLOCK, true);
    let (old, new): (Vec<u32>, Vec<u32>) = ((0..12).collect(), (100..108).collect());
    drop(served(&pool, "a", &old));
    drop(served(&pool, "a", &new));
    let mut other = pool.table(&lane("a"));
    // One was blank; then the tail of the older chain.
    assert!(other.grow_to(2 * BLOCK));
    assert_eq!((found(&pool, "a", &old).blocks, found(&pool, "a", &new).blocks), (2, 2));
    // Used again, the older is the newer.
    drop(served(&pool, "a", &old[..9]));
    assert!(other.grow_to(3 * BLOCK));
    assert_eq!((found(&pool, "a", &old).blocks, found(&pool, "a", &new).blocks), (2, 1));
}

#[test]
fn a_lane_that_floods_the_cache_leaves_the_others_their_share_until_it_is_stale() {
    let pool = BlockPool::new(12, BLOCK, true);
    let mine: Vec<u32> = (0..16).collect();
    drop(served(&pool, "mine", &mine));
    let flood = |pool: &BlockPool| {
        for i in 1..50 {
            let tokens: Vec<u32> = (0..8).map(|t| i * 1000 + t).collect();
            drop(served(pool, "flood", &tokens));
        }
    };
    flood(&pool);
    assert_eq!(found(&pool, "mine", &mine).blocks, 4);
    pool.set_time(KEPT_MAX * 2);
    flood(&pool);
    assert_eq!(found(&pool, "mine", &mine).blocks, 0);
}

#[test]
fn nothing_is_remembered_where_the_cache_is_off() {
    let pool = BlockPool::new(8, BLOCK, false);
    let tokens: Vec<u32> = (0..13).collect();
    let table = served(&pool, "a", &tokens);
    assert_eq!(found(&pool, "a", &tokens).blocks, 0);
    drop(table);
    assert_eq!(pool.free(), 8);
}

#[derive(Clone, Debug)]
enum Move {
    /// Serves a sequence of a lane: a prefix of one of a few texts, and a tail.
    Serve {
        lane: u8,
        text: u8,
        tokens: usize,
        tail: u8,
    },
    End(usize),
    Wait,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        4 => (0u8..3, 0u8..3, 1usize..30, 0u8..4)
            .prop_map(|(lane, text, tokens, tail)| Move::Serve { lane, text, tokens, tail }),
        3 => (0usize..8).prop_map(Move::End),
        1 => Just(Move::Wait),
    ];
    prop::collection::vec(one, 1..80)
}

proptest! {
    #[test]
    fn a_block_is_lent_to_one_content_only_and_what_is_found_has_no_holes(moves in moves()) {
        let pool = BlockPool::new(24, BLOCK, true);
        // What stands in each block, by name; blocks in use must never change it.
        let mut live: Vec<(BlockTable, Vec<BlockName>)> = Vec::new();
        let mut seen: Vec<Vec<BlockName>> = Vec::new();
        for (step, action) in moves.into_iter().enumerate() {
            match action {
                Move::Wait => pool.set_time(Duration::from_secs(200 * step as u64)),
                Move::End(at) if at < live.len() => drop(live.remove(at)),
                Move::End(_) => {}
                Move::Serve { lane: l, text, tokens, tail } => {
                    let mut all: Vec<u32> = (0..tokens as u32).map(|t| u32::from(text) * 1000 + t).collect();
                    all.extend([5000 + u32::from(tail); 3]);
                    let name = format!("lane {l}");
                    let chain = chain(&name, &all);
                    let found = pool.find(chain.usable(all.len()));
                    let need = all.len().div_ceil(BLOCK) - found.blocks + found.kept;
                    if need > pool.free() {
                        continue;
                    }
                    let table = served(&pool, &name, &all);
                    seen.push(chain.names().to_vec());
                    live.push((table, chain.names().to_vec()));
                }
            }
            // In use: one block has one content, and whatever is published is the one of its name.
            let mut content: HashMap<u32, Option<BlockName>> = HashMap::new();
            for (table, names) in &live {
                for (at, id) in table.ids().iter().enumerate() {
                    let name = names.get(at).copied();
                    match content.insert(*id, name) {
                        None => {}
                        Some(other) => prop_assert!(name.is_some() && other == name, "block {id} is lent twice"),
                    }
                }
                prop_assert_eq!(pool.find(names), Found { blocks: names.len(), kept: 0 });
            }
            prop_assert_eq!(pool.free(), 24 - content.len());
            // No holes, and nothing found twice in different blocks.
            let state = pool.state.borrow();
            for names in &seen {
                let known: Vec<bool> = names.iter().map(|name| state.named.contains_key(name)).collect();
                prop_assert!(known.is_sorted_by(|a, b| a >= b), "{known:?}");
            }
            let blank: HashSet<u32> = state.blank.iter().copied().collect();
            prop_assert_eq!(blank.len(), state.blank.len());
            prop_assert!(state.named.values().all(|id| !blank.contains(id)));
            prop_assert_eq!(state.kept.values().map(BTreeMap::len).sum::<usize>(), state.kept_count);
        }
        live.clear();
        prop_assert_eq!(pool.free(), 24);
    }
}
