//! What may happen to a tenant with several keys, at random: everything that moves money, in every order.

use lightcone::{
    admission::{LimitKind, Tier, Tiers},
    ledger::ReleaseReason,
};
use proptest::{
    prelude::*,
    sample::{Index, select},
};

/// Of the tenant.
pub const KEYS: usize = 3;
const NOTES: [&str; 2] = ["", "as agreed"];
const REFERENCES: [&str; 5] = ["a", "b", "c", "d", "invoice 7"];
/// The last is in nobody's configuration.
const TIERS: [&str; 4] = ["", "small", "large", "gone"];
/// Ordinary ones, one with a discount, free ones, and ones at which a request is worth a fortune.
pub const PRICES: [(i64, i64, i64); 6] =
    [(200, 300, 200), (200, 300, 20), (0, 0, 0), (0, 7, 0), (9, 0, 1), (8_000_000_000_000, 9_000_000_000_000, 0)];
const RELEASES: [ReleaseReason; 6] = [
    ReleaseReason::NotQueued,
    ReleaseReason::Withdrawn,
    ReleaseReason::WorkerFailed,
    ReleaseReason::WorkerLost,
    ReleaseReason::DeadlineExceeded,
    ReleaseReason::Draining,
];
const LIMITED: [LimitKind; 5] = [
    LimitKind::RequestsAtOnce,
    LimitKind::RequestsPerDay,
    LimitKind::TokensPerDay,
    LimitKind::SpendPerDay,
    LimitKind::SpendPerMonth,
];

/// Requests are picked among those that there are by then.
#[derive(Clone, Debug)]
pub enum Pick {
    Open(Index),
    Any(Index),
    Unknown,
}

/// What happens to a tenant.
#[derive(Clone, Debug)]
pub enum Step {
    Grant { amount: i64, reference: &'static str, note: &'static str },
    Adjust { amount: i64, reference: &'static str, note: &'static str },
    Refund { request: Pick, amount: Back, reference: &'static str, note: &'static str },
    Credit { amount: i64 },
    LowBalance(Option<i64>),
    Admit { key: usize, prompt: u32, output_max: u32, choices: u32, step: u32, price: usize, again: Option<Pick> },
    Extend { request: Pick, wanted: u32 },
    Settle { request: Pick, completion: Index, beyond: u32, cached: Index, other: Option<usize>, begun: bool },
    Release { request: Pick, why: ReleaseReason },
    Lapse(Pick),
    Renew(Pick),
    Sweep,
    TenantLimit(LimitKind, Option<u64>),
    KeyLimit(usize, LimitKind, Option<u64>),
    Tier(&'static str),
    Suspend(bool),
    Revoke(usize),
    Age(u64),
}

/// How much of a charge is given back.
#[derive(Clone, Debug)]
pub enum Back {
    All,
    Part(Index),
    Nano(i64),
}

fn amounts() -> impl Strategy<Value = i64> {
    const FORTUNES: [i64; 9] = [
        i64::MAX,
        i64::MAX - 1,
        i64::MAX / 2,
        9_000_000_000_000_001,
        -9_000_000_000_000_001,
        -i64::MAX / 2,
        -i64::MAX,
        i64::MIN + 2,
        i64::MIN,
    ];
    prop_oneof![
        5 => 1..2_000_000_i64,
        3 => select(&[1_000, 500_000, -1_000][..]),
        2 => -2_000_000..0_i64,
        1 => -2..=2_i64,
        1 => select(&FORTUNES[..]),
    ]
}

/// One that is open, as a rule.
fn picks() -> impl Strategy<Value = Pick> {
    prop_oneof![
        10 => any::<Index>().prop_map(Pick::Open),
        2 => any::<Index>().prop_map(Pick::Any),
        1 => Just(Pick::Unknown),
    ]
}

fn limits() -> impl Strategy<Value = (LimitKind, Option<u64>)> {
    select(&LIMITED[..]).prop_flat_map(|kind| {
        let most = match kind {
            LimitKind::RequestsAtOnce => 4,
            LimitKind::RequestsPerDay => 12,
            LimitKind::TokensPerDay => 4_000,
            _ => 800_000_u64,
        };
        (Just(kind), proptest::option::weighted(0.75, 0..=most))
    })
}

pub fn steps() -> impl Strategy<Value = Step> {
    let (reference, note) = (select(&REFERENCES[..]), select(&NOTES[..]));
    let named = || (amounts(), reference.clone(), note.clone());
    let back = prop_oneof![
        3 => Just(Back::All),
        3 => any::<Index>().prop_map(Back::Part),
        2 => amounts().prop_map(Back::Nano),
    ];
    let asks = (0..KEYS, 0..200_u32, 0..600_u32, 1..5_u32, select(&[0_u32, 1, 50, 256][..]), 0..PRICES.len());
    let again = proptest::option::weighted(0.05, picks());
    prop_oneof![
        4 => named().prop_map(|(amount, reference, note)| Step::Grant { amount, reference, note }),
        2 => named().prop_map(|(amount, reference, note)| Step::Adjust { amount, reference, note }),
        3 => (picks(), back, reference.clone(), note.clone())
            .prop_map(|(request, amount, reference, note)| Step::Refund { request, amount, reference, note }),
        1 => amounts().prop_map(|amount| Step::Credit { amount }),
        1 => proptest::option::of(0..1_000_000_i64).prop_map(Step::LowBalance),
        20 => (asks, again).prop_map(|((key, prompt, output_max, choices, step, price), again)| Step::Admit {
            key, prompt, output_max, choices, step, price, again,
        }),
        5 => (picks(), prop_oneof![5 => 0..700_u32, 1 => Just(u32::MAX)])
            .prop_map(|(request, wanted)| Step::Extend { request, wanted }),
        14 => (
            picks(), any::<Index>(), prop_oneof![5 => Just(0_u32), 1 => 1..900_u32], any::<Index>(),
            proptest::option::weighted(0.1, 0..4_usize), prop::bool::weighted(0.2),
        )
            .prop_map(|(request, completion, beyond, cached, other, begun)| Step::Settle {
                request, completion, beyond, cached, other, begun,
            }),
        3 => (picks(), select(&RELEASES[..])).prop_map(|(request, why)| Step::Release { request, why }),
        3 => picks().prop_map(Step::Lapse),
        1 => picks().prop_map(Step::Renew),
        2 => Just(Step::Sweep),
        2 => limits().prop_map(|(kind, value)| Step::TenantLimit(kind, value)),
        3 => (0..KEYS, limits()).prop_map(|(key, (kind, value))| Step::KeyLimit(key, kind, value)),
        1 => prop_oneof![6 => select(&TIERS[..3]), 1 => Just(TIERS[3])].prop_map(Step::Tier),
        1 => prop::bool::weighted(0.2).prop_map(Step::Suspend),
        1 => (0..KEYS).prop_map(Step::Revoke),
        1 => (1..40_u64).prop_map(Step::Age),
    ]
}

/// The configured ones.
pub fn tiers() -> Tiers {
    let of = |limits: &[(LimitKind, u64)]| Tier { limits: limits.iter().copied().collect(), ..Tier::default() };
    let small = of(&[
        (LimitKind::RequestsAtOnce, 3),
        (LimitKind::RequestsPerDay, 10),
        (LimitKind::TokensPerDay, 3_000),
        (LimitKind::SpendPerDay, 300_000),
    ]);
    let large = of(&[(LimitKind::RequestsAtOnce, 8), (LimitKind::SpendPerMonth, 900_000)]);
    Tiers { standard: Tier::default(), named: [("small".to_owned(), small), ("large".to_owned(), large)].into() }
}
