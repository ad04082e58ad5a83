//! A host with one machine of one disk, and a guest that runs on it while everything is recorded.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use understudy::{
    base::{
        checksum::Digest,
        clock::SystemClock,
        ids::{Lineage, MachineId, Name, SystemIds},
        limits::DELTA_FRAMES_MAX,
        units::{Epoch, Extent, MIB, to_usize},
    },
    disk::{
        Access, Content, Disk, DiskError, Fua, Geometry, Opening, Space,
        image::{self, CreateOptions, Format},
    },
    shim::{MountOptions, MountedDisk, Unmount, Writability, mount},
    storage::{
        Folder, Open, Storage,
        ledger::Ledger,
        memory::{MemoryFolder, MemoryStorage, Power},
    },
    track::state::StateDir,
    volume::{CopyScope, DiskSource, ImageStamp, Machine, MachineOptions, Side, Taken},
};

use super::{
    sender::Sender,
    tape::{Entry, NAMES, Shelf, Tape},
};
use crate::support::must;

/// Bytes of the disk.
pub(crate) const SIZE: u64 = 32 * MIB;
/// Bytes of the file system at its start.
const FILE_SYSTEM_MIB: u64 = 31;
/// Where the guest writes what it has to say: `note` of scripts/guest-init.
const NOTES_AT: u64 = SIZE - 4096;
/// Few enough that regions cool all the time.
const HOT_REGIONS_MAX: usize = 8;
/// Few enough that the guest sometimes rewrites more of a cut epoch, which is then merged.
const PRESERVED_BLOCKS: u64 = 96;

/// What is known of a run.
pub(crate) struct Recording {
    pub(crate) format: Format,
    pub(crate) tape: Arc<Tape>,
    pub(crate) entries: Vec<Entry>,
    /// What the replica held before the first entry, and its point.
    pub(crate) replica: Vec<u8>,
    pub(crate) head: Lineage,
    /// Names and hashes of the files that were left, as the guest printed them at its end.
    pub(crate) left: Vec<(String, String)>,
    /// What the disk held at the end.
    pub(crate) disk: Vec<u8>,
    pub(crate) merged_epochs: u64,
    pub(crate) preserved_blocks: u64,
}

/// Opens the disk in an image.
pub(crate) fn open_disk(image: Arc<dyn Storage>, format: Format) -> Result<Arc<dyn Disk>, String> {
    // Each session of an image has a log with an identity of its own.
    let opening = Opening::new(Access::ReadWrite, Arc::new(SystemIds::default()));
    image::open(image, format, &opening).map_err(|error| format!("the image: {error:?}"))
}

/// Opens the machine, in a boot of that name.
pub(crate) fn open_machine(
    disk: Arc<dyn Disk>,
    store: Arc<dyn Storage>,
    state: &StateDir,
    boot: &str,
) -> Result<Arc<Machine>, String> {
    let ledger = Ledger::open(store).map_err(|error| format!("the store: {error:?}"))?;
    let options = MachineOptions {
        id: MachineId(uuid::Uuid::from_u128(11)),
        name: Name::new("m").unwrap(),
        clock: Arc::new(SystemClock::default()),
        boot_id: boot.into(),
        preserve_bytes_max: PRESERVED_BLOCKS * (4096 + 128),
        hot_regions_max: HOT_REGIONS_MAX,
        frames_max: DELTA_FRAMES_MAX,
    };
    let disk = DiskSource {
        name: Name::new("disk").unwrap(),
        disk,
        stamp: stamp(),
    };
    Machine::open(options, vec![disk], state, Arc::new(ledger))
        .map_err(|error| format!("the machine: {error:?}"))
}

pub(crate) fn stamp() -> ImageStamp {
    ImageStamp {
        inode: 1,
        bytes: 1,
        modified: (1, 1),
    }
}

/// All bytes of a disk.
pub(crate) fn read(disk: &dyn Disk) -> Result<Vec<u8>, DiskError> {
    let mut bytes = vec![0; to_usize(disk.geometry().size)];
    disk.read_at(0, &mut bytes)?;
    Ok(bytes)
}

/// The point that ends this epoch.
pub(crate) fn lineage(epoch: Epoch) -> Lineage {
    let number = u8::try_from(epoch.0 % 251).unwrap();
    Lineage {
        epoch,
        chain: Digest([number; 32]),
    }
}

/// Runs the guest of scripts/guest-lab on a new disk of this format with an ext4, while epochs are cut and sent.
pub(crate) fn record(lab: &Path, format: Format) -> Recording {
    let (files, head) = prepare(format);
    let replica = {
        let image = MemoryStorage::with_bytes(&files[0].bytes());
        read(&*open_disk(image, format).unwrap()).unwrap()
    };
    let tape = Tape::new(&files);
    let files = tape.files();
    let state = Shelf::state(&files);
    let disk = open_disk(Arc::clone(&files[0]), format).unwrap();
    let machine = open_machine(Arc::clone(&disk), Arc::clone(&files[1]), &state, "one").unwrap();
    tape.watch(&state).unwrap();
    let mut sender = Sender::new(&machine, &tape, head);
    let said = run(lab, &machine, &tape, &mut sender);
    sender.finish();
    let content = read(&*disk).unwrap();
    let counters = machine.counters();
    machine.close(&mut |_| Ok(stamp())).unwrap();
    Recording {
        format,
        entries: tape.take(),
        tape,
        replica,
        head,
        left: said,
        disk: content,
        merged_epochs: counters.merged_epochs,
        preserved_blocks: counters.preserved_blocks,
    }
}

/// Boots the guest on the machine's disk and lets the sender work until it has shut down. Returns the files it left.
fn run(
    lab: &Path,
    machine: &Arc<Machine>,
    tape: &Arc<Tape>,
    sender: &mut Sender,
) -> Vec<(String, String)> {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("mnt");
    fs::create_dir(&dir).unwrap();
    let disk = MountedDisk {
        folder: None,
        file_name: Name::new("disk").unwrap(),
        disk: Arc::new(Overheard {
            disk: Arc::clone(&machine.volumes()[0]) as Arc<dyn Disk>,
            tape: Arc::clone(tape),
        }),
        writability: Writability::Writable,
    };
    let mounted = mount(&MountOptions::new(dir), vec![disk]).unwrap();
    let file = mounted.dir().join("disk.raw");
    let over = AtomicBool::new(false);
    let said = thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let said = std::panic::catch_unwind(|| guest(lab, &file));
            over.store(true, Ordering::SeqCst);
            said.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        while !over.load(Ordering::SeqCst) {
            sender.turn(&|| over.load(Ordering::SeqCst));
        }
        guest.join().unwrap()
    });
    mounted.unmount(Unmount::IfUnused).unwrap();
    let files = said.lines().filter_map(|line| {
        let (name, sum) = line.strip_prefix("GUEST file ")?.split_once(' ')?;
        Some((name.to_owned(), sum.to_owned()))
    });
    files.collect()
}

fn guest(lab: &Path, file: &Path) -> String {
    let arguments = ["--mode", "power", "--aio", "native"].map(AsRef::as_ref);
    must(
        lab.to_str().unwrap(),
        [&arguments[..], &[file.as_os_str()]].concat(),
    )
}

/// The files of a host whose machine is in step with its replica and was closed, and the point of both.
fn prepare(format: Format) -> (Vec<Arc<MemoryStorage>>, Lineage) {
    let power = Power::new();
    let image = MemoryStorage::new(&power);
    let geometry = Geometry {
        size: SIZE,
        logical_sector: 512,
        physical_sector: 4096,
    };
    let mut options = CreateOptions::new(format, geometry);
    options.block_size = (format != Format::Raw).then_some(1 << 20);
    image::create(&*image, &options, &SystemIds::default()).unwrap();
    let disk = open_disk(Arc::clone(&image) as _, format).unwrap();
    put_file_system(&*disk);

    let folder = MemoryFolder::new(&power);
    let state = StateDir::memory(Arc::clone(&folder) as _);
    let store = MemoryStorage::new(&power);
    let machine = open_machine(disk, Arc::clone(&store) as _, &state, "zero").unwrap();
    machine.begin_initial_copy(CopyScope::Allocated).unwrap();
    while machine.take(Side::Closing, Epoch::INITIAL, MIB).unwrap() != Taken::Drained {}
    let head = lineage(Epoch::INITIAL);
    machine.staged(head).unwrap();
    machine.close(&mut |_| Ok(stamp())).unwrap();

    let tracking = NAMES.map(|(name, _)| {
        let file = folder.open(name, Open::Read).unwrap();
        let mut bytes = vec![0; to_usize(file.len().unwrap())];
        file.read_at(0, &mut bytes).unwrap();
        MemoryStorage::with_bytes(&bytes)
    });
    ([image, store].into_iter().chain(tracking).collect(), head)
}

/// Makes an ext4 on the disk.
fn put_file_system(disk: &dyn Disk) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let size = format!("{FILE_SYSTEM_MIB}M");
    must(
        "mkfs.ext4",
        ["-q".as_ref(), file.path().as_os_str(), size.as_ref()],
    );
    let bytes = fs::read(file.path()).unwrap();
    for (chunk, at) in bytes.chunks(4096).zip((0..).step_by(4096)) {
        if chunk.iter().any(|&byte| byte != 0) {
            disk.write_at(at, chunk, Fua::No).unwrap();
        }
    }
    disk.flush().unwrap();
}

/// The disk as the guest has it. What the guest says is heard.
#[derive(Debug)]
struct Overheard {
    disk: Arc<dyn Disk>,
    tape: Arc<Tape>,
}

impl Disk for Overheard {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.disk.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8], fua: Fua) -> Result<(), DiskError> {
        if offset == NOTES_AT {
            let text = String::from_utf8_lossy(buf);
            let line = text.lines().next().unwrap_or_default();
            self.tape.note(Entry::Note(line.to_owned()));
        }
        self.disk.write_at(offset, buf, fua)
    }

    fn zero(&self, run: Extent, space: Space, fua: Fua) -> Result<(), DiskError> {
        self.disk.zero(run, space, fua)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.disk.flush()
    }

    fn run_at(&self, offset: u64) -> Result<(Extent, Content), DiskError> {
        self.disk.run_at(offset)
    }

    fn close(&self) -> Result<(), DiskError> {
        self.disk.close()
    }
}
