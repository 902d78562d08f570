//! Drawn trees.

use qmp::schema::CheckpointLabel;

use super::*;

fn reference(tag: &str, date_sec: i64) -> CheckpointRef {
    let (date_nsec, vm_clock_sec, vm_clock_nsec) = (0, date_sec, 0);
    CheckpointRef { tag: tag.to_owned(), date_sec, date_nsec, vm_clock_sec, vm_clock_nsec }
}

/// A checkpoint with that place above it; its parent is the same.
fn info(tag: &str, date: i64, above: Option<(&str, i64)>) -> CheckpointInfo {
    let above = above.map(|(tag, date)| reference(tag, date));
    let share = |alone, shared| Some(CheckpointShare { alone, shared });
    CheckpointInfo {
        checkpoint: reference(tag, date),
        places: vec![CheckpointPlace {
            node_name: "disk0".to_owned(),
            id: "1".to_owned(),
            disk: share(1 << 20, 0),
            vm_state: share(1 << 19, 3 << 30),
        }],
        vmstate: Some("disk0".to_owned()),
        vm_state_size: 5 << 30,
        parent: above.clone(),
        nearest: above,
        current: false,
        description: String::new(),
        labels: Vec::new(),
        problem: None,
        machine: None,
    }
}

/// The first column and the remark of each row but the header.
fn names(all: &[CheckpointInfo]) -> Vec<(String, String)> {
    let drawn = tree(all);
    let split = |line: &str| {
        let (name, rest) = line.split_once("  1970-").unwrap();
        let remark = rest.split_once("disk0").unwrap().1.trim();
        (name.trim_end().to_owned(), remark.to_owned())
    };
    drawn.lines().skip(1).map(split).collect()
}

#[test]
fn a_tree_has_its_columns_in_line() {
    let mut all = [
        info("booted", 0, None),
        info("installed", 60, Some(("booted", 0))),
        info("try-1", 61, Some(("installed", 60))),
        info("try-1b", 63, Some(("try-1", 61))),
        info("try-2", 62, Some(("installed", 60))),
    ];
    all[4].current = true;
    all[4].description = "with the new driver".to_owned();
    all[4].labels = vec![CheckpointLabel { key: "job".to_owned(), value: "17".to_owned() }];
    let wanted = "\
CHECKPOINT     DATE (UTC)           CLOCK    ALONE    SHARED   DISKS
● booted       1970-01-01 00:00:00  0:00:00  1.5 MiB  3.0 GiB  disk0
○ installed    1970-01-01 00:01:00  0:01:00  1.5 MiB  3.0 GiB  disk0
├─○ try-1      1970-01-01 00:01:01  0:01:01  1.5 MiB  3.0 GiB  disk0
│ ○ try-1b     1970-01-01 00:01:03  0:01:03  1.5 MiB  3.0 GiB  disk0
└─○ try-2  <-  1970-01-01 00:01:02  0:01:02  1.5 MiB  3.0 GiB  disk0  with the new driver [job=17]
";
    assert_eq!(tree(&all), wanted);
}

#[test]
fn a_deleted_parent_is_named_and_the_checkpoint_hangs_on_what_is_left() {
    let mut orphan = info("c", 3, Some(("a", 1)));
    orphan.parent = Some(reference("b", 2));
    let mut foreign = info("d", 4, None);
    foreign.parent = Some(reference("base", 0));
    let rows = names(&[info("a", 1, None), orphan, foreign]);
    let row = |name: &str, remark: &str| (name.to_owned(), remark.to_owned());
    assert_eq!(
        rows,
        [
            row("● a", ""),
            row("○ c", "(from 'b', deleted)"),
            row("● d", "(from 'base', which is not here)")
        ]
    );
}

#[test]
fn a_tag_used_again_is_another_checkpoint() {
    let all = [info("t", 1, None), info("t", 2, Some(("t", 1))), info("x", 3, Some(("t", 2)))];
    let names: Vec<_> = names(&all).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["● t", "○ t", "○ x"]);
}

#[test]
fn what_an_image_says_reaches_no_terminal_unescaped() {
    let mut all = [info("a\u{1b}[31m", 1, None)];
    all[0].problem = Some("bad\u{7}".to_owned());
    let drawn = tree(&all);
    assert!(!drawn.contains(['\u{1b}', '\u{7}']), "{drawn:?}");
    assert!(drawn.contains("(bad\\u{7})"), "{drawn:?}");
    assert_eq!(tree(&[]), "No checkpoints.\n");
}
