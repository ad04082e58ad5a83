//! The chain of a differencing disk: its parent, the parent's parent, up to one that has none.
//!
//! Parents are opened for reading only and stay as they are: a log that one of them holds is replayed in memory. A child
//! holds what changed since it was made, so a parent that was written to since then makes nonsense of it. That is why a
//! parent's `DataWriteGuid`, which every writer renews, must be one that the child's locator names.
//!
//! Every image of a chain has its table in memory (see [`bat`](super::bat)); nothing else grows with its length.
//!
//! Sizes may differ: what lies past the end of a parent reads as zeros, what lies past the child's own is not seen.

use std::{io, sync::Arc};

use crate::disk::{Access, Content, Opening, parents::Parents};

use super::{
    disk::VhdxDisk,
    error::OpenError,
    format::VHDX_LOCATOR,
    locator::Locator,
    open::{Image, Replaying},
};

/// Longest chain of parents: Microsoft's own bound.
const PARENTS_MAX: usize = 256;
/// What the first image of a chain is called in messages; whoever opens it knows its name.
const FIRST: &str = "the image";

/// A parent in use.
#[derive(Debug)]
pub(super) struct Link {
    name: String,
    disk: Box<VhdxDisk>,
}

/// The images of the parents of `child`, nearest first, each with its name.
pub(super) fn read(
    child: &Image,
    parents: &Arc<dyn Parents>,
) -> Result<Vec<(String, Image)>, OpenError> {
    let mut chain: Vec<(String, Image)> = Vec::new();
    let mut parents = Arc::clone(parents);
    loop {
        let (name, image) = match chain.last() {
            Some((name, image)) => (name.as_str(), image),
            None => (FIRST, child),
        };
        let Some(locator) = &image.locator else {
            return Ok(chain);
        };
        if chain.len() == PARENTS_MAX {
            return Err(OpenError::TooManyParents {
                child: name.into(),
                limit: PARENTS_MAX,
            });
        }
        if locator.id != VHDX_LOCATOR {
            return Err(OpenError::Unsupported(format!(
                "a parent locator of type {}",
                locator.id
            )));
        }
        let found = parents
            .find(&locator.paths())
            .map_err(|source| OpenError::NoParent {
                child: name.into(),
                source,
            })?;
        let parent = Image::read(found.storage, &Replaying::InMemory).map_err(|source| {
            OpenError::Parent {
                child: name.into(),
                parent: found.name.clone(),
                source: Box::new(source),
            }
        })?;
        check(name, image, locator, &found.name, &parent)?;
        chain.push((found.name, parent));
        parents = found.parents;
    }
}

/// Whether `parent` is the parent that `child` was made over.
fn check(
    child: &str,
    image: &Image,
    locator: &Locator,
    parent: &str,
    found: &Image,
) -> Result<(), OpenError> {
    let expected = locator.linkages();
    let data_write = found.headers.current().data_write;
    if !expected.contains(&data_write) {
        return Err(OpenError::Linkage {
            child: child.into(),
            parent: parent.into(),
            expected,
            found: data_write,
        });
    }
    let [ours, theirs] = [image, found].map(|image| image.parameters.geometry.logical_sector);
    if ours != theirs {
        return Err(OpenError::ParentSectors {
            child: child.into(),
            parent: parent.into(),
            expected: ours,
            found: theirs,
        });
    }
    Ok(())
}

/// Opens the parents of `child`.
pub(super) fn open(child: &Image, opening: &Opening) -> Result<Option<Link>, OpenError> {
    let reading = Opening::new(Access::ReadOnly, Arc::clone(&opening.ids));
    let mut link = None;
    for (name, image) in read(child, &opening.parents)?.into_iter().rev() {
        let disk = Box::new(VhdxDisk::assemble(image, &reading, link));
        link = Some(Link { name, disk });
    }
    Ok(link)
}

impl Link {
    /// Fills `buf` from `offset` of the parent's disk.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.named(self.disk.read_run(offset, buf))
    }

    /// What the run at `offset` holds that ends at `end` at the latest, and where it ends.
    pub(super) fn piece_at(&self, offset: u64, end: u64) -> io::Result<(u64, Content)> {
        if offset >= self.disk.parameters.geometry.size {
            return Ok((end, Content::Zero));
        }
        let (stop, content) = self.named(self.disk.piece_at(offset, self.disk.size()))?;
        Ok((stop.min(end), content))
    }

    fn named<T>(&self, outcome: io::Result<T>) -> io::Result<T> {
        outcome.map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("in the parent {}: {error}", self.name),
            )
        })
    }
}
