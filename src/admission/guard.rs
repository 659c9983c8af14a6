use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
    time::{Duration, Instant},
};

use parking_lot::RwLock;

use crate::store::{Function, Reply, Store, StoreError, keys};

/// Blocked addresses that the store and every edge remember. Beyond it the block that ends first is forgotten.
const BLOCKS_MAX: usize = 10_000;

/// Who is counted and blocked: an IPv4 address, or the network of an IPv6 address, for whoever has one of those
/// has 2^64 addresses. Written `203.0.113.7` or `2001:db8:1:2::/64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address(IpAddr);

const NETWORK_SUFFIX: &str = "/64";

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        match ip.to_canonical() {
            IpAddr::V6(ip) => Self(Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64).into()),
            ip => Self(ip),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = if self.0.is_ipv6() { NETWORK_SUFFIX } else { "" };
        write!(f, "{}{suffix}", self.0)
    }
}

impl FromStr for Address {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        let ip = text.strip_suffix(NETWORK_SUFFIX).unwrap_or(text).parse::<IpAddr>();
        ip.map(Self::from).map_err(|_| StoreError::Damaged(format!("`{text}` is blocked and no address")))
    }
}

/// When an address is blocked, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuardLimits {
    /// Failures within the window; 0 blocks nobody.
    pub failures_max: u64,
    pub window: Duration,
    pub block: Duration,
}

/// Counts failed authentications in the store, for all edges together, and knows which addresses are blocked.
///
/// Decides by what it remembers, so that a request costs no question; what other edges have blocked is known
/// after the next [`Guard::refresh`]. A store that is away adds no block.
pub struct Guard {
    store: Store,
    limits: GuardLimits,
    blocks: RwLock<Blocks>,
}

/// What is remembered of the store's list.
#[derive(Default)]
struct Blocks {
    ends: HashMap<Address, Instant>,
    revision: String,
}

impl Guard {
    pub fn new(store: Store, limits: GuardLimits) -> Self {
        Self { store, limits, blocks: RwLock::default() }
    }

    pub fn is_off(&self) -> bool {
        self.limits.failures_max == 0
    }

    /// How long an address is blocked from now on.
    pub fn blocked_for(&self, address: Address) -> Option<Duration> {
        let end = self.blocks.read().ends.get(&address).copied()?;
        Some(end.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
    }

    /// Counts a failed authentication. The one that is too many blocks its address, here at once and elsewhere
    /// with the next refresh; then this answers true.
    pub async fn failed(&self, address: Address) -> Result<bool, StoreError> {
        if self.is_off() {
            return Ok(false);
        }
        let name = address.to_string();
        let number = |duration: Duration| duration.as_millis().to_string();
        let GuardLimits { failures_max, window, block } = self.limits;
        let arguments = [failures_max.to_string(), number(window), number(block)];
        let arguments = arguments.each_ref().map(String::as_bytes);
        let mut reply: Reply = self.store.call(Function::AuthFail, &keys::failures(&name), &arguments).await?;
        match reply.word() {
            "counted" => return Ok(false),
            "blocked" => {}
            _ => return Err(reply.unexpected("auth_fail")),
        }
        let left_ms: u64 = reply.next("time left")?;
        let now = Instant::now();
        self.blocks.write().add([(address, now + Duration::from_millis(left_ms))], now);
        // A process that dies here leaves it to the address's next failure to tell the others.
        let arguments = [name, left_ms.to_string(), BLOCKS_MAX.to_string()];
        let arguments = arguments.each_ref().map(String::as_bytes);
        let reply: Reply = self.store.call(Function::BlockAdd, &keys::blocks(), &arguments).await?;
        match reply.word() {
            "added" => Ok(true),
            "known" => Ok(false),
            _ => Err(reply.unexpected("block_add")),
        }
    }

    /// Learns what all edges have blocked; answers how many addresses are blocked now.
    pub async fn refresh(&self) -> Result<usize, StoreError> {
        let known = self.blocks.read().revision.clone();
        let arguments = [known, BLOCKS_MAX.to_string()];
        let arguments = arguments.each_ref().map(String::as_bytes);
        // Before the question, so that no block ends here later than in the store.
        let asked = Instant::now();
        let mut reply: Reply = self.store.call(Function::BlockList, &keys::blocks(), &arguments).await?;
        match reply.word() {
            "same" => {
                let mut blocks = self.blocks.write();
                blocks.forget_ended(asked);
                Ok(blocks.ends.len())
            }
            "blocks" => {
                let revision: String = reply.next("revision")?;
                let now_ms: u64 = reply.next("time")?;
                let listed: Vec<(String, u64)> = reply.next("blocks")?;
                let end = |(address, end_ms): (String, u64)| {
                    Ok((address.parse()?, asked + Duration::from_millis(end_ms.saturating_sub(now_ms))))
                };
                let listed = listed.into_iter().map(end).collect::<Result<Vec<_>, StoreError>>()?;
                let mut blocks = self.blocks.write();
                blocks.revision = revision;
                blocks.add(listed, asked);
                Ok(blocks.ends.len())
            }
            _ => Err(reply.unexpected("block_list")),
        }
    }
}

impl Blocks {
    /// Besides those that are known: one that was just made here may not be in the store's list yet.
    fn add(&mut self, more: impl IntoIterator<Item = (Address, Instant)>, now: Instant) {
        self.ends.extend(more);
        self.forget_ended(now);
        if self.ends.len() > BLOCKS_MAX {
            let mut all: Vec<_> = self.ends.drain().collect();
            all.sort_unstable_by_key(|(_, end)| std::cmp::Reverse(*end));
            self.ends.extend(all.into_iter().take(BLOCKS_MAX));
        }
    }

    fn forget_ended(&mut self, now: Instant) {
        self.ends.retain(|_, end| *end > now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn an_ipv6_address_stands_for_its_network_and_a_mapped_one_for_its_ipv4_address() {
        assert_eq!(address("2001:db8:1:2:3:4:5:6").to_string(), "2001:db8:1:2::/64");
        assert_eq!(address("2001:db8:1:2::"), address("2001:db8:1:2:ffff::1"));
        assert_ne!(address("2001:db8:1:2::1"), address("2001:db8:1:3::1"));
        assert_eq!(address("::ffff:203.0.113.7").to_string(), "203.0.113.7");
        for text in ["203.0.113.7", "2001:db8:1:2::1", "::1", "::"] {
            let address = address(text);
            assert_eq!(address.to_string().parse::<Address>().unwrap(), address);
        }
        assert!("x".parse::<Address>().is_err());
    }

    #[test]
    fn a_full_list_forgets_the_block_that_ends_first_and_those_that_have_ended() {
        let (now, mut blocks) = (Instant::now(), Blocks::default());
        let ip = |index: u32| Address::from(IpAddr::from(index.to_be_bytes()));
        let end = |index: usize| now + Duration::from_millis(index as u64);
        blocks.add((0..BLOCKS_MAX + 5).map(|index| (ip(index as u32), end(index))), now);
        // The first has ended by now.
        assert_eq!(blocks.ends.len(), BLOCKS_MAX);
        assert!(!blocks.ends.contains_key(&ip(4)) && blocks.ends.contains_key(&ip(5)));
        blocks.forget_ended(end(9));
        assert!(!blocks.ends.contains_key(&ip(9)) && blocks.ends.contains_key(&ip(10)));
    }
}
