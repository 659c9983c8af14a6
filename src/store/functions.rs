use std::sync::LazyLock;

use sha2::{Digest, Sha256};

use super::keys;

/// Our functions on the server, by what they do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Function {
    AccountOpen,
    AccountSet,
    KeySet,
    Grant,
    Adjust,
    Refund,
    Credit,
    Hold,
    Extend,
    TakeOver,
    Forgive,
    Settle,
    Release,
    Renew,
    Sweep,
    Standing,
    Snapshot,
    Trim,
    AuthFail,
    BlockAdd,
    BlockList,
    OnceBegin,
    OnceRenew,
    OnceAnswer,
    OnceForget,
    QueuePublish,
    QueueClaim,
    QueueRenew,
    QueueRestore,
    QueueTryOut,
    QueueAcknowledge,
    QueueGiveBack,
    QueueDisown,
    QueueWithdraw,
    QueueExpire,
    NodeAnnounce,
    NodeLeave,
    NodeList,
    WebhookSet,
    WebhookShow,
    WebhookRemove,
    WebhookTake,
    WebhookDone,
    WebhookFailed,
    WebhookDead,
}

impl Function {
    fn name(self) -> &'static str {
        match self {
            Self::AccountOpen => "account_open",
            Self::AccountSet => "account_set",
            Self::KeySet => "key_set",
            Self::Grant => "grant",
            Self::Adjust => "adjust",
            Self::Refund => "refund",
            Self::Credit => "credit",
            Self::Hold => "hold",
            Self::Extend => "extend",
            Self::TakeOver => "take_over",
            Self::Forgive => "forgive",
            Self::Settle => "settle",
            Self::Release => "release",
            Self::Renew => "renew",
            Self::Sweep => "sweep",
            Self::Standing => "standing",
            Self::Snapshot => "snapshot",
            Self::Trim => "trim",
            Self::AuthFail => "auth_fail",
            Self::BlockAdd => "block_add",
            Self::BlockList => "block_list",
            Self::OnceBegin => "once_begin",
            Self::OnceRenew => "once_renew",
            Self::OnceAnswer => "once_answer",
            Self::OnceForget => "once_forget",
            Self::QueuePublish => "queue_publish",
            Self::QueueClaim => "queue_claim",
            Self::QueueRenew => "queue_renew",
            Self::QueueRestore => "queue_restore",
            Self::QueueTryOut => "queue_try_out",
            Self::QueueAcknowledge => "queue_acknowledge",
            Self::QueueGiveBack => "queue_give_back",
            Self::QueueDisown => "queue_disown",
            Self::QueueWithdraw => "queue_withdraw",
            Self::QueueExpire => "queue_expire",
            Self::WebhookSet => "webhook_set",
            Self::WebhookShow => "webhook_show",
            Self::WebhookRemove => "webhook_remove",
            Self::NodeAnnounce => "node_announce",
            Self::NodeLeave => "node_leave",
            Self::NodeList => "node_list",
            Self::WebhookTake => "webhook_take",
            Self::WebhookDone => "webhook_done",
            Self::WebhookFailed => "webhook_failed",
            Self::WebhookDead => "webhook_dead",
        }
    }

    pub(super) fn only_reads(self) -> bool {
        matches!(self, Self::Standing | Self::Snapshot | Self::BlockList | Self::NodeList | Self::WebhookShow)
    }
}

pub(super) struct Library {
    pub source: String,
    version: String,
}

impl Library {
    pub fn name_of(&self, function: Function) -> String {
        format!("lightcone_{}_{}", function.name(), self.version)
    }
}

/// The library carries a digest of its own text in its name and in those of its functions, so that nodes of
/// two versions share a server while one replaces the other, each calling its own.
pub(super) fn library() -> &'static Library {
    static LIBRARY: LazyLock<Library> = LazyLock::new(|| {
        let body = concat!(
            include_str!("functions/common.lua"),
            include_str!("functions/rates.lua"),
            include_str!("functions/limits.lua"),
            include_str!("functions/outbox.lua"),
            include_str!("functions/ledger.lua"),
            include_str!("functions/holds.lua"),
            include_str!("functions/archive.lua"),
            include_str!("functions/queue.lua"),
            include_str!("functions/nodes.lua"),
            include_str!("functions/records.lua"),
            include_str!("functions/guard.lua"),
            include_str!("functions/webhooks.lua")
        );
        let version = hex::encode(Sha256::digest(body.as_bytes()))[..12].to_owned();
        let channel = keys::OUTBOX_CHANNEL;
        let constants = format!("local VERSION, OUTBOX_CHANNEL = '{version}', '{channel}'");
        let source = format!("#!lua name=lightcone_{version}\n{constants}\n{body}");
        Library { source, version }
    });
    &LIBRARY
}
