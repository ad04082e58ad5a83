//! Callers that do not keep to the rules, played by a bare quinn endpoint: nothing of ours helps them to behave.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use quinn::crypto::rustls::QuicClientConfig;
use rustls::{
    NamedGroup, RootCertStore,
    client::{ClientSessionStore, Resumption, Tls12ClientSessionValue, Tls13ClientSessionValue},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use understudy::net::{AcceptError, LinkError, Listener, Protocol, Refusal, RefusedBy};

use super::{Authority, listen, now, patiently};

/// A stranger: a bare quinn endpoint with a TLS configuration of its own.
pub(crate) struct Stranger {
    pub(crate) tls: rustls::ClientConfig,
}

impl Stranger {
    fn builder(
        trusts: &Path,
    ) -> rustls::ConfigBuilder<rustls::ClientConfig, rustls::client::WantsClientCert> {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(trusts.join("ca.crt")).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
    }

    /// With the certificate of a host folder, or without any.
    pub(crate) fn new(dir: &Path, certificate: bool, protocol: &[u8]) -> Self {
        let builder = Self::builder(dir);
        let mut tls = if certificate {
            let chain = CertificateDer::from_pem_file(dir.join("host.crt")).unwrap();
            let key = PrivateKeyDer::from_pem_file(dir.join("host.key")).unwrap();
            builder.with_client_auth_cert(vec![chain], key).unwrap()
        } else {
            builder.with_no_client_auth()
        };
        tls.alpn_protocols = vec![protocol.to_vec()];
        Self { tls }
    }

    async fn dial(
        &self,
        address: SocketAddr,
    ) -> (
        quinn::Endpoint,
        Result<quinn::Connection, quinn::ConnectionError>,
    ) {
        let endpoint = self.endpoint("127.0.0.1:0");
        let connecting = endpoint.connect(address, "127.0.0.1").unwrap();
        (endpoint, connecting.await)
    }

    /// A socket from which it dials as often as it likes.
    pub(crate) fn endpoint(&self, from: &str) -> quinn::Endpoint {
        let mut endpoint = quinn::Endpoint::client(from.parse().unwrap()).unwrap();
        let crypto = QuicClientConfig::try_from(self.tls.clone()).unwrap();
        endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
        endpoint
    }
}

async fn refused_by(listener: &mut Listener) -> (RefusedBy, Refusal) {
    match listener.accept().await {
        Err(AcceptError::Refused { by, refusal, .. }) => (by, refusal),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_caller_without_a_certificate_is_refused() {
    let authority = Authority::new();
    let mut listener = listen(&authority.identity("replica"), &["primary"]);
    let stranger = Stranger::new(
        &authority.issue("primary", now()),
        false,
        Protocol::Replicate.alpn(),
    );
    let dialled = stranger.dial(listener.address().unwrap());
    let ((_endpoint, _connection), refused) = tokio::join!(dialled, refused_by(&mut listener));
    assert_eq!(refused, (RefusedBy::Us, Refusal::NoCertificate));
}

#[tokio::test]
async fn a_caller_of_another_protocol_is_refused() {
    let authority = Authority::new();
    let mut listener = listen(&authority.identity("replica"), &["primary"]);
    let stranger = Stranger::new(&authority.issue("primary", now()), true, b"h3");
    let dialled = stranger.dial(listener.address().unwrap());
    let ((_endpoint, connection), refused) = tokio::join!(dialled, refused_by(&mut listener));
    assert_eq!(refused, (RefusedBy::Us, Refusal::NoCommonProtocol));
    assert!(connection.is_err());
}

/// The length alone must be enough to refuse: a receiver that waited for the bytes would already hold memory for them.
#[tokio::test]
async fn a_message_over_the_limit_is_refused_at_its_length() {
    let authority = Authority::new();
    let mut listener = listen(&authority.identity("replica"), &["primary"]);
    let stranger = Stranger::new(
        &authority.issue("primary", now()),
        true,
        Protocol::Replicate.alpn(),
    );
    let (_endpoint, connection) = stranger.dial(listener.address().unwrap()).await;
    let connection = connection.unwrap();
    let (mut send, _recv) = connection.open_bi().await.unwrap();
    send.write_all(&0_u32.to_le_bytes()).await.unwrap();
    send.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
    let (_link, mut control) = listener.accept().await.unwrap();
    let error = patiently(control.receiver.receive()).await.unwrap_err();
    assert!(matches!(error, LinkError::TooLong(0xFFFF_FFFF)), "{error}");
    let closed = connection.closed().await;
    assert!(closed.to_string().contains("over the limit"), "{closed}");
}

/// Counts the tickets a server hands out.
#[derive(Debug, Default)]
struct CountTickets(AtomicUsize);

impl ClientSessionStore for CountTickets {
    fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}
    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }
    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}
    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }
    fn remove_tls12_session(&self, _: &ServerName<'static>) {}
    fn insert_tls13_ticket(&self, _: ServerName<'static>, _: Tls13ClientSessionValue) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        None
    }
}

/// A resumed session would skip the certificate: whoever has a ticket could come back after losing the right to.
#[tokio::test]
async fn no_caller_ever_gets_a_ticket() {
    let authority = Authority::new();
    let mut listener = listen(&authority.identity("replica"), &["primary"]);
    let mut stranger = Stranger::new(
        &authority.issue("primary", now()),
        true,
        Protocol::Replicate.alpn(),
    );
    let tickets = Arc::new(CountTickets::default());
    stranger.tls.resumption =
        Resumption::store(Arc::clone(&tickets) as Arc<dyn ClientSessionStore>);
    let (_endpoint, connection) = stranger.dial(listener.address().unwrap()).await;
    let connection = connection.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&0_u32.to_le_bytes()).await.unwrap();
    listener.accept().await.unwrap();
    // Tickets come before the first application data of the listener.
    let mut greeting = [0xFF; 4];
    recv.read_exact(&mut greeting).await.unwrap();
    assert_eq!(greeting, [0; 4]);
    assert_eq!(tickets.0.load(Ordering::SeqCst), 0);
}
