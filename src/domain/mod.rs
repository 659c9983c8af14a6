//! The words of the house: identifiers, money, usage, prices, what a tenant asks for and what comes back.
//!
//! Pure data and arithmetic. Never does I/O, never reads a clock, never logs.

mod calendar;
mod event;
mod ids;
mod job;
mod money;
mod price;
mod usage;

pub use calendar::{Day, Month, NoMonth, utc_text};
pub use event::{EventBody, FailureCode, FinishReason, FundsEnd, StoppedBy, TokenDetail, TokenEvent, Told, ToldChoice};
pub use ids::{KeyId, ModelId, NodeId, RequestId, TenantId};
pub use job::{Claim, GrammarSource, Job, Priority, ReplyTo, SamplingParams, Stops, Telling};
pub use money::{MoneyError, NanoUsd};
pub use price::{Price, PriceBook, PriceList};
pub use usage::Usage;
