//! Any bytes as an image to be checked.

use block::qcow2::check::{Options, check};
use block::{Error, Format as _, Progress};

use super::{limit, open};
use crate::input;

pub(super) fn run(input: &[u8]) {
    let file = input::unpack(input);
    let _limit = limit(&file);
    let progress = Progress::default();
    let Ok(report) = check(&*file, &Options { progress: Some(&progress) }) else {
        return;
    };
    let (done, total) = progress.get();
    assert!(done <= total || report.exit_code() != 0, "{done} of {total} bytes are checked");
    if report.exit_code() == 0 && report.overlaps == 0 {
        // What is clean can be written to, as far as its features are known.
        match open(&file, false) {
            Ok(image) => drop(image.flush()),
            // The header beyond the tables' places is not the check's business.
            Err(Error::Corrupt { reason, .. })
                if reason.starts_with("backing file name")
                    || reason.starts_with("snapshot table offset") => {}
            Err(e) => assert!(!matches!(e, Error::Corrupt { .. }), "no error was found, but: {e}"),
        }
    }
}
