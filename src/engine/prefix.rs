//! Names of KV blocks by what stands in them.
//!
//! A block's name is a SHA-256 over the name of the block before it and its own tokens, so it stands for
//! everything from the sequence's first token on; the first name is made from whose request it is and from
//! its salt. Two lanes, or two salts, therefore never have a name in common, and nobody can make two texts
//! that share one.

use sha2::{Digest, Sha256};

pub type BlockName = [u8; 32];

/// The names of the full blocks of one sequence, as far as its tokens go.
pub struct Chain {
    root: BlockName,
    names: Vec<BlockName>,
    block_tokens: usize,
}

impl Chain {
    pub fn new(lane: &str, salt: &[u8], block_tokens: usize) -> Self {
        let mut hash = Sha256::new();
        // The length keeps (lane, salt) from meaning the same as another pair with the border elsewhere.
        hash.update((lane.len() as u64).to_le_bytes());
        hash.update(lane.as_bytes());
        hash.update(salt);
        Self { root: hash.finalize().into(), names: Vec::new(), block_tokens }
    }

    /// Names the blocks that `tokens`, the sequence's so far, have filled.
    pub fn extend(&mut self, tokens: &[u32]) {
        let named = self.names.len() * self.block_tokens;
        for block in tokens.get(named..).unwrap_or_default().chunks_exact(self.block_tokens) {
            let mut hash = Sha256::new();
            hash.update(self.names.last().unwrap_or(&self.root));
            for token in block {
                hash.update(token.to_le_bytes());
            }
            self.names.push(hash.finalize().into());
        }
    }

    pub fn names(&self) -> &[BlockName] {
        &self.names
    }

    /// Those that a sequence of `tokens` tokens may take from others: one token at least it computes itself,
    /// since what is computed is what can be sampled from.
    pub fn usable(&self, tokens: usize) -> &[BlockName] {
        let blocks = tokens.saturating_sub(1) / self.block_tokens;
        &self.names[..blocks.min(self.names.len())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(lane: &str, salt: &[u8], tokens: &[u32]) -> Vec<BlockName> {
        let mut chain = Chain::new(lane, salt, 4);
        chain.extend(tokens);
        chain.names
    }

    #[test]
    fn a_name_stands_for_everything_before_its_block_and_for_nothing_after() {
        let tokens: Vec<u32> = (0..14).collect();
        let whole = names("a", b"", &tokens);
        assert_eq!(whole.len(), 3);
        assert_eq!(names("a", b"", &tokens[..9]), whole[..2]);
        let mut other = tokens.clone();
        other[2] = 99;
        let changed = names("a", b"", &other);
        assert!(changed.iter().zip(&whole).all(|(a, b)| a != b));
        other = tokens.clone();
        other[11] = 99;
        assert_eq!(names("a", b"", &other)[..2], whole[..2]);
    }

    #[test]
    fn a_chain_that_grows_token_by_token_is_the_chain_of_the_whole() {
        let tokens: Vec<u32> = (0..23).map(|i| i * i).collect();
        let mut chain = Chain::new("a", b"s", 4);
        (0..=tokens.len()).for_each(|end| chain.extend(&tokens[..end]));
        assert_eq!(chain.names, names("a", b"s", &tokens));
        assert_eq!((chain.usable(20).len(), chain.usable(21).len(), chain.usable(1).len()), (4, 5, 0));
    }

    #[test]
    fn lanes_and_salts_share_no_name_wherever_the_border_between_them_lies() {
        let tokens: Vec<u32> = (0..8).collect();
        let all = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("a", ""), ("b", "")];
        let firsts: std::collections::HashSet<_> =
            all.iter().map(|(lane, salt)| names(lane, salt.as_bytes(), &tokens)[0]).collect();
        assert_eq!(firsts.len(), all.len());
    }
}
