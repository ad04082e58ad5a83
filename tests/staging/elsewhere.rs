//! Over real files: a replica whose images lie where their operator put them.

use std::{path::PathBuf, sync::Arc};

use understudy::{
    base::ids::SystemIds,
    delta::Codec,
    disk::{
        Access, Opening,
        image::{self, Format},
    },
    replica::{DiskSpec, MachineReplica},
    storage::{Folder, Open, file::FileFolder, ledger::Ledger, placed::PlacedFolder},
};

use super::{
    Disks, MACHINE, check_points, content, options,
    rescue::{COMMON, adoption, check_rescue, differing, keep_up, leave_images, parted, specs_in},
    send,
};

/// Images that lie outside the replica's folder, one of them behind a link.
struct Elsewhere {
    dir: tempfile::TempDir,
    names: Vec<String>,
}

impl Elsewhere {
    fn new(specs: &[DiskSpec], own: &Disks) -> Self {
        let elsewhere = Self {
            dir: tempfile::tempdir().unwrap(),
            names: specs.iter().map(DiskSpec::file_name).collect(),
        };
        leave_images(&*elsewhere.images(), specs, own);
        let target = elsewhere.dir.path().join("vms").join(&elsewhere.names[0]);
        std::os::unix::fs::symlink(target, elsewhere.link()).unwrap();
        elsewhere
    }

    fn images(&self) -> Arc<dyn Folder> {
        Arc::new(FileFolder::open(&self.dir.path().join("vms")).unwrap())
    }

    fn link(&self) -> PathBuf {
        self.dir.path().join("system")
    }

    fn open(&self) -> MachineReplica {
        let store = FileFolder::open(&self.dir.path().join("store")).unwrap();
        let ledger = Arc::new(Ledger::open_in(&store, "node.redb").unwrap());
        let second = self.dir.path().join("vms").join(&self.names[1]);
        let places = [
            (self.names[0].clone(), self.link()),
            (self.names[1].clone(), second),
        ];
        let placed = PlacedFolder::new(store.folder("machine").unwrap(), places.into());
        let ids = Arc::new(SystemIds::default());
        MachineReplica::open(Arc::new(placed), ledger, ids, MACHINE, options(0)).unwrap()
    }

    /// Names in the replica's own folder.
    fn machine_files(&self) -> Vec<String> {
        let folder = FileFolder::open(&self.dir.path().join("store/machine")).unwrap();
        folder.names().unwrap()
    }
}

#[test]
fn images_are_adopted_where_their_operator_put_them() {
    for format in [Format::Raw, Format::Vhdx] {
        let (mut model, own) = parted();
        let specs = specs_in(format);
        let elsewhere = Elsewhere::new(&specs, &own);
        let replica = elsewhere.open();
        replica.adopt(&specs, adoption(&model, false)).unwrap();
        let changes = differing(7, Codec::Zstd);
        let first = model.epoch_of(COMMON + 1, Some(COMMON), &changes);
        send(&replica, &first).unwrap();
        send(&replica, &model.epoch(COMMON + 2, Some(COMMON + 1))).unwrap();
        keep_up(&replica);
        check_points(&replica, &model);
        drop(replica);
        let replica = elsewhere.open();
        check_points(&replica, &model);
        check_rescue(&replica, &own);
        let files = elsewhere.machine_files();
        assert!(files.iter().all(|name| name.contains(".hrl")), "{files:?}");
        replica.drop_rescue().unwrap();
        replica.merge().unwrap().unwrap();
        check_points(&replica, &model);
        replica.close().unwrap();
        assert!(elsewhere.machine_files().is_empty());
        for (spec, expected) in specs.iter().zip(&model.disks) {
            let file = elsewhere.images().open(&spec.file_name(), Open::Read);
            let opening = Opening::new(Access::ReadOnly, Arc::new(SystemIds::default()));
            let disk = image::open(file.unwrap(), format, &opening).unwrap();
            assert!(content(&*disk) == *expected, "{}", spec.name);
        }
        let replica = elsewhere.open();
        check_points(&replica, &model);
        replica.destroy().unwrap();
        assert!(elsewhere.images().names().unwrap().is_empty());
        let link = elsewhere.link().symlink_metadata();
        assert!(link.is_ok(), "the link is the operator's");
    }
}
