//! Claims for tests.

use std::sync::Arc;

use crate::domain::{
    Claim, Job, KeyId, ModelId, NanoUsd, NodeId, Price, Priority, ReplyTo, RequestId, SamplingParams, Stops, Telling,
    TenantId,
};

pub fn claim(request: &str, edge: &str) -> Arc<Claim> {
    Arc::new(Claim { job: job(request, edge), owner: NodeId::from("node_worker"), attempt: 1, losses: 0 })
}

pub fn job(request: &str, edge: &str) -> Job {
    let price = Price::flat(NanoUsd::new(200), NanoUsd::new(300));
    Job {
        request: RequestId::from(request),
        tenant: TenantId::from("ten_a"),
        key: KeyId::from("key_a"),
        model: ModelId::from("model"),
        prompt: vec![1, 2, 3],
        output_tokens_max: 8,
        choices: 1,
        sampling: SamplingParams { temperature: 0.0, seed: 1, ..SamplingParams::default() },
        stops: Stops { ignore_eos: true, ..Stops::default() },
        telling: Telling::default(),
        grammar: None,
        cache_salt: String::new(),
        priority: Priority::default(),
        price,
        price_version: "test".into(),
        hold: NanoUsd::new(3 * 200 + 8 * 300),
        allowed_tokens: 8,
        reply_to: ReplyTo { node: NodeId::from(edge), relay: None },
        enqueued_unix_ms: 0,
        deadline_unix_ms: 60_000,
    }
}
