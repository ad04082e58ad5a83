//! Long buffers that are used again.
//!
//! A fresh MiB costs a page fault for each of its pages and zeros that nobody reads: together more than reading or
//! checking what it is for. So whoever fills such buffers keeps a handle on each that it gave away, and takes it back
//! when all others have dropped theirs.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Handles on at most `COUNT_MAX` buffers that were given away. While they are kept their memory is kept.
#[derive(Debug, Default)]
pub struct Buffers<const COUNT_MAX: usize>(VecDeque<Bytes>);

impl<const COUNT_MAX: usize> Buffers<COUNT_MAX> {
    /// A buffer that nobody uses any more, with room for `capacity` bytes. It begins where it began when it was lent, and
    /// holds what it held.
    pub fn reclaim(&mut self, capacity: usize) -> Option<BytesMut> {
        let free = self.0.iter().position(Bytes::is_unique)?;
        let buffer = self.0.remove(free)?.try_into_mut().ok()?;
        (buffer.capacity() >= capacity).then_some(buffer)
    }

    /// Keeps a handle on a buffer that is given away, if it keeps fewer than it may.
    pub fn lend(&mut self, buffer: &Bytes) {
        if self.0.len() < COUNT_MAX {
            self.0.push_back(buffer.clone());
        }
    }

    /// Lets go of all of them.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_when_all_others_have_dropped_it() {
        let mut buffers = Buffers::<2>::default();
        let [first, second, third] = [1, 2, 3].map(|n| Bytes::from(vec![n; 4096]));
        for buffer in [&first, &second, &third] {
            buffers.lend(buffer);
        }
        let part = second.slice(1..2);
        drop((second, third));
        assert!(buffers.reclaim(1).is_none());
        drop(part);
        let again = buffers.reclaim(4096).unwrap();
        assert_eq!(again, vec![2; 4096]);
        drop(first);
        assert!(buffers.reclaim(4097).is_none(), "too short, and let go of");
        assert!(buffers.reclaim(1).is_none());
    }

    #[test]
    fn a_part_comes_back_with_the_room_behind_it() {
        let mut buffers = Buffers::<1>::default();
        let mut whole = BytesMut::zeroed(8192);
        let mut rest = whole.split_off(100);
        let at = rest.as_ptr();
        let part = rest.split_to(10).freeze();
        buffers.lend(&part);
        drop((whole, part));
        assert!(buffers.reclaim(10).is_none());
        drop(rest);
        let again = buffers.reclaim(8092).unwrap();
        assert_eq!((again.as_ptr(), again.len()), (at, 10));
    }
}
