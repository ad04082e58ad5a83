//! Links that can be made bad: UDP relays, each in front of one host, which lose, hold up, repeat and reorder packets.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, Weak},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tokio::{net::UdpSocket, sync::oneshot};
use understudy::testing::Random;

use crate::support::runtime;

/// Largest UDP payload.
const PACKET_MAX: usize = 65_536;
/// A flow that carried nothing for so long is forgotten; longer than a link may be silent.
const FLOW_IDLE: Duration = Duration::from_secs(40);
/// How long a packet may wait for a slow line before it is dropped.
const QUEUE_MAX: Duration = Duration::from_millis(400);

/// What a line does to packets, in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Weather {
    /// Nothing gets through.
    pub(super) cut: bool,
    /// Packets that are lost, in a hundred.
    pub(super) loss: u64,
    /// Packets that arrive twice, in a hundred.
    pub(super) repeat: u64,
    /// How long each packet is under way.
    pub(super) delay: Duration,
    /// How much longer it is at most, each for itself: later packets overtake earlier ones.
    pub(super) jitter: Duration,
    /// Bytes per second, if the line is slow.
    pub(super) rate: Option<u64>,
}

/// A line and how it is at present.
#[derive(Debug)]
struct Line {
    weather: Weather,
    random: Random,
    /// When each direction has carried all it has taken.
    clear: [Instant; 2],
}

impl Line {
    /// After which delays copies of a packet of `len` bytes arrive.
    fn carry(&mut self, direction: usize, len: usize) -> Vec<Duration> {
        let weather = self.weather;
        if weather.cut || self.random.percent(weather.loss) {
            return Vec::new();
        }
        let mut queued = Duration::ZERO;
        if let Some(rate) = weather.rate {
            let now = Instant::now();
            let bytes = u64::try_from(len).unwrap();
            let clear =
                self.clear[direction].max(now) + Duration::from_micros(bytes * 1_000_000 / rate);
            if clear - now > QUEUE_MAX {
                return Vec::new();
            }
            self.clear[direction] = clear;
            queued = clear - now;
        }
        let copies = 1 + usize::from(self.random.percent(weather.repeat));
        let jitter = u64::try_from(weather.jitter.as_micros()).unwrap();
        let mut late =
            || queued + weather.delay + Duration::from_micros(self.random.below(jitter + 1));
        (0..copies).map(|_| late()).collect()
    }
}

/// A relay in front of a host. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Relay {
    line: Arc<Mutex<Line>>,
    port: u16,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Carries packets to the port `to` of this computer, and the answers back.
    pub(super) fn new(to: u16, seed: u64) -> Self {
        let line = Arc::new(Mutex::new(Line {
            weather: Weather::default(),
            random: Random::new(seed),
            clear: [Instant::now(); 2],
        }));
        let listen = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        listen.set_nonblocking(true).unwrap();
        let port = listen.local_addr().unwrap().port();
        let (stop, stopped) = oneshot::channel();
        let shared = Arc::clone(&line);
        let thread = thread::spawn(move || {
            runtime().block_on(async {
                let listen = Arc::new(UdpSocket::from_std(listen).unwrap());
                let to = SocketAddr::from(([127, 0, 0, 1], to));
                tokio::select! {
                    () = forward(listen, to, shared) => {}
                    _ = stopped => {}
                }
            });
        });
        Self {
            line,
            port,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// Where it listens.
    pub(super) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(super) fn set(&self, weather: Weather) {
        self.line.lock().unwrap().weather = weather;
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Carries what arrives, with a socket of its own for each sender, by which its answers are known.
async fn forward(listen: Arc<UdpSocket>, to: SocketAddr, line: Arc<Mutex<Line>>) {
    let mut flows: HashMap<SocketAddr, Weak<UdpSocket>> = HashMap::new();
    let mut buffer = vec![0; PACKET_MAX];
    loop {
        let Ok((len, from)) = listen.recv_from(&mut buffer).await else {
            continue;
        };
        let known = flows.get(&from).and_then(Weak::upgrade);
        let flow = match known {
            Some(flow) => flow,
            None => match open(to).await {
                Ok(flow) => {
                    let flow = Arc::new(flow);
                    flows.retain(|_, flow| flow.strong_count() > 0);
                    flows.insert(from, Arc::downgrade(&flow));
                    tokio::spawn(answer(
                        Arc::clone(&flow),
                        Arc::clone(&listen),
                        from,
                        Arc::clone(&line),
                    ));
                    flow
                }
                Err(_) => continue,
            },
        };
        let delays = line.lock().unwrap().carry(0, len);
        deliver(&buffer[..len], delays, move |packet| flow.try_send(packet));
    }
}

async fn open(to: SocketAddr) -> io::Result<UdpSocket> {
    let flow = UdpSocket::bind("127.0.0.1:0").await?;
    flow.connect(to).await?;
    Ok(flow)
}

/// Carries the answers of one flow back, until it is silent.
async fn answer(
    flow: Arc<UdpSocket>,
    listen: Arc<UdpSocket>,
    to: SocketAddr,
    line: Arc<Mutex<Line>>,
) {
    let mut buffer = vec![0; PACKET_MAX];
    while let Ok(received) = tokio::time::timeout(FLOW_IDLE, flow.recv(&mut buffer)).await {
        // A host that does not listen is an error of the socket, and no end of the flow.
        let Ok(len) = received else { continue };
        let delays = line.lock().unwrap().carry(1, len);
        let listen = Arc::clone(&listen);
        deliver(&buffer[..len], delays, move |packet| {
            listen.try_send_to(packet, to)
        });
    }
}

/// Sends a packet after each of `delays`; what a socket does not take is lost.
fn deliver(
    packet: &[u8],
    delays: Vec<Duration>,
    send: impl Fn(&[u8]) -> io::Result<usize> + Clone + Send + 'static,
) {
    for delay in delays {
        if delay.is_zero() {
            let _ = send(packet);
            continue;
        }
        let (packet, send) = (packet.to_vec(), send.clone());
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let _ = send(&packet);
        });
    }
}
