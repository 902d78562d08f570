//! Snapshots of many disks at one moment: how long the guest stands still for them, with and without the
//! machine's state.

use std::path::{Path, PathBuf};
use std::time::Duration;

use qmp::client::Client;
use serde_json::{Value, json};
use tardigrade_tests::baremetal::{Monitor, image};
use tardigrade_tests::disk::qemu_img;

use crate::checkpoint::{ticks_per_ms, used_ranges};
use crate::program::{Machine, Program};
use crate::report::{Report, number};

/// Disks of the group.
const DISKS: usize = 8;
/// Size of each in MiB, and what of it has data.
const SIZE: u64 = 1024;
const DATA: u64 = 16;
/// RAM in use, in MiB.
const USED: u64 = 256;
/// Snapshots of the disks alone, and of the machine with them.
const ROUNDS: usize = 20;
const SAVES: usize = 5;

const IDLE: &str = "group idle";
const SNAPSHOT: &str = "group pause, disks";
const SAVE: &str = "group pause, machine and disks";

/// Measures, and adds a table.
pub(crate) fn measure(dir: &Path, report: &mut Report) {
    if !tardigrade_tests::require::kvm() {
        return;
    }
    eprintln!("snapshots of {DISKS} disks");
    one(Program::Tardigrade, dir, report);
    report.section(table);
}

fn one(program: Program, dir: &Path, report: &mut Report) {
    let disks: Vec<PathBuf> = (0..DISKS).map(|n| make_disk(dir, n)).collect();
    let machine = start(program, &disks, USED, dir);
    let mut guest = machine.monitor();
    for range in used_ranges(USED) {
        guest.fill(range, 1);
    }
    let ticks = ticks_per_ms(&mut guest);
    let mut pause = |guest: &mut Monitor, what: &str, work: &mut dyn FnMut()| {
        let gap = guest.watch(|| {
            // Until the guest has the whole request.
            std::thread::sleep(Duration::from_millis(300));
            work();
        });
        report.add(what, program.name(), USED, gap as f64 / ticks);
    };
    let mut qmp = machine.connect();
    for round in 0..ROUNDS {
        pause(&mut guest, IDLE, &mut || std::thread::sleep(Duration::from_millis(50)));
        let actions: Vec<Value> = (0..DISKS).map(|n| snapshot(n, &format!("s{round}"))).collect();
        pause(&mut guest, SNAPSHOT, &mut || {
            qmp.execute("transaction", json!({ "actions": actions })).unwrap();
        });
    }
    for round in 0..SAVES {
        let tag = format!("m{round}");
        pause(&mut guest, SAVE, &mut || save(&mut qmp, &tag));
    }
    machine.quit();
    disks.iter().for_each(|disk| std::fs::remove_file(disk).unwrap());
}

/// A machine with these disks as nodes `disk0`, `disk1`, ... and so much RAM in use.
pub(crate) fn start(program: Program, disks: &[PathBuf], used: u64, dir: &Path) -> Machine {
    let kernel = dir.join("guest.elf");
    image::write(&kernel);
    let mut command = program.command(&kernel, used + 64);
    for (n, disk) in disks.iter().enumerate().skip(1) {
        let file = format!("file.driver=file,file.filename={}", disk.display());
        command.args(["--blockdev", &format!("driver=qcow2,node-name=disk{n},{file}")]);
        command.args(["--device", &format!("virtio-blk-device,drive=disk{n}")]);
    }
    Machine::start(program, command, &disks[0], dir).with_disks(disks.len())
}

pub(crate) fn make_disk(dir: &Path, number: usize) -> PathBuf {
    let (disk, data) = (dir.join(format!("group{number}.qcow2")), dir.join("group-data"));
    std::fs::write(&data, vec![0x5a; usize::try_from(DATA << 20).unwrap()]).unwrap();
    let name = disk.display().to_string();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &data.display().to_string(), &name]);
    qemu_img(&["resize", "-q", "-f", "qcow2", &name, &format!("{SIZE}M")]);
    std::fs::remove_file(&data).unwrap();
    disk
}

fn snapshot(disk: usize, name: &str) -> Value {
    let data = json!({ "device": format!("disk{disk}"), "name": name });
    json!({ "type": "blockdev-snapshot-internal-sync", "data": data })
}

/// The machine's state and all disks. Ends when all is on the disks.
fn save(qmp: &mut Client, tag: &str) {
    let state = json!({ "node": "disk0", "tag": tag });
    let mut actions = vec![json!({ "type": "x-vmstate-save", "data": state })];
    actions.extend((1..DISKS).map(|n| snapshot(n, tag)));
    qmp.execute("transaction", json!({ "actions": actions })).unwrap();
}

fn table(report: &Report) -> String {
    let mut text = format!(
        "| Group snapshot of {DISKS} disks, {USED} MiB of RAM in use: pause the guest sees, ms | median | longest |\n\
         |---|---:|---:|\n"
    );
    for (what, title) in [
        (SNAPSHOT, "`blockdev-snapshot-internal-sync` of each, in a transaction"),
        (SAVE, "the machine's state with them: `x-vmstate-save` in the transaction"),
        (IDLE, "none"),
    ] {
        let part = |part| number(report.quantile(what, Program::Tardigrade.name(), USED, part), 1);
        text += &format!("| {title} | {} | {} |\n", part(0.5), part(1.0));
    }
    text + "\n"
}
