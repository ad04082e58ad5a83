//! Floor 1: the conversation of a primary and a replica: messages, sender and receiver, all without input or output.
#![forbid(unsafe_code)]
