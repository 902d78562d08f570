//! Random requests beside a model in memory.

use block::nbd::wire::Mode;
use block::nbd::wire::request::{cmd, cmd_flag};

use crate::client::Client;
use crate::common::{Numbers, Setup, run};

const SIZE: u64 = 4 << 20;

/// A range, often one with round ends.
fn range(numbers: &mut Numbers) -> (u64, u64) {
    let align = [1, 512, 4096, 65536][numbers.below(4) as usize];
    let offset = numbers.below(SIZE) / align * align;
    let most = [600, 5000, 70_000, 300_000][numbers.below(4) as usize];
    let len = (1 + numbers.below(most)).next_multiple_of(align).min(SIZE - offset);
    (offset, len)
}

/// Does one thing to both.
fn step(client: &mut Client, model: &mut [u8], numbers: &mut Numbers) {
    let (offset, len) = range(numbers);
    let part = &mut model[offset as usize..(offset + len) as usize];
    let fua = if numbers.below(8) == 0 { cmd_flag::FUA } else { 0 };
    match numbers.below(10) {
        0..4 => {
            let data: Vec<u8> = (0..len).map(|_| numbers.next() as u8).collect();
            assert_eq!(client.write(fua, offset, &data), 0);
            part.copy_from_slice(&data);
        }
        4 => {
            let flags = [0, cmd_flag::NO_HOLE, cmd_flag::FAST_ZERO][numbers.below(3) as usize];
            assert_eq!(client.call(cmd::WRITE_ZEROES, flags | fua, offset, len).error, 0);
            part.fill(0);
        }
        5 => {
            // Trimmed data is not defined; these formats leave it, or make it zeroes.
            assert_eq!(client.call(cmd::TRIM, fua, offset, len).error, 0);
            let now = client.read(offset, len);
            assert!(now.iter().zip(&*part).all(|(now, before)| *now == 0 || now == before));
            part.copy_from_slice(&now);
        }
        6 => assert_eq!(client.call(cmd::FLUSH, 0, 0, 0).error, 0),
        7 => assert_eq!(client.call(cmd::CACHE, 0, offset, len).error, 0),
        _ => {
            let df = client.mode != Mode::Simple && numbers.below(2) == 0;
            let flags = if df { cmd_flag::DF } else { 0 };
            let reply = client.call(cmd::READ, flags, offset, len);
            assert!(reply.error == 0 && !(df && reply.data.len() != 1));
            assert!(reply.assemble(offset, len) == part, "read of {len} at {offset}");
        }
    }
}

fn rounds(setup: &Setup, seed: u64) {
    let mut model = vec![0; SIZE as usize];
    let mut numbers = Numbers(seed);
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let mut client = setup.client().go("d", mode, &[]);
        for _ in 0..150 {
            step(&mut client, &mut model, &mut numbers);
        }
        assert!(client.read(0, SIZE) == model, "{mode:?}");
    }
}

#[test]
fn random_requests_do_what_they_do_to_memory_on_qcow2() {
    for (seed, options) in
        ["", "cluster_size=512", "extended_l2=on", "cluster_size=2M"].iter().enumerate()
    {
        let setup = Setup::with_image("4M", options);
        rounds(&setup, seed as u64);
        setup.check();
    }
}

#[test]
fn random_requests_do_what_they_do_to_memory_on_raw() {
    rounds(&Setup::with_raw(SIZE), 99);
}

#[test]
fn a_backing_file_shows_through_until_it_is_written_over() {
    let setup = Setup::new(block::nbd::ServerOptions::default());
    let base = setup.create("base.qcow2", "3M", "");
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 1M 1500k", base.to_str().unwrap()]);
    let backing = format!("backing_file={},backing_fmt=qcow2", base.display());
    let overlay = setup.create("d.qcow2", "4M", &backing);
    setup.open("d", &overlay);
    setup.export("d", true).unwrap();
    let mut model = vec![0; SIZE as usize];
    model[1 << 20..(1 << 20) + 1500 * 1024].fill(9);
    let mut client = setup.client().go("d", Mode::Structured, &[]);
    assert!(client.read(0, SIZE) == model);
    let mut numbers = Numbers(4);
    for _ in 0..300 {
        step(&mut client, &mut model, &mut numbers);
    }
    assert!(client.read(0, SIZE) == model);
    setup.check();
}

/// Many requests in flight, each slot of the disk in at most one of them.
#[test]
fn requests_in_flight_together_are_all_answered_whatever_their_order() {
    const SLOTS: usize = 96;
    const SLOT: u64 = 40_000;
    let setup = Setup::with_image("4M", "");
    let mut clients: Vec<_> =
        (0..3).map(|_| setup.client().go("d", Mode::Structured, &[])).collect();
    let mut model = [0u8; SLOTS];
    let mut numbers = Numbers(7);
    for round in 1..60u8 {
        let mut sent = vec![std::collections::HashMap::new(); clients.len()];
        for (slot, byte) in model.iter_mut().enumerate() {
            let who = numbers.below(3) as usize;
            let offset = slot as u64 * SLOT;
            let write = numbers.below(2) == 0;
            let cookie = if write {
                *byte = round;
                clients[who].send_write(0, offset, &[round; SLOT as usize])
            } else {
                clients[who].send(cmd::READ, 0, offset, SLOT)
            };
            sent[who].insert(cookie, (slot, write));
        }
        for (client, sent) in clients.iter_mut().zip(&mut sent) {
            while !sent.is_empty() {
                let reply = client.receive(0);
                let (slot, write) = sent.remove(&reply.cookie).expect("a cookie that was sent");
                assert_eq!(reply.error, 0);
                if !write {
                    let data = reply.assemble(slot as u64 * SLOT, SLOT);
                    assert!(data.iter().all(|byte| *byte == model[slot]), "slot {slot}");
                }
            }
        }
    }
    setup.check();
}

#[test]
fn a_flush_on_one_connection_covers_writes_of_another() {
    let setup = Setup::with_image("4M", "");
    let mut one = setup.client().go("d", Mode::Structured, &[]);
    let mut other = setup.client().go("d", Mode::Extended, &[]);
    assert_eq!(one.write(0, 12345, &[6; 70_000]), 0);
    assert!(other.read(12345, 70_000) == [6; 70_000]);
    assert_eq!(other.call(cmd::FLUSH, 0, 0, 0).error, 0);
    // A copy of the file as it is now, while the server has it open: what a crash would leave.
    let copy = setup.path("copy.qcow2");
    std::fs::copy(setup.path("d.qcow2"), &copy).unwrap();
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 6 12345 70000", &copy]);
    run("qemu-img", &["check", "-f", "qcow2", &copy]);
}
