//! Real clients.

use std::io::Read;
use std::process::{Command, Stdio};

use block::nbd::ServerOptions;

use crate::common::{Numbers, Setup, have, run, try_run};

/// A raw file with data and holes.
fn sparse_file(path: &str, size: u64) {
    let mut bytes = vec![0; size as usize];
    let mut numbers = Numbers(5);
    for part in bytes.chunks_mut(200_000).step_by(2) {
        part.iter_mut().for_each(|byte| *byte = numbers.next() as u8);
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn qemu_img_copies_to_and_from_an_export_and_finds_no_difference() {
    let setup = Setup::with_image("8M", "");
    let (uri, from, to) = (setup.uri("d"), setup.path("from.raw"), setup.path("to.raw"));
    sparse_file(&from, 8 << 20);
    run("qemu-img", &["convert", "-n", "-W", "-f", "raw", "-O", "raw", &from, &uri]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &from, &uri]);
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, &to]);
    assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
    let info = run("qemu-img", &["info", "--output=json", &uri]);
    assert!(info.contains("\"virtual-size\": 8388608"), "{info}");
    setup.check();
}

#[test]
fn qemu_io_writes_zeroes_discards_and_flushes_with_its_flags() {
    let setup = Setup::with_image("8M", "");
    let uri = setup.uri("d");
    let commands = [
        "write -P 1 0 4M",
        "write -f -P 2 1M 64k",
        "write -z 2M 100k",
        "write -z -u 3M 64k",
        "discard 3500k 128k",
        "flush",
        "read -P 1 0 1M",
        "read -P 2 1M 64k",
        "read -P 0 2M 100k",
        "read -P 0 3M 64k",
        "read -P 0 4M 4M",
    ];
    let mut args = vec!["-f", "raw"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(&uri);
    let text = run("qemu-io", &args);
    assert!(!text.contains("failed") && !text.contains("error"), "{text}");
    // Other data than there is must be found, or the checks above check nothing.
    let text = try_run("qemu-io", &["-f", "raw", "-c", "read -P 3 0 4k", &uri]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("verification failed"));
    setup.check();
}

#[test]
fn qemu_img_maps_an_export_as_it_maps_the_image() {
    let setup = Setup::new(ServerOptions::default());
    let image = setup.create("d.qcow2", "8M", "");
    let path = image.to_str().unwrap().to_owned();
    let io = ["-f", "qcow2", "-c", "write 64k 1M", "-c", "write -z 256k 64k", "-c", "write 5M 3M"];
    run("qemu-io", &[&io[..], &[path.as_str()]].concat());
    let of_image = run("qemu-img", &["map", "--output=json", "-f", "qcow2", &path]);
    setup.open("d", &image);
    setup.export("d", false).unwrap();
    let of_export = run("qemu-img", &["map", "--output=json", &setup.uri("d")]);
    let ranges = |text: &str| -> Vec<(u64, u64, bool, bool)> {
        let all: serde_json::Value = serde_json::from_str(text).unwrap();
        let one = |e: &serde_json::Value| {
            let number = |key: &str| e[key].as_u64().unwrap();
            let flag = |key: &str| e[key].as_bool().unwrap();
            (number("start"), number("length"), flag("zero"), flag("data"))
        };
        all.as_array().unwrap().iter().map(one).collect()
    };
    let merged = |list: Vec<(u64, u64, bool, bool)>| {
        let mut out: Vec<(u64, u64, bool, bool)> = Vec::new();
        for e in list {
            match out.last_mut() {
                Some(last) if (last.2, last.3) == (e.2, e.3) => last.1 += e.1,
                _ => out.push(e),
            }
        }
        out
    };
    assert_eq!(merged(ranges(&of_export)), merged(ranges(&of_image)));
    assert!(ranges(&of_export).len() > 3);
}

#[test]
fn nbdcopy_copies_both_ways_over_several_connections() {
    if !have("nbdcopy_copies_both_ways_over_several_connections", "nbdcopy") {
        return;
    }
    let setup = Setup::with_image("32M", "");
    let (uri, from, to) = (setup.uri("d"), setup.path("from.raw"), setup.path("to.raw"));
    sparse_file(&from, 32 << 20);
    run("nbdcopy", &["--connections=4", "--requests=32", "--flush", &from, &uri]);
    run("nbdcopy", &["--connections=4", "--requests=32", &uri, &to]);
    assert!(std::fs::read(&from).unwrap() == std::fs::read(&to).unwrap());
    run("nbdcopy", &["--connections=1", "--synchronous", "--destination-is-zero", &uri, "null:"]);
    setup.check();
}

#[test]
fn nbdinfo_shows_flags_sizes_contexts_and_all_exports() {
    if !have("nbdinfo_shows_flags_sizes_contexts_and_all_exports", "nbdinfo") {
        return;
    }
    let setup = Setup::with_image("8M", "");
    let other = setup.create("e.qcow2", "1M", "");
    setup.open("e", &other);
    setup.export("e", false).unwrap();
    let info: serde_json::Value =
        serde_json::from_str(&run("nbdinfo", &["--json", &setup.uri("d")])).unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], 8 << 20);
    assert_eq!(export["description"], "a disk");
    for flag in [
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    ] {
        assert_eq!(export[flag], true, "{flag}");
    }
    assert_eq!(export["is_read_only"], false);
    let contexts = serde_json::json!(["base:allocation", "qemu:allocation-depth"]);
    assert_eq!(export["contexts"], contexts);
    assert_eq!(export["block_size_maximum"], 32 << 20);
    let list = run("nbdinfo", &["--list", "--json", &setup.uri("")]);
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    let names: Vec<_> = list["exports"].as_array().unwrap().iter().collect();
    assert_eq!(names.iter().map(|e| &e["export-name"]).collect::<Vec<_>>(), ["d", "e"]);
    assert_eq!(names[1]["is_read_only"], true);
}

const NBDSH: &str = r#"
import errno, os
assert h.get_size() == 8 * 1024 * 1024
h.pwrite(b"\x05" * 65536, 1024 * 1024)
h.pwrite(b"\x06" * 512, 100, nbd.CMD_FLAG_FUA)
assert h.pread(512, 100) == b"\x06" * 512
chunks = []
def chunk(buf, offset, status, err):
    chunks.append((offset, len(buf), status))
h.pread_structured(262144, 1024 * 1024, chunk)
assert sorted(chunks) == [(1048576, 65536, nbd.READ_DATA), (1114112, 196608, nbd.READ_HOLE)], chunks
chunks = []
h.pread_structured(262144, 1024 * 1024, chunk, nbd.CMD_FLAG_DF)
assert chunks == [(1048576, 262144, nbd.READ_DATA)], chunks
h.zero(32768, 1024 * 1024, nbd.CMD_FLAG_NO_HOLE)
h.zero(4096, 2 * 1024 * 1024, nbd.CMD_FLAG_FAST_ZERO)
h.trim(65536, 3 * 1024 * 1024, nbd.CMD_FLAG_FUA)
h.cache(65536, 0)
h.flush()
status = {}
def extent(context, offset, entries, err):
    status[context] = (offset, entries)
h.block_status(2 * 1024 * 1024, 0, extent)
assert set(status) == {"base:allocation", "qemu:allocation-depth"}, status
offset, entries = status["base:allocation"]
assert offset == 0 and sum(entries[::2]) == 2 * 1024 * 1024, entries
h.block_status(2 * 1024 * 1024, 0, extent, nbd.CMD_FLAG_REQ_ONE)
assert len(status["base:allocation"][1]) == 2
h.set_strict_mode(0)
def fails(number, f):
    try:
        f()
    except nbd.Error as e:
        assert e.errnum == number, (e, number)
    else:
        raise AssertionError("no error")
fails(errno.EINVAL, lambda: h.pread(512, 8 * 1024 * 1024 - 100))
fails(errno.ENOSPC, lambda: h.pwrite(b"x" * 512, 8 * 1024 * 1024 - 100))
fails(errno.ENOSPC, lambda: h.zero(512, 8 * 1024 * 1024))
fails(errno.EINVAL, lambda: h.trim(512, 8 * 1024 * 1024))
fails(errno.EINVAL, lambda: h.flush(1 << 3))
assert h.pread(512, 100) == b"\x06" * 512
"#;

#[test]
fn nbdsh_gets_data_holes_status_and_the_errors_of_the_protocol() {
    if !have("nbdsh_gets_data_holes_status_and_the_errors_of_the_protocol", "nbdsh") {
        return;
    }
    let setup = Setup::with_image("8M", "");
    let contexts =
        "h.add_meta_context('base:allocation'); h.add_meta_context('qemu:allocation-depth')";
    let connect = format!("h.connect_uri('{}')", setup.uri("d"));
    run("nbdsh", &["-c", contexts, "-c", &connect, "-c", NBDSH, "-c", "h.shutdown()"]);
    setup.check();
}

#[test]
fn nbdsh_is_refused_writes_of_a_read_only_export() {
    if !have("nbdsh_is_refused_writes_of_a_read_only_export", "nbdsh") {
        return;
    }
    let setup = Setup::new(ServerOptions::default());
    let image = setup.create("d.qcow2", "1M", "");
    setup.open("d", &image);
    setup.export("d", false).unwrap();
    let script = r#"
import errno
h.set_strict_mode(0)
assert h.is_read_only() and not h.can_trim() and not h.can_zero()
for f in (lambda: h.pwrite(b"x", 0), lambda: h.trim(512, 0), lambda: h.zero(512, 0)):
    try:
        f()
    except nbd.Error as e:
        assert e.errnum == errno.EPERM, e
    else:
        raise AssertionError("no error")
assert h.pread(512, 0) == bytes(512)
"#;
    run("nbdsh", &["-u", &setup.uri("d"), "-c", script]);
}

/// Clients are killed in the middle of transfers, at moments that their own progress gives.
#[test]
fn clients_that_are_killed_leave_the_server_and_the_image_well() {
    if !have("clients_that_are_killed_leave_the_server_and_the_image_well", "nbdcopy") {
        return;
    }
    let setup = Setup::with_image("64M", "");
    let (uri, from) = (setup.uri("d"), setup.path("from.raw"));
    sparse_file(&from, 64 << 20);
    for round in 0..10 {
        // Data comes through a pipe that we stop to feed: then requests are in flight or done.
        let mut writer = Command::new("nbdcopy")
            .args(["--requests=16", "-", &uri])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut reader = Command::new("nbdcopy")
            .args(["--requests=16", &uri, "-"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let data = std::fs::read(&from).unwrap();
        let some = (round + 1) * 3_000_000;
        std::io::Write::write_all(writer.stdin.as_mut().unwrap(), &data[..some]).unwrap();
        reader.stdout.as_mut().unwrap().read_exact(&mut vec![0; some]).unwrap();
        for child in [&mut writer, &mut reader] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
    run("nbdcopy", &["--flush", &from, &uri]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &from, &uri]);
    setup.check();
}
