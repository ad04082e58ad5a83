//! A folder whose files tell what is done to them, before it is done.

use std::{fmt, io, sync::Arc};

use understudy::{
    base::units::{Extent, to_u64},
    storage::{Folder, Fua, Open, Space, Storage},
};

/// What is about to happen to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// So many bytes are read.
    Read(u64),
    /// So many bytes are written.
    Write(u64),
    /// So many bytes become zeros, or the length changes.
    Change(u64),
    Sync,
}

type Observer = dyn Fn(&str, Call) + Send + Sync;

/// A folder, or a file of this name, that is observed.
struct Observed<T: ?Sized> {
    name: String,
    observer: Arc<Observer>,
    inner: Arc<T>,
}

/// `folder`, with somebody who is told.
pub(crate) fn observed(
    folder: Arc<dyn Folder>,
    observer: impl Fn(&str, Call) + Send + Sync + 'static,
) -> Arc<dyn Folder> {
    Arc::new(Observed {
        name: ".".to_owned(),
        observer: Arc::new(observer),
        inner: folder,
    })
}

impl<T: ?Sized> Observed<T> {
    fn tell(&self, call: Call) {
        (self.observer)(&self.name, call);
    }

    fn below<U: ?Sized>(&self, name: &str, inner: Arc<U>) -> Observed<U> {
        Observed {
            name: name.to_owned(),
            observer: Arc::clone(&self.observer),
            inner,
        }
    }
}

impl<T: ?Sized> fmt::Debug for Observed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observed")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Folder for Observed<dyn Folder> {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn Storage>> {
        let file = self.inner.open(name, how)?;
        Ok(Arc::new(self.below(name, file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.inner.remove(name)
    }

    fn names(&self) -> io::Result<Vec<String>> {
        self.inner.names()
    }

    fn folder(&self, name: &str) -> io::Result<Arc<dyn Folder>> {
        Ok(Arc::new(self.below(name, self.inner.folder(name)?)))
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }
}

impl Storage for Observed<dyn Storage> {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.tell(Call::Read(to_u64(buf.len())));
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> io::Result<()> {
        self.tell(Call::Write(to_u64(buf.len())));
        self.inner.write_at(offset, buf, fua)
    }

    fn zero(&self, run: Extent, space: Space) -> io::Result<()> {
        self.tell(Call::Change(run.len));
        self.inner.zero(run, space)
    }

    fn data_after(&self, offset: u64) -> io::Result<Option<Extent>> {
        self.inner.data_after(offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.tell(Call::Change(len));
        self.inner.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.tell(Call::Sync);
        self.inner.sync()
    }
}
