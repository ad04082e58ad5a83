//! Floor 2: which blocks changed: maps, intent log, cuts, preserved blocks.
