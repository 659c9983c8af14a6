use std::collections::BTreeMap;

use super::{
    accounts::{Accounts, OperatorError},
    audit_log::Change,
};
use crate::{
    config,
    domain::{ModelId, NanoUsd, Price, PriceList, TenantId},
    ledger::{Moved, Prices, Refund, funds},
};

/// A price that is to be published. One of zero must be meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PriceWish {
    pub price: Price,
    pub is_free: bool,
}

impl Accounts {
    /// Adds prepaid money, once for each reference.
    pub async fn grant(
        &self,
        tenant: &TenantId,
        amount: NanoUsd,
        reference: &str,
        note: &str,
    ) -> Result<Moved, OperatorError> {
        funds::check_grant(amount, reference, note)?;
        let change = of_money("credits.grant", tenant, amount, note).with("reference", reference);
        self.move_money(tenant, change, self.ledger.grant(tenant, amount, reference, note)).await
    }

    /// Puts a balance right, once for each reference.
    pub async fn adjust(
        &self,
        tenant: &TenantId,
        amount: NanoUsd,
        reference: &str,
        note: &str,
    ) -> Result<Moved, OperatorError> {
        funds::check_adjustment(amount, reference, note)?;
        let change = of_money("credits.adjust", tenant, amount, note).with("reference", reference);
        self.move_money(tenant, change, self.ledger.adjust(tenant, amount, reference, note)).await
    }

    /// Gives a charge back, once for each reference.
    pub async fn refund(&self, tenant: &TenantId, refund: &Refund) -> Result<Moved, OperatorError> {
        let Refund { request, amount, reference, note } = refund;
        funds::check_grant(*amount, reference, note)?;
        let change = of_money("credits.refund", tenant, *amount, note).with("reference", reference);
        let change = change.with("request", request.as_str());
        self.move_money(tenant, change, self.ledger.refund(tenant, refund)).await
    }

    /// Sets how far below zero a balance may go.
    pub async fn set_credit(&self, tenant: &TenantId, amount: NanoUsd, note: &str) -> Result<Moved, OperatorError> {
        funds::check_credit(amount, note)?;
        let change = of_money("credits.line", tenant, amount, note);
        self.move_money(tenant, change, self.ledger.set_credit(tenant, amount, note)).await
    }

    /// Publishes prices that hold from a date on; nothing for now.
    pub async fn publish_prices(
        &self,
        prices: &Prices,
        version: &str,
        from_unix_ms: Option<u64>,
        wishes: &BTreeMap<ModelId, PriceWish>,
    ) -> Result<PriceList, OperatorError> {
        if wishes.is_empty() {
            return Err(OperatorError::wish("prices", "a price list needs at least one model"));
        }
        let checked = |(model, wish): (&ModelId, &PriceWish)| {
            let fault = |fault| OperatorError::Price { model: model.clone(), fault };
            Ok((model.clone(), config::check_price(wish.price, wish.is_free).map_err(fault)?))
        };
        let list: BTreeMap<ModelId, Price> = wishes.iter().map(checked).collect::<Result<_, OperatorError>>()?;
        prices.check(version, from_unix_ms).await?;
        let change = Change::of("prices.set", &version).with("from_unix_ms", from_unix_ms).with("prices", &list);
        let publishing = async { Ok(prices.publish(version, from_unix_ms, list).await?) };
        self.recorded(change, publishing, |_| true).await
    }

    async fn move_money(
        &self,
        tenant: &TenantId,
        change: Change,
        moving: impl Future<Output = Result<Moved, crate::ledger::LedgerError>>,
    ) -> Result<Moved, OperatorError> {
        self.must_exist(tenant).await?;
        self.recorded(change, async { Ok(moving.await?) }, |moved| !moved.repeated).await
    }
}

fn of_money(action: &'static str, tenant: &TenantId, amount: NanoUsd, note: &str) -> Change {
    Change::of(action, tenant).with("amount_nano_usd", amount).with("note", note)
}
