//! `understudy demo`: the main job end to end on this machine, with real parts: two node processes, real certificates,
//! QUIC over loopback, a FUSE mount, a loop-mounted ext4 under a verified load. It ends with a proof, or fails.
//!
//! 1. make certificates and a VHDX with an ext4 file system on it;
//! 2. start a replica, mount the VHDX, let the initial copy run;
//! 3. write, rewrite, remove and verify files while epochs flow;
//! 4. stop writing, cut, wait until the replica's image holds that epoch;
//! 5. compare primary and replica by digest and with `qemu-img compare`, check the replica's file system, and read every
//!    file back from it.
//!
//! Everything lives in one temporary folder that is removed, and every mount, loop device and process is taken down
//! again, also when a step fails: `stage` holds the guards.

mod load;
mod stage;
mod verify;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use self::{
    load::Files,
    stage::{FileSystem, Host, LoopDevice, Tools},
};
use super::output::Output;
use crate::{
    base::{
        clock::{Clock, SystemClock},
        ids::{Name, SystemIds},
        units::{Bytes, GIB, MIB},
    },
    coord::state::ReplicationState,
    disk::{Geometry, image},
    net::pki,
    node::status::MachineStatus,
    storage::file::FileStorage,
};

/// Options of the demo.
#[derive(Clone, Debug, clap::Args)]
pub struct DemoArgs {
    /// Seconds of verified write load.
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    load: u64,
    /// Size of the disk, in GiB.
    #[arg(long, default_value_t = 2, value_name = "GIB", value_parser = clap::value_parser!(u64).range(1..=64))]
    size: u64,
    /// Folder for everything the demo makes; it is removed at the end.
    #[arg(long, default_value = "/tmp", value_name = "DIR")]
    scratch: PathBuf,
}

/// Bytes of files that are there before the initial copy.
const SEED_BYTES: u64 = 192 * MIB;
/// How long the initial copy, a cut or a merge may take before the demo gives up.
const PATIENCE: Duration = Duration::from_mins(2);
/// The machine's name.
const MACHINE: &str = "demo";

/// Runs the demo.
pub fn run(args: &DemoArgs, out: &Output) -> anyhow::Result<()> {
    let tools = Tools::find()?;
    let scratch = stage::scratch(&args.scratch)?;
    let dir = scratch.path();
    let started = Instant::now();

    certificates(dir)?;
    let image = dir.join("disk.vhdx");
    create_image(&image, args.size * GIB)?;
    let mut files = Files::new(dir.join("fs"));
    out.step("make a VHDX with an ext4 file system on it");
    seed(tools, dir, &image, &mut files)?;

    out.step("start a replica, mount the VHDX, copy");
    let replica = Host::replica(dir)?;
    let primary = Host::primary(dir, &image, replica.listening()?)?;
    let copied = Instant::now();
    primary.wait(PATIENCE, "the initial copy", |m| {
        m.state == ReplicationState::Replicating
    })?;
    let copy_time = copied.elapsed();
    let copy_bytes = primary.machine()?.traffic.raw;

    out.step(&format!(
        "write, rewrite, remove and verify files for {} s while epochs flow",
        args.load
    ));
    let raw = dir.join("mnt/disk.raw");
    {
        let device = LoopDevice::attach(tools, &raw)?;
        let _mounted = FileSystem::mount(tools, device.path(), files.root())?;
        files.churn(Duration::from_secs(args.load))?;
    }

    out.step("stop writing, cut, wait until the replica's image holds that epoch");
    let lineage = primary.cut()?;
    let before = primary.machine()?;
    replica.wait(PATIENCE, "the merge", |m| {
        m.base_epoch.is_some_and(|base| base >= lineage.epoch)
    })?;
    primary.stop()?;
    replica.stop()?;

    out.step("prove that primary and replica hold the same bytes");
    let replica_image = verify::replica_image(dir)?;
    let digest = verify::digests(&image, &replica_image)?;
    verify::qemu_compare(tools, &image, &replica_image)?;
    let verified = verify::file_system(tools, dir, &replica_image, &files)?;

    report(
        out,
        &before,
        &files,
        copy_bytes,
        copy_time,
        started.elapsed(),
    );
    out.line(&format!("digest of both images      {digest}"));
    out.line("qemu-img compare           identical");
    out.line(&format!(
        "e2fsck on the replica      clean, {verified} files with the right SHA-256"
    ));
    scratch.close().context("cannot remove the demo's folder")?;
    out.line(&format!(
        "demo: replica identical at epoch {}",
        lineage.epoch
    ));
    Ok(())
}

fn certificates(dir: &Path) -> anyhow::Result<()> {
    let ca = dir.join("ca");
    let now = SystemClock::default().wall();
    pki::init(&ca, now)?;
    for host in ["primary", "replica"] {
        let name = Name::new(host)?;
        pki::issue(
            &ca,
            &name,
            &stage::local_names(host),
            &dir.join(host).join("identity"),
            now,
        )?;
    }
    Ok(())
}

fn create_image(path: &Path, size: u64) -> anyhow::Result<()> {
    let storage = FileStorage::create_new(path).context("cannot create the demo's image")?;
    let geometry = Geometry {
        size,
        logical_sector: 512,
        physical_sector: 4096,
    };
    let options = image::CreateOptions::new(image::Format::Vhdx, geometry);
    image::create(&storage, &options, &SystemIds::default())?;
    Ok(())
}

/// Makes the file system and its first files through a mount that does not track.
fn seed(tools: Tools, dir: &Path, image: &Path, files: &mut Files) -> anyhow::Result<()> {
    let host = Host::untracked(dir, image)?;
    let raw = dir.join("mnt/disk.raw");
    tools.run(
        "mkfs.ext4",
        &["-q", "-F", "-E", "lazy_itable_init=0", &stage::text(&raw)?],
    )?;
    {
        let device = LoopDevice::attach(tools, &raw)?;
        let _mounted = FileSystem::mount(tools, device.path(), files.root())?;
        files.seed(SEED_BYTES)?;
    }
    host.stop()
}

fn report(
    out: &Output,
    primary: &MachineStatus,
    files: &Files,
    copied: u64,
    copy_time: Duration,
    all: Duration,
) {
    let traffic = &primary.traffic;
    let ms = |value: Option<u64>| value.map_or_else(|| "-".into(), |ms| format!("{ms} ms"));
    let latency = primary.write_latency.unwrap_or_default();
    out.line("");
    out.line(&format!(
        "initial copy               {} in {:.1} s",
        Bytes(copied),
        copy_time.as_secs_f64()
    ));
    out.line(&format!("load                       {files}"));
    out.line(&format!(
        "epochs                     {} durable, {} merged",
        traffic.epochs, traffic.merged
    ));
    let wire = format!(
        "{} raw, {} on the wire",
        Bytes(traffic.raw),
        Bytes(traffic.sent)
    );
    out.line(&format!(
        "sent                       {wire}, {} folded away",
        Bytes(traffic.folded)
    ));
    out.line(&format!(
        "RPO as achieved            p50 {}, p99 {}",
        ms(primary.rpo.p50_ms),
        ms(primary.rpo.p99_ms)
    ));
    let (p50, p99, p999) = (latency.p50_us, latency.p99_us, latency.p999_us);
    out.line(&format!(
        "guest write latency        p50 {p50:.0} us, p99 {p99:.0} us, p99.9 {p999:.0} us"
    ));
    out.line(&format!(
        "whole demo                 {:.1} s",
        all.as_secs_f64()
    ));
}

/// The check that a demo can fail: a wait that ran out, named.
fn ensure_in_time(started: Instant, patience: Duration, what: &str) -> anyhow::Result<()> {
    ensure!(
        started.elapsed() < patience,
        "{what} took longer than {} s",
        patience.as_secs()
    );
    Ok(())
}
