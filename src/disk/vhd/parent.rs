//! The parents of a differencing disk: found by what each child calls its parent, known by their identity.
//!
//! A parent is itself a VHD of any kind, opened for reading only. It may be shorter than its child, which reads as zeros
//! from there on.

use std::sync::Arc;

use crate::{disk::parents::Parents, storage::Storage};

use super::{Kind, error::OpenError, open::Image};

/// Most images of a chain, the child included: reading may go through all of them, one within the other.
const CHAIN_MAX: usize = 256;

/// Images of a chain and the files they are in, the youngest first.
pub(super) type Chain = Vec<(Arc<dyn Storage>, Image)>;

/// Reads all parents of `child`, the nearest first.
pub(super) fn read_chain(child: &Image, parents: &Arc<dyn Parents>) -> Result<Chain, OpenError> {
    let mut chain = Chain::new();
    let mut parents = Arc::clone(parents);
    let mut name = None;
    loop {
        let youngest = chain.last().map_or(child, |(_, image)| image);
        let Some(sparse) = &youngest.sparse else {
            return Ok(chain);
        };
        if youngest.kind != Kind::Differencing {
            return Ok(chain);
        }
        if chain.len() + 1 == CHAIN_MAX {
            return Err(OpenError::ChainTooLong(CHAIN_MAX));
        }
        let paths = sparse.header.parent_paths(&sparse.locators);
        let found = parents
            .find(&paths)
            .map_err(|source| in_parent(name, source.into()))?;
        let image = Image::read(found.storage.as_ref())
            .map_err(|source| in_parent(Some(found.name.clone()), source))?;
        let (id, wanted) = (image.current.footer.id, sparse.header.header.parent_id);
        if id != wanted {
            return Err(OpenError::WrongParent {
                name: found.name,
                found: id,
                wanted,
            });
        }
        chain.push((found.storage, image));
        parents = found.parents;
        name = Some(found.name);
    }
}

/// The error of the image called `name`, or of the child itself.
fn in_parent(name: Option<String>, source: OpenError) -> OpenError {
    match name {
        Some(name) => OpenError::Parent {
            name,
            source: Box::new(source),
        },
        None => source,
    }
}
