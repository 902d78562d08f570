//! The models; seconds each.

use tardigrade_loom::{gates, ranges};

#[test]
fn requests_never_meet_a_change_of_the_node() {
    gates::requests_never_meet_a_change();
}

#[test]
fn owners_of_a_closed_gate_come_one_after_the_other() {
    gates::owners_come_one_after_the_other();
}

#[test]
fn who_only_tries_a_gate_does_not_hold_an_owner_up() {
    gates::who_only_tries_does_not_hold_an_owner_up();
}

#[test]
fn who_holds_a_range_alone_is_alone() {
    ranges::who_holds_a_range_alone_is_alone();
}

#[test]
fn the_last_of_several_lets_the_next_go_on() {
    ranges::the_last_of_several_lets_the_next_go_on();
}

#[test]
fn who_only_tries_a_range_gets_all_or_nothing() {
    ranges::who_only_tries_gets_all_or_nothing();
}

#[test]
fn each_who_waits_for_a_range_is_told() {
    ranges::each_who_waits_is_told();
}
