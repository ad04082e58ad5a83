//! The demo's proofs: two comparisons of the images that share no code, and the guest's file system on the replica.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, ensure};

use super::{
    load::Files,
    stage::{FileSystem, Host, LoopDevice, Tools, text},
};
use crate::{
    base::{
        checksum::{Digest, Sha256, is_zero},
        ids::SystemIds,
        units::{BLOCK_BYTES, MIB, to_u64, to_usize},
    },
    disk::{Access, Content, Opening, image},
    storage::file::FileStorage,
};

/// The replica's image of the one disk: the only `.vhdx` in its store.
pub(super) fn replica_image(dir: &Path) -> anyhow::Result<PathBuf> {
    let mut pending = vec![dir.join("replica/store")];
    while let Some(folder) = pending.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                pending.push(path);
            } else if path
                .extension()
                .is_some_and(|extension| extension == "vhdx")
            {
                return Ok(path);
            }
        }
    }
    anyhow::bail!("the replica's store holds no image")
}

/// The content digest of both images, if it is the same: SHA-256 over index and bytes of every block that is not zero.
pub(super) fn digests(primary: &Path, replica: &Path) -> anyhow::Result<Digest> {
    let (source, target) = (digest(primary)?, digest(replica)?);
    ensure!(
        source == target,
        "the images differ: primary {source}, replica {target}"
    );
    Ok(source)
}

fn digest(path: &Path) -> anyhow::Result<Digest> {
    let storage = FileStorage::open(path, Access::ReadOnly)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let opening = Opening::new(Access::ReadOnly, Arc::new(SystemIds::default()));
    let disk = image::open(Arc::new(storage), image::Format::Vhdx, &opening)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let size = disk.geometry().size;
    let mut digest = Sha256::default();
    let mut piece = vec![0; to_usize(MIB)];
    let mut offset = 0;
    while offset < size {
        let (run, content) = disk.run_at(offset)?;
        if content == Content::Zero {
            // The next run starts at a block: a block with any data is read whole below.
            offset =
                (run.end() / BLOCK_BYTES * BLOCK_BYTES).max(offset / BLOCK_BYTES * BLOCK_BYTES);
            if run.end() >= size {
                break;
            }
            if run.end() % BLOCK_BYTES == 0 {
                continue;
            }
        }
        let start = offset / BLOCK_BYTES * BLOCK_BYTES;
        let len = to_usize(MIB.min(size - start));
        disk.read_at(start, &mut piece[..len])?;
        for (block, bytes) in
            (start / BLOCK_BYTES..).zip(piece[..len].chunks(to_usize(BLOCK_BYTES)))
        {
            if !is_zero(bytes) {
                digest.update(&block.to_le_bytes());
                digest.update(bytes);
            }
        }
        offset = start + to_u64(len);
    }
    Ok(digest.finish())
}

/// `qemu-img compare` of both images.
pub(super) fn qemu_compare(tools: Tools, primary: &Path, replica: &Path) -> anyhow::Result<()> {
    let (source, target) = (text(primary)?, text(replica)?);
    let said = tools.run(
        "qemu-img",
        &["compare", "-f", "vhdx", "-F", "vhdx", &source, &target],
    )?;
    ensure!(said.contains("identical"), "qemu-img compare: {said}");
    Ok(())
}

/// Checks the file system on the replica's image and every file on it; returns how many there are.
pub(super) fn file_system(
    tools: Tools,
    dir: &Path,
    replica: &Path,
    files: &Files,
) -> anyhow::Result<usize> {
    let host = Host::look(dir, replica)?;
    let name = replica
        .file_stem()
        .context("an image has a name")?
        .to_string_lossy();
    let raw = dir.join("look").join(format!("{name}.raw"));
    tools.run("e2fsck", &["-f", "-n", &text(&raw)?])?;
    let verified = {
        let device = LoopDevice::attach_read_only(tools, &raw)?;
        let _mounted = FileSystem::mount_read_only(tools, device.path(), files.root())?;
        files.verify_all(files.root())?
    };
    host.stop()?;
    Ok(verified)
}
