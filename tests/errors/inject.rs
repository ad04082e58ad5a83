//! Errors of system calls, by strace, which is attached to a process that runs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// How long strace may take to attach; it is no measure of speed.
const PATIENCE: Duration = Duration::from_secs(30);
/// Time between two looks.
const LOOK: Duration = Duration::from_millis(5);

/// Calls that fail with `EIO`. Dropping it detaches strace, and the process goes on.
pub(super) struct Injection {
    strace: Child,
    told: PathBuf,
    _folder: tempfile::TempDir,
}

impl Injection {
    /// From now on `calls` of a process on `files` fail; `when` is counted in each thread for itself: `3` is its third
    /// call, `3+` that and all later ones.
    pub(super) fn begin(process: Pid, files: &[&Path], calls: &[&str], when: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let told = folder.path().join("strace");
        let calls = calls.join(",");
        let mut strace = Command::new("strace");
        strace
            .args(["-f", "-qq", "-p", &process.to_string(), "-o"])
            .arg(&told);
        for file in files {
            strace.arg("-P").arg(file);
        }
        strace.args(["-e", &format!("trace={calls}")]);
        strace.args(["-e", &format!("inject={calls}:error=EIO:when={when}")]);
        let injection = Self {
            strace: strace
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
            told,
            _folder: folder,
        };
        let began = Instant::now();
        while !is_traced(process) {
            assert!(began.elapsed() < PATIENCE, "strace does not attach");
            std::thread::sleep(LOOK);
        }
        injection
    }

    /// Ends it: how many calls failed.
    pub(super) fn end(mut self) -> usize {
        self.detach();
        let told = fs::read_to_string(&self.told).unwrap();
        told.matches("(INJECTED)").count()
    }

    fn detach(&mut self) {
        if self.strace.try_wait().is_ok_and(|ended| ended.is_none()) {
            let pid = Pid::from_raw(i32::try_from(self.strace.id()).unwrap());
            let _ = kill(pid, Signal::SIGTERM);
            let _ = self.strace.wait();
        }
    }
}

impl Drop for Injection {
    fn drop(&mut self) {
        self.detach();
    }
}

/// Whether all threads of a process are traced.
fn is_traced(process: Pid) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{process}/task")) else {
        return false;
    };
    threads.flatten().all(|thread| {
        let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
        !status.contains("TracerPid:\t0\n")
    })
}
