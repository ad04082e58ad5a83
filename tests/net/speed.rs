//! How fast a log goes over the loopback device, and over a long link. Not part of a test run, since it only measures:
//! `cargo nextest run --release --run-ignored only --no-capture speed`

use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender};
use understudy::net::{Link, dial};

use super::{Authority, anywhere, listen, name, pair};

const CHUNK_BYTES: usize = 1 << 20;
const CHUNKS: usize = 1024;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures"]
async fn loopback() {
    let mut rates = Vec::new();
    for _ in 0..5 {
        let (_listener, (near, _near_control), (far, _far_control)) = pair().await;
        rates.push(send_log(&near, &far, CHUNKS).await);
        eprintln!("{:.0} MB/s, {:?}", rates[rates.len() - 1], near.stats());
    }
    rates.sort_by(f64::total_cmp);
    eprintln!("median {:.0} MB/s", rates[2]);
}

/// A long link with little room: the relay's socket buffers hold some dozens of packets, and it drops what does not
/// fit. What limits the rate is therefore how the congestion controller takes losses; look at the window it reports.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures"]
async fn round_trip_of_100_ms() {
    let authority = Authority::new();
    let mut listener = listen(&authority.identity("replica"), &["primary"]);
    let relay = delaying_relay(listener.address().unwrap(), Duration::from_millis(50));
    let (relay, expected) = (relay.to_string(), name("replica"));
    let identity = authority.identity("primary");
    let (dialled, accepted) =
        tokio::join!(dial(&relay, Some(&expected), &identity), listener.accept());
    let ((near, _near_control), (far, _far_control)) = (dialled.unwrap(), accepted.unwrap());
    for _ in 0..4 {
        let rate = send_log(&near, &far, CHUNKS / 2).await;
        eprintln!("{rate:.0} MB/s, {:?}", near.stats());
    }
}

/// Sends a log from `near` to `far`, and says how many megabytes of it arrived each second.
async fn send_log(near: &Link, far: &Link, chunks: usize) -> f64 {
    let begun = Instant::now();
    let near = near.clone();
    let sending = tokio::spawn(async move {
        let mut log = near.open_log().await.unwrap();
        let chunk = Bytes::from(vec![7; CHUNK_BYTES]);
        for _ in 0..chunks {
            log.write_chunks(&mut [chunk.clone()]).await.unwrap();
        }
        log.finish().unwrap();
    });
    let mut log = far.accept_log().await.unwrap();
    let mut length = 0;
    while let Some(chunk) = log.read_chunk(CHUNK_BYTES).await.unwrap() {
        length += chunk.len();
    }
    assert_eq!(length, chunks * CHUNK_BYTES);
    sending.await.unwrap();
    let megabytes = f64::from(u32::try_from(length / 1000).unwrap()) / 1e3;
    megabytes / begun.elapsed().as_secs_f64()
}

/// A UDP relay to `server` for one client, which holds every datagram for `delay`. Its threads end with the process.
fn delaying_relay(server: SocketAddr, delay: Duration) -> SocketAddr {
    let front = Arc::new(UdpSocket::bind(anywhere()).unwrap());
    let back = Arc::new(UdpSocket::bind(anywhere()).unwrap());
    let address = front.local_addr().unwrap();
    let (to_server, from_client) = crossbeam_channel::unbounded();
    let (to_client, from_server) = crossbeam_channel::unbounded();
    let (client, client_known) = crossbeam_channel::bounded(1);
    let (front_in, back_in) = (Arc::clone(&front), Arc::clone(&back));
    thread::spawn(move || take(&front_in, &to_server, Some(&client)));
    thread::spawn(move || take(&back_in, &to_client, None));
    thread::spawn(move || give(&back, &from_client, server, delay));
    thread::spawn(move || give(&front, &from_server, client_known.recv().unwrap(), delay));
    address
}

type Datagram = (Instant, Vec<u8>);

fn take(socket: &UdpSocket, queue: &Sender<Datagram>, sender: Option<&Sender<SocketAddr>>) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        if let Some(sender) = sender {
            // Full after the first datagram: there is one client.
            let _ = sender.try_send(from);
        }
        if queue
            .send((Instant::now(), buffer[..length].to_vec()))
            .is_err()
        {
            return;
        }
    }
}

fn give(socket: &UdpSocket, queue: &Receiver<Datagram>, to: SocketAddr, delay: Duration) {
    for (taken, datagram) in queue {
        thread::sleep((taken + delay).saturating_duration_since(Instant::now()));
        // What does not fit is lost, as on any link.
        let _ = socket.send_to(&datagram, to);
    }
}
