//! Style as a test: floors, file heads, file sizes, unsafe code, marks of unfinished work.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// The floor of each module; a module uses strictly lower floors only.
const FLOORS: [(&str, u32); 17] = [
    ("base", 0),
    ("storage", 1),
    ("delta", 1),
    ("protocol", 1),
    ("disk", 2),
    ("track", 2),
    ("volume", 3),
    ("replica", 3),
    ("coord", 3),
    ("shim", 4),
    ("net", 4),
    ("bench", 4),
    ("testing", 4),
    ("web", 4),
    ("node", 5),
    ("cli", 6),
    ("main", 7),
];
/// Floors up to this one are synchronous: no async, no sockets.
const SYNCHRONOUS: u32 = 3;
/// Longest file before its tests, in lines.
const LINES_MAX: usize = 600;
/// The one file that may hold unsafe code.
const UNSAFE_FILE: &str = "src/track/mapping.rs";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(below: &str) -> Vec<(String, String)> {
    let mut pending = vec![root().join(below)];
    let mut files = Vec::new();
    while let Some(path) = pending.pop() {
        if path.is_dir() {
            pending.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path
                .strip_prefix(root())
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned();
            files.push((name, fs::read_to_string(&path).unwrap()));
        }
    }
    assert!(!files.is_empty(), "no Rust files below {below}");
    files.sort();
    files
}

/// The part of a file before its unit tests.
fn code(text: &str) -> &str {
    text.split("\n#[cfg(test)]\n").next().unwrap()
}

/// Where the text of `//` comments begins, code only.
fn without_comments(text: &str) -> String {
    text.lines()
        .map(|line| line.split("//").next().unwrap())
        .collect::<Vec<_>>()
        .join("\n")
}

fn module_of(file: &str) -> String {
    let below = file.strip_prefix("src/").unwrap();
    below
        .split('/')
        .next()
        .unwrap()
        .trim_end_matches(".rs")
        .to_owned()
}

/// The top-level modules that a text names after `crate::`, also inside braces.
fn used_modules(text: &str) -> Vec<String> {
    let mut used = Vec::new();
    for part in text.split("crate::").skip(1) {
        if let Some(group) = part.strip_prefix('{') {
            let mut depth = 1;
            let mut item = String::new();
            for letter in group.chars() {
                match letter {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 1 => used.push(first_word(&std::mem::take(&mut item))),
                    _ if depth == 1 => item.push(letter),
                    _ => {}
                }
                if depth == 0 {
                    break;
                }
            }
            used.push(first_word(&item));
        } else {
            used.push(first_word(part));
        }
    }
    used.retain(|word| !word.is_empty());
    used
}

fn first_word(text: &str) -> String {
    text.trim_start()
        .chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect()
}

#[test]
fn modules_use_lower_floors_only() {
    let floors: BTreeMap<_, _> = FLOORS.into_iter().collect();
    let mut wrong = Vec::new();
    for (file, text) in rust_files("src") {
        let module = module_of(&file);
        if module == "lib" {
            continue;
        }
        let Some(&floor) = floors.get(module.as_str()) else {
            panic!("{file}: module {module} has no floor: add it to the table");
        };
        for used in used_modules(&without_comments(code(&text))) {
            let Some(&below) = floors.get(used.as_str()) else {
                continue;
            };
            if used != module && below >= floor {
                wrong.push(format!(
                    "{file} (floor {floor}) uses {used} (floor {below})"
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn lower_floors_are_synchronous() {
    let floors: BTreeMap<_, _> = FLOORS.into_iter().collect();
    let mut wrong = Vec::new();
    for (file, text) in rust_files("src") {
        if floors
            .get(module_of(&file).as_str())
            .is_none_or(|&floor| floor > SYNCHRONOUS)
        {
            continue;
        }
        let code = without_comments(code(&text));
        for sign in [
            "async ",
            ".await",
            "tokio::",
            "std::net",
            "thread::spawn",
            "thread::sleep",
            "SystemTime::now",
            "Instant::now",
        ] {
            if code.contains(sign) && file != "src/base/clock.rs" {
                wrong.push(format!("{file}: {sign}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_file_says_what_it_is() {
    let files = [rust_files("src"), rust_files("tests")].concat();
    let silent: Vec<_> = files
        .iter()
        .filter(|(_, text)| !text.starts_with("//!"))
        .map(|(file, _)| file)
        .collect();
    assert!(silent.is_empty(), "files without a //! head: {silent:#?}");
}

#[test]
fn files_stay_readable() {
    let files = [rust_files("src"), rust_files("tests")].concat();
    let long: Vec<_> = files
        .iter()
        .map(|(file, text)| (file, code(text).lines().count()))
        .filter(|&(_, lines)| lines > LINES_MAX)
        .collect();
    assert!(
        long.is_empty(),
        "files over {LINES_MAX} lines before their tests: {long:#?}"
    );
}

#[test]
fn unsafe_code_lives_in_one_file() {
    for (file, text) in rust_files("src") {
        let code = without_comments(&text);
        let has_unsafe =
            code.contains("unsafe {") || code.contains("unsafe impl") || code.contains("unsafe fn");
        assert!(
            !has_unsafe || file == UNSAFE_FILE,
            "{file} holds unsafe code"
        );
        if file.ends_with("/mod.rs")
            && file.matches('/').count() == 2
            && module_of(&file) != "track"
        {
            assert!(
                text.contains("#![forbid(unsafe_code)]"),
                "{file} does not forbid unsafe code"
            );
        }
    }
}

#[test]
fn nothing_is_left_unfinished() {
    let marks = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("HA", "CK"),
        concat!("unimple", "mented!("),
    ];
    let files = [rust_files("src"), rust_files("tests")].concat();
    for (file, text) in &files {
        for mark in marks {
            assert!(!text.contains(mark), "{file}: {mark}");
        }
        assert!(
            !text.contains(concat!("#[ig", "nore]")),
            "{file}: an ignored test gives its reason"
        );
    }
}

#[test]
fn the_top_level_holds_only_what_belongs_there() {
    let expected = [
        "Cargo.toml",
        "Cargo.lock",
        "src",
        "disks",
        "tests",
        "scripts",
        "bench",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "target",
    ];
    for entry in fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(
            name.starts_with('.') || expected.contains(&name.as_str()),
            "{name} does not belong at the top level"
        );
    }
    for needed in [
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "scripts/check",
        "scripts/demo",
        ".ci/run",
    ] {
        assert!(
            PathBuf::from(root()).join(needed).exists(),
            "{needed} is missing"
        );
    }
}

#[test]
fn the_floor_test_sees_what_it_should() {
    assert_eq!(
        used_modules("use crate::{base::units::{A, B}, disk::Disk}; crate::net::x();"),
        ["base", "disk", "net"]
    );
}
