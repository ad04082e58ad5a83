//! Suspects are compared before they are sent: what is equal is proved and forgotten, and no write is lost on the way.

use understudy::{
    base::units::{Epoch, to_u64},
    protocol::compare::{Differing, runs_of},
    volume::{MachineError, Piece, Reconcile, ReplicaHead, ResyncReason, Side, Taken},
};

use super::host::{
    Blocks, Host, Runs, SIZES, blocks_in, blocks_of, compare, drain, point, run, sift,
};

const REVERSED: ResyncReason = ResyncReason::Reversed;
const BLOCKS: u64 = SIZES[0].div_ceil(4096) + SIZES[1].div_ceil(4096);

/// A host in step at point 7 with a replica that holds the same.
fn in_step() -> (Host, Vec<Vec<u8>>) {
    let host = Host::running(None);
    host.write(0, 4096, 2 << 20, 7).unwrap();
    host.machine().continue_from(point(7, 7), &[]).unwrap();
    send(&host, 8);
    let held = host.contents();
    (host, held)
}

/// Cuts, and has the epoch staged.
fn send(host: &Host, epoch: u64) -> Vec<Piece> {
    let cut = host.machine().cut().unwrap();
    assert_eq!(cut.epoch, Epoch(epoch));
    let log = drain(host.machine(), Side::Closing, cut.epoch).unwrap();
    host.machine().pending(point(epoch, 7)).unwrap();
    host.machine().staged(point(epoch, 7)).unwrap();
    log
}

/// One question about everything that fits, and what a replica with these bytes answers.
fn ask(host: &Host, held: &[Vec<u8>]) -> (Runs, Differing) {
    let samples = host.machine().ask().unwrap();
    (runs_of(&samples), compare(&samples, held))
}

#[test]
fn only_what_differs_is_sent() {
    let (host, mut held) = in_step();
    // One block of data, one where the primary has a hole, and the last one, which is not whole.
    let differing = Blocks::from([(0, 3), (0, 600), (1, 256)]);
    held[0][3 * 4096 + 99] ^= 1;
    held[0][600 * 4096] = 1;
    *held[1].last_mut().unwrap() = 1;
    host.machine().demand_resync().unwrap();
    assert_eq!(host.machine().counters().suspect_blocks, BLOCKS);
    sift(host.machine(), &held).unwrap();
    assert_eq!(blocks_of(&host.machine().divergence()), differing);
    let resync = host.machine().state().resync;
    assert_eq!(resync, Some(ResyncReason::Demanded), "not over yet");
    assert_eq!(blocks_in(&send(&host, 9)), differing);
    assert_eq!(host.machine().state().resync, None);
    assert_eq!(host.machine().at_rest(), Some(point(9, 7)));
}

/// The guest writes a block after it was hashed and before the answer says that it is equal. Also when that write was
/// sent ahead, so that it is not owed any more: the log it is in may yet be lost.
#[test]
fn a_write_that_races_the_answer_is_not_lost() {
    for ahead in [false, true] {
        let (host, held) = in_step();
        let machine = host.machine();
        machine.suspect(&[run(0, 8192, 8192)], REVERSED).unwrap();
        let (runs, answer) = ask(&host, &held);
        assert_eq!(answer, Differing::default(), "they are equal");
        host.write(0, 8192, 512, 99).unwrap();
        if ahead {
            let taken = machine.take(Side::Open, Epoch(9), 4096).unwrap();
            assert!(matches!(taken, Taken::Piece(_)));
        }
        let sifted = machine.answered(&runs, &answer).unwrap();
        assert_eq!((sifted.equal, sifted.differing), (1, 0));
        let left = blocks_of(&machine.divergence());
        assert_eq!(left, Blocks::from([(0, 2)]), "sent ahead: {ahead}");
        machine.disconnected();
        let met = machine.reconcile(ReplicaHead::At(point(8, 7))).unwrap();
        assert_eq!(met, Reconcile::InStep);
        sift(machine, &held).unwrap();
        assert_eq!(blocks_in(&send(&host, 9)), left);
    }
}

/// A block was sent ahead, and is then written back to what the replica holds. The log still has the other content, so
/// a comparison with the replica's head must not acquit it.
#[test]
fn a_block_that_a_log_under_way_holds_is_no_suspect() {
    let (host, held) = in_step();
    let machine = host.machine();
    host.write(0, 4096, 4096, 99).unwrap();
    let taken = machine.take(Side::Open, Epoch(9), 4096).unwrap();
    assert!(matches!(taken, Taken::Piece(_)));
    host.write(0, 4096, 4096, 7).unwrap();
    machine.demand_resync().unwrap();
    assert_eq!(machine.counters().suspect_blocks, BLOCKS - 1);
    sift(machine, &held).unwrap();
    let last = blocks_in(&send(&host, 9));
    assert_eq!(last, Blocks::from([(0, 1)]), "its last frame wins");
}

#[test]
fn a_write_before_the_question_needs_no_answer() {
    let (host, held) = in_step();
    let machine = host.machine();
    machine.suspect(&[run(0, 0, 40_960)], REVERSED).unwrap();
    host.write(0, 8192, 4096, 1).unwrap();
    let (runs, answer) = ask(&host, &held);
    assert!(!blocks_of(&runs).contains(&(0, 2)), "{runs:?}");
    machine.answered(&runs, &answer).unwrap();
    assert_eq!(machine.counters().suspect_blocks, 0);
    assert_eq!(blocks_in(&send(&host, 9)), Blocks::from([(0, 2)]));
}

/// What was proved equal stays so, whatever ends the conversation; what was only asked is asked again.
#[test]
fn a_resync_that_is_cut_short_goes_on_with_what_is_left() {
    let (mut host, held) = in_step();
    host.machine().demand_resync().unwrap();
    // The first answer arrives, the second does not.
    let (runs, answer) = ask(&host, &held);
    ask(&host, &held);
    let proved = host.machine().answered(&runs, &answer).unwrap().equal;
    assert!(proved > 0 && proved < BLOCKS, "{proved}");
    let again = host.machine().demand_resync().unwrap_err();
    assert!(matches!(again, MachineError::Resyncing(_)), "{again}");
    for end in 0..4 {
        let head = ReplicaHead::At(point(8, 7));
        match end {
            0 => host.machine().disconnected(),
            1 => host.kill(),
            2 => host.close().unwrap(),
            // Everything that was not synced is lost: then it is compared once more.
            _ => host.lose_power(&mut || false).unwrap(),
        }
        if !host.runs() {
            host.start().unwrap();
        }
        let machine = host.machine();
        let left = machine.counters().suspect_blocks;
        assert!(machine.cut().is_err(), "not before all is compared");
        assert_eq!(machine.reconcile(head).unwrap(), Reconcile::InStep);
        assert_eq!(machine.state().resync, Some(ResyncReason::Demanded));
        assert_eq!(machine.counters().suspect_blocks, left);
        assert_eq!(left, BLOCKS - proved, "after end {end}");
    }
    sift(host.machine(), &held).unwrap();
    assert_eq!(send(&host, 9), [], "nothing differs");
    assert_eq!(host.machine().state().resync, None);
}

#[test]
fn answers_about_something_else_change_nothing() {
    let (host, _) = in_step();
    let machine = host.machine();
    machine.suspect(&[run(0, 0, 8192)], REVERSED).unwrap();
    let runs = runs_of(&machine.ask().unwrap());
    let mut beyond = Differing::default();
    beyond.push(to_u64(blocks_of(&runs).len()));
    assert_eq!(machine.answered(&runs, &beyond), None);
    assert_eq!(machine.counters().suspect_blocks, 2);
    machine.disconnected();
    // Of an earlier connection: nobody is asked about now.
    let late = machine.answered(&runs, &Differing::default()).unwrap();
    assert_eq!((late.equal, late.differing), (0, 0));
    assert_eq!(machine.counters().suspect_blocks, 2);
}

#[test]
fn without_a_complete_copy_there_is_nothing_to_compare() {
    let host = Host::running(None);
    let refused = host.machine().demand_resync().unwrap_err().to_string();
    assert!(refused.contains("initial copy"), "{refused}");
    assert_eq!(host.machine().counters().open_blocks, 0);
}
