//! Sessions of QMP clients to start from: text of every kind, and choices of commands.

use fastrand::Rng;
use qmp::schema::commands;
use serde_json::json;

use crate::seeds::Seed;
use crate::targets::qmp::STRUCTURED;

/// Inputs that choose commands.
const CHOICES: u64 = 8;
/// Bytes of each.
const BYTES: usize = 256;

const NEGOTIATE: &str = "{'execute':'qmp_capabilities'}";

pub(crate) fn all() -> Vec<Seed> {
    let text = |name: &str, text: &str| Seed { name: name.to_owned(), input: text.into() };
    let plain: String =
        commands().map(|info| json!({ "execute": info.name, "id": [1.5] }).to_string()).collect();
    let mut seeds = vec![
        text("every-command", &format!("{NEGOTIATE}{plain}")),
        text("none-negotiated", &plain),
        text(
            "out-of-band",
            "{\"execute\":\"qmp_capabilities\",\"arguments\":{\"enable\":[\"oob\"]}}\
             {\"execute\":\"cont\"}{\"exec-oob\":\"query-jobs\",\"id\":1}{\"exec-oob\":\"x\"}",
        ),
        text(
            "bad-json",
            "{'a':}{,}[1 2]{'a':1,'a':2}'\\ud83d'\"\\x\"01\n-s\n1.\n\u{1}{'a'\u{7f}nulltrue \
             [[[[{{{'\\uD83D\\uDE00':1e400,'b':18446744073709551616}]}",
        ),
        text("deep", &format!("{NEGOTIATE}{}{}", "[".repeat(1030), "]".repeat(1030))),
    ];
    let choices = |n| {
        let mut random = Rng::with_seed(n);
        let mut input = vec![STRUCTURED];
        input.extend(std::iter::repeat_with(|| random.u8(..)).take(BYTES));
        Seed { name: format!("choices-{n}"), input }
    };
    seeds.extend((0..CHOICES).map(choices));
    seeds
}
