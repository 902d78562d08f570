//! RAM that is read when it is touched: the same as what is read at once, whatever happens meanwhile.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use block::Progress;
use snapshot::save::{Save, SaveSetup};
use snapshot::{
    Checkpoint, GuestMemory, LazyHost, LazyRam, Notice, Orders, PageRun, PageSet, SaveImages,
};
use vm_memory::{Bytes, GuestAddress};

use crate::support::{MIB, Machine, contents, new_ram, stamp};

/// How long a thing that must happen may take.
const PATIENCE: Duration = Duration::from_secs(60);

fn host() -> Option<LazyHost> {
    LazyHost::open().inspect_err(|error| eprintln!("SKIPPED: no userfaultfd: {error}")).ok()
}

/// Lends `ram` the RAM of checkpoint `tag`.
fn lend(
    machine: &Machine,
    tag: &str,
    ram: &GuestMemory,
    fresh: bool,
) -> Option<(LazyRam, Receiver<Notice>)> {
    lend_in_order(machine, tag, ram, fresh, &Arc::default())
}

/// The same, reading ahead what `orders` says.
fn lend_in_order(
    machine: &Machine,
    tag: &str,
    ram: &GuestMemory,
    fresh: bool,
    orders: &Arc<Orders>,
) -> Option<(LazyRam, Receiver<Notice>)> {
    let (sender, notices) = channel();
    let sender = Mutex::new(sender);
    let notify = move |notice| {
        // A test that has seen enough is gone.
        let _ = sender.lock().unwrap().send(notice);
    };
    let checkpoint = Checkpoint::open(&machine.nodes, "d0", tag).unwrap();
    checkpoint.check_machine(&machine.config, ram).unwrap();
    let lazy = checkpoint.lend_ram(host()?, ram, fresh, orders, Box::new(notify)).unwrap();
    Some((lazy, notices))
}

fn next(notices: &Receiver<Notice>) -> Notice {
    notices.recv_timeout(PATIENCE).unwrap()
}

/// A thread that looks at a byte of RAM.
fn look(ram: &GuestMemory, at: u64) -> JoinHandle<u8> {
    let ram = ram.clone();
    thread::spawn(move || ram.read_obj(GuestAddress(at)).unwrap())
}

#[test]
fn pages_come_when_they_are_touched_whatever_the_cluster_size() {
    for cluster in [512, 65536, 2 << 20] {
        let machine = Machine::new(cluster);
        let before = contents(&machine.ram);
        machine.save("t").unwrap();
        machine.go_on();
        for (ram, fresh) in [(machine.ram.clone(), false), (new_ram(), true)] {
            let Some((lazy, notices)) = lend(&machine, "t", &ram, fresh) else { return };
            assert!(!lazy.is_complete());
            assert!(contents(&ram) == before, "cluster size {cluster}, fresh {fresh}");
            assert_eq!(next(&notices), Notice::Complete);
            assert!(lazy.is_complete());
            assert!(contents(&ram) == before);
        }
    }
}

#[test]
fn the_rest_is_read_in_the_background_once_the_machine_is_restored() {
    let machine = Machine::new(65536);
    let before = contents(&machine.ram);
    machine.save("t").unwrap();
    let ram = new_ram();
    let Some((lazy, notices)) = lend(&machine, "t", &ram, true) else { return };
    assert_ne!(lazy.missing_bytes(), 0);
    lazy.restored();
    assert_eq!(next(&notices), Notice::Complete);
    assert_eq!(lazy.missing_bytes(), 0);
    assert!(contents(&ram) == before);
}

#[test]
fn what_is_written_before_the_rest_is_read_stays() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    let mut expected = contents(&machine.ram);
    let ram = new_ram();
    let Some((lazy, _notices)) = lend(&machine, "t", &ram, true) else { return };
    // In a page that is stored, in one of zeroes between stored ones, and in one far from any.
    for at in [MIB + 5000, 5 * MIB + 4096, 7 * MIB] {
        ram.write_obj(0xee_u8, GuestAddress(at)).unwrap();
        expected[0][usize::try_from(at).unwrap()] = 0xee;
    }
    lazy.complete(&Progress::default()).unwrap();
    assert!(lazy.is_complete());
    assert!(contents(&ram) == expected);
}

#[test]
fn a_page_that_cannot_be_read_stays_missing_until_it_can() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    let before = contents(&machine.ram);
    let ram = new_ram();
    let Some((lazy, notices)) = lend(&machine, "t", &ram, true) else { return };
    machine.images[0].fail("read", 0);
    lazy.restored();
    let lookers = [look(&ram, 0), look(&ram, MIB), look(&ram, MIB + 4096)];
    assert_eq!(next(&notices), Notice::Failing("read was made to fail".to_owned()));
    assert_eq!(lazy.failing().unwrap(), "read was made to fail");
    // Once is enough; and reading the rest tells the error to who asked for it.
    let error = lazy.complete(&Progress::default()).unwrap_err();
    assert_eq!(error.to_string(), "read was made to fail");
    // It fails again: it is told again.
    lazy.retry();
    assert!(matches!(next(&notices), Notice::Failing(_)));
    assert!(!lookers.iter().any(JoinHandle::is_finished));

    machine.images[0].mend();
    lazy.retry();
    let bytes = lookers.map(|looker| looker.join().unwrap());
    assert_eq!(bytes, [1, 3, 3]);
    assert_eq!(lazy.failing(), None);
    assert_eq!(next(&notices), Notice::Complete);
    assert_eq!(lazy.lost(), None);
    assert!(contents(&ram) == before);
}

#[test]
fn a_page_that_cannot_be_read_is_given_up_when_nobody_may_wait() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    // While the machine is put together, and when a waiting guest is given up.
    for restored in [false, true] {
        let ram = new_ram();
        let Some((lazy, notices)) = lend(&machine, "t", &ram, true) else { return };
        machine.images[0].fail("read", 0);
        if restored {
            lazy.restored();
        }
        let looker = look(&ram, MIB);
        if restored {
            assert!(matches!(next(&notices), Notice::Failing(_)));
            lazy.forfeit();
        }
        assert_eq!(looker.join().unwrap(), 0);
        assert_eq!(next(&notices), Notice::Lost);
        assert_eq!(lazy.lost().unwrap(), "read was made to fail");
        machine.images[0].mend();
        assert!(lazy.complete(&Progress::default()).is_err(), "lost RAM passes for whole");
    }
}

#[test]
fn who_waits_for_a_page_is_let_go_when_the_load_is_abandoned() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    let ram = new_ram();
    let Some((lazy, notices)) = lend(&machine, "t", &ram, true) else { return };
    machine.images[0].fail("read", 0);
    lazy.restored();
    let looker = look(&ram, MIB);
    assert!(matches!(next(&notices), Notice::Failing(_)));
    lazy.abandon();
    assert_eq!(looker.join().unwrap(), 0);
    assert!(lazy.complete(&Progress::default()).is_err());
}

#[test]
fn another_checkpoint_can_be_loaded_before_the_first_is_read() {
    let machine = Machine::new(65536);
    machine.save("first").unwrap();
    machine.go_on();
    let second = contents(&machine.ram);
    machine.save("second").unwrap();
    let ram = new_ram();
    let Some((first, _notices)) = lend(&machine, "first", &ram, true) else { return };
    assert_eq!(look(&ram, MIB).join().unwrap(), 3);
    first.abandon();
    let Some((lazy, _notices)) = lend(&machine, "second", &ram, false) else { return };
    lazy.complete(&Progress::default()).unwrap();
    assert!(contents(&ram) == second);
}

#[test]
fn a_cancel_ends_reading_the_rest_and_leaves_it_missing() {
    let machine = Machine::new(65536);
    let before = contents(&machine.ram);
    machine.save("t").unwrap();
    let ram = new_ram();
    let Some((lazy, _notices)) = lend(&machine, "t", &ram, true) else { return };
    let progress = Progress::default();
    progress.cancel();
    assert!(matches!(lazy.complete(&progress), Err(block::Error::Cancelled)));
    assert_ne!(lazy.missing_bytes(), 0);
    assert!(contents(&ram) == before);
}

#[test]
fn many_threads_that_touch_at_random_see_the_checkpoint() {
    let machine = Machine::new(4096);
    let before = Arc::new(contents(&machine.ram));
    machine.save("t").unwrap();
    for seed in 0..8 {
        let ram = new_ram();
        let Some((lazy, _notices)) = lend(&machine, "t", &ram, true) else { return };
        lazy.restored();
        let look = |seed: u64| {
            let (ram, before) = (ram.clone(), Arc::clone(&before));
            thread::spawn(move || {
                let mut state = seed | 1;
                for _ in 0..500 {
                    state =
                        state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let at = (state >> 33) % (9 * MIB);
                    let byte: u8 = ram.read_obj(GuestAddress(at)).unwrap();
                    assert_eq!(byte, before[0][usize::try_from(at).unwrap()], "at {at:#x}");
                }
            })
        };
        let lookers: Vec<_> = (0..4).map(|n| look(seed * 4 + n)).collect();
        lookers.into_iter().for_each(|looker| looker.join().unwrap());
        lazy.complete(&Progress::default()).unwrap();
        assert!(contents(&ram) == *before);
    }
}

#[test]
fn what_was_touched_first_is_read_ahead_first() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    let orders = Arc::default();
    let ram = new_ram();
    let Some((lazy, _notices)) = lend_in_order(&machine, "t", &ram, true, &orders) else { return };
    // The last of what is stored.
    let last = 9 * MIB - 4096;
    assert_eq!(look(&ram, last).join().unwrap(), 2);
    lazy.abandon();

    let ram = new_ram();
    let Some((lazy, notices)) = lend_in_order(&machine, "t", &ram, true, &orders) else { return };
    let reads = machine.images[0].reads_of(|| {
        lazy.restored();
        assert_eq!(next(&notices), Notice::Complete);
    });
    // RAM starts at 4 MiB of the VM state; two threads read ahead.
    assert!(reads[..2].contains(&((4 * MIB + last) / 65536 * 65536)), "{reads:x?}");
}

#[test]
fn who_reads_the_rest_of_an_abandoned_load_hears_of_it_and_touches_nothing() {
    let machine = Machine::new(65536);
    machine.save("t").unwrap();
    let ram = new_ram();
    let Some((lazy, _notices)) = lend(&machine, "t", &ram, true) else { return };
    let (reading, is_read) = channel();
    let (go_on, may_go_on) = channel::<()>();
    machine.images[0].on_read(move || {
        // Nobody listens any more after the first one.
        let _ = reading.send(());
        let _ = may_go_on.recv();
    });
    assert!(!lazy.is_abandoned());
    thread::scope(|scope| {
        let rest = scope.spawn(|| lazy.complete(&Progress::default()));
        is_read.recv_timeout(PATIENCE).unwrap();
        lazy.abandon();
        drop((go_on, is_read));
        assert!(rest.join().unwrap().is_err());
    });
    assert!(lazy.is_abandoned());
    assert!(contents(&ram).concat().iter().all(|byte| *byte == 0));
}

#[test]
fn an_incremental_save_of_clusters_up_to_a_unit_waits_for_no_page() {
    for cluster in [4096, 65536, 131_072] {
        let machine = Machine::new(cluster);
        machine.save("base").unwrap();
        let ram = &machine.ram;
        let Some((lazy, _notices)) = lend(&machine, "base", ram, false) else { return };
        ram.write_obj(0xee_u8, GuestAddress(MIB + 5000)).unwrap();
        let mut dirty = PageSet::of(ram);
        dirty.insert(PageRun { region: 0, first: 257, count: 1 });
        let base = Checkpoint::open(&machine.nodes, "d0", "base").unwrap().base();
        let images = SaveImages::of(&machine.nodes, "d0");
        let (stamp, progress) = (stamp("t"), Progress::default());
        let setup = SaveSetup {
            nodes: &machine.nodes,
            vmstate: "d0",
            stamp: &stamp,
            base: Some(&base),
            compress: None,
            absent: lazy.missing_bytes() > 0,
            state_bytes: 1000,
            ram,
            progress: &progress,
            threads: 1,
        };
        let mut save = Save::begin(&images, setup).unwrap();
        assert!(save.is_incremental());
        assert_eq!(save.may_be_absent(), cluster <= 65536);
        if !save.may_be_absent() {
            lazy.complete(&Progress::default()).unwrap();
        }
        let reads = machine.images[0].reads_of(|| save.write(&dirty).unwrap());
        assert_eq!(reads, [0; 0], "cluster size {cluster}");
    }
}
