//! Space goes back to the host and is used again: the file stays as small as what is in it.
//!
//! `SPACE_ROUNDS` says how many rounds (`make space-test`: a thousand).

use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::MetadataExt;

use block::{Node, WriteBuf};

use crate::check::Random;
use crate::common::{check, create, have_qemu_img, land, new_snapshot, open};

const CLUSTER: u64 = 64 << 10;
/// Guest clusters of the disk.
const DISK: u64 = 1024;
/// Snapshots that are kept at a time.
const KEPT: usize = 4;
const ROUNDS: usize = 60;

/// Which write each guest cluster is of; discarded ones are not there.
type Disk = BTreeMap<u64, u64>;

struct Saved {
    id: String,
    disk: Disk,
    /// Clusters of VM state.
    state: u64,
}

/// What is in the image.
struct Model {
    disk: Disk,
    saved: Vec<Saved>,
    writes: u64,
    /// The most bytes that were live at a time.
    largest: u64,
}

impl Model {
    /// Bytes that the image has to hold at this moment: each version of each cluster once, VM state,
    /// and tables: L1 and L2 of each disk, an L2 table of VM state, and of the whole image the header,
    /// refcount table, refcount block and the snapshot table, twice while it is replaced.
    fn live(&self) -> u64 {
        let disks = self.saved.iter().map(|saved| &saved.disk).chain([&self.disk]);
        let data: HashSet<_> = disks.flatten().collect();
        let state: u64 = self.saved.iter().map(|saved| saved.state).sum();
        let tables = 7 + 3 * self.saved.len() as u64;
        (data.len() as u64 + state + tables) * CLUSTER
    }

    fn note(&mut self) {
        self.largest = self.largest.max(self.live());
    }
}

/// Writes, zeroes and discards clusters here and there.
fn work(node: &Node, model: &mut Model, random: &mut Random) {
    for _ in 0..1 + random.below(12) {
        let first = random.below(DISK as usize) as u64;
        let count = (1 + random.below(24) as u64).min(DISK - first);
        let (offset, len) = (first * CLUSTER, count * CLUSTER);
        if random.below(4) == 0 {
            node.discard(offset, len).unwrap();
            model.disk.retain(|n, _| !(first..first + count).contains(n));
        } else {
            model.writes += 1;
            let bytes = vec![model.writes.to_le_bytes()[0] | 1; len as usize];
            node.write(offset, &[WriteBuf::new(&bytes)]).unwrap();
            let version = model.writes;
            model.disk.extend((first..first + count).map(|n| (n, version)));
        }
        model.note();
    }
}

fn save(node: &Node, model: &mut Model, random: &mut Random) {
    let format = node.format();
    let mut change = format.create_snapshot(&new_snapshot("s")).unwrap();
    let mut state = 0;
    let mut at = 0;
    for _ in 0..1 + random.below(6) {
        // What is not written takes no space.
        at += random.below(20) as u64;
        let count = 1 + random.below(40) as u64;
        let bytes = vec![0x5a; (count * CLUSTER) as usize];
        change.write_vmstate(at * CLUSTER, &[WriteBuf::new(&bytes)]).unwrap();
        at += count;
        state += count;
    }
    change.set_vmstate_size(at * CLUSTER);
    land(&mut *change).unwrap();
    drop(change);
    let id = format.snapshots().last().unwrap().id.clone();
    model.saved.push(Saved { id, disk: model.disk.clone(), state });
    model.note();
}

#[test]
fn save_and_delete_for_ever_take_no_more_space_than_the_largest_live_content() {
    if !have_qemu_img("space") {
        return;
    }
    let rounds = std::env::var("SPACE_ROUNDS").map_or(ROUNDS, |n| n.parse().unwrap());
    // On a real disk: a temporary directory may be in memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = create(dir.path(), "image", "64M", "");
    let mut model = Model { disk: Disk::new(), saved: Vec::new(), writes: 0, largest: 0 };
    let mut random = Random(0x5bd1_e995);
    let mut worst = 0.0f64;
    let (mut graph, mut node) = open(&image);
    for round in 0..rounds {
        work(&node, &mut model, &mut random);
        save(&node, &mut model, &mut random);
        work(&node, &mut model, &mut random);
        while model.saved.len() > KEPT - random.below(2) {
            let gone = model.saved.remove(random.below(model.saved.len()));
            land(&mut *node.format().delete_snapshot(&gone.id).unwrap()).unwrap();
        }
        node.flush().unwrap();
        if round % 25 == 24 {
            drop((graph, node));
            check(&image);
            (graph, node) = open(&image);
        }
        let file = std::fs::metadata(&image).unwrap();
        let (len, allocated) = (file.len(), file.blocks() * 512);
        let most = model.largest / 10 * 11;
        assert!(
            len <= most && allocated <= most,
            "round {round}: the file has {len} bytes, {allocated} of them on the disk, and at most \
             {} were live",
            model.largest
        );
        let now = model.live() / 10 * 11;
        assert!(
            allocated <= now,
            "round {round}: {allocated} bytes are on the disk, {} are live",
            model.live()
        );
        worst = worst.max(len.max(allocated) as f64 / model.largest as f64);
    }
    println!(
        "{rounds} rounds: at most {worst:.3} of the largest live content, {} bytes",
        model.largest
    );
    drop((graph, node));
    check(&image);
}
