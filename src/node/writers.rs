//! Threads that write what an initial copy brings, so that receiving does not wait for the disk.

use std::thread;

use crossbeam_channel::{Sender, bounded};

use crate::replica::WriteTask;

/// Threads, and writes under way at once: one that the disk carries out while the next one is handed over.
const WRITERS: usize = 2;
/// Writes that wait for a thread. With those under way they bound what a connection keeps in memory to as many MiB.
const WAITING: usize = 2;

/// Carries out writes beside the receiving. Dropping it waits for them.
#[derive(Debug)]
pub(super) struct Writers {
    tasks: Option<Sender<WriteTask>>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Writers {
    /// Starts the threads; those that the system gives.
    pub(super) fn start() -> Self {
        let (tasks, inbox) = bounded::<WriteTask>(WAITING);
        let threads: Vec<_> = (0..WRITERS)
            .map_while(|index| {
                let inbox = inbox.clone();
                thread::Builder::new()
                    .name(format!("write-{index}"))
                    .spawn(move || inbox.into_iter().for_each(WriteTask::run))
                    .ok()
            })
            .collect();
        Self {
            tasks: (!threads.is_empty()).then_some(tasks),
            threads,
        }
    }

    /// Has `task` carried out. Waits while enough of them are under way.
    pub(super) fn run(&self, task: WriteTask) {
        match &self.tasks {
            // The threads live as long as this value; a task that comes back is dropped, and that fails its log.
            Some(tasks) => drop(tasks.send(task)),
            None => task.run(),
        }
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.tasks = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so on standard error.
            let _ = thread.join();
        }
    }
}
