//! `docs/qmp-reference.md` is what the schema says.
#![allow(clippy::unwrap_used, clippy::panic, reason = "test code")]

use std::path::Path;

#[test]
fn the_reference_page_is_what_the_schema_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/qmp-reference.md");
    let page = qmp::schema::reference();
    if std::env::var("QMP_REFERENCE").as_deref() == Ok("write") {
        std::fs::write(&path, &page).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    let stale = page.lines().zip(written.lines()).find(|(new, old)| new != old);
    assert!(
        page == written,
        "docs/qmp-reference.md is stale: QMP_REFERENCE=write cargo test -p qmp --test reference\n{stale:?}"
    );
}
