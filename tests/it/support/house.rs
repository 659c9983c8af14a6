//! A tenant with money on a fresh store, and the rooms that serve it.

use std::{sync::Arc, time::Duration};

use lightcone::{
    admission::{Admission, AdmitError, AdmittedRequest, Ask, Principal, Scope},
    domain::{NanoUsd, Price, RequestId, TenantId, Usage},
    ledger::{Balance, EndReason, Ledger, Receipts, Settlement},
    operator::Accounts,
    store::Store,
};

use super::valkey::Valkey;

/// Long enough that nothing expires while a test runs.
pub const LEASE: Duration = Duration::from_secs(600);
pub const MODEL: &str = "tzafon.sm-1";
pub const PRICE: Price = Price::flat(NanoUsd::new(200), NanoUsd::new(300));
pub const PRICE_VERSION: &str = "2026-11";

pub struct House {
    pub valkey: Valkey,
    pub store: Store,
    pub ledger: Ledger,
    pub admission: Admission,
    pub accounts: Accounts,
    pub receipts: Receipts,
    pub tenant: TenantId,
    pub principal: Principal,
    pub secret: String,
}

impl House {
    pub async fn with_balance(nano: i64) -> Self {
        let valkey = Valkey::start();
        let store = valkey.store().await;
        let ledger = Ledger::new(store.clone(), LEASE);
        let accounts = Accounts::new(store.clone(), ledger.clone());
        let admission = Admission::new(store.clone(), LEASE);
        let receipts = Receipts::open(&store, None).await.expect("a key");
        let tenant = accounts.create_tenant("first", NanoUsd::new(nano)).await.expect("a tenant").id;
        let scopes = [Scope::Chat].into_iter().collect();
        let secret = accounts.create_key(&tenant, "test", scopes).await.expect("a key").secret;
        let principal = admission.authenticate(&secret).await.expect("a principal");
        Self { valkey, store, ledger, admission, accounts, receipts, tenant, principal, secret }
    }

    /// Another tenant, as its principal.
    pub async fn another(&self, nano: i64) -> Principal {
        let tenant = self.accounts.create_tenant("another", NanoUsd::new(nano)).await.expect("a tenant").id;
        let scopes = [Scope::Chat].into_iter().collect();
        let secret = self.accounts.create_key(&tenant, "test", scopes).await.expect("a key").secret;
        self.admission.authenticate(&secret).await.expect("a principal")
    }

    pub async fn admit(&self, prompt_tokens: u32, output_tokens_max: u32) -> Result<AdmittedRequest, AdmitError> {
        self.admission.admit(&self.principal, ask(prompt_tokens, output_tokens_max)).await
    }

    pub async fn admit_as(
        &self,
        request: RequestId,
        prompt_tokens: u32,
        output_tokens_max: u32,
    ) -> Result<AdmittedRequest, AdmitError> {
        let ask = Ask { request, ..ask(prompt_tokens, output_tokens_max) };
        self.admission.admit(&self.principal, ask).await
    }

    pub async fn balance(&self) -> Balance {
        self.ledger.balance(&self.tenant).await.expect("a balance")
    }

    pub async fn assert_balanced(&self) {
        let report = self.ledger.verify().await.expect("a report");
        assert!(report.is_balanced(), "{report:#?}");
    }

    /// Makes a hold look as if nobody had renewed it for long.
    pub async fn let_lease_run_out(&self, request: &RequestId) {
        self.let_lease_of_run_out(&self.tenant, request).await;
    }

    pub async fn let_lease_of_run_out(&self, tenant: &TenantId, request: &RequestId) {
        let key = lightcone::store::keys::hold_leases(tenant);
        let mut raw = self.valkey.raw().await;
        redis::cmd("ZADD").arg(key).arg("XX").arg(1).arg(request.as_str()).exec_async(&mut raw).await.expect("ZADD");
    }
}

pub fn ask(prompt_tokens: u32, output_tokens_max: u32) -> Ask {
    Ask {
        request: RequestId::generate(),
        model: MODEL.into(),
        price: PRICE,
        price_version: PRICE_VERSION.to_owned(),
        prompt_tokens,
        output_tokens_max,
        choices: 1,
    }
}

pub fn settlement(admitted: &AdmittedRequest, completion_tokens: u32) -> Settlement {
    Settlement {
        request: admitted.request().clone(),
        tenant: admitted.tenant().clone(),
        key: admitted.key().clone(),
        model: admitted.model().clone(),
        usage: Usage { prompt_tokens: admitted.prompt_tokens(), completion_tokens, cached_tokens: 0 },
        price: admitted.price(),
        price_version: admitted.price_version().to_owned(),
        reason: EndReason::Stop,
        digest: None,
        attempt: 1,
    }
}

/// Runs `count` tasks at once, which all start together, and answers what each gave back.
pub async fn at_once<T, F>(count: usize, task: impl Fn(usize) -> F) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let start = Arc::new(tokio::sync::Barrier::new(count));
    let tasks: Vec<_> = (0..count)
        .map(|index| {
            let (start, task) = (start.clone(), task(index));
            tokio::spawn(async move {
                start.wait().await;
                task.await
            })
        })
        .collect();
    let mut answers = Vec::with_capacity(count);
    for task in tasks {
        answers.push(task.await.expect("a task that ends"));
    }
    answers
}
