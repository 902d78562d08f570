//! The order in which a tree is drawn.

use super::*;

/// `index` after a mark: `*` root, `-` branch, ` ` continued; before it the branches to come.
fn drawn(above: &[Option<usize>]) -> Vec<String> {
    let text = |row: &Row| {
        let branches: String =
            row.branches.iter().map(|more| if *more { '|' } else { '.' }).collect();
        let mark = if row.root {
            '*'
        } else if row.starts_branch {
            '-'
        } else {
            ' '
        };
        format!("{branches}{mark}{}", row.index)
    };
    arrange(above).iter().map(text).collect()
}

#[test]
fn a_chain_is_one_line_however_long() {
    assert_eq!(drawn(&[None, Some(0), Some(1)]), ["*0", " 1", " 2"]);
    let chain: Vec<_> = (0..50_000_usize).map(|at| at.checked_sub(1)).collect();
    let rows = arrange(&chain);
    assert_eq!(rows.len(), 50_000);
    assert!(rows.iter().all(|row| row.branches.is_empty()));
}

#[test]
fn branches_nest_and_roots_follow_each_other() {
    let above = [None, Some(0), Some(0), Some(1), Some(3), Some(3), None, Some(2)];
    assert_eq!(drawn(&above), ["*0", "|-1", "| 3", "||-4", "|.-5", ".-2", ". 7", "*6"]);
}

#[test]
fn a_circle_is_drawn_once_each() {
    assert_eq!(drawn(&[Some(1), Some(0), None]), ["*2", "*0", " 1"]);
    assert_eq!(drawn(&[Some(0)]), ["*0"]);
    // Out of range, from who knows where.
    assert_eq!(drawn(&[Some(9)]), ["*0"]);
}
