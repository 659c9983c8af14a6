use base64::{Engine, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use rand::TryRng;
use sha2::Sha256;

use super::WebhookError;

const PREFIX: &str = "whsec_";
const BYTES: usize = 32;

/// What a tenant's endpoint recognises our messages by: the specification's symmetric key.
#[derive(Clone)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Straight from the system's random numbers.
    pub fn generate() -> Result<Self, WebhookError> {
        let mut bytes = vec![0; BYTES];
        rand::rngs::SysRng.try_fill_bytes(&mut bytes).map_err(|error| WebhookError::Random(error.to_string()))?;
        Ok(Self(bytes))
    }

    pub fn parse(text: &str) -> Option<Self> {
        STANDARD.decode(text.strip_prefix(PREFIX)?).ok().filter(|bytes| !bytes.is_empty()).map(Self)
    }

    /// As a person gets it, once.
    pub fn reveal(&self) -> String {
        format!("{PREFIX}{}", STANDARD.encode(&self.0))
    }

    /// Of the message `id`, sent at `unix_seconds`.
    pub fn sign(&self, id: &str, unix_seconds: u64, body: &str) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("a key of any length will do");
        for part in [id, ".", &unix_seconds.to_string(), ".", body] {
            mac.update(part.as_bytes());
        }
        format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
    }
}

/// Without the secret, which must not end up in a log.
impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by the specification's own Python library, which has the same one in its tests.
    #[test]
    fn a_signature_is_that_of_the_specification() {
        let secret = Secret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let signature = secret.sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, r#"{"test": 2432232314}"#);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn a_secret_is_32_random_bytes_and_can_be_read_again() {
        let (one, other) = (Secret::generate().unwrap(), Secret::generate().unwrap());
        assert_eq!(one.0.len(), BYTES);
        assert_ne!(one.0, other.0);
        assert_eq!(Secret::parse(&one.reveal()).unwrap().0, one.0);
        assert!(!format!("{one:?}").contains(&one.reveal()[PREFIX.len()..]));
        for bad in ["", "whsec_", "whsec_!", "sk_AAAA"] {
            assert!(Secret::parse(bad).is_none(), "{bad}");
        }
    }
}
