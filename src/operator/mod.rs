//! What the people who run the service do with it: tenants, keys, credits.
//!
//! Promises that a secret is shown once, at its making, and never stored; that every step which a crash may
//! interrupt can be repeated. Never touches a request under way.

mod accounts;
mod bootstrap;

pub use accounts::{Accounts, NewKey, OperatorError, Tenant};
pub use bootstrap::{Bootstrap, KEY_FILE_ADMIN, KEY_FILE_DEVELOPMENT};
