//! The kernel's table of mounts, `/proc/self/mountinfo` (proc(5)).
//!
//! Asking the table instead of the path has two reasons: a path whose server died answers nothing but `ENOTCONN`, and
//! one whose server hangs does not answer at all.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MountEntry {
    /// `major:minor` of the file system: for FUSE it names the connection and is never shared by two mounts alive.
    pub device: String,
    /// Where it is attached.
    pub point: PathBuf,
    /// File system type, with the subtype: `fuse.understudy`.
    pub kind: String,
    /// For FUSE the user whose process serves it.
    pub user: Option<u32>,
}

impl MountEntry {
    /// Whether a process serves it through `/dev/fuse`.
    pub(super) fn is_fuse(&self) -> bool {
        self.kind == "fuse" || self.kind.starts_with("fuse.")
    }
}

/// The topmost mount attached at exactly `point`, an absolute path without links.
pub(super) fn mounted_at(point: &Path) -> io::Result<Option<MountEntry>> {
    Ok(topmost(&fs::read("/proc/self/mountinfo")?, point))
}

fn topmost(table: &[u8], point: &Path) -> Option<MountEntry> {
    table
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .rfind(|entry| entry.point == point)
}

/// Parses one line; the kernel writes no other, so a line of another form is skipped.
fn parse(line: &[u8]) -> Option<MountEntry> {
    let text = |field: &[u8]| String::from_utf8(field.to_vec()).ok();
    let mut fields = line.split(|byte| *byte == b' ');
    let device = text(fields.nth(2)?)?;
    let point = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let kind = text(fields.next()?)?;
    let options = fields.nth(1).and_then(text).unwrap_or_default();
    let user = |option: &str| option.strip_prefix("user_id=")?.parse().ok();
    Some(MountEntry {
        device,
        point,
        kind,
        user: options.split(',').find_map(user),
    })
}

/// Undoes the kernel's `\ooo` for space, tab, newline and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let escaped = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if *first == b'\\' => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &tail[3..] } else { tail };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 22 0:50 / /mnt/a\\040b rw,nosuid,nodev shared:7 master:3 - fuse.understudy understudy rw,user_id=0
41 40 0:51 / /mnt/a\\040b rw - tmpfs tmpfs rw
garbage
";

    #[test]
    fn the_last_mount_at_a_path_is_the_one_on_top() {
        let entry = topmost(TABLE.as_bytes(), Path::new("/mnt/a b")).unwrap();
        assert_eq!(
            (entry.device.as_str(), entry.kind.as_str()),
            ("0:51", "tmpfs")
        );
        assert!(!entry.is_fuse());
        let without_top = TABLE.replace("41 40 0:51", "#");
        let entry = topmost(without_top.as_bytes(), Path::new("/mnt/a b")).unwrap();
        assert!(
            entry.is_fuse() && entry.device == "0:50",
            "optional fields are skipped"
        );
        assert_eq!(entry.user, Some(0));
        assert_eq!(topmost(TABLE.as_bytes(), Path::new("/mnt")), None);
    }

    #[test]
    fn escapes_are_undone() {
        assert_eq!(
            unescape(b"a\\040b\\134c\\012"),
            b"a b\\c\n",
            "space, backslash, newline"
        );
        assert_eq!(unescape(b"tail\\04"), b"tail\\04");
    }

    #[test]
    fn the_root_is_mounted() {
        let root = mounted_at(Path::new("/")).unwrap().unwrap();
        assert!(!root.is_fuse() && root.device.contains(':'));
    }
}
