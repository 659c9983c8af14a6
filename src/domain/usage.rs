use serde::{Deserialize, Serialize};

/// Tokens of one request. The same three numbers stand in the answer, the ledger and the metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    /// Prompt tokens whose KV blocks were found in the prefix cache; counted in `prompt_tokens` too.
    pub cached_tokens: u32,
}
