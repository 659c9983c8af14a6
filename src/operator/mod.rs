//! What the people who run the service do with it: tenants, keys, limits, credits, prices.
//!
//! Promises that a secret is shown once, at its making, and never stored; that every step which a crash may
//! interrupt can be repeated; that no change is made without a record of who wanted it. Never touches a request under
//! way, and never speaks HTTP: the edge and the command line are its two faces.

mod accounts;
mod api_keys;
mod audit_log;
mod bootstrap;
mod credits;
mod tenants;
mod webhooks;

pub use accounts::{Accounts, LimitChanges, NAME_CHARACTERS_MAX, OperatorError, Page};
pub use api_keys::{GRACE_MAX, KeyChanges, KeyWish, LABELS_MAX, MODELS_MAX, NewKey, UNIX_MS_MAX};
pub use audit_log::{AuditLog, AuditRecord};
pub use bootstrap::{Bootstrap, KEY_FILE_ADMIN, KEY_FILE_DEVELOPMENT};
pub use credits::PriceWish;
pub use tenants::{Tenant, TenantChanges, TenantStatus, TenantWish};
