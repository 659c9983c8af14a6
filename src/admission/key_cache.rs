use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{Principal, SecretHash};

/// How old an answer about a key may be. Together with the time that a question takes it stays below the
/// second within which a revocation must reach every edge.
const AGE_MAX: Duration = Duration::from_millis(500);
/// Keys remembered at a time; beyond it those that are still fresh are forgotten too.
const KEYS_MAX: usize = 16_384;

/// Valid keys seen a moment ago. Only valid ones: a key that was just made must work at once, and guesses
/// must not push out what is in use.
#[derive(Default)]
pub(super) struct KeyCache {
    known: Mutex<HashMap<SecretHash, (Instant, Principal)>>,
}

impl KeyCache {
    pub fn get(&self, hash: &SecretHash, now: Instant) -> Option<Principal> {
        let known = self.known.lock();
        let (asked, principal) = known.get(hash)?;
        is_fresh(*asked, now).then(|| principal.clone())
    }

    pub fn put(&self, hash: SecretHash, asked: Instant, principal: Principal) {
        let mut known = self.known.lock();
        if known.len() >= KEYS_MAX {
            known.retain(|_, (then, _)| is_fresh(*then, asked));
            if known.len() >= KEYS_MAX {
                known.clear();
            }
        }
        known.insert(hash, (asked, principal));
    }
}

fn is_fresh(asked: Instant, now: Instant) -> bool {
    now.saturating_duration_since(asked) < AGE_MAX
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Scopes;

    fn principal() -> Principal {
        let (tenant, key, scopes) = ("ten_1".into(), "key_1".into(), Scopes::default());
        Principal { tenant, key, scopes, tier: String::new(), models: None }
    }

    #[test]
    fn an_answer_about_a_key_is_believed_for_half_a_second() {
        let cache = KeyCache::default();
        let hash = SecretHash::of("sk_1").unwrap();
        let principal = principal();
        let asked = Instant::now();
        cache.put(hash, asked, principal.clone());
        assert_eq!(cache.get(&hash, asked + Duration::from_millis(499)), Some(principal));
        assert_eq!(cache.get(&hash, asked + Duration::from_millis(500)), None);
    }

    #[test]
    fn the_cache_is_bounded() {
        let cache = KeyCache::default();
        let principal = principal();
        let asked = Instant::now();
        for index in 0..=KEYS_MAX {
            cache.put(SecretHash::of(&format!("sk_{index}")).unwrap(), asked, principal.clone());
        }
        assert!(cache.known.lock().len() <= KEYS_MAX);
    }
}
