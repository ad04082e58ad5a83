//! Requests at the same time: which run together, and what waits for what.

use std::{
    fs::OpenOptions,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use understudy::{
    base::units::Extent,
    disk::{Content, Disk, DiskError, Fua, Geometry, Space},
    shim::{FileIndex, MountedDisk, Refusal, Unmount, Writability},
};

use crate::support::{Mounted, can_mount, have, must, raw_disk};

const MIB: u64 = 1 << 20;
/// How long a request waits for company before it gives up; only a failing test waits that long.
const PATIENCE: Duration = Duration::from_secs(20);

/// A disk that holds writes until as many are under way as are wanted, and counts flushes that overlap.
#[derive(Debug)]
struct Meeting {
    below: Arc<dyn Disk>,
    wanted: usize,
    present: Mutex<usize>,
    arrived: Condvar,
    writes_ended: AtomicUsize,
    flushing: AtomicUsize,
    flushes_at_once: AtomicUsize,
}

impl Meeting {
    fn new(below: Arc<dyn Disk>, wanted: usize) -> Arc<Self> {
        Arc::new(Self {
            below,
            wanted,
            present: Mutex::new(0),
            arrived: Condvar::new(),
            writes_ended: AtomicUsize::new(0),
            flushing: AtomicUsize::new(0),
            flushes_at_once: AtomicUsize::new(0),
        })
    }

    /// Joins the meeting and waits until it is complete.
    fn attend(&self) -> Result<(), DiskError> {
        let mut present = self.present.lock();
        *present += 1;
        self.arrived.notify_all();
        let enough = |present: &mut usize| *present < self.wanted;
        if self
            .arrived
            .wait_while_for(&mut present, enough, PATIENCE)
            .timed_out()
        {
            return Err(DiskError::Stopped("nobody else came".into()));
        }
        Ok(())
    }

    fn wait_for(&self, count: usize) {
        let mut present = self.present.lock();
        self.arrived
            .wait_while(&mut present, |present| *present < count);
    }
}

impl Disk for Meeting {
    fn geometry(&self) -> Geometry {
        self.below.geometry()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.below.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> Result<(), DiskError> {
        self.attend()?;
        self.below.write_at(offset, buf, fua)?;
        self.writes_ended.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn zero(&self, run: Extent, space: Space, fua: Fua) -> Result<(), DiskError> {
        self.below.zero(run, space, fua)
    }

    fn flush(&self) -> Result<(), DiskError> {
        let now = self.flushing.fetch_add(1, Ordering::SeqCst) + 1;
        self.flushes_at_once.fetch_max(now, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(5));
        self.flushing.fetch_sub(1, Ordering::SeqCst);
        self.below.flush()
    }

    fn run_at(&self, offset: u64) -> Result<(Extent, Content), DiskError> {
        self.below.run_at(offset)
    }

    fn close(&self) -> Result<(), DiskError> {
        self.below.close()
    }
}

/// A mount whose writes wait until `wanted` of them are under way.
fn meet(wanted: usize) -> (Mounted, Arc<Meeting>) {
    let mut meeting = None;
    let mounted = Mounted::with(MIB, |image| {
        let disk = raw_disk(image, None, "disk");
        let held = meeting.insert(Meeting::new(disk.disk, wanted)).clone();
        MountedDisk { disk: held, ..disk }
    });
    (mounted, meeting.unwrap())
}

#[test]
fn writes_to_one_disk_run_at_the_same_time() {
    if !can_mount() {
        return;
    }
    let (mounted, _) = meet(8);
    let file = OpenOptions::new().write(true).open(mounted.file()).unwrap();
    thread::scope(|scope| {
        for number in 0..8_u8 {
            let file = &file;
            // Were they to take turns, the first would wait for the others in vain and fail.
            scope.spawn(move || {
                file.write_all_at(&[number; 4096], u64::from(number) * 4096)
                    .unwrap();
            });
        }
    });
}

#[test]
fn one_submitter_keeps_many_requests_under_way() {
    if !can_mount() || !have(&["fio"]) {
        return;
    }
    let (mounted, _) = meet(8);
    let file = format!("--filename={}", mounted.file().display());
    let job = [
        "--name=depth",
        "--ioengine=libaio",
        "--direct=1",
        "--rw=write",
        "--bs=4k",
        "--size=32k",
        "--iodepth=8",
    ];
    // Without asynchronous direct I/O the first request would keep the submitter from sending the second.
    must("fio", job.into_iter().chain([file.as_str()]));
}

#[test]
fn the_kernel_sends_one_flush_at_a_time() {
    if !can_mount() {
        return;
    }
    let (mounted, meeting) = meet(1);
    thread::scope(|scope| {
        for _ in 0..8 {
            let path = mounted.file();
            scope.spawn(move || {
                OpenOptions::new()
                    .write(true)
                    .open(path)
                    .unwrap()
                    .sync_all()
                    .unwrap();
            });
        }
    });
    assert_eq!(mounted.mount.latencies().flush.count(), 8);
    let at_once = meeting.flushes_at_once.load(Ordering::SeqCst);
    assert_eq!(
        at_once, 1,
        "flushes overlap on this kernel: merging them in the shim would pay now"
    );
}

#[test]
fn fencing_and_detaching_wait_for_the_write_under_way() {
    if !can_mount() {
        return;
    }
    for detach in [false, true] {
        // The second guest is this test: it releases the first one's write by attending itself.
        let (mounted, meeting) = meet(2);
        let file = OpenOptions::new().write(true).open(mounted.file()).unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| file.write_all_at(&[1; 4096], 0).unwrap());
            meeting.wait_for(1);
            scope.spawn(|| {
                if detach {
                    mounted.mount.unmount(Unmount::Detach).unwrap();
                } else {
                    let refused = Writability::Refused(Refusal::ReadOnly);
                    mounted.mount.set_writable(FileIndex(0), refused);
                }
                let ended = meeting.writes_ended.load(Ordering::SeqCst);
                done.store(true, Ordering::SeqCst);
                assert_eq!(ended, 1, "a write was still under way (detach: {detach})");
            });
            // Time to return too early, if that were possible.
            thread::sleep(Duration::from_millis(100));
            assert!(
                !done.load(Ordering::SeqCst),
                "it did not wait (detach: {detach})"
            );
            meeting.attend().unwrap();
        });
        assert!(file.write_at(&[2; 4096], 0).is_err());
    }
}
