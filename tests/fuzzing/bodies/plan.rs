//! An input read as a plan: numbers one after the other, zeros when it ends. So every input is a whole plan, and a byte
//! changed in it changes one decision.

use understudy::base::units::{MIB, to_u64, to_usize};

/// What is left of an input.
pub(crate) struct Plan<'a>(&'a [u8]);

impl<'a> Plan<'a> {
    pub(crate) fn new(input: &'a [u8]) -> Self {
        Self(input)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `len` bytes, or fewer at the end.
    pub(crate) fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Whatever is left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        self.take(usize::MAX)
    }

    fn array<const LEN: usize>(&mut self) -> [u8; LEN] {
        let taken = self.take(LEN);
        let mut bytes = [0; LEN];
        bytes[..taken.len()].copy_from_slice(taken);
        bytes
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `limit`, which is not 0.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        let number = if limit <= 1 << 16 {
            u64::from(self.u16())
        } else {
            self.u64()
        };
        number % limit
    }

    /// One of `choices`.
    pub(crate) fn choose<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[to_usize(u64::from(self.u8()) % to_u64(choices.len()))]
    }

    /// A number of a kind that matters in images: small, aligned, a power of two, close to the largest, or any.
    pub(crate) fn number(&mut self) -> u64 {
        match self.u8() % 8 {
            0 => u64::from(self.u8()),
            1 => u64::from(self.u16()),
            2 => u64::from(self.u32()),
            3 => self.u64(),
            4 => u64::from(self.u16()) * MIB,
            5 => 1 << (self.u8() % 64),
            6 => u64::MAX - u64::from(self.u16()),
            _ => u64::from(self.u16()) * 4096,
        }
    }
}
