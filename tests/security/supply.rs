//! Dependencies that had advisories are in versions without, offline: what `cargo deny` says of `.deny.toml` where it is installed.

use std::fs;

/// The first version without the advisories that were known when it was written down.
const AT_LEAST: [(&str, [u64; 3]); 4] = [
    ("quinn-proto", [0, 11, 15]),
    ("rustls-webpki", [0, 103, 13]),
    ("lz4_flex", [0, 12, 1]),
    ("fuser", [0, 16, 0]),
];
const NEVER: [&str; 3] = ["bincode", "rustls-pemfile", "openssl"];

#[test]
fn what_is_locked_is_in_a_version_without_known_advisories() {
    let lock = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.lock");
    let lock = fs::read_to_string(lock).unwrap();
    let packages: Vec<(&str, [u64; 3])> = lock
        .split("[[package]]")
        .skip(1)
        .map(|package| {
            let field = |key: &str| {
                let line = package.lines().find_map(|line| line.strip_prefix(key));
                line.unwrap().trim_matches([' ', '=', '"'])
            };
            let version = field("version").split(['-', '+']).next().unwrap();
            let mut numbers = version.split('.').map(|number| number.parse().unwrap());
            (field("name"), [(); 3].map(|()| numbers.next().unwrap()))
        })
        .collect();
    for (name, least) in AT_LEAST {
        let mut found = packages
            .iter()
            .filter(|(known, _)| *known == name)
            .peekable();
        assert!(found.peek().is_some(), "{name} is not locked");
        assert!(
            found.all(|(_, version)| *version >= least),
            "{name} is older than {least:?}"
        );
    }
    for (name, _) in packages {
        assert!(!NEVER.contains(&name), "{name}");
    }
}
