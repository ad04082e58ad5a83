//! Children and parents that do not belong together, and chains without an end.

use super::{
    differencing::{LOCATOR_AT, base, child_of, fill, write_u64},
    *,
};
use crate::{
    base::units::{Extent, MIB},
    disk::{
        Content, Fua,
        parents::{self, ParentsError},
    },
    storage::memory::Power,
};

/// What opening a child says after `change` was done to it or to its parent.
fn refusal(change: impl FnOnce(&Subject, &Subject)) -> Option<OpenError> {
    let power = Power::new();
    let parent = base(&power, &options(4 << 20, Kind::Dynamic));
    let child = child_of(&parent, "p", 1 << 20, &power);
    change(&child, &parent);
    child.open_as(Access::ReadOnly).err()
}

/// Puts a text of the same length over the first or the second linkage.
fn set_linkage(child: &Subject, second: bool, text: &str) {
    let texts = LOCATOR_AT + 20 + 3 * 12;
    let (keys, value) = (["parent_linkage", "parent_linkage2"], 38);
    let first = texts + 2 * keys[0].len() as u64;
    let at = if second {
        first + 2 * value + 2 * keys[1].len() as u64
    } else {
        first
    };
    let bytes: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert_eq!(bytes.len(), 76);
    child.storage.write_at(at, &bytes, Fua::No).unwrap();
}

fn data_write(image: &Subject) -> uuid::Uuid {
    let file: Arc<dyn Storage> = Arc::clone(&image.storage) as _;
    let [first, _] = inspect(&file).headers;
    first.unwrap().data_write
}

#[test]
fn a_parent_must_be_the_one_the_child_was_made_over() {
    let braced = |id: uuid::Uuid| id.braced().to_string();
    let other = uuid::Uuid::from_u128(77);
    assert!(refusal(|_, _| {}).is_none());
    let upper = |child: &Subject, parent: &Subject| {
        set_linkage(child, false, &braced(data_write(parent)).to_uppercase());
    };
    assert!(refusal(upper).is_none());
    let second = |child: &Subject, parent: &Subject| {
        set_linkage(child, false, &braced(other));
        set_linkage(child, true, &braced(data_write(parent)));
    };
    assert!(refusal(second).is_none());
    let written = refusal(|_, parent| fill(parent, 1));
    let Some(OpenError::Linkage {
        child,
        parent,
        expected,
        found,
    }) = written
    else {
        panic!("{written:?}");
    };
    assert_eq!((child.as_str(), parent.as_str()), ("the image", "p"));
    assert!(expected.len() == 1 && expected[0] != found);
    let swapped = refusal(|child, _| set_linkage(child, false, &braced(other)));
    assert!(matches!(swapped, Some(OpenError::Linkage { .. })));
    // A parent without identity is nobody's, even if a child asks for it: all zeros is how Windows says "none".
    let nil = refusal(|child, parent| {
        set_linkage(child, false, &braced(uuid::Uuid::nil()));
        let mut bytes = parent.storage.bytes();
        for at in [0x10000, 0x20000] {
            bytes[at + 32..at + 48].fill(0);
            format::seal(&mut bytes[at..at + 4096]);
            let header = &bytes[at..at + 4096];
            parent.storage.write_at(at as u64, header, Fua::No).unwrap();
        }
        assert!(data_write(parent).is_nil());
    });
    assert!(matches!(nil, Some(OpenError::Linkage { .. })), "{nil:?}");
    let sectors = refusal(|_, parent| {
        let at = 2 * MIB + 0x1_0010;
        let bytes = 4096u32.to_le_bytes();
        parent.storage.write_at(at, &bytes, Fua::No).unwrap();
    });
    assert!(
        matches!(
            sectors,
            Some(OpenError::ParentSectors {
                expected: 512,
                found: 4096,
                ..
            })
        ),
        "{sectors:?}"
    );
    let damaged = refusal(|_, parent| parent.storage.set_len(100).unwrap());
    assert!(matches!(damaged, Some(OpenError::Parent { .. })));
    let foreign = refusal(|child, _| write_u64(child, LOCATOR_AT, 5));
    assert!(matches!(foreign, Some(OpenError::Unsupported(_))));
}

#[test]
fn a_child_without_its_parent_is_refused() {
    let power = Power::new();
    let parent = base(&power, &options(4 << 20, Kind::Dynamic));
    let child = child_of(&parent, "p", 1 << 20, &power);
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let before = child.storage.bytes();
        let error = open_as(Arc::clone(&child.storage), access).unwrap_err();
        let OpenError::NoParent { source, .. } = error else {
            panic!("{error:?}");
        };
        assert!(matches!(source, ParentsError::NotConfigured { paths } if paths == [r".\p"]));
        assert!(child.storage.bytes() == before);
    }
}

/// Finds the same file whoever asks.
#[derive(Debug)]
struct Always(Arc<dyn Storage>);

impl Parents for Always {
    fn find(&self, _: &[String]) -> Result<parents::Parent, ParentsError> {
        Ok(parents::Parent {
            storage: Arc::clone(&self.0),
            name: "always".into(),
            parents: Arc::new(Self(Arc::clone(&self.0))),
        })
    }
}

#[test]
fn a_chain_has_an_end() {
    let power = Power::new();
    let mut image = base(&power, &options(1 << 20, Kind::Dynamic));
    fill(&image, 7);
    for _ in 0..256 {
        image = child_of(&image, "p", 1 << 20, &power);
    }
    let disk = image.open_as(Access::ReadOnly).unwrap();
    assert!(read_all(&disk).iter().all(|&byte| byte == 7));
    assert_eq!(
        disk.run_at(0).unwrap(),
        (Extent::new(0, MIB), Content::Data)
    );
    drop(disk);
    let one_more = child_of(&image, "p", 1 << 20, &power);
    let error = one_more.open_as(Access::ReadOnly).unwrap_err();
    assert!(matches!(
        error,
        OpenError::TooManyParents { limit: 256, .. }
    ));
    // A file that is its own parent: where files have an identity it is found at once, otherwise by the limit.
    let parent = base(&power, &options(1 << 20, Kind::Dynamic));
    let mut own = child_of(&parent, "p", 1 << 20, &power);
    set_linkage(&own, false, &data_write(&own).braced().to_string());
    own.parents = Arc::new(Always(Arc::clone(&own.storage) as _));
    let error = own.open_as(Access::ReadOnly).unwrap_err();
    assert!(matches!(error, OpenError::TooManyParents { .. }), "{error}");
    let file = ("p".to_owned(), Arc::clone(&own.storage) as _);
    own.parents = Arc::new(MemoryParents::new(vec![file]));
    let error = own.open_as(Access::ReadOnly).unwrap_err();
    let looped = |error: &OpenError| match error {
        OpenError::NoParent { source, .. } => matches!(source, ParentsError::Loop { .. }),
        _ => false,
    };
    assert!(looped(&error), "{error:?}");
}
