//! The shared line of requests of each model, kept in the store.
//!
//! Promises: first come, first served within a tenant; between tenants the one that has received the fewest
//! tokens comes first, and one that was idle saves up nothing; a claim belongs to one owner and one attempt,
//! and nobody else can renew or acknowledge it; every change is one atomic function on the store, whose clock
//! alone decides what has expired. A full line refuses ([`PublishError::Full`]), and so does one in which a request
//! would wait for too long at the pace of late; it never waits, and one tenant cannot fill the last ninth of it. Never looks into a job.

use std::{sync::Arc, time::Duration};

use redis::FromRedisValue;

use crate::{
    domain::{Claim, Job, ModelId, NodeId, RequestId, TenantId},
    fault,
    store::{ClockWatch, Function, Reply, Store, StoreError, Subscription, keys},
};

/// First byte of a stored job. A node that reads another one was not made for this queue's jobs.
const JOB_FORMAT: u8 = 6;
/// Requests that one sweep takes out at most; the rest is for the next one.
const EXPIRED_PER_SWEEP: usize = 256;
/// A cancellation that its edge has not read by then is forgotten.
const CANCELLATION_MS_MAX: u64 = 60_000;
const CANCELLATIONS_AT_ONCE: usize = 256;

#[derive(Clone, Copy, Debug)]
pub struct QueueLimits {
    /// Requests that may wait per model.
    pub depth_max: usize,
    /// What would not be begun within this time, at the pace of late, is refused.
    pub start_max: Duration,
    /// A claim that its owner has not renewed for this long may be taken over.
    pub claim_lease: Duration,
    /// A request that has lost its worker waits so long for another.
    pub takeover_max: Duration,
    /// A request with which so many workers were lost is not tried again.
    pub losses_max: u32,
}

/// How many requests a worker has room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// That others have begun: these go first.
    pub to_take_over: usize,
    pub to_begin: usize,
}

/// Why claims are given up that have not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GivenUp {
    /// What worked on them failed. While one was tried out, it is the loss of no other.
    Lost { trial: Option<RequestId> },
    /// Their edges cannot be reached from here. This owner is not asked again for so long.
    Unreached(Duration),
    /// This node goes away.
    HandedOver,
}

impl GivenUp {
    fn as_str(&self) -> &'static str {
        match self {
            Self::Lost { .. } => "lost",
            Self::Unreached(_) => "passed_on",
            Self::HandedOver => "handed_over",
        }
    }
}

/// What is not the owner's of the claims that he renewed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Renewed {
    /// They are somebody else's: work on them must stop.
    pub lost: Vec<RequestId>,
    /// The store has lost them. See [`Queue::restore`].
    pub gone: Vec<RequestId>,
}

/// Where a request is whose worker was said to be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disowned {
    /// Waiting to be taken over.
    Waits,
    /// Somebody else has it, or nobody had it.
    Elsewhere,
    /// Not in the queue: it has ended, or was never there.
    Absent,
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

    /// How many workers may be lost with a request.
    pub fn losses_max(&self) -> u32 {
        self.limits.losses_max
    }

    /// Puts a job at the end of its tenant's line. To publish the same request twice is to publish it once.
    pub async fn publish(&self, job: &Job) -> Result<(), PublishError> {
        let payload = encode(job)?;
        let cost = cost(job);
        // The two times come from the edge's clock, but only their distance is used.
        let wait_ms = job.deadline_unix_ms.saturating_sub(job.enqueued_unix_ms).to_string();
        let depth_max = self.limits.depth_max.to_string();
        let channel = keys::queue_channel(&job.model);
        let start_max = self.limits.start_max.as_millis().to_string();
        let arguments = [
            job.request.as_str().as_bytes(),
            job.tenant.as_str().as_bytes(),
            &payload,
            cost.as_bytes(),
            wait_ms.as_bytes(),
            depth_max.as_bytes(),
            channel.as_bytes(),
            start_max.as_bytes(),
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

    /// Takes up to so many requests that have lost their worker, and up to so many others, each from the tenant whose
    /// turn it is, to whose count their prompt tokens are charged. The attempt of what others had begun is above 1.
    pub async fn claim(&self, model: &ModelId, owner: &NodeId, room: Room) -> Result<Vec<Claim>, StoreError> {
        if room == Room::default() {
            return Ok(Vec::new());
        }
        let (to_take_over, to_begin) = (room.to_take_over.to_string(), room.to_begin.to_string());
        let lease = self.lease_ms();
        let arguments = [owner.as_str().as_bytes(), to_take_over.as_bytes(), to_begin.as_bytes(), lease.as_bytes()];
        let taken: Vec<(String, u32, u32, Vec<u8>)> =
            self.store.call(Function::QueueClaim, &keys::queue(model), &arguments).await?;
        // A look that finds nothing is no claim.
        if !taken.is_empty() {
            fault::point("queue.claim.answered");
        }
        let mut claims = Vec::with_capacity(taken.len());
        for (request, attempt, losses, payload) in taken {
            match decode(&payload) {
                Ok(job) => claims.push(Claim { job, owner: owner.clone(), attempt, losses }),
                // Nobody of this version can run it. It stays a claim that nobody renews, and is swept.
                Err(error) => tracing::error!(%model, request, %error, "claimed a job that cannot be read"),
            }
        }
        Ok(claims)
    }

    /// Extends the leases of `claims` (request and attempt).
    pub async fn renew(
        &self,
        model: &ModelId,
        owner: &NodeId,
        claims: &[(RequestId, u32)],
    ) -> Result<Renewed, StoreError> {
        if claims.is_empty() {
            return Ok(Renewed::default());
        }
        let (lost, gone) = self.fenced(Function::QueueRenew, model, owner, &[&self.lease_ms()], claims).await?;
        Ok(Renewed { lost: requests(lost), gone: requests(gone) })
    }

    /// Claims again what the store has lost and the owner still works on. `false`: it is somebody else's.
    pub async fn restore(&self, claim: &Claim) -> Result<bool, StoreError> {
        let Claim { job, owner, attempt, .. } = claim;
        let damaged = |error| StoreError::Damaged(format!("job {}: {error}", job.request));
        let payload = encode(job).map_err(damaged)?;
        let (lease, attempt, cost) = (self.lease_ms(), attempt.to_string(), cost(job));
        let arguments = [
            owner.as_str().as_bytes(),
            lease.as_bytes(),
            job.request.as_str().as_bytes(),
            attempt.as_bytes(),
            job.tenant.as_str().as_bytes(),
            &payload,
            cost.as_bytes(),
        ];
        let reply: Reply = self.store.call(Function::QueueRestore, &keys::queue(&job.model), &arguments).await?;
        match reply.word() {
            "restored" => Ok(true),
            "lost" => Ok(false),
            _ => Err(reply.unexpected("restore")),
        }
    }

    /// Leaves claims to others, who take them over. Answers those that were no longer the owner's.
    pub async fn give_up(
        &self,
        model: &ModelId,
        owner: &NodeId,
        how: &GivenUp,
        claims: &[(RequestId, u32)],
    ) -> Result<Vec<RequestId>, StoreError> {
        let (shun, trial) = match how {
            GivenUp::Unreached(shun) => (shun.as_millis(), ""),
            GivenUp::Lost { trial } => (0, trial.as_ref().map_or("", RequestId::as_str)),
            GivenUp::HandedOver => (0, ""),
        };
        let (channel, shun, [takeover, losses]) = (keys::queue_channel(model), shun.to_string(), self.takeover());
        let more = [channel.as_str(), &shun, how.as_str(), &takeover, &losses, trial];
        if claims.is_empty() {
            return Ok(Vec::new());
        }
        self.fenced(Function::QueueGiveBack, model, owner, &more, claims).await.map(requests)
    }

    /// Says that the worker which claimed a request in this attempt is lost, so that another takes it over at once.
    pub async fn disown(&self, model: &ModelId, request: &RequestId, attempt: u32) -> Result<Disowned, StoreError> {
        let (attempt, channel, [takeover, losses]) = (attempt.to_string(), keys::queue_channel(model), self.takeover());
        let arguments = [
            request.as_str().as_bytes(),
            attempt.as_bytes(),
            channel.as_bytes(),
            takeover.as_bytes(),
            losses.as_bytes(),
        ];
        let reply: Reply = self.store.call(Function::QueueDisown, &keys::queue(model), &arguments).await?;
        match reply.word() {
            "disowned" => Ok(Disowned::Waits),
            "elsewhere" => Ok(Disowned::Elsewhere),
            "absent" => Ok(Disowned::Absent),
            _ => Err(reply.unexpected("disown")),
        }
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

    /// Notes which request of a lost worker its next one tries out, if any: should that be lost as well, it is the loss of
    /// no other.
    pub async fn try_out(
        &self,
        model: &ModelId,
        owner: &NodeId,
        request: Option<&RequestId>,
    ) -> Result<(), StoreError> {
        let arguments = [owner.as_str(), request.map_or("", RequestId::as_str)].map(str::as_bytes);
        let reply: Reply = self.store.call(Function::QueueTryOut, &keys::queue(model), &arguments).await?;
        match reply.word() {
            "noted" => Ok(()),
            _ => Err(reply.unexpected("try out")),
        }
    }

    /// Takes out, for good, requests past their deadline: that no worker began in time (attempt 0, no owner), or none took
    /// over. Each is answered to exactly one caller. Claims whose lease ran out are left to be taken over; they are spared for one
    /// lease after an outage of the store, so that their owners can renew them first, and everything is after a jump of
    /// its clock.
    pub async fn expired(&self, model: &ModelId) -> Result<Vec<Claim>, StoreError> {
        // Whether the store was away is only known once it has answered.
        let now = self.store.now_unix_ms().await?;
        if !self.clock.is_steady(now, self.limits.claim_lease) {
            return Ok(Vec::new());
        }
        let leases_count: &[u8] = if self.store.connected_for() >= self.limits.claim_lease { b"1" } else { b"0" };
        self.expire(model, leases_count, b"0").await
    }

    /// Takes every job and claim of `model` out, whatever its lease says: for a node that knows that all who
    /// used this store before it are dead.
    pub async fn left_over(&self, model: &ModelId) -> Result<Vec<Claim>, StoreError> {
        let mut all = Vec::new();
        loop {
            let some = self.expire(model, b"1", b"1").await?;
            if some.is_empty() {
                return Ok(all);
            }
            all.extend(some);
        }
    }

    async fn expire(&self, model: &ModelId, leases_count: &[u8], all: &[u8]) -> Result<Vec<Claim>, StoreError> {
        let (limit, [takeover, losses]) = (EXPIRED_PER_SWEEP.to_string(), self.takeover());
        let channel = keys::queue_channel(model);
        let arguments =
            [limit.as_bytes(), leases_count, takeover.as_bytes(), losses.as_bytes(), all, channel.as_bytes()];
        let taken: Vec<(String, u32, u32, Vec<u8>)> =
            self.store.call(Function::QueueExpire, &keys::queue(model), &arguments).await?;
        let mut expired = Vec::with_capacity(taken.len());
        for (owner, attempt, losses, payload) in taken {
            match decode(&payload) {
                Ok(job) => expired.push(Claim { job, owner: NodeId::from(owner), attempt, losses }),
                Err(error) => tracing::error!(%model, %error, "dropped a job that cannot be read"),
            }
        }
        Ok(expired)
    }

    /// Notices that something was published for `model`. Claimers also look by themselves now and then.
    pub fn wakeups(&self, model: &ModelId) -> Subscription {
        self.store.subscribe(keys::queue_channel(model))
    }

    async fn fenced<T: FromRedisValue>(
        &self,
        function: Function,
        model: &ModelId,
        owner: &NodeId,
        more: &[&str],
        claims: &[(RequestId, u32)],
    ) -> Result<T, StoreError> {
        let attempts: Vec<String> = claims.iter().map(|(_, attempt)| attempt.to_string()).collect();
        let mut arguments = vec![owner.as_str().as_bytes()];
        arguments.extend(more.iter().map(|argument| argument.as_bytes()));
        for ((request, _), attempt) in claims.iter().zip(&attempts) {
            arguments.extend([request.as_str().as_bytes(), attempt.as_bytes()]);
        }
        self.store.call(function, &keys::queue(model), &arguments).await
    }

    /// How long the store has served without a gap, after which it may have lost its last moments.
    pub fn store_connected_for(&self) -> Duration {
        self.store.connected_for()
    }

    fn lease_ms(&self) -> String {
        self.limits.claim_lease.as_millis().to_string()
    }

    /// How long a request waits to be taken over, and how many losses end it.
    fn takeover(&self) -> [String; 2] {
        [self.limits.takeover_max.as_millis().to_string(), self.limits.losses_max.to_string()]
    }
}

fn requests(names: Vec<String>) -> Vec<RequestId> {
    names.into_iter().map(RequestId::from).collect()
}

/// What a claim counts for in its tenant's turn.
fn cost(job: &Job) -> String {
    job.prompt.len().max(1).to_string()
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
