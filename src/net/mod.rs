//! Floor 4: authenticated connections: QUIC, TLS 1.3 with certificates on both sides.
#![forbid(unsafe_code)]
