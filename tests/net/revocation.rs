//! Identities that are renewed or taken back while links are open.

use std::{fs, path::PathBuf};

use bytes::Bytes;
use understudy::{
    base::clock::Timestamp,
    net::{
        Identity, IdentityError, LinkError, Reason, Refusal, Trust,
        pki::PkiError,
        revoke::{self, LIST_VALID, List},
    },
};

use super::{Authority, assert_refused, listen, meet, name, now, patiently};

impl Authority {
    fn revoke_at(&self, hosts: &[&str], at: Timestamp) -> List {
        let names: Vec<_> = hosts.iter().map(|host| name(host)).collect();
        revoke::revoke(&self.ca(), &names, &[], at).unwrap()
    }

    fn revoke(&self, hosts: &[&str]) -> List {
        self.revoke_at(hosts, now())
    }

    fn list(&self) -> PathBuf {
        self.ca().join("ca.crl")
    }

    /// An identity that obeys the authority's list.
    fn wary(&self, host: &str) -> Identity {
        let dir = self.issue(host, now());
        let trust = Trust {
            crl: Some(self.list()),
            ..Trust::default()
        };
        Identity::load_with(&dir, trust).unwrap()
    }

    /// Issues a host's identity anew, in its old place.
    fn renew(&self, host: &str) {
        fs::remove_dir_all(self.dir.path().join(host)).unwrap();
        self.issue(host, now());
    }
}

#[tokio::test]
async fn a_revoked_host_is_refused_by_either_side() {
    let authority = Authority::new();
    let primary = authority.identity("primary");
    authority.revoke(&[]);
    let mut listener = listen(&authority.wary("replica"), &["primary"]);
    let (dialled, accepted) = meet(&mut listener, &primary).await;
    dialled.unwrap();
    accepted.unwrap();

    authority.revoke(&["primary"]);
    let mut listener = listen(&authority.wary("strict"), &["primary"]);
    let met = meet(&mut listener, &primary).await;
    assert_refused(met, Refusal::Revoked, true, "our certificate was revoked");

    authority.revoke(&["strict"]);
    let met = meet(&mut listener, &authority.wary("other")).await;
    assert_refused(met, Refusal::Revoked, false, "its certificate was revoked");
}

/// A revocation that waited for the next handshake would let a stolen identity go on for as long as its link holds.
#[tokio::test]
async fn a_reload_closes_the_links_of_revoked_peers_and_no_others() {
    let authority = Authority::new();
    authority.revoke(&[]);
    let replica = authority.wary("replica");
    let mut listener = listen(&replica, &["primary", "thief"]);
    let primary = authority.wary("primary");
    let (good, good_accepted) = meet(&mut listener, &primary).await;
    let ((good, mut to_replica), (_good, mut from_primary)) =
        (good.unwrap(), good_accepted.unwrap());
    let (stolen, stolen_accepted) = meet(&mut listener, &authority.identity("thief")).await;
    let ((stolen, _control), (theirs, _kept)) = (stolen.unwrap(), stolen_accepted.unwrap());

    assert_eq!(replica.reread().unwrap().take().closed, []);
    authority.revoke(&["thief"]);
    let reloaded = replica.reread().unwrap().take();
    assert_eq!(reloaded.revoked, Some(1));
    assert_eq!(reloaded.closed, [(name("thief"), Refusal::Revoked)]);
    let LinkError::Closed { reason, text, .. } = patiently(stolen.closed()).await else {
        panic!("the peer closed it");
    };
    let said = (reason, text.as_str());
    assert_eq!(said, (Reason::Revoked, "the certificate was revoked"));
    let here = patiently(theirs.closed()).await;
    assert!(matches!(here, LinkError::ClosedHere(_)), "{here}");

    let message = Bytes::from_static(b"still here");
    to_replica.sender.send(message.clone()).await.unwrap();
    let received = from_primary.receiver.receive().await.unwrap();
    assert_eq!(received, Some(message));

    // The side that dialled judges as well.
    authority.revoke(&["replica"]);
    let reloaded = primary.reread().unwrap().take();
    assert_eq!(reloaded.closed, [(name("replica"), Refusal::Revoked)]);
    let closed = patiently(good.closed()).await;
    assert!(matches!(closed, LinkError::ClosedHere(_)), "{closed}");
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_after_a_reload() {
    let authority = Authority::new();
    authority.revoke(&[]);
    let replica = authority.identity("replica");
    let mut listener = listen(&replica, &["primary"]);
    authority.revoke(&["replica"]);
    let primary = authority.wary("primary");
    authority.renew("replica");
    let met = meet(&mut listener, &primary).await;
    assert_refused(met, Refusal::Revoked, false, "revoked");
    let _ = replica.reread().unwrap().take();
    let (dialled, accepted) = meet(&mut listener, &primary).await;
    dialled.unwrap();
    accepted.unwrap();

    // And so does the dialler.
    let wary = authority.wary("wary");
    let mut listener = listen(&wary, &["primary"]);
    authority.revoke(&["primary"]);
    let _ = wary.reread().unwrap().take();
    authority.renew("primary");
    let met = meet(&mut listener, &primary).await;
    assert_refused(met, Refusal::Revoked, true, "revoked");
    let _ = primary.reread().unwrap().take();
    let (dialled, accepted) = meet(&mut listener, &primary).await;
    dialled.unwrap();
    accepted.unwrap();
}

#[tokio::test]
async fn an_authority_that_is_trusted_no_more_loses_its_links() {
    let (old, new) = (Authority::new(), Authority::new());
    let replica = old.identity("replica");
    let mut listener = listen(&replica, &["primary"]);
    let (dialled, accepted) = meet(&mut listener, &old.identity("primary")).await;
    let ((near, _control), (_far, _kept)) = (dialled.unwrap(), accepted.unwrap());
    fs::copy(
        new.ca().join("ca.crt"),
        old.dir.path().join("replica/ca.crt"),
    )
    .unwrap();
    let reloaded = replica.reread().unwrap().take();
    assert_eq!(reloaded.closed, [(name("primary"), Refusal::UnknownCa)]);
    let closed = patiently(near.closed()).await;
    let text = closed.to_string();
    assert!(text.contains("is no longer accepted"), "{text}");
}

#[tokio::test]
async fn files_that_cannot_be_used_change_nothing() {
    let authority = Authority::new();
    authority.revoke(&[]);
    let replica = authority.wary("replica");
    let mut listener = listen(&replica, &["primary"]);
    let primary = authority.identity("primary");
    let (dialled, accepted) = meet(&mut listener, &primary).await;
    let ((near, mut control), (_far, mut kept)) = (dialled.unwrap(), accepted.unwrap());

    let other = Identity::load(&authority.issue("other", now())).unwrap();
    let folder = authority.dir.path().join("replica");
    for file in ["host.crt", "host.key"] {
        fs::copy(
            authority.dir.path().join("other").join(file),
            folder.join(file),
        )
        .unwrap();
    }
    let renamed = replica.reread().unwrap_err();
    assert!(
        matches!(renamed, IdentityError::Renamed { .. }),
        "{renamed}"
    );
    fs::write(folder.join("host.key"), "rubbish").unwrap();
    let rubbish = replica.reread().unwrap_err();
    assert!(matches!(rubbish, IdentityError::NotPem { .. }), "{rubbish}");
    authority.renew("replica");
    let whole = fs::read(authority.list()).unwrap();
    for (text, words) in [
        (&b""[..], "no list of revoked certificates"),
        (&whole[..whole.len() / 2], "no list of revoked certificates"),
        (
            b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n",
            "is not usable",
        ),
    ] {
        fs::write(authority.list(), text).unwrap();
        let error = replica.reread().unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    fs::remove_file(authority.list()).unwrap();
    let gone = replica.reread().unwrap_err();
    assert!(matches!(gone, IdentityError::Read { .. }), "{gone}");

    let message = Bytes::from_static(b"still here");
    control.sender.send(message.clone()).await.unwrap();
    assert_eq!(kept.receiver.receive().await.unwrap(), Some(message));
    let (dialled, accepted) = meet(&mut listener, &primary).await;
    dialled.unwrap();
    accepted.unwrap();
    drop((near, other));
}

#[tokio::test]
async fn an_expired_list_is_obeyed_and_one_of_another_authority_vouches_for_nobody() {
    let authority = Authority::new();
    let (primary, thief) = (authority.identity("primary"), authority.identity("thief"));
    let micros = u64::try_from(LIST_VALID.as_micros()).unwrap();
    let list = authority.revoke_at(&["thief"], Timestamp(now().0 - 2 * micros));
    assert!(list.valid_until < now());
    let mut listener = listen(&authority.wary("replica"), &["primary", "thief"]);
    let (dialled, accepted) = meet(&mut listener, &primary).await;
    dialled.unwrap();
    accepted.unwrap();
    let met = meet(&mut listener, &thief).await;
    assert_refused(met, Refusal::Revoked, true, "revoked");

    let other = Authority::new();
    other.revoke(&[]);
    fs::copy(other.list(), authority.list()).unwrap();
    let mut listener = listen(&authority.wary("strict"), &["primary"]);
    let (dialled, accepted) = meet(&mut listener, &primary).await;
    dialled.unwrap_err();
    accepted.unwrap_err();
}

#[test]
fn a_list_only_grows() {
    let authority = Authority::new();
    let nobody = revoke::revoke(&authority.ca(), &[name("nobody")], &[], now());
    assert!(matches!(nobody, Err(PkiError::NotIssued(_))), "{nobody:?}");
    assert!(!authority.list().exists());
    let counts = |list: List| (list.added, list.revoked);
    authority.issue("a", now());
    authority.renew("a");
    authority.issue("b", now());
    assert_eq!(counts(authority.revoke(&["A"])), (2, 2), "both of them");
    assert_eq!(counts(authority.revoke(&["a", "b"])), (1, 3));
    assert_eq!(counts(authority.revoke(&[])), (0, 3));

    // One that was issued before there was a record of it.
    let certificate = authority.issue("c", now()).join("host.crt");
    fs::remove_file(authority.ca().join("issued")).unwrap();
    let unknown = revoke::revoke(&authority.ca(), &[name("c")], &[], now());
    assert!(
        matches!(unknown, Err(PkiError::NotIssued(_))),
        "{unknown:?}"
    );
    let by_file = revoke::revoke(&authority.ca(), &[], &[certificate], now()).unwrap();
    assert_eq!(counts(by_file), (1, 4));
    let foreign = Authority::new().issue("d", now());
    let refused = revoke::revoke(&authority.ca(), &[], &[foreign.join("host.crt")], now());
    assert!(refused.is_err());
    fs::write(authority.list(), "rubbish").unwrap();
    let damaged = revoke::revoke(&authority.ca(), &[name("a")], &[], now());
    assert!(
        matches!(damaged, Err(PkiError::BadCa { .. })),
        "{damaged:?}"
    );
}
