//! A UDP socket that sends whatever packets the path carries.
//!
//! quinn hands up to ten packets of one size to the kernel in one call (UDP segmentation offload, udp(7)), which takes at
//! most [`SEND_BYTES_MAX`] bytes of them. This socket cuts such a row of packets where it is longer, so that packets may
//! grow to what the path carries: 8,972 bytes with jumbo frames, more on a loopback.

use std::{
    fmt,
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};

/// Most payload of one UDP send, in bytes: 65,535 less the headers of IPv4 and UDP, the smaller of both families.
const SEND_BYTES_MAX: usize = 65_507;

/// The socket below, with no row of packets longer than the kernel takes.
pub(super) struct RowSocket(pub(super) Arc<dyn AsyncUdpSocket>);

impl fmt::Debug for RowSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl AsyncUdpSocket for RowSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.0).create_io_poller()
    }

    /// Where the kernel takes no more after the first part of a row, quinn sends the whole row again, and the peer drops
    /// the packets it has.
    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        rows(transmit).try_for_each(|row| self.0.try_send(&row))
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.0.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.0.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.0.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.0.may_fragment()
    }
}

/// The row of packets in parts of whole packets that the kernel takes.
fn rows<'a>(transmit: &Transmit<'a>) -> impl Iterator<Item = Transmit<'a>> {
    let &Transmit {
        destination,
        ecn,
        contents,
        segment_size,
        src_ip,
    } = transmit;
    let packet = segment_size.unwrap_or(contents.len()).max(1);
    let row = (SEND_BYTES_MAX / packet).max(1) * packet;
    contents.chunks(row).map(move |contents| Transmit {
        destination,
        ecn,
        contents,
        segment_size: segment_size.filter(|&size| size < contents.len()),
        src_ip,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `rows` makes of `len` bytes in packets of `packet`: bytes of each part, and whether it is a row.
    fn cut(len: usize, packet: Option<usize>) -> Vec<(usize, bool)> {
        let contents: Vec<u8> = (0..len).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let transmit = Transmit {
            destination: ([127, 0, 0, 1], 1).into(),
            ecn: None,
            contents: &contents,
            segment_size: packet,
            src_ip: None,
        };
        let parts: Vec<_> = rows(&transmit).collect();
        let joined: Vec<u8> = parts
            .iter()
            .flat_map(|part| part.contents.to_vec())
            .collect();
        assert!(joined == contents, "{len} bytes in packets of {packet:?}");
        let part = |part: &Transmit<'_>| (part.contents.len(), part.segment_size.is_some());
        parts.iter().map(part).collect()
    }

    #[test]
    fn a_row_is_cut_between_packets() {
        assert_eq!(cut(1200, None), [(1200, false)]);
        assert_eq!(cut(14_520, Some(1452)), [(14_520, true)]);
        // Seven packets of jumbo frames, then three, the last one short.
        let jumbo = 8952;
        assert_eq!(
            cut(9 * jumbo + 5, Some(jumbo)),
            [(7 * jumbo, true), (2 * jumbo + 5, true)]
        );
        // Nine packets of the largest kind: the ninth goes alone and is no row.
        assert_eq!(
            cut(9 * 16_250, Some(16_250)),
            [(65_000, true), (65_000, true), (16_250, false)]
        );
        assert_eq!(
            cut(80_000, Some(40_000)),
            [(40_000, false), (40_000, false)]
        );
    }
}
