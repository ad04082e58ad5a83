//! Links between hosts over real sockets: who gets in, who does not and why, and what arrives.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod revocation;
mod speed;
pub(crate) mod strangers;

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use tempfile::TempDir;
use understudy::{
    base::{
        checksum::Sha256,
        clock::{Clock, SystemClock, Timestamp},
        ids::Name,
        limits::MESSAGE_BYTES_MAX,
    },
    net::{
        AcceptError, Allow, BindError, Control, DialError, Identity, IdentityError, Link,
        LinkError, Listener, LogReceiver, LogSender, Reason, Refusal, RefusedBy, dial,
        pki::{self, HOST_VALID, PkiError, San},
    },
};

/// A CA and the identities it has issued.
struct Authority {
    dir: TempDir,
}

impl Authority {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        pki::init(&dir.path().join("ca"), now()).unwrap();
        Self { dir }
    }

    fn ca(&self) -> PathBuf {
        self.dir.path().join("ca")
    }

    /// Issues an identity for `name` that can be dialled as 127.0.0.1, made at time `at`.
    fn issue(&self, host: &str, at: Timestamp) -> PathBuf {
        let out = self.dir.path().join(host);
        let sans = [San::Ip([127, 0, 0, 1].into())];
        pki::issue(&self.ca(), &name(host), &sans, &out, at).unwrap();
        out
    }

    fn identity(&self, host: &str) -> Identity {
        Identity::load(&self.issue(host, now())).unwrap()
    }
}

/// Turns a wait that would never end into a failure.
async fn patiently<T>(wait: impl Future<Output = T>) -> T {
    let outcome = tokio::time::timeout(Duration::from_mins(1), wait).await;
    outcome.expect("what is waited for must come")
}

fn now() -> Timestamp {
    SystemClock::default().wall()
}

fn long_ago() -> Timestamp {
    let micros = u64::try_from(HOST_VALID.as_micros()).unwrap();
    Timestamp(now().0 - micros - 60_000_000)
}

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn anywhere() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

fn listen(identity: &Identity, allow: &[&str]) -> Listener {
    let allow = allow.iter().map(|text| name(text)).collect::<Allow>();
    Listener::bind(anywhere(), identity, allow).unwrap()
}

/// What a dialler and a listener make of each other.
type Met = (
    Result<(Link, Control), DialError>,
    Result<(Link, Control), AcceptError>,
);

/// Dials `listener` and accepts, at once.
async fn meet(listener: &mut Listener, identity: &Identity) -> Met {
    let address = listener.address().unwrap().to_string();
    tokio::join!(dial(&address, None, identity), listener.accept())
}

/// A link between `primary` and `replica` of one authority.
async fn pair() -> (Listener, (Link, Control), (Link, Control)) {
    let authority = Authority::new();
    let mut listener = listen(&authority.identity("replica"), &["primary"]);
    let (dialled, accepted) = meet(&mut listener, &authority.identity("primary")).await;
    (listener, dialled.unwrap(), accepted.unwrap())
}

/// Asserts that both sides name the refusal, each from its point of view, in a message with all of `words`.
fn assert_refused(
    (dialled, accepted): Met,
    expected: Refusal,
    refused_by_listener: bool,
    words: &str,
) {
    let (dialler, listener) = if refused_by_listener {
        (RefusedBy::Peer, RefusedBy::Us)
    } else {
        (RefusedBy::Us, RefusedBy::Peer)
    };
    let error = dialled.unwrap_err();
    assert!(error.to_string().contains(words), "{error}");
    let DialError::Refused { by, refusal, .. } = error else {
        panic!("{error}");
    };
    assert_eq!((by, refusal), (dialler, expected));
    let error = accepted.unwrap_err();
    assert!(!error.is_final());
    let AcceptError::Refused { by, refusal, .. } = error else {
        panic!("{error}");
    };
    assert_eq!((by, refusal), (listener, expected));
}

#[test]
fn identities_are_issued_whole_private_and_never_over_others() {
    let authority = Authority::new();
    let dir = authority.issue("Web-1.Example", now());
    let identity = Identity::load(&dir).unwrap();
    assert_eq!(identity.name(), &name("web-1.example"), "small letters");
    assert!(identity.valid_until() > now());
    for key in [authority.ca().join("ca.key"), dir.join("host.key")] {
        let mode = fs::metadata(&key).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", key.display());
    }
    let before = fs::read(dir.join("host.key")).unwrap();
    let again = pki::issue(&authority.ca(), &name("web-1.example"), &[], &dir, now());
    assert!(matches!(again, Err(PkiError::Exists(_))), "{again:?}");
    let again = pki::init(&authority.ca(), now());
    assert!(matches!(again, Err(PkiError::Exists(_))), "{again:?}");
    assert_eq!(fs::read(dir.join("host.key")).unwrap(), before);
    let left_over = fs::read_dir(authority.dir.path())
        .unwrap()
        .filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_string_lossy().contains("partial")
        })
        .count();
    assert_eq!(left_over, 0);
}

#[test]
fn names_that_are_no_dns_names_are_not_issued() {
    let authority = Authority::new();
    let out = authority.dir.path().join("out");
    let refused = pki::issue(&authority.ca(), &name("SQL Server"), &[], &out, now());
    assert!(matches!(refused, Err(PkiError::NotDns(_))), "{refused:?}");
    assert!("not a name".parse::<San>().is_err());
    assert_eq!(
        "fd00::1".parse::<San>().unwrap(),
        San::Ip("fd00::1".parse().unwrap())
    );
    assert!(!out.exists());
}

#[test]
fn a_ca_with_the_wrong_key_signs_nothing() {
    let (authority, other) = (Authority::new(), Authority::new());
    fs::copy(other.ca().join("ca.key"), authority.ca().join("ca.key")).unwrap();
    let out = authority.dir.path().join("out");
    let refused = pki::issue(&authority.ca(), &name("host"), &[], &out, now());
    assert!(
        matches!(refused, Err(PkiError::BadCa { .. })),
        "{refused:?}"
    );
}

#[test]
fn unusable_identities_are_named_when_they_are_loaded() {
    let authority = Authority::new();
    let load = |dir: &Path| Identity::load(dir).unwrap_err();
    let missing = load(&authority.dir.path().join("nowhere"));
    assert!(matches!(missing, IdentityError::Read { .. }), "{missing}");

    let dir = authority.issue("swapped", now());
    fs::copy(
        authority.issue("other", now()).join("host.key"),
        dir.join("host.key"),
    )
    .unwrap();
    let mismatch = load(&dir);
    assert!(
        matches!(mismatch, IdentityError::KeyMismatch(_)),
        "{mismatch}"
    );

    let dir = authority.issue("damaged", now());
    fs::copy(dir.join("host.key"), dir.join("host.crt")).unwrap();
    let wrong = load(&dir);
    assert!(matches!(wrong, IdentityError::NotPem { .. }), "{wrong}");
    fs::write(dir.join("host.crt"), "").unwrap();
    assert!(matches!(load(&dir), IdentityError::NotPem { .. }));

    let expired = load(&authority.issue("expired", long_ago()));
    assert!(matches!(expired, IdentityError::Expired(_)), "{expired}");
    let early = Timestamp(now().0 + 7_200_000_000);
    let early = load(&authority.issue("early", early));
    assert!(matches!(early, IdentityError::NotYetValid(_)), "{early}");
}

#[tokio::test]
async fn two_hosts_of_one_ca_exchange_messages_both_ways() {
    let (_listener, (near, mut to_far), (far, mut to_near)) = pair().await;
    assert_eq!(near.peer().name, name("replica"));
    assert_eq!(far.peer().name, name("primary"));
    let longest = Bytes::from(vec![7; MESSAGE_BYTES_MAX]);
    for message in [Bytes::from_static(b"hello"), Bytes::new(), longest] {
        to_far.sender.send(message.clone()).await.unwrap();
        assert_eq!(
            to_near.receiver.receive().await.unwrap(),
            Some(message.clone())
        );
        to_near.sender.send(message.clone()).await.unwrap();
        assert_eq!(to_far.receiver.receive().await.unwrap(), Some(message));
    }
    let too_long = Bytes::from(vec![0; MESSAGE_BYTES_MAX + 1]);
    let refused = to_far.sender.send(too_long).await;
    assert!(matches!(refused, Err(LinkError::TooLong(_))), "{refused:?}");
    to_far.sender.finish();
    assert_eq!(to_near.receiver.receive().await.unwrap(), None);

    near.close(Reason::Fenced, "generation 4 is over");
    let LinkError::Closed { reason, text, .. } = far.closed().await else {
        panic!("the peer closed it");
    };
    assert_eq!(
        (reason, text.as_str()),
        (Reason::Fenced, "generation 4 is over")
    );
    assert!(matches!(
        near.open_log().await,
        Err(LinkError::ClosedHere(_))
    ));
    near.drained().await;
}

/// A receive that loses a `select!` must not lose the bytes it has read.
#[tokio::test]
async fn a_cancelled_receive_or_send_loses_nothing() {
    let (_listener, (_near, mut to_far), (_far, mut to_near)) = pair().await;
    let sent = tokio::spawn(async move {
        for index in 0..200_u32 {
            let message = Bytes::from(vec![index.to_le_bytes()[0]; 20_000]);
            // Polled once and dropped: the next call carries on where this one was.
            tokio::select! {
                biased;
                sent = to_far.sender.send(message) => sent.unwrap(),
                () = std::future::ready(()) => {}
            }
        }
        to_far
            .sender
            .send(Bytes::from_static(b"end"))
            .await
            .unwrap();
        to_far
    });
    for index in 0..200_u32 {
        let message = loop {
            tokio::select! {
                biased;
                message = to_near.receiver.receive() => break message.unwrap().unwrap(),
                () = tokio::task::yield_now() => {}
            }
        };
        assert_eq!(message.len(), 20_000);
        assert!(
            message.iter().all(|&byte| byte == index.to_le_bytes()[0]),
            "{index}"
        );
    }
    assert_eq!(to_near.receiver.receive().await.unwrap().unwrap(), "end");
    sent.await.unwrap();
}

#[tokio::test]
async fn a_host_of_another_ca_is_refused() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let mut listener = listen(&ours.identity("replica"), &["primary"]);
    // The dialler sees the listener's certificate first.
    let met = meet(&mut listener, &theirs.identity("primary")).await;
    assert_refused(met, Refusal::UnknownCa, false, "ca.crt");

    // A dialler that trusts the listener is refused by it.
    let dir = theirs.issue("other", now());
    fs::copy(ours.ca().join("ca.crt"), dir.join("ca.crt")).unwrap();
    let met = meet(&mut listener, &Identity::load(&dir).unwrap()).await;
    assert_refused(met, Refusal::UnknownCa, true, "does not trust the CA");
}

#[tokio::test]
async fn an_expired_certificate_is_refused_by_either_side() {
    let authority = Authority::new();
    let expired = |host| Identity::load_at(&authority.issue(host, long_ago()), long_ago()).unwrap();
    let mut listener = listen(&authority.identity("replica"), &["old-primary"]);
    let met = meet(&mut listener, &expired("old-primary")).await;
    assert_refused(
        met,
        Refusal::Expired,
        true,
        "issue a new identity for this host",
    );

    let mut listener = listen(&expired("old-replica"), &["primary"]);
    let met = meet(&mut listener, &authority.identity("primary")).await;
    assert_refused(met, Refusal::Expired, false, "issue it a new identity");
}

#[tokio::test]
async fn a_host_that_is_not_allowed_is_told_its_name() {
    let authority = Authority::new();
    let mut listener = listen(&authority.identity("replica"), &["primary"]);
    let met = meet(&mut listener, &authority.identity("stranger")).await;
    assert_refused(
        met,
        Refusal::NotAllowed,
        true,
        "(the certificate names stranger)",
    );

    let mut nobody = listen(&authority.identity("strict"), &[]);
    let met = meet(&mut nobody, &authority.identity("primary")).await;
    assert_refused(met, Refusal::NotAllowed, true, "allow list");
}

#[tokio::test]
async fn the_peer_must_be_who_was_dialled() {
    let authority = Authority::new();
    let mut listener = listen(&authority.identity("replica"), &["primary"]);
    let identity = authority.identity("primary");
    let address = listener.address().unwrap();

    let local = format!("localhost:{}", address.port());
    let met = tokio::join!(dial(&local, None, &identity), listener.accept());
    assert_refused(met, Refusal::WrongName, false, "--san");

    let expected = name("replica");
    let (dialled, accepted) =
        tokio::join!(dial(&local, Some(&expected), &identity), listener.accept());
    assert_eq!(dialled.unwrap().0.peer().name, expected);
    accepted.unwrap();
    let wrong = dial("no port", None, &identity).await.unwrap_err();
    assert!(matches!(wrong, DialError::Address(_)), "{wrong}");
}

#[tokio::test]
async fn a_busy_port_is_named() {
    let authority = Authority::new();
    let identity = authority.identity("replica");
    let listener = listen(&identity, &[]);
    let address = listener.address().unwrap();
    let busy = Listener::bind(address, &identity, Allow::default()).unwrap_err();
    assert!(matches!(busy, BindError::Busy(_)), "{busy}");
    assert!(
        busy.to_string().contains(&address.port().to_string()),
        "{busy}"
    );
    let foreign = Listener::bind(
        "203.0.113.7:0".parse().unwrap(),
        &identity,
        Allow::default(),
    );
    assert!(matches!(foreign, Err(BindError::NotOurs(_))), "{foreign:?}");
}

#[tokio::test]
async fn a_dropped_listener_keeps_its_links_and_a_closed_one_tells_them() {
    let (listener, (near, mut to_far), (_far, mut to_near)) = pair().await;
    drop(listener);
    to_far
        .sender
        .send(Bytes::from_static(b"still here"))
        .await
        .unwrap();
    assert_eq!(
        to_near.receiver.receive().await.unwrap().unwrap(),
        "still here"
    );
    drop(near);

    let (listener, (near, _control), _far) = pair().await;
    listener.close(Reason::Stopping, "maintenance").await;
    let closed = near.closed().await;
    assert!(
        closed.to_string().contains("(stopping): maintenance"),
        "{closed}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_of_100_mib_arrives_intact() {
    let (_listener, (near, _near_control), (far, _far_control)) = pair().await;
    let sending = tokio::spawn(async move {
        let mut log = near.open_log().await.unwrap();
        let mut digest = Sha256::default();
        for index in 0..100_u32 {
            let mut chunk = vec![0; 1 << 20];
            for (at, word) in (0_u32..).zip(chunk.chunks_exact_mut(4)) {
                word.copy_from_slice(&(at ^ index.wrapping_mul(0x9E37_79B9)).to_le_bytes());
            }
            digest.update(&chunk);
            log.write_chunks(&mut [chunk.into()]).await.unwrap();
        }
        log.finish().unwrap();
        (near, digest.finish())
    });
    let mut log = far.accept_log().await.unwrap();
    let (mut digest, mut length) = (Sha256::default(), 0);
    while let Some(chunk) = log.read_chunk(1 << 20).await.unwrap() {
        length += chunk.len();
        digest.update(&chunk);
    }
    let (near, expected) = sending.await.unwrap();
    assert_eq!(length, 100 << 20);
    assert_eq!(digest.finish(), expected);
    assert!(near.stats().sent_bytes > 100 << 20);
    assert!(far.stats().received_bytes > 100 << 20);
    let packet = near.stats().packet_bytes;
    assert!(
        packet > 9000,
        "a loopback carries packets of more than {packet} bytes"
    );
}

/// Control must get through while nobody reads the logs.
#[tokio::test]
async fn unread_logs_do_not_hold_up_control() {
    let (_listener, (near, mut to_far), (far, mut to_near)) = pair().await;
    let stuffing = tokio::spawn(async move {
        let mut log = near.open_log().await.unwrap();
        while log
            .write_chunks(&mut [vec![1; 1 << 20].into()])
            .await
            .is_ok()
        {}
    });
    let unread = far.accept_log().await.unwrap();
    let talk = async {
        for _ in 0..20 {
            to_far
                .sender
                .send(Bytes::from_static(b"alive?"))
                .await
                .unwrap();
            assert_eq!(to_near.receiver.receive().await.unwrap().unwrap(), "alive?");
            // The log fills its window meanwhile.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    patiently(talk).await;
    drop(unread);
    stuffing.await.unwrap();
}

/// A log from `near` to `far` that begins with these bytes. It cannot be opened before somebody waits for it.
async fn begun((near, far): (&Link, &Link), bytes: &'static [u8]) -> (LogSender, LogReceiver) {
    let begin = async {
        let mut log = near.open_log().await.unwrap();
        let bytes = Bytes::from_static(bytes);
        log.write_chunks(&mut [bytes]).await.unwrap();
        log
    };
    let (log, received) = tokio::join!(begin, far.accept_log());
    (log, received.unwrap())
}

#[tokio::test]
async fn a_log_that_is_broken_off_is_an_error_and_not_an_end() {
    let (_listener, (near, _near_control), (far, _far_control)) = pair().await;
    for explicit in [true, false] {
        let (log, mut received) = begun((&near, &far), b"half a log").await;
        if explicit {
            log.reset(Reason::Aborted);
        } else {
            drop(log);
        }
        let error = loop {
            match received.read_chunk(1024).await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("a broken log looked like a whole one"),
                Err(error) => break error,
            }
        };
        let LinkError::Reset { reason, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(reason, Reason::Aborted);
    }

    let (mut log, unwanted) = begun((&near, &far), b"unwanted").await;
    unwanted.stop(Reason::Busy);
    let error = loop {
        if let Err(error) = log.write_chunks(&mut [Bytes::from_static(b"more")]).await {
            break error;
        }
        tokio::task::yield_now().await;
    };
    assert!(
        matches!(
            error,
            LinkError::Stopped {
                reason: Reason::Busy,
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn garbage_at_the_port_hurts_nobody() {
    let authority = Authority::new();
    let mut listener = listen(&authority.identity("replica"), &["primary"]);
    let address = listener.address().unwrap();
    let noise = UdpSocket::bind(anywhere()).unwrap();
    for index in 0..2_000_u32 {
        // Long headers, short headers, nothing at all; some of them look like the first packet of a handshake.
        let length = usize::try_from(index % 1_400).unwrap();
        let mut datagram = vec![index.to_le_bytes()[0] ^ 0x5A; length];
        if index % 3 == 0 && length > 5 {
            datagram[..5].copy_from_slice(&[0xC3, 0, 0, 0, 1]);
        }
        // A full buffer drops datagrams, which is all the same here.
        let _ = noise.send_to(&datagram, address);
    }
    let (dialled, accepted) = meet(&mut listener, &authority.identity("primary")).await;
    dialled.unwrap();
    accepted.unwrap();
}
