//! Who uses the files of a mount: what a person must stop before it can go.
//!
//! Asked of the kernel's process table (proc(5)) and of the loop devices, never of the mount itself, which may not answer.

use std::{fs, path::Path};

/// Somebody who has a file of a mount open.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum User {
    /// A process, with its id and its name as the kernel knows it.
    Process(u32, String),
    /// A loop device, held by the kernel itself.
    Loop(String),
}

impl std::fmt::Display for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Process(id, name) => write!(f, "{name} (process {id})"),
            Self::Loop(name) => write!(f, "loop device {name}"),
        }
    }
}

/// Everybody who has a file below `dir`, an absolute path without links, open or mapped, or stands in a folder of it.
/// Processes of other users are seen by root only; those in another mount namespace may be missed.
pub fn users_of(dir: &Path) -> Vec<User> {
    let mut users: Vec<_> = processes(dir).chain(loops(dir)).collect();
    users.sort();
    users.dedup();
    users
}

fn processes(dir: &Path) -> impl Iterator<Item = User> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(move |entry| {
        let id = entry.file_name().to_str()?.parse().ok()?;
        let process = entry.path();
        uses(&process, dir).then(|| {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            User::Process(id, name.trim().to_owned())
        })
    })
}

fn uses(process: &Path, dir: &Path) -> bool {
    let leads_there = |link: &Path| fs::read_link(link).is_ok_and(|target| target.starts_with(dir));
    if ["cwd", "root"]
        .iter()
        .any(|link| leads_there(&process.join(link)))
    {
        return true;
    }
    ["fd", "map_files"].iter().any(|links| {
        let links = fs::read_dir(process.join(links)).into_iter().flatten();
        links.flatten().any(|link| leads_there(&link.path()))
    })
}

fn loops(dir: &Path) -> impl Iterator<Item = User> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    entries.filter_map(move |entry| {
        let file = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
        let name = entry.file_name().into_string().ok()?;
        Path::new(file.trim_end_matches('\n'))
            .starts_with(dir)
            .then_some(User::Loop(name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_has_a_file_open_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        assert_eq!(users_of(&path), []);
        let file = fs::File::create(path.join("disk.raw")).unwrap();
        let users = users_of(&path);
        let [User::Process(id, name)] = &users[..] else {
            panic!("{users:?}");
        };
        assert_eq!(*id, std::process::id());
        assert!(!name.is_empty() && users[0].to_string().contains(name));
        drop(file);
        assert_eq!(users_of(&path), []);
    }
}
