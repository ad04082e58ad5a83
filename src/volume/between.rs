//! What this program notes when it writes the files of a machine that is closed: an image that changes between two mounts
//! is otherwise taken for somebody else's work, and the whole disk is compared with the replica.
#![forbid(unsafe_code)]

use super::record::{ImageStamp, Record, Trust};
use crate::{
    base::ids::{MachineId, Name},
    storage::ledger::{Ledger, LedgerError},
};

/// Notes that this program is about to write files of a machine that is closed, and opens the machine then. `stamps` are
/// those of its disks as they are now. If they are those of the end, the record does not count as clean from here on, so
/// that a death before the machine is open leaves what a death after it would: a machine whose files were ours to write.
/// Otherwise, or if the end was not clean, nothing changes.
pub fn will_write(
    ledger: &Ledger,
    id: MachineId,
    stamps: &[(&Name, ImageStamp)],
) -> Result<(), LedgerError> {
    let key = Record::key(id);
    let Some(mut record) = ledger.get::<Record>(&key)? else {
        return Ok(());
    };
    let unchanged = record.disks.len() == stamps.len()
        && (record.disks.iter()).all(|disk| stamps.contains(&(&disk.name, disk.stamp)));
    if record.trust == Trust::Clean && unchanged {
        record.trust = Trust::Open;
        ledger.put(&key, &record)?;
    }
    Ok(())
}

/// Notes that this program has just grown the image of `disk`, of a machine that is closed: its new `stamp` is not a
/// change behind our back.
pub fn grew(
    ledger: &Ledger,
    id: MachineId,
    disk: &Name,
    stamp: ImageStamp,
) -> Result<(), LedgerError> {
    let key = Record::key(id);
    let Some(mut record) = ledger.get::<Record>(&key)? else {
        return Ok(());
    };
    if record.trust == Trust::Clean
        && let Some(disk) = record.disks.iter_mut().find(|known| known.name == *disk)
    {
        disk.stamp = stamp;
        ledger.put(&key, &record)?;
    }
    Ok(())
}
