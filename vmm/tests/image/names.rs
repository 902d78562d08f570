//! What an image's name and first bytes tell: foreign formats, names with a protocol, `json:` names.

use std::process::Command;

use serde_json::Value;

use crate::{TARDIGRADE, have_qemu_img, ok, ours, refused, run};

/// Formats that qemu-img makes, as the errors call them.
const FOREIGN: [(&str, &str); 6] = [
    ("vmdk", "VMDK image"),
    ("qed", "QED image"),
    ("vdi", "VDI image"),
    ("vhdx", "VHDX image"),
    ("vpc", "VHD (vpc) image"),
    ("parallels", "Parallels image"),
];

#[test]
fn images_of_other_programs_are_refused_by_name_unless_they_are_said_to_be_raw() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut all: Vec<_> = FOREIGN.iter().map(|(f, n)| (*f, format!("x.{f}"), *n)).collect();
    for (format, file, _) in &all {
        ok(&run(dir, "qemu-img", &["create", "-q", "-f", format, file, "32M"]));
    }
    let flat = ["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", "flat", "1M"];
    ok(&run(dir, "qemu-img", &flat));
    all.push(("vmdk", "flat".to_owned(), "VMDK image"));
    let secret = ["--object", "secret,id=s,data=abc", "-o", "key-secret=s,iter-time=10"];
    let made = run(
        dir,
        "qemu-img",
        &[&["create", "-q", "-f", "luks"], &secret[..], &["l", "1M"]].concat(),
    );
    if made.status.success() {
        all.push(("luks", "l".to_owned(), "LUKS container"));
    }
    for (format, file, name) in &all {
        let before = std::fs::read(dir.join(file)).unwrap();
        let wanted = format!("'{file}' is a {name}, which is not supported");
        for args in [
            &["info", file][..],
            &["check", file],
            &["check", "--repair", "all", file],
            &["resize", file, "64M"],
            &["convert", "-O", "raw", file, "never"],
            &["snapshot", "list", file],
        ] {
            let error = refused(&ours(dir, args));
            assert!(error.contains(&wanted), "{args:?}: {error}");
        }
        assert!(!dir.join("never").exists());
        assert!(std::fs::read(dir.join(file)).unwrap() == before, "{file} was written to");
        // QEMU calls it the format that it made, so nothing is called foreign that is not.
        let info = ok(&run(dir, "qemu-img", &["info", "--output=json", file]));
        let info: Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["format"], *format);
        ok(&ours(dir, &["convert", "-f", "raw", "-O", "raw", file, "copy"]));
        let copy = std::fs::read(dir.join("copy")).unwrap();
        assert!(copy.starts_with(&before), "{file}: its bytes as they are");
    }
}

#[test]
fn a_base_of_a_foreign_format_that_its_overlay_does_not_record_is_refused() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok(&run(dir, "qemu-img", &["create", "-q", "-f", "vmdk", "b", "1M"]));
    ok(&run(dir, "qemu-img", &["create", "-q", "-f", "qcow2", "-b", "b", "-F", "vmdk", "o.q"]));
    let mut bytes = std::fs::read(dir.join("o.q")).unwrap();
    let extension = 0xe279_2aca_u32.to_be_bytes();
    let at = bytes.windows(4).position(|part| part == extension).unwrap();
    // An extension that nobody knows is passed over.
    bytes[at..at + 4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
    std::fs::write(dir.join("o.q"), bytes).unwrap();
    let error = refused(&ours(dir, &["convert", "-O", "raw", "o.q", "never"]));
    assert!(error.contains("backing file of 'o.q': 'b' is a VMDK image, which"), "{error}");
    std::fs::remove_file(dir.join("b")).unwrap();
    let error = refused(&ours(dir, &["convert", "-O", "raw", "o.q", "never"]));
    assert!(error.contains("backing file of 'o.q': Could not open 'b': No such file"), "{error}");
}

#[test]
fn overlays_name_their_backing_file_as_in_qemu() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "base.q", "3M"]));
    ok(&run(dir, "qemu-io", &["-c", "write -P 7 64k 64k", "base.q"]));
    std::fs::copy(dir.join("base.q"), dir.join("x:y.img")).unwrap();
    let json = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"base.q"}}"#;
    for program in ["ours", "theirs"] {
        let create = |args: &[&str]| match program {
            "ours" => ours(dir, &[&["create", "-q"], args].concat()),
            _ => run(dir, "qemu-img", &[&["create", "-q"], args].concat()),
        };
        let error = refused(&create(&["-f", "qcow2", "-b", "x:y.img", "-F", "qcow2", "no.q"]));
        assert!(error.contains("protocol 'x'"), "{error}");
        assert!(!dir.join("no.q").exists());
        let error = refused(&create(&["-f", "raw", "-b", "base.q", "-F", "qcow2", "no", "1M"]));
        assert!(error.contains("Backing file not supported for file format 'raw'"), "{error}");
        for backing in ["base.q", "file:base.q", json, "./x:y.img"] {
            ok(&create(&["-f", "qcow2", "-b", backing, "-F", "qcow2", "over.q"]));
            for reader in [TARDIGRADE, "qemu-img"] {
                let first = if reader == TARDIGRADE { &["image"][..] } else { &[] };
                let run = |args: &[&str]| run(dir, reader, &[first, args].concat());
                let chain = ok(&run(&["info", "--backing-chain", "--output=json", "over.q"]));
                let chain: Value = serde_json::from_str(&chain).unwrap();
                let [over, base] = &chain.as_array().unwrap()[..] else { panic!("{chain}") };
                assert_eq!(over["backing-filename"], backing);
                assert_eq!(over["virtual-size"], 3 << 20, "{backing}");
                let name = if backing.contains("x:y") { "x:y.img" } else { "base.q" };
                let shown = base["filename"].as_str().unwrap();
                assert_eq!(shown.trim_start_matches("./"), name, "{reader} {backing}");
                assert_eq!(base["children"][0]["info"]["format"], "file");
            }
            ok(&ours(dir, &["convert", "-O", "raw", "over.q", "copy"]));
            ok(&run(dir, "qemu-img", &["compare", "-F", "raw", "base.q", "copy"]));
        }
    }
    let shown = ok(&ours(dir, &["info", json]));
    assert!(shown.starts_with("image: base.q\nfile format: qcow2\n"), "{shown}");
    let error = refused(&ours(dir, &["info", "json:[]"]));
    assert!(error.contains("json:[]"), "{error}");
}

#[test]
fn a_chain_that_loops_through_a_json_name_is_called_that() {
    if !have_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let json = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a.q"}}"#;
    ok(&ours(dir, &["create", "-q", "-f", "qcow2", "a.q", "1M"]));
    ok(&run(dir, "qemu-img", &["rebase", "-u", "-b", json, "-F", "qcow2", "a.q"]));
    let error = refused(&ours(dir, &["info", "--backing-chain", "a.q"]));
    assert!(error.contains("creates an infinite loop."), "{error}");
}

#[test]
fn a_write_past_the_limit_of_file_sizes_fails_and_does_not_kill() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::write(dir.join("a.raw"), vec![7; 4 << 20]).unwrap();
    // In blocks of 512 bytes or of 1 KiB, as the shell has it.
    let script = r#"ulimit -f 1024; exec "$0" image convert -f raw -O raw a.raw b.raw"#;
    let output =
        Command::new("sh").current_dir(dir).args(["-c", script, TARDIGRADE]).output().unwrap();
    let error = refused(&output);
    assert!(error.contains("File too large"), "{error}");
}
