//! Where the disks of a moved checkpoint are looked for.

use super::*;

fn disk(node: &str, filename: &Path, read_only: bool) -> DiskConfig {
    DiskConfig {
        node: node.to_owned(),
        size: 0,
        read_only,
        serial: String::new(),
        format: "qcow2".to_owned(),
        filename: filename.display().to_string(),
        share_rw: false,
        rerror: String::new(),
        werror: String::new(),
    }
}

/// The files of a checkpoint whose image was `was` and is `image`.
fn files(was: &Path, image: &Path) -> Files {
    let moved = was.canonicalize().ok() != image.canonicalize().ok();
    Files {
        image: image.to_owned(),
        directory: PathBuf::new(),
        vmstate: "disk0".to_owned(),
        was: was.to_owned(),
        moved,
        given: Vec::new(),
    }
}

fn touch(path: &Path) -> PathBuf {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, "").unwrap();
    path.to_owned()
}

#[test]
fn disks_that_moved_with_the_image_are_found_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let was = touch(&dir.path().join("old/disk0"));
    let other = touch(&dir.path().join("old/more/disk1"));
    let image = touch(&dir.path().join("new/renamed"));
    let copy = touch(&dir.path().join("new/more/disk1"));
    let found = |files: &Files| files.file(&disk("disk1", &other, false));
    assert_eq!(found(&files(&was, &image)), Ok(copy));
    assert_eq!(found(&files(&was, &was)), Ok(other.clone()));
}

#[test]
fn a_writable_disk_of_the_original_is_not_taken_for_a_copy() {
    let dir = tempfile::tempdir().unwrap();
    let was = touch(&dir.path().join("old/disk0"));
    let other = touch(&dir.path().join("old/disk1"));
    let elsewhere = touch(&dir.path().join("elsewhere/disk2"));
    let image = touch(&dir.path().join("new/disk0"));
    let files = files(&was, &image);
    for path in [&other, &elsewhere] {
        let error = files.file(&disk("d", path, false)).unwrap_err();
        assert!(error.contains("moved or copied since"), "{error}");
        assert!(error.contains("--blockdev driver=qcow2,node-name=d"), "{error}");
        assert_eq!(files.file(&disk("d", path, true)), Ok(path.clone()), "read-only is harmless");
    }
    let error = files.file(&disk("d", &dir.path().join("old/none"), false)).unwrap_err();
    let wanted = dir.path().join("new/none");
    assert!(error.contains(&format!("there is no '{}'", wanted.display())), "{error}");
}
