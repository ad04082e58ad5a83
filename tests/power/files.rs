//! The file system on the guest's disk: what the guest was told is durable in it, and what is found after a cut.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
};

use understudy::base::checksum::{Digest, Sha256, is_zero};

use crate::support::run;

/// Names and hashes of files.
pub(crate) type Files = BTreeMap<String, String>;

/// What `e2fsck -p` may say when nothing is wrong: what a crash of the guest alone leaves is a journal, and files that were
/// being removed.
const USUAL: [&str; 4] = [
    "recovering journal",
    ": clean, ",
    "orphaned inode",
    "Setting free ",
];

/// What the guest knows to be durable, by what it noted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Told {
    /// The hash of each file, or that there is none of that name.
    files: BTreeMap<String, Option<String>>,
    /// Files that it is changing: nothing is promised about them.
    changing: BTreeSet<String>,
}

impl Told {
    /// The guest noted something.
    pub(crate) fn hear(&mut self, note: &str) {
        let mut words = note.split(' ').map(str::to_owned);
        match words.next().as_deref() {
            Some("begin") => self.changing.extend(words),
            Some("durable") => {
                self.changing.clear();
                while let (Some(name), Some(sum)) = (words.next(), words.next()) {
                    self.files.insert(name, (sum != "-").then_some(sum));
                }
            }
            _ => panic!("the guest noted {note:?}"),
        }
    }

    /// It noted something while the instant was being made that this is about: it may have happened or not.
    pub(crate) fn hear_meanwhile(&mut self, note: &str) {
        let words = note.split(' ').skip(1);
        self.changing.extend(words.map(str::to_owned));
    }

    /// Files that are there for certain.
    pub(crate) fn there(&self) -> Files {
        let files = self.files.iter();
        files
            .filter_map(|(name, sum)| Some((name.clone(), sum.clone()?)))
            .collect()
    }

    /// Whether the files that were `found` are those that the guest knows of.
    pub(crate) fn compare(&self, found: &Files) -> Result<(), String> {
        for (name, sum) in &self.files {
            if !self.changing.contains(name) && found.get(name) != sum.as_ref() {
                return Err(format!(
                    "{name} holds {:?}; the guest was told that {sum:?} is durable",
                    found.get(name)
                ));
            }
        }
        let known =
            |name: &&String| self.files.contains_key(*name) || self.changing.contains(*name);
        match found.keys().find(|name| !known(name)) {
            Some(name) => Err(format!("{name} is there, and the guest never made it")),
            None => Ok(()),
        }
    }

    /// How many files the guest knows something of.
    pub(crate) fn count(&self) -> usize {
        self.files.len()
    }
}

/// What a guest finds in the file system on a disk with this content, after its journal was replayed; an error if more than
/// that is needed.
pub(crate) fn look(content: &[u8]) -> Result<Files, String> {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk");
    write_sparse(&image, content);
    look_at(&image, folder.path()).map_err(|error| {
        let kept = folder.keep();
        format!("{error}\nkept in {}", kept.display())
    })
}

fn look_at(image: &Path, folder: &Path) -> Result<Files, String> {
    let check = |how: &str| {
        let output = run("e2fsck", [how.as_ref(), image.as_os_str()]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code(), said)
    };
    // As at each boot: the journal, and what was being removed. Without -f nothing else is looked at, so nothing is
    // mended that the second run should find.
    let (code, said) = check("-p");
    let usual = |line: &str| USUAL.iter().any(|usual| line.contains(usual));
    if !matches!(code, Some(0 | 1)) || !said.lines().all(usual) {
        return Err(format!("e2fsck -p: {code:?}\n{said}"));
    }
    let (code, said) = check("-fn");
    if code != Some(0) {
        return Err(format!("e2fsck -fn: {code:?}\n{said}"));
    }
    let out = folder.join("files");
    fs::create_dir(&out).unwrap();
    let dump = format!("rdump / {}", out.display());
    let output = run("debugfs", ["-R".as_ref(), dump.as_ref(), image.as_os_str()]);
    assert!(output.status.success(), "debugfs: {output:?}");
    let mut files = Files::new();
    for entry in fs::read_dir(&out).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            files.insert(name, sha256(&fs::read(&path).unwrap()).to_string());
        }
    }
    Ok(files)
}

fn write_sparse(path: &Path, content: &[u8]) {
    let file = File::create_new(path).unwrap();
    file.set_len(content.len().try_into().unwrap()).unwrap();
    for (chunk, at) in content.chunks(4096).zip((0..).step_by(4096)) {
        if !is_zero(chunk) {
            file.write_all_at(chunk, at).unwrap();
        }
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> Digest {
    let mut hash = Sha256::default();
    hash.update(bytes);
    hash.finish()
}
