//! The shared line of requests of each model, kept in the store.
//!
//! Promises: first come, first served within a tenant; between tenants the one that has received the fewest
//! tokens comes first, and one that was idle saves up nothing; a claim belongs to one owner and one attempt,
//! and nobody else can renew or acknowledge it; every change is one atomic function on the store, whose clock
//! alone decides what has expired. A full line refuses ([`PublishError::Full`]); it never waits, and one
//! tenant cannot fill the last ninth of it. Never looks into a job.

use std::{sync::Arc, time::Duration};

use crate::{
    domain::{Claim, Job, ModelId, NodeId, RequestId, TenantId},
    fault,
    store::{ClockWatch, Function, Reply, Store, StoreError, Subscription, keys},
};

/// First byte of a stored job. A node that reads another one was not made for this queue's jobs.
const JOB_FORMAT: u8 = 5;
/// Requests that one sweep takes out at most; the rest is for the next one.
const EXPIRED_PER_SWEEP: usize = 256;
/// A cancellation that its edge has not read by then is forgotten.
const CANCELLATION_MS_MAX: u64 = 60_000;
const CANCELLATIONS_AT_ONCE: usize = 256;

#[derive(Clone, Copy, Debug)]
pub struct QueueLimits {
    /// Requests that may wait per model.
    pub depth_max: usize,
    /// A claim that its owner has not renewed for this long is taken back.
    pub claim_lease: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    #[error("the queue is full; try again in {retry_after_ms} ms")]
    Full { retry_after_ms: u64 },
    #[error("the job cannot be encoded: {0}")]
    Encoding(#[from] postcard::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[derive(Clone)]
pub struct Queue {
    store: Store,
    limits: QueueLimits,
    clock: Arc<ClockWatch>,
}

impl Queue {
    pub fn new(store: Store, limits: QueueLimits) -> Self {
        Self { store, limits, clock: Arc::default() }
    }

    /// Puts a job at the end of its tenant's line. To publish the same request twice is to publish it once.
    pub async fn publish(&self, job: &Job) -> Result<(), PublishError> {
        let payload = encode(job)?;
        let cost = job.prompt.len().max(1).to_string();
        // The two times come from the edge's clock, but only their distance is used.
        let wait_ms = job.deadline_unix_ms.saturating_sub(job.enqueued_unix_ms).to_string();
        let depth_max = self.limits.depth_max.to_string();
        let channel = keys::queue_channel(&job.model);
        let arguments = [
            job.request.as_str().as_bytes(),
            job.tenant.as_str().as_bytes(),
            &payload,
            cost.as_bytes(),
            wait_ms.as_bytes(),
            depth_max.as_bytes(),
            channel.as_bytes(),
        ];
        fault::point("queue.publish.asked");
        let mut reply: Reply = self.store.call(Function::QueuePublish, &keys::queue(&job.model), &arguments).await?;
        fault::point("queue.publish.answered");
        match reply.word() {
            "published" => Ok(()),
            "full" => Err(PublishError::Full { retry_after_ms: reply.next("time to wait")? }),
            _ => Err(reply.unexpected("publish").into()),
        }
    }

    /// Takes up to `room` requests, each from the tenant whose turn it is, and charges their prompt tokens to
    /// that tenant's count.
    pub async fn claim(&self, model: &ModelId, owner: &NodeId, room: usize) -> Result<Vec<Claim>, StoreError> {
        if room == 0 {
            return Ok(Vec::new());
        }
        let (room, lease) = (room.to_string(), self.lease_ms());
        let arguments = [owner.as_str().as_bytes(), room.as_bytes(), lease.as_bytes()];
        let taken: Vec<(String, u32, Vec<u8>)> =
            self.store.call(Function::QueueClaim, &keys::queue(model), &arguments).await?;
        // A look that finds nothing is no claim.
        if !taken.is_empty() {
            fault::point("queue.claim.answered");
        }
        let mut claims = Vec::with_capacity(taken.len());
        for (request, attempt, payload) in taken {
            match decode(&payload) {
                Ok(job) => claims.push(Claim { job, owner: owner.clone(), attempt }),
                // Nobody of this version can run it. It stays a claim that nobody renews, and is swept.
                Err(error) => tracing::error!(%model, request, %error, "claimed a job that cannot be read"),
            }
        }
        Ok(claims)
    }

    /// Extends the leases of `claims` (request and attempt). Answers those that are no longer the owner's:
    /// it must stop working on them.
    pub async fn renew(
        &self,
        model: &ModelId,
        owner: &NodeId,
        claims: &[(RequestId, u32)],
    ) -> Result<Vec<RequestId>, StoreError> {
        self.fenced(Function::QueueRenew, model, owner, &self.lease_ms(), claims).await
    }

    /// Returns claims that were not started to the places where they stood, for any worker to take. Answers
    /// those that were no longer the owner's.
    pub async fn give_back(
        &self,
        model: &ModelId,
        owner: &NodeId,
        claims: &[(RequestId, u32)],
    ) -> Result<Vec<RequestId>, StoreError> {
        self.fenced(Function::QueueGiveBack, model, owner, &keys::queue_channel(model), claims).await
    }

    /// Forgets a request that has ended, and adds its output tokens to the tenant's count. `false`: the claim
    /// is no longer the owner's, and nothing was changed.
    pub async fn acknowledge(
        &self,
        model: &ModelId,
        owner: &NodeId,
        request: &RequestId,
        attempt: u32,
        completion_tokens: u32,
    ) -> Result<bool, StoreError> {
        let (attempt, tokens) = (attempt.to_string(), completion_tokens.to_string());
        let arguments = [owner.as_str().as_bytes(), request.as_str().as_bytes(), attempt.as_bytes(), tokens.as_bytes()];
        fault::point("queue.acknowledge.asked");
        let reply: Reply = self.store.call(Function::QueueAcknowledge, &keys::queue(model), &arguments).await?;
        fault::point("queue.acknowledge.answered");
        match reply.word() {
            "acknowledged" => Ok(true),
            "lost" => Ok(false),
            _ => Err(reply.unexpected("acknowledge")),
        }
    }

    /// Takes back a request that nobody has claimed. `true`: it was still waiting and is now gone.
    pub async fn withdraw(&self, model: &ModelId, tenant: &TenantId, request: &RequestId) -> Result<bool, StoreError> {
        let arguments = [tenant.as_str().as_bytes(), request.as_str().as_bytes()];
        let reply: Reply = self.store.call(Function::QueueWithdraw, &keys::queue(model), &arguments).await?;
        match reply.word() {
            "withdrawn" => Ok(true),
            "absent" => Ok(false),
            _ => Err(reply.unexpected("withdraw")),
        }
    }

    /// The job of a request that waits or runs. `None`: it is not in this queue, or no longer.
    pub async fn find(&self, model: &ModelId, request: &RequestId) -> Result<Option<Job>, StoreError> {
        let [jobs, ..] = keys::queue(model);
        let payload: Option<Vec<u8>> = self.store.query(redis::cmd("HGET").arg(jobs).arg(request.as_str())).await?;
        let damaged = |why| StoreError::Damaged(format!("job {request}: {why}"));
        payload.map(|payload| decode(&payload).map_err(damaged)).transpose()
    }

    /// Asks the edge at `node`, which has the client of `request`, to cancel it.
    pub async fn ask_to_cancel(&self, node: &NodeId, request: &RequestId) -> Result<(), StoreError> {
        let (list, channel) = (keys::cancellations(node), keys::cancellation_channel(node));
        let mut commands = redis::pipe();
        commands.cmd("RPUSH").arg(&list).arg(request.as_str());
        // An edge that is gone reads nothing any more.
        commands.cmd("PEXPIRE").arg(&list).arg(CANCELLATION_MS_MAX);
        commands.cmd("PUBLISH").arg(&channel).arg("");
        self.store.query_all(&commands).await.map(drop)
    }

    /// What other edges asked this one to cancel.
    pub async fn cancellations(&self, node: &NodeId) -> Result<Vec<RequestId>, StoreError> {
        let mut pop = redis::cmd("LPOP");
        let requests: Option<Vec<String>> =
            self.store.query(pop.arg(keys::cancellations(node)).arg(CANCELLATIONS_AT_ONCE)).await?;
        Ok(requests.unwrap_or_default().into_iter().map(RequestId::from).collect())
    }

    /// Told whenever there is one.
    pub fn cancellation_notices(&self, node: &NodeId) -> Subscription {
        self.store.subscribe(keys::cancellation_channel(node))
    }

    /// Requests that wait for `model`.
    pub async fn depth(&self, model: &ModelId) -> Result<usize, StoreError> {
        self.store.query(redis::cmd("ZCARD").arg(keys::queue_line(model))).await
    }

    /// Takes out, for good, requests past their deadline and claims whose lease ran out; each is answered to
    /// exactly one caller. `attempt` 0 and an empty owner mark a request that no worker ever claimed. Claims
    /// are spared for one lease after an outage of the store, so that their owners can renew them first, and everything
    /// is after a jump of its clock.
    pub async fn expired(&self, model: &ModelId) -> Result<Vec<Claim>, StoreError> {
        // Whether the store was away is only known once it has answered.
        let now = self.store.now_unix_ms().await?;
        if !self.clock.is_steady(now, self.limits.claim_lease) {
            return Ok(Vec::new());
        }
        let claims_too = if self.store.connected_for() >= self.limits.claim_lease { "1" } else { "0" };
        self.expire(model, claims_too, "0").await
    }

    /// Takes every job and claim of `model` out, whatever its lease says: for a node that knows that all who
    /// used this store before it are dead.
    pub async fn left_over(&self, model: &ModelId) -> Result<Vec<Claim>, StoreError> {
        let mut all = Vec::new();
        loop {
            let some = self.expire(model, "1", "1").await?;
            if some.is_empty() {
                return Ok(all);
            }
            all.extend(some);
        }
    }

    async fn expire(&self, model: &ModelId, claims_too: &str, all: &str) -> Result<Vec<Claim>, StoreError> {
        let limit = EXPIRED_PER_SWEEP.to_string();
        let arguments = [limit.as_bytes(), claims_too.as_bytes(), all.as_bytes()];
        let taken: Vec<(String, u32, Vec<u8>)> =
            self.store.call(Function::QueueExpire, &keys::queue(model), &arguments).await?;
        let mut expired = Vec::with_capacity(taken.len());
        for (owner, attempt, payload) in taken {
            match decode(&payload) {
                Ok(job) => expired.push(Claim { job, owner: NodeId::from(owner), attempt }),
                Err(error) => tracing::error!(%model, %error, "dropped a job that cannot be read"),
            }
        }
        Ok(expired)
    }

    /// Notices that something was published for `model`. Claimers also look by themselves now and then.
    pub fn wakeups(&self, model: &ModelId) -> Subscription {
        self.store.subscribe(keys::queue_channel(model))
    }

    async fn fenced(
        &self,
        function: Function,
        model: &ModelId,
        owner: &NodeId,
        second: &str,
        claims: &[(RequestId, u32)],
    ) -> Result<Vec<RequestId>, StoreError> {
        if claims.is_empty() {
            return Ok(Vec::new());
        }
        let attempts: Vec<String> = claims.iter().map(|(_, attempt)| attempt.to_string()).collect();
        let mut arguments = vec![owner.as_str().as_bytes(), second.as_bytes()];
        for ((request, _), attempt) in claims.iter().zip(&attempts) {
            arguments.extend([request.as_str().as_bytes(), attempt.as_bytes()]);
        }
        let lost: Vec<String> = self.store.call(function, &keys::queue(model), &arguments).await?;
        Ok(lost.into_iter().map(RequestId::from).collect())
    }

    fn lease_ms(&self) -> String {
        self.limits.claim_lease.as_millis().to_string()
    }
}

fn encode(job: &Job) -> Result<Vec<u8>, postcard::Error> {
    postcard::to_extend(job, vec![JOB_FORMAT])
}

fn decode(payload: &[u8]) -> Result<Job, String> {
    match payload.split_first() {
        Some((&JOB_FORMAT, job)) => postcard::from_bytes(job).map_err(|error| error.to_string()),
        Some((format, _)) => Err(format!("job format {format}, this program reads {JOB_FORMAT}")),
        None => Err("an empty job".to_owned()),
    }
}
