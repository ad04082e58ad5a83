//! The demo's load: files with known content on the guest's file system, made, rewritten, removed and read back.

use std::{
    collections::BTreeMap,
    fmt, fs,
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use crate::base::{
    checksum::{Digest, Sha256},
    ids::{Ids, SeededIds},
    units::{Bytes, KIB, MIB, to_u64, to_usize},
};

/// Largest file.
const FILE_BYTES_MAX: u64 = 4 * MIB;
/// Files that are kept; from then on old ones are replaced.
const FILES_MAX: usize = 192;
/// Size of a rewrite in place.
const PATCH_BYTES: u64 = 16 * KIB;

/// Files, and what they must hold.
#[derive(Debug)]
pub(super) struct Files {
    root: PathBuf,
    random: SeededIds,
    kept: BTreeMap<String, Digest>,
    made: u64,
    removed: u64,
    patched: u64,
    verified: u64,
    bytes: u64,
}

impl Files {
    pub(super) fn new(root: PathBuf) -> Self {
        let random = SeededIds::new(0x5EED);
        Self {
            root,
            random,
            kept: BTreeMap::new(),
            made: 0,
            removed: 0,
            patched: 0,
            verified: 0,
            bytes: 0,
        }
    }

    /// Where the file system is mounted.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Makes `bytes` of files.
    pub(super) fn seed(&mut self, bytes: u64) -> anyhow::Result<()> {
        let mut left = bytes;
        while left > 0 {
            let size = FILE_BYTES_MAX.min(left);
            self.make(size)?;
            left -= size;
        }
        Ok(())
    }

    /// Makes, patches, removes and verifies files for `time`, each change made durable by fsync.
    pub(super) fn churn(&mut self, time: Duration) -> anyhow::Result<()> {
        let started = Instant::now();
        while started.elapsed() < time {
            match self.pick(8) {
                0..=2 => {
                    let size = 1 + self.pick(FILE_BYTES_MAX);
                    self.make(size)?;
                }
                3..=5 => self.patch()?,
                6 => self.verify_one()?,
                _ => self.remove()?,
            }
        }
        Ok(())
    }

    /// Reads every file below `root` and compares; returns how many there are.
    pub(super) fn verify_all(&self, root: &Path) -> anyhow::Result<usize> {
        for (name, expected) in &self.kept {
            let found = digest_of(&root.join(name))?;
            ensure!(
                found == *expected,
                "{name} holds {found}, it was written as {expected}"
            );
        }
        Ok(self.kept.len())
    }

    fn pick(&self, below: u64) -> u64 {
        let bytes = self.random.fresh();
        u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) % below
    }

    fn fill(&self, len: u64) -> Vec<u8> {
        let mut content = Vec::with_capacity(to_usize(len) + 16);
        // Half of a block is random and half repeats, as data of real guests do.
        while to_u64(content.len()) < len {
            let piece = self.random.fresh();
            content.extend_from_slice(&piece);
            content.extend_from_slice(b"understudy demo.");
        }
        content.truncate(to_usize(len));
        content
    }

    fn some_file(&self) -> Option<String> {
        let count = to_u64(self.kept.len());
        if count == 0 {
            return None;
        }
        self.kept.keys().nth(to_usize(self.pick(count))).cloned()
    }

    fn make(&mut self, size: u64) -> anyhow::Result<()> {
        if self.kept.len() >= FILES_MAX {
            self.remove()?;
        }
        let name = format!("file-{:06}", self.made);
        let content = self.fill(size);
        let mut file =
            File::create(self.root.join(&name)).with_context(|| format!("cannot create {name}"))?;
        file.write_all(&content)
            .with_context(|| format!("cannot write {name}"))?;
        file.sync_all()
            .with_context(|| format!("cannot fsync {name}"))?;
        let mut digest = Sha256::default();
        digest.update(&content);
        self.kept.insert(name, digest.finish());
        self.made += 1;
        self.bytes += size;
        Ok(())
    }

    fn patch(&mut self) -> anyhow::Result<()> {
        let Some(name) = self.some_file() else {
            return Ok(());
        };
        let path = self.root.join(&name);
        let mut file = File::options().read(true).write(true).open(&path)?;
        let len = file.metadata()?.len();
        let at = self.pick(len);
        let patch = self.fill(PATCH_BYTES.min(len - at));
        file.seek(SeekFrom::Start(at))?;
        file.write_all(&patch)
            .with_context(|| format!("cannot patch {name}"))?;
        file.sync_data()
            .with_context(|| format!("cannot fsync {name}"))?;
        drop(file);
        self.kept.insert(name, digest_of(&path)?);
        self.patched += 1;
        self.bytes += to_u64(patch.len());
        Ok(())
    }

    fn verify_one(&mut self) -> anyhow::Result<()> {
        let Some(name) = self.some_file() else {
            return Ok(());
        };
        let found = digest_of(&self.root.join(&name))?;
        ensure!(
            found == self.kept[&name],
            "{name} does not read as it was written"
        );
        self.verified += 1;
        Ok(())
    }

    fn remove(&mut self) -> anyhow::Result<()> {
        let Some(name) = self.some_file() else {
            return Ok(());
        };
        fs::remove_file(self.root.join(&name)).with_context(|| format!("cannot remove {name}"))?;
        self.kept.remove(&name);
        self.removed += 1;
        Ok(())
    }
}

impl fmt::Display for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            made,
            patched,
            removed,
            verified,
            bytes,
            ..
        } = self;
        write!(
            f,
            "{made} files made, {patched} patched, {removed} removed, {verified} read back, {}",
            Bytes(*bytes)
        )
    }
}

fn digest_of(path: &Path) -> anyhow::Result<Digest> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut digest = Sha256::default();
    let mut piece = vec![0; to_usize(MIB)];
    loop {
        let count = file
            .read(&mut piece)
            .with_context(|| format!("cannot read {}", path.display()))?;
        if count == 0 {
            return Ok(digest.finish());
        }
        digest.update(&piece[..count]);
    }
}
