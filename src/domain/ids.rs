//! Identifiers. Each is its own type, so that a tenant can never be passed where a key is meant.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Arc<str>);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text.into())
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// One chat request, `chatcmpl-…`. It names the stream, the hold, the claim and the ledger entries,
    /// and is what makes a settlement happen once.
    RequestId
);
id!(
    /// Who pays, `ten_…`.
    TenantId
);
id!(
    /// One API key of a tenant, `key_…`. Not the secret, which is stored only as a SHA-256.
    KeyId
);
id!(
    /// A served model, as clients name it (`tzafon.sm-1`).
    ModelId
);
id!(
    /// One process of the cluster, `node_…`. New at every start, so that a restarted node never
    /// passes for the one that died.
    NodeId
);

macro_rules! generated {
    ($name:ident, $prefix:literal) => {
        impl $name {
            /// A fresh identifier, ordered by time of creation.
            pub fn generate() -> Self {
                Self(format!(concat!($prefix, "{}"), uuid::Uuid::now_v7().simple()).into())
            }
        }
    };
}

generated!(RequestId, "chatcmpl-");
generated!(TenantId, "ten_");
generated!(KeyId, "key_");
generated!(NodeId, "node_");
