//! Floor 1: the delta log (`.hrl`), one epoch serialised; the same bytes on the wire and on disk.
#![forbid(unsafe_code)]
