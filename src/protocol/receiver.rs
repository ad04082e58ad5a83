//! The replica's side of the conversation: who may talk, and how much.
//!
//! The receiver checks a greeting against what this host knows of the machine, and counts log bytes so that a primary
//! never has more than [`CREDIT_BYTES`] on the way beyond what has been written here. What the bytes mean is the
//! replica store's business.

use super::message::{Head, Hello, Refusal, ToPrimary, Version};
use crate::base::{ids::Generation, limits::CREDIT_BYTES};

/// A grant is renewed when half of it is used: one message per 32 MiB, and never a pause on a healthy link.
const RENEW_BYTES: u64 = CREDIT_BYTES / 2;

/// What a primary may send beyond a grant: frames that were already being encoded when it used the grant up, their
/// headers, and the trailer.
const SLACK_BYTES: u64 = CREDIT_BYTES / 2;

/// The replica's half of one machine's conversation.
#[derive(Debug, Default)]
pub struct Receiver {
    received: u64,
    granted: u64,
}

impl Receiver {
    /// Judges a greeting apart from the roles.
    pub fn greet(hello: &Hello) -> Result<(), Refusal> {
        if hello.version == Version::CURRENT {
            Ok(())
        } else {
            Err(Refusal::Version {
                theirs: Version::CURRENT,
            })
        }
    }

    /// The answer to a greeting that was accepted.
    pub fn welcome(&mut self, follows: Generation, head: Head) -> ToPrimary {
        self.granted = CREDIT_BYTES;
        ToPrimary::Welcome {
            version: Version::CURRENT,
            follows,
            head,
            granted: self.granted,
        }
    }

    /// `bytes` of delta log were written here. Returns the new grant to announce, if one is due, or an error if the
    /// primary sent more than it was granted.
    pub fn received(&mut self, bytes: u64) -> Result<Option<ToPrimary>, Overrun> {
        self.received = self.received.checked_add(bytes).ok_or(Overrun)?;
        if self.received > self.granted.saturating_add(SLACK_BYTES) {
            return Err(Overrun);
        }
        if self.granted.saturating_sub(self.received) > RENEW_BYTES {
            return Ok(None);
        }
        self.granted = self.received.checked_add(CREDIT_BYTES).ok_or(Overrun)?;
        Ok(Some(ToPrimary::Granted {
            bytes: self.granted,
        }))
    }
}

/// A primary sent more delta-log bytes than it was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the primary sent more bytes than it was granted")]
pub struct Overrun;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::message::tests::hello;

    #[test]
    fn another_version_is_refused_with_both_numbers() {
        let mut hello = hello();
        assert_eq!(Receiver::greet(&hello), Ok(()));
        hello.version = Version(Version::CURRENT.0 + 1);
        let refusal = Receiver::greet(&hello).unwrap_err();
        let text = refusal.to_string();
        assert!(text.contains("version 2, this host 2"), "{text}");
    }

    #[test]
    fn grants_follow_what_was_written() {
        let mut receiver = Receiver::default();
        receiver.welcome(hello().claim.generation, Head::Empty);
        assert_eq!(receiver.received(RENEW_BYTES - 1), Ok(None));
        let renewed = RENEW_BYTES + CREDIT_BYTES;
        assert_eq!(
            receiver.received(1),
            Ok(Some(ToPrimary::Granted { bytes: renewed }))
        );
        assert_eq!(
            receiver.received(CREDIT_BYTES),
            Ok(Some(ToPrimary::Granted {
                bytes: renewed + CREDIT_BYTES
            }))
        );
        assert_eq!(
            receiver.received(CREDIT_BYTES + SLACK_BYTES + 1),
            Err(Overrun)
        );
    }
}
