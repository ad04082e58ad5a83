//! Floor 6: the verbs. The only place that prints.
#![forbid(unsafe_code)]
