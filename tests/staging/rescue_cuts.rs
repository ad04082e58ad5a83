//! What a cut leaves of a rescue point: all of it, or what follows it.

use std::io;

use understudy::{base::units::Epoch, delta::Codec, replica::Head};

use super::{
    Disks, Host, Model, check_points,
    cuts::keeps,
    head_epoch,
    rescue::{COMMON, adoption, check_rescue, differing, leave_images, parted},
    send, specs,
};

/// How far a story came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    #[default]
    Begun,
    Adopted,
    Dropping,
    Dropped,
    Finished,
}

/// What happened before the end of a story.
#[derive(Debug, Default)]
struct Told {
    stage: Stage,
    acknowledged: Option<Epoch>,
}

/// The life of a former primary's replica, which ends by dropping the rescue point or by settling.
struct Story {
    model: Model,
    own: Disks,
    logs: Vec<(u64, Vec<u8>)>,
    settles: bool,
}

impl Story {
    fn new(settles: bool) -> Self {
        let (mut model, own) = parted();
        let changes = differing(9, Codec::None);
        let first = model.epoch_of(COMMON + 1, Some(COMMON), &changes);
        let mut logs = vec![(COMMON + 1, first)];
        for epoch in COMMON + 2..=COMMON + 6 {
            logs.push((epoch, model.epoch(epoch, Some(epoch - 1))));
        }
        Self {
            model,
            own,
            logs,
            settles,
        }
    }

    /// Up to the first error.
    fn tell(&self, host: &Host, told: &mut Told) -> Result<(), Box<dyn std::error::Error>> {
        let replica = host.open(0)?;
        if replica.head() == Head::Empty {
            replica.adopt(&specs(), adoption(&self.model, false))?;
        }
        told.stage = Stage::Adopted;
        let have = head_epoch(&replica).unwrap().0;
        for (epoch, log) in self.logs.iter().filter(|(epoch, _)| *epoch > have) {
            send(&replica, log)?;
            told.acknowledged = Some(Epoch(*epoch));
            while replica.upkeep()?.is_some() {}
        }
        told.stage = Stage::Dropping;
        if self.settles {
            replica.settle(Epoch(COMMON + 6))?;
        } else {
            replica.drop_rescue()?;
        }
        told.stage = Stage::Dropped;
        while replica.upkeep()?.is_some() {}
        told.stage = Stage::Finished;
        Ok(())
    }

    /// What must be true when a host that told so much is opened again; then it goes on to the end.
    fn check(&self, host: &Host, told: &Told, what: &str) {
        let replica = host
            .open(0)
            .unwrap_or_else(|error| panic!("{what}: {error:?}"));
        let (head, rescue) = (replica.head(), replica.rescue());
        let what = format!("{what}: {told:?}, found {head:?}, {rescue:?}");
        assert!(told.stage < Stage::Adopted || head != Head::Empty, "{what}");
        assert!(head_epoch(&replica) >= told.acknowledged, "{what}");
        check_points(&replica, &self.model);
        if rescue.is_some() {
            assert!(told.stage < Stage::Dropped, "{what}");
            check_rescue(&replica, &self.own);
        } else {
            assert!(
                told.stage >= Stage::Dropping || head == Head::Empty,
                "{what}"
            );
        }
        drop(replica);
        self.tell(host, &mut Told::default())
            .unwrap_or_else(|error| panic!("{what}: {error:?}"));
        let replica = host.open(0).unwrap();
        let end = (replica.points().len(), replica.rescue());
        assert_eq!(end, (1, None), "{what}");
        check_points(&replica, &self.model);
        assert_eq!(host.files().len(), 2, "{what}: {:?}", host.files());
    }
}

/// The power is cut, or the disk full, after every step of the story. The rescue point is there until it was dropped.
#[test]
fn a_cut_at_any_step_leaves_the_rescue_point_or_what_follows_it() {
    for settles in [false, true] {
        let story = Story::new(settles);
        for steps in 0.. {
            let mut finished = false;
            for variant in 0..4 {
                let host = Host::new();
                leave_images(&*host.folder, &specs(), &story.own);
                if variant < 3 {
                    host.power.cut_after(steps);
                } else {
                    host.power.fail_after(steps, io::ErrorKind::StorageFull);
                }
                let mut told = Told::default();
                let end = story.tell(&host, &mut told);
                assert_eq!(end.is_ok(), told.stage == Stage::Finished);
                if variant < 3 {
                    host.power.restore(&mut keeps(variant));
                    finished = end.is_ok();
                }
                let what = format!("step {steps}, variant {variant}, settles {settles}");
                story.check(&host, &told, &what);
            }
            if finished {
                assert!(steps > 60, "the cuts reach into the story: {steps}");
                break;
            }
        }
    }
}
