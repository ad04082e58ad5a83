//! The mount helper: what a host that may not mount does with it, what it refuses, and what the death of either leaves.

use std::{
    ffi::OsStr,
    fs,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::{PermissionsExt, chown, symlink},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, umount2},
    sys::statfs::statfs,
};
use rustix::{
    cmsg_space,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg,
        sendmsg, socket_with,
    },
};
use serde_json::{Value, json};
use understudy::shim::helper::{CONNECTIONS_MAX, MESSAGE_BYTES_MAX, PATH_BYTES_MAX};

use super::hardening::{NOBODY, give_away};
use crate::support::{PROGRAM, can_mount, have, scratch};

/// Somebody else: the user of a hypervisor.
pub(super) const GUEST: u32 = 1000;
/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_mins(1);

/// A running mount helper. Dropping it kills it.
pub(super) struct Helper {
    child: Child,
    socket: PathBuf,
}

impl Helper {
    /// One for `user`, who has `CAP_SYS_ADMIN` and no other capability.
    pub(super) fn start(user: u32, socket: PathBuf, beneath: &Path) -> Self {
        // As udev makes it, where there is one.
        fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
        let id = user.to_string();
        let child = Command::new("setpriv")
            .args([&format!("--reuid={id}"), &format!("--regid={id}")])
            .args(["--clear-groups", "--inh-caps=-all,+sys_admin"])
            .args([
                "--ambient-caps=-all,+sys_admin",
                "--bounding-set=-all,+sys_admin",
            ])
            .args([PROGRAM, "mount-helper", "--socket"])
            .arg(&socket)
            .arg("--beneath")
            .arg(beneath)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let helper = Self { child, socket };
        let began = Instant::now();
        while helper.connect().is_err() {
            assert!(began.elapsed() < PATIENCE, "the helper does not come up");
            std::thread::sleep(Duration::from_millis(10));
        }
        // The connection that found it up has a thread and a descriptor there until its end is noticed.
        while helper.threads() > 1 {
            assert!(began.elapsed() < PATIENCE, "a connection is left behind");
            std::thread::sleep(Duration::from_millis(1));
        }
        helper
    }

    /// Its own, and one for each connection.
    fn threads(&self) -> usize {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id()));
        tasks.unwrap().count()
    }

    fn connect(&self) -> rustix::io::Result<OwnedFd> {
        let (kind, close) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let socket = socket_with(AddressFamily::UNIX, kind, close, None)?;
        connect(&socket, &SocketAddrUnix::new(&self.socket)?)?;
        Ok(socket)
    }

    /// Sends bytes as they are.
    fn raw(&self, bytes: &[u8]) -> (Value, Option<OwnedFd>) {
        let socket = self.connect().unwrap();
        let mut nothing = SendAncillaryBuffer::default();
        sendmsg(
            &socket,
            &[IoSlice::new(bytes)],
            &mut nothing,
            SendFlags::NOSIGNAL,
        )
        .unwrap();
        answer(&socket)
    }

    fn ask(&self, request: &Value) -> (Value, Option<OwnedFd>) {
        self.raw(&serde_json::to_vec(request).unwrap())
    }

    /// Why it refuses.
    fn refused(&self, request: &Value) -> String {
        let (answer, device) = self.ask(request);
        assert!(device.is_none());
        let why = &answer["refused"]["why"];
        why.as_str()
            .unwrap_or_else(|| panic!("{request}: {answer}"))
            .to_owned()
    }

    /// Descriptors that it has open.
    fn open(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .unwrap()
            .count()
    }

    /// Waits until no more are open.
    fn wait_open(&self, most: usize) {
        let began = Instant::now();
        while self.open() > most {
            assert!(began.elapsed() < PATIENCE, "descriptors are left behind");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGKILL.
    pub(super) fn kill(mut self) -> PathBuf {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.socket.clone()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn answer(socket: &OwnedFd) -> (Value, Option<OwnedFd>) {
    let mut bytes = vec![0; 2 * MESSAGE_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg(socket, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut device = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            device = descriptors.next();
        }
    }
    (
        serde_json::from_slice(&bytes[..message.bytes]).unwrap(),
        device,
    )
}

fn mount(dir: &Path) -> Value {
    json!({ "mount": { "dir": dir, "access": "owner" } })
}

fn unmount(dir: &Path, mark: &str) -> Value {
    json!({ "unmount": { "dir": dir, "mark": mark, "how": "detach" } })
}

fn recover(dir: &Path) -> Value {
    json!({ "recover": { "dir": dir } })
}

/// Lines of the kernel's table about mounts at or below `dir`, as a process sees them.
pub(super) fn mounts(dir: &Path, process: &str) -> Vec<String> {
    let table = fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap();
    let below = |line: &&str| {
        let place = line.split(' ').nth(4);
        place.is_some_and(|place| Path::new(place).starts_with(dir))
    };
    table.lines().filter(below).map(str::to_owned).collect()
}

pub(super) fn is_dead(dir: &Path) -> bool {
    statfs(dir).err() == Some(Errno::ENOTCONN)
}

/// Detaches whatever a test left in a folder, before the folder is removed.
struct Swept(tempfile::TempDir);

impl Swept {
    fn new() -> Self {
        Self(scratch())
    }

    fn path(&self) -> PathBuf {
        self.0.path().canonicalize().unwrap()
    }
}

impl Drop for Swept {
    fn drop(&mut self) {
        for line in mounts(&self.path(), "self").iter().rev() {
            let _ = umount2(line.split(' ').nth(4).unwrap(), MntFlags::MNT_DETACH);
        }
    }
}

/// Runs a program as another user.
pub(super) fn as_user<I: AsRef<OsStr>>(user: u32, words: impl IntoIterator<Item = I>) -> Output {
    Command::new("setpriv")
        .args([format!("--reuid={user}"), format!("--regid={user}")])
        .args(["--clear-groups", "--inh-caps=-all"])
        .args(words)
        .output()
        .unwrap()
}

pub(super) fn able() -> bool {
    can_mount() && have(&["setpriv", "unshare", "dd"])
}

/// A new folder.
fn made(dir: &Path, name: &str) -> PathBuf {
    fs::create_dir_all(dir.join(name)).unwrap();
    dir.join(name)
}

#[test]
fn what_may_not_be_mounted_at_is_refused_with_the_reason() {
    if !able() {
        return;
    }
    let (inside, outside) = (Swept::new(), Swept::new());
    let dir = inside.path();
    let make = |name: &str| made(&dir, name);
    let (good, full, others) = (make("good"), make("full"), make("others"));
    fs::write(full.join("file"), "").unwrap();
    chown(&others, Some(GUEST), Some(GUEST)).unwrap();
    fs::create_dir(outside.path().join("it")).unwrap();
    symlink(outside.path(), dir.join("out")).unwrap();
    symlink(outside.path().join("it"), dir.join("link")).unwrap();
    symlink("good", dir.join("alias")).unwrap();
    // Our own user, so that this test may ask as it likes: root, without the capabilities that make it root.
    let helper = Helper::start(0, outside.path().join("helper.sock"), &dir);
    let open = helper.open();

    let long = dir.join("x/".repeat(PATH_BYTES_MAX / 2));
    for (wrong, why) in [
        (outside.path().join("it"), "is not beneath"),
        (dir.clone(), "is not beneath"),
        ("/".into(), "is not beneath"),
        ("good".into(), "is not beneath"),
        (dir.join("../it"), "is not beneath"),
        (good.join("../../it"), "is not beneath"),
        (dir.join("good\0/etc"), "plain file name"),
        (dir.join("out/it"), "device"),
        (dir.join("link"), "not a folder"),
        (dir.join("alias"), "not a folder"),
        (full.join("file"), "not a folder"),
        (dir.join("none"), "No such file"),
        (full, "not empty"),
        (others, "another user"),
        (long, "over 1024 bytes"),
    ] {
        let said = helper.refused(&mount(&wrong));
        assert!(said.contains(why), "{}: {said}", wrong.display());
    }
    for bytes in [
        &b""[..],
        b"{}",
        b"\xff\xfe",
        br#"{"mount":{"dir":"/","access":"owner","options":"suid"}}"#,
        &vec![b'['; MESSAGE_BYTES_MAX],
        &vec![b' '; MESSAGE_BYTES_MAX + 100],
    ] {
        let (answer, device) = helper.raw(bytes);
        assert!(
            answer["refused"].is_object() && device.is_none(),
            "{answer}"
        );
    }
    assert!(mounts(&dir, "self").is_empty() && mounts(&outside.path(), "self").is_empty());
    helper.wait_open(open);
}

#[test]
fn only_what_it_mounted_for_its_user_is_unmounted() {
    if !able() {
        return;
    }
    let (inside, outside) = (Swept::new(), Swept::new());
    let dir = inside.path();
    let (good, below, theirs) = (
        made(&dir, "good"),
        made(&dir, "below/it"),
        made(&dir, "theirs"),
    );
    let helper = Helper::start(0, outside.path().join("helper.sock"), &dir);
    let open = helper.open();
    let (mounted, device) = helper.ask(&mount(&good));
    assert!(mounted["mounted"].is_object(), "{mounted}");
    // Nobody serves it yet, so that whoever asks whether it is dead waits, and nobody else does.
    let waiting = helper.connect().unwrap();
    let request = serde_json::to_vec(&mount(&good)).unwrap();
    let mut nothing = SendAncillaryBuffer::default();
    let request = [IoSlice::new(&request)];
    sendmsg(&waiting, &request, &mut nothing, SendFlags::NOSIGNAL).unwrap();
    let covered = json!({ "unmounted": { "outcome": "covered" } });
    assert_eq!(helper.ask(&unmount(&good, "0:1")).0, covered);
    let (none, kind) = (MsFlags::empty(), Some("tmpfs"));
    nix::mount::mount(kind, &below, kind, none, None::<&str>).unwrap();
    let device_of = |dir: &Path| mounts(dir, "self")[0].split(' ').nth(2).unwrap().to_owned();
    assert_eq!(helper.ask(&unmount(&below, &device_of(&below))).0, covered);
    let left_alone = json!({ "recovered": { "found": false } });
    assert_eq!(helper.ask(&recover(&below)).0, left_alone);

    // A mount of another user, dead as well, is not this helper's to take away.
    let fuse = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .unwrap();
    let options = format!(
        "fd={},rootmode=40000,user_id={NOBODY},group_id={NOBODY},allow_other",
        fuse.as_fd().as_raw_fd()
    );
    let kind = Some("fuse.understudy");
    nix::mount::mount(Some("x"), &theirs, kind, none, Some(&*options)).unwrap();
    assert_eq!(
        helper.ask(&unmount(&theirs, &device_of(&theirs))).0,
        covered
    );
    drop((device, fuse));
    let (again, device) = answer(&waiting);
    let mark = again["mounted"]["mark"].as_str().unwrap().to_owned();
    drop(device);
    assert!(is_dead(&theirs) && is_dead(&good));
    assert_eq!(helper.ask(&recover(&theirs)).0, left_alone);
    assert!(is_dead(&good));
    assert_eq!(
        helper.ask(&recover(&good)).0,
        json!({ "recovered": { "found": true } })
    );
    assert!(mounts(&good, "self").is_empty());
    let gone = json!({ "unmounted": { "outcome": "gone" } });
    assert_eq!(helper.ask(&unmount(&good, &mark)).0, gone);
    umount2(&below, MntFlags::empty()).unwrap();
    helper.wait_open(open);
}

#[test]
fn only_the_user_that_it_works_for_is_answered() {
    if !able() {
        return;
    }
    let place = Swept::new();
    give_away(&place.path());
    let helper = Helper::start(NOBODY, place.path().join("helper.sock"), &place.path());
    let said = helper.refused(&mount(&place.path().join("it")));
    assert!(
        said.contains("user 0 asks") && said.contains("for user 65534"),
        "{said}"
    );
    // Nor do others get as far as that.
    let mode = fs::metadata(&helper.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    for key in ["CapPrm", "CapEff", "CapBnd"] {
        let status = fs::read_to_string(format!("/proc/{}/status", helper.child.id())).unwrap();
        let mask = status
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .unwrap();
        // CAP_SYS_ADMIN is the 21st.
        assert_eq!(
            u64::from_str_radix(mask[1..].trim(), 16).unwrap(),
            1 << 21,
            "{key}"
        );
    }
    // A second one on the same socket says so and does not take it away.
    let second = as_user(
        NOBODY,
        [
            OsStr::new(PROGRAM),
            "mount-helper".as_ref(),
            "--socket".as_ref(),
            helper.socket.as_ref(),
            "--beneath".as_ref(),
            place.path().as_ref(),
        ],
    );
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(
        !second.status.success() && said.contains("another mount helper"),
        "{said}"
    );
    helper.refused(&mount(&place.path().join("it")));
}

#[test]
fn connections_that_say_nothing_keep_nobody_out_for_long() {
    if !able() {
        return;
    }
    let place = Swept::new();
    let helper = Helper::start(0, place.path().join("helper.sock"), &place.path());
    let silent: Vec<_> = (0..CONNECTIONS_MAX)
        .map(|_| helper.connect().unwrap())
        .collect();
    // One more gets no answer: it is closed, before or after it could ask.
    let one_more = helper.connect().unwrap();
    let mut nothing = SendAncillaryBuffer::default();
    let request = serde_json::to_vec(&recover(&place.path().join("it"))).unwrap();
    let request = [IoSlice::new(&request)];
    let _ = sendmsg(&one_more, &request, &mut nothing, SendFlags::NOSIGNAL);
    let mut byte = [0];
    let received = rustix::net::recv(&one_more, &mut byte[..], RecvFlags::empty());
    assert!(!matches!(received, Ok((_, 1..))), "{received:?}");
    // They are closed, each with a reason, although their clients hold on.
    for socket in &silent {
        let (answer, _) = answer(socket);
        assert!(answer["refused"].is_object(), "{answer}");
    }
    let began = Instant::now();
    while helper.ask(&recover(&place.path().join("it"))).0["recovered"].is_null() {
        assert!(began.elapsed() < PATIENCE, "nobody is let in any more");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn descriptors_that_come_with_a_request_are_not_kept() {
    if !able() {
        return;
    }
    let place = Swept::new();
    let helper = Helper::start(0, place.path().join("helper.sock"), &place.path());
    let open = helper.open();
    for _ in 0..4 {
        let socket = helper.connect().unwrap();
        let file = fs::File::open("/dev/null").unwrap();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [file.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let request = serde_json::to_vec(&recover(&place.path().join("it"))).unwrap();
        let flags = SendFlags::NOSIGNAL;
        sendmsg(&socket, &[IoSlice::new(&request)], &mut control, flags).unwrap();
        assert!(answer(&socket).0["recovered"].is_object());
    }
    helper.wait_open(open);
}

/// Ends the swapping, also when its test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Somebody swaps a folder on the way for a link that leads out, all the time.
#[test]
fn a_link_that_is_swapped_in_leads_no_mount_out() {
    if !able() {
        return;
    }
    let (inside, outside) = (Swept::new(), Swept::new());
    let dir = inside.path();
    fs::create_dir_all(dir.join("way/it")).unwrap();
    fs::create_dir(outside.path().join("it")).unwrap();
    symlink(outside.path(), dir.join("link")).unwrap();
    let helper = Helper::start(0, outside.path().join("helper.sock"), &dir);
    let over = AtomicBool::new(false);
    let (mut mounted, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            use rustix::fs::{CWD, RenameFlags, renameat_with};
            let (way, link) = (dir.join("way"), dir.join("link"));
            while !over.load(Ordering::Relaxed) {
                let _ = renameat_with(CWD, &way, CWD, &link, RenameFlags::EXCHANGE);
            }
        });
        let _over = Over(&over);
        for _ in 0..2000 {
            let (answer, device) = helper.ask(&mount(&dir.join("way/it")));
            assert!(mounts(&outside.path(), "self").is_empty(), "{answer}");
            if device.is_some() {
                mounted += 1;
            } else {
                refused += 1;
            }
            drop(device);
            // By the true path, whichever name it has at the moment.
            for line in mounts(&dir, "self") {
                let _ = umount2(line.split(' ').nth(4).unwrap(), MntFlags::MNT_DETACH);
            }
            if mounted > 20 && refused > 20 {
                break;
            }
        }
    });
    assert!(
        mounted > 0 && refused > 0,
        "{mounted} mounted, {refused} refused"
    );
}
