//! Times and sizes for people. Texts from images are shown without control characters, which could
//! make a terminal do things.

use time::OffsetDateTime;
use time::macros::format_description;

/// A text from an image, with control characters escaped.
pub(crate) fn safe(text: &str) -> String {
    let one = |c: char| -> String {
        if c.is_control() { c.escape_default().collect() } else { c.into() }
    };
    text.chars().map(one).collect()
}

/// `1.5 MiB`
pub(crate) fn size(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.into_iter().find(|(_, shift)| bytes >> shift > 0) {
        Some((unit, shift)) => format!("{:.1} {unit}", bytes as f64 / (1_u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

/// `YYYY-MM-DD HH:MM:SS` of seconds since the epoch.
pub(crate) fn utc(seconds: i64) -> String {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]");
    let date = OffsetDateTime::from_unix_timestamp(seconds).ok();
    date.and_then(|date| date.format(format).ok()).unwrap_or_else(|| seconds.to_string())
}

/// `H:MM:SS` of the time a guest has been running.
pub(crate) fn clock(seconds: i64) -> String {
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(utc(0), "1970-01-01 00:00:00");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(utc(1_735_689_599), "2024-12-31 23:59:59");
        assert_eq!(clock(3723), "1:02:03");
    }

    #[test]
    fn sizes_have_the_largest_fitting_unit() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(4 << 30), "4.0 GiB");
    }

    #[test]
    fn control_characters_do_not_reach_a_terminal() {
        assert_eq!(safe("a\u{1b}[2Jb\nc \u{e9}"), "a\\u{1b}[2Jb\\nc \u{e9}");
    }
}
