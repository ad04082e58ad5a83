//! What a client and the mount helper say to each other: one JSON object in one message each.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::MESSAGE_BYTES_MAX;
use crate::shim::{
    mount::{Unmount, Visibility},
    point::Detached,
};

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Request {
    /// To mount at a folder, after a dead mount there was taken away.
    Mount { dir: PathBuf, access: Visibility },
    /// To unmount what was mounted there and has this mark.
    Unmount {
        dir: PathBuf,
        mark: String,
        how: Unmount,
    },
    /// To take away a mount whose server has died.
    Recover { dir: PathBuf },
}

/// What the helper answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Answer {
    /// It is mounted; the descriptor of the device comes with the message.
    Mounted { mark: String },
    /// What became of the mount.
    Unmounted { outcome: Detached },
    /// Whether there was a dead mount.
    Recovered { found: bool },
    /// Nothing was done.
    Refused { why: String },
}

impl Request {
    /// Reads what a client sent.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > MESSAGE_BYTES_MAX {
            return Err(format!("a request over {MESSAGE_BYTES_MAX} bytes"));
        }
        serde_json::from_slice(bytes).map_err(|error| format!("not a request: {error}"))
    }
}

/// One message. A text that is too long for one is left out.
pub(super) fn encode<T: Serialize>(message: &T) -> Option<Vec<u8>> {
    let bytes = serde_json::to_vec(message).ok()?;
    (bytes.len() <= MESSAGE_BYTES_MAX).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_said_is_understood() {
        for request in [
            Request::Mount {
                dir: "/mnt/a b\u{1}".into(),
                access: Visibility::AllUsers,
            },
            Request::Unmount {
                dir: "/mnt".into(),
                mark: "0:50".into(),
                how: Unmount::IfUnused,
            },
            Request::Recover { dir: "/".into() },
        ] {
            assert_eq!(Request::parse(&encode(&request).unwrap()), Ok(request));
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "{}",
            "null",
            r#"{"mount":{"dir":"/mnt"}}"#,
            r#"{"mount":{"dir":"/mnt","access":"owner","options":"suid"}}"#,
            r#"{"remount":{"dir":"/mnt"}}"#,
            r#"{"recover":{"dir":"/mnt"}} "#,
            r#"{"recover":{"dir":"/mnt"}}{"recover":{"dir":"/"}}"#,
        ] {
            let refused = Request::parse(text.as_bytes()).is_err();
            assert_eq!(refused, !text.ends_with(' '), "{text}");
        }
        let long = Request::Recover {
            dir: "x".repeat(MESSAGE_BYTES_MAX).into(),
        };
        assert_eq!(encode(&long), None);
        let long = serde_json::to_vec(&long).unwrap();
        assert!(Request::parse(&long).unwrap_err().contains("over"));
        let deep = "[".repeat(MESSAGE_BYTES_MAX);
        Request::parse(deep.as_bytes()).unwrap_err();
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = Request::parse(&bytes);
        }
    }
}
