//! Changes of one thing of a tenant.

use lightcone::{
    domain::NanoUsd,
    operator::{LimitChanges, TenantChanges},
};

pub fn of_limits(limits: LimitChanges) -> TenantChanges {
    TenantChanges { limits, ..TenantChanges::default() }
}

pub fn of_low_balance(low: Option<NanoUsd>) -> TenantChanges {
    TenantChanges { low_balance: Some(low), ..TenantChanges::default() }
}
