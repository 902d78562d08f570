//! `tardigrade image` beside qemu-img: the same images, texts and exit statuses.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

mod bitmaps;
mod copies;
mod devices;
mod names;

const TARDIGRADE: &str = env!("CARGO_BIN_EXE_tardigrade");

fn run(dir: &Path, program: &str, args: &[&str]) -> Output {
    Command::new(program).current_dir(dir).args(args).output().unwrap()
}

fn ours(dir: &Path, args: &[&str]) -> Output {
    run(dir, TARDIGRADE, &[&["image"], args].concat())
}

/// Output of a command that must succeed.
#[track_caller]
fn ok(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// What a command that must fail says.
#[track_caller]
fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A `qemu-io` that has an image open for writing; ends when dropped.
struct Holder(Child);

impl Holder {
    fn of(dir: &Path, args: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .current_dir(dir)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Its answer tells that the image is open.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("MiB") {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0, "qemu-io does not open the image");
        }
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

fn have_qemu_img() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: qemu-img is not installed (apt-get install qemu-utils)");
    }
    found
}

#[test]
fn images_are_made_and_described_in_qemus_words() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for args in [
        &["create", "-f", "qcow2", "a.q", "10M"][..],
        &[
            "create",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=4k,lazy_refcounts=on,compat=v3",
            "a.q",
            "10M",
        ],
        &["create", "-f", "qcow2", "-o", "preallocation=metadata,size=3M,compat=0.10", "a.q"],
        &["create", "-f", "qcow2", "-o", "data_file=d.raw,data_file_raw=on", "a.q", "3M"],
        &["create", "-f", "raw", "a.q", "1001"],
        &["create", "-f", "qcow2", "-o", "extent_size_hint=2M,nocow=off", "a.q", "1M"],
        &["create", "-f", "raw", "-o", "extent_size_hint=0,nocow=off", "a.q", "1M"],
        &["create", "-f", "qcow2", "-u", "-b", "none", "-F", "raw", "a.q", "1M"],
    ] {
        let theirs = ok(&run(dir, "qemu-img", args));
        let their_info = ok(&run(dir, "qemu-img", &["info", "a.q"]));
        std::fs::remove_file(dir.join("a.q")).unwrap();
        assert_eq!(ok(&ours(dir, args)), theirs);
        // What the host gives to files differs; what they are does not.
        let plain = |text: &str| -> Vec<String> {
            let kept = |line: &&str| !line.contains("disk size") && !line.contains("file length");
            text.lines().filter(kept).map(str::to_owned).collect()
        };
        assert_eq!(plain(&ok(&run(dir, "qemu-img", &["info", "a.q"]))), plain(&their_info));
        let info = ok(&ours(dir, &["info", "a.q"]));
        assert_eq!(info, ok(&run(dir, "qemu-img", &["info", "a.q"])), "{args:?}");
    }
}

#[test]
fn a_check_has_qemus_exit_statuses_and_repairs() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "a.q", "4M"]));
    ok(&run(dir, "qemu-io", &["-c", "write -P 1 0 1M", "a.q"]));
    let whole = std::fs::read(dir.join("a.q")).unwrap();
    let status = |args: &[&str]| ours(dir, args).status.code().unwrap();
    let theirs = |args: &[&str]| run(dir, "qemu-img", args).status.code().unwrap();
    // The refcount table is the second cluster; its first entry, made to refer to no cluster, cannot
    // be followed. The first refcount is the one of the header, in the third cluster.
    for (at, byte, expected) in [(8193, 1, 0), (8193, 2, 3), (8193, 0, 2), (4096 + 6, 0x22, 1)] {
        let mut bytes = whole.clone();
        bytes[at] = byte;
        std::fs::write(dir.join("a.q"), &bytes).unwrap();
        assert_eq!(status(&["check", "a.q"]), expected, "byte {at}");
        assert_eq!(theirs(&["check", "a.q"]), expected, "byte {at}");
        let json = ours(dir, &["check", "--output", "json", "a.q"]);
        let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
        assert_eq!((&json["filename"], &json["format"]), (&"a.q".into(), &"qcow2".into()));
        let fix = if expected == 3 { "leaks" } else { "all" };
        let text = ok(&ours(dir, &["check", "--repair", fix, "a.q"]));
        assert_eq!(text.contains("inconsistencies were found and repaired"), expected != 0);
        assert_eq!(theirs(&["check", "a.q"]), 0);
        ok(&run(dir, "qemu-io", &["-c", "read -P 1 0 1M", "a.q"]));
    }
    assert_eq!(status(&["check", "none.q"]), 1);
    ok(&ours(dir, &["create", "-q", "r.raw", "1M"]));
    assert_eq!((status(&["check", "r.raw"]), theirs(&["check", "-f", "raw", "r.raw"])), (63, 63));
}

#[test]
fn disks_are_resized_saved_and_copied() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "base.q", "2M"]));
    ok(&run(dir, "qemu-io", &["-c", "write -P 1 0 2M", "base.q"]));
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "-b", "base.q", "-F", "qcow2", "a.q"]));
    ok(&ours(dir, &["snapshot", "create", "a.q", "before"]));
    ok(&run(dir, "qemu-io", &["-c", "write -P 2 0 64k", "a.q"]));
    assert_eq!(ok(&ours(dir, &["resize", "a.q", "+3M"])), "Image resized.\n");
    let refused = ours(dir, &["resize", "a.q", "-1M"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("Use the --shrink option"));
    ok(&ours(dir, &["resize", "--shrink", "a.q", "-1M"]));
    for (format, flags) in [("qcow2", &["-c"][..]), ("qcow2", &[]), ("raw", &[])] {
        let args = [&["convert", "-q", "-O", format][..], flags, &["a.q", "copy"]].concat();
        ok(&ours(dir, &args));
        ok(&run(dir, "qemu-img", &["compare", "-F", format, "a.q", "copy"]));
    }
    let list = ok(&ours(dir, &["snapshot", "list", "a.q"]));
    assert_eq!(list.lines().count(), 3, "{list}");
    ok(&ours(dir, &["snapshot", "apply", "a.q", "before"]));
    ok(&run(dir, "qemu-img", &["compare", "a.q", "base.q"]));
    ok(&ours(dir, &["snapshot", "delete", "a.q", "before"]));
    assert_eq!(ok(&ours(dir, &["snapshot", "list", "a.q"])), "");
    assert!(!ours(dir, &["snapshot", "delete", "a.q", "before"]).status.success());
    ok(&run(dir, "qemu-img", &["check", "a.q"]));
}

#[test]
fn a_resize_that_cannot_be_is_refused_as_by_qemu_and_changes_nothing() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "a.q", "1M"]));
    let before = std::fs::read(dir.join("a.q")).unwrap();
    let modes = ["metadata", "falloc", "full"].map(|mode| format!("--preallocation={mode}"));
    let mut cases = vec![
        (vec!["2000001"], "The new size must be a multiple of 512"),
        (vec!["+3"], "The new size must be a multiple of 512"),
        (vec!["--shrink", "1000"], "The new size must be a multiple of 512"),
        (vec!["0"], "New image size must be positive"),
        (vec!["-2M"], "New image size must be positive"),
    ];
    for mode in &modes {
        for rest in [&["512k"][..], &["--shrink", "512k"], &["1M"]] {
            let text = "Preallocation can only be used for growing images";
            cases.push(([&[mode.as_str()], rest].concat(), text));
        }
    }
    for (args, text) in cases {
        let args = [
            &["resize", "-f", "qcow2"],
            &args[..args.len() - 1],
            &["a.q"],
            &args[args.len() - 1..],
        ]
        .concat();
        let theirs = refused(&run(dir, "qemu-img", &args));
        assert!(theirs.contains(text), "{args:?}: {theirs}");
        let error = refused(&ours(dir, &args));
        assert!(error.contains(text), "{args:?}: {error}");
        assert!(std::fs::read(dir.join("a.q")).unwrap() == before, "{args:?}");
    }
}

#[test]
fn what_cannot_be_is_refused_and_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for (args, error) in [
        (&["create", "-f", "qcow2", "x"][..], "x: Image creation needs a size parameter"),
        (
            &["create", "-f", "qcow2", "-o", "size=2M", "x", "1M"],
            "x: The image size must be specified only once",
        ),
        (&["create", "-f", "qcow2", "-o", "zz=1", "x", "1M"], "Invalid parameter 'zz'"),
        (&["create", "-f", "vmdk", "x", "1M"], "x: Unknown file format 'vmdk'"),
        (
            &["create", "-f", "qcow2", "-b", "y", "x", "1M"],
            "x: Backing file specified without backing format",
        ),
        (
            &["create", "-f", "qcow2", "-b", "y", "-F", "raw", "x", "1M"],
            "Could not open backing image.",
        ),
        (
            &["create", "-f", "qcow2", "-o", "cluster_size=300", "x", "1M"],
            "Cluster size must be a power of two",
        ),
        (&["create", "-f", "qcow2", "-o", "encrypt.format=luks", "x", "1M"], "is not supported"),
        (
            &["create", "-f", "qcow2", "-o", "extent_size_hint=8G", "x", "1M"],
            "Extent size hint is too large",
        ),
        (&["create", "-f", "qcow2", "x", "1Z"], "Invalid image size specified: '1Z'"),
    ] {
        let output = ours(dir, args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(text.contains(error), "{args:?}: {text}");
        assert!(!dir.join("x").exists(), "{args:?}");
    }
}

/// The bytes of a disk that must not be lost.
static PRECIOUS: [u8; 1 << 20] = [0x5a; 1 << 20];

#[test]
fn a_copy_onto_its_own_source_or_backing_file_is_refused_and_loses_nothing() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("src.raw"), PRECIOUS).unwrap();
    std::fs::hard_link(dir.join("src.raw"), dir.join("link.raw")).unwrap();
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "-b", "src.raw", "-F", "raw", "over.q"]));
    for args in [
        &["convert", "-f", "raw", "-O", "qcow2", "src.raw", "src.raw"][..],
        &["convert", "-f", "raw", "-O", "raw", "src.raw", "src.raw"],
        &["convert", "-f", "raw", "-O", "raw", "src.raw", "link.raw"],
        &["convert", "-O", "qcow2", "over.q", "src.raw"],
    ] {
        let refused = ours(dir, args);
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            !refused.status.success() && text.contains("Failed to get \"write\" lock"),
            "{text}"
        );
        assert!(std::fs::read(dir.join("src.raw")).unwrap() == PRECIOUS, "{args:?}");
    }
}

#[test]
fn a_raw_image_that_another_program_writes_is_neither_resized_nor_copied() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("src.raw"), PRECIOUS).unwrap();
    let holder = Holder::of(dir, &["-f", "raw", "src.raw"]);
    for args in [
        &["resize", "-f", "raw", "src.raw", "512K", "--shrink"][..],
        &["convert", "-f", "raw", "-O", "raw", "src.raw", "copy.raw"],
    ] {
        let refused = ours(dir, args);
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && text.contains("lock"), "{args:?}: {text}");
        assert_eq!(std::fs::metadata(dir.join("src.raw")).unwrap().len(), 1 << 20);
    }
    drop(holder);
    ok(&ours(dir, &["resize", "-q", "-f", "raw", "src.raw", "2M"]));
}

#[test]
fn an_overlay_is_made_of_a_base_that_another_program_writes() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "base.q", "4M"]));
    let holder = Holder::of(dir, &["-f", "qcow2", "base.q"]);
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "-b", "base.q", "-F", "qcow2", "over.q"]));
    drop(holder);
    assert!(ok(&ours(dir, &["info", "over.q"])).contains("virtual size: 4 MiB"));
    ok(&run(dir, "qemu-img", &["compare", "over.q", "base.q"]));
}

#[test]
fn help_is_of_the_format_asked_for_and_an_unknown_one_is_refused_before_all_else() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let raw = ok(&ours(dir, &["create", "-o", "help"]));
    assert!(raw.starts_with("Supported raw options:") && !raw.contains("cluster_size"), "{raw}");
    let qcow2 = ok(&ours(dir, &["create", "-f", "qcow2", "-o", "help", "x"]));
    assert!(qcow2.contains("refcount_bits") && !qcow2.contains("raw options"), "{qcow2}");
    assert_eq!(ok(&ours(dir, &["convert", "-O", "qcow2", "-o", "help", "x", "y"])), qcow2);
    for args in [&["create", "-f", "vmdk", "x", "1M"][..], &["create", "-f", "vmdk", "-o", "help"]]
    {
        let output = ours(dir, args);
        assert!(refused(&output).contains("Unknown file format 'vmdk'"), "{output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
    }
}

#[test]
fn a_resize_warns_of_a_raw_image_that_was_only_guessed() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok(&ours(dir, &["create", "-q", "r.raw", "1M"]));
    let said = |args: &[&str]| {
        let output = ours(dir, args);
        ok(&output);
        String::from_utf8(output.stderr).unwrap()
    };
    let warning = said(&["resize", "-q", "r.raw", "2M"]);
    assert!(
        warning.contains("Image format was not specified for 'r.raw' and probing guessed raw"),
        "{warning}"
    );
    assert_eq!(said(&["resize", "-q", "-f", "raw", "r.raw", "3M"]), "");
}

#[test]
fn a_backing_chain_that_loops_is_called_that() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "a.q", "1M"]));
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "-b", "a.q", "-F", "qcow2", "b.q"]));
    ok(&run(dir, "qemu-img", &["rebase", "-u", "-b", "b.q", "-F", "qcow2", "a.q"]));
    for args in [&["info", "--backing-chain", "a.q"][..], &["resize", "a.q", "2M"]] {
        let error = refused(&ours(dir, args));
        assert!(error.contains("a.q' creates an infinite loop."), "{args:?}: {error}");
    }
}
