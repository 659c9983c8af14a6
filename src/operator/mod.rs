//! What the people who run the service do with it: tenants, keys, limits, credits.
//!
//! Promises that a secret is shown once, at its making, and never stored; that every step which a crash may
//! interrupt can be repeated, that no change is made without a record of who wanted it. Never touches a request under way.

mod accounts;
mod api_keys;
mod audit_log;
mod bootstrap;

pub use accounts::{Accounts, LimitChanges, OperatorError, Tenant, TenantStatus};
pub use api_keys::{KeyChanges, KeyWish, NewKey};
pub use audit_log::{AuditLog, AuditRecord};
pub use bootstrap::{Bootstrap, KEY_FILE_ADMIN, KEY_FILE_DEVELOPMENT};
