//! Sizes and dates, as qemu-img reads and prints them.

use time::OffsetDateTime;
use time::macros::format_description;

/// Bytes of a size with an optional suffix b, k, M, G, T, P, E and an optional fraction; or in hex
/// digits after 0x, which has neither.
pub(crate) fn parse_size(text: &str) -> Option<u64> {
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let digits = !hex.is_empty() && hex.chars().all(|c| c.is_ascii_hexdigit());
        return u64::from_str_radix(hex, 16).ok().filter(|_| digits);
    }
    let (number, shift) = match text.char_indices().next_back()? {
        (at, last) if last.is_ascii_alphabetic() => {
            let shift = match last.to_ascii_uppercase() {
                'B' => 0,
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                'P' => 50,
                'E' => 60,
                _ => return None,
            };
            (&text[..at], shift)
        }
        _ => (text, 0),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |part: &str| part.chars().all(|c| c.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || fraction.len() > 18 {
        return None;
    }
    if !fraction.is_empty() && shift == 0 {
        return None;
    }
    let bytes = whole.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    let part = match fraction.len() {
        0 => 0,
        n => {
            let scaled = u128::from(fraction.parse::<u64>().ok()?) << shift;
            u64::try_from(scaled / 10u128.pow(u32::try_from(n).ok()?)).ok()?
        }
    };
    bytes.checked_add(part)
}

/// A size with three digits and the unit that suits.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut scaled = u128::from(bytes) * 1000;
    while scaled >= 1_000_000 && unit < 6 {
        unit += 1;
        scaled = (u128::from(bytes) * 1000) >> (10 * unit);
    }
    // Three digits that count: with three to none after the point.
    let places = match scaled {
        0..1000 => 3,
        1000..10_000 => 2,
        10_000..100_000 => 1,
        _ => 0,
    };
    let step = 10u128.pow(3 - places);
    let exact = (u128::from(bytes) * 1000) - (scaled << (10 * unit)) == 0;
    let half = step / 2;
    let mut rounded = scaled / step;
    let rest = scaled % step;
    if rest > half || (rest == half && (!exact || rounded % 2 == 1)) {
        rounded += 1;
    }
    let ten = 10u128.pow(places);
    let mut text = format!("{}", rounded / ten);
    if !rounded.is_multiple_of(ten) {
        let fraction = format!("{:0width$}", rounded % ten, width = places as usize);
        text = format!("{text}.{}", fraction.trim_end_matches('0'));
    }
    format!("{text} {}", UNITS[unit])
}

/// `YYYY-MM-DD HH:MM:SS` in UTC.
pub(crate) fn date(seconds: u32) -> String {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]");
    let date = OffsetDateTime::from_unix_timestamp(seconds.into()).ok();
    date.and_then(|date| date.format(format).ok()).unwrap_or_else(|| seconds.to_string())
}

/// `HHHH:MM:SS.mmm` of a guest's running time.
pub(crate) fn clock(nanoseconds: u64) -> String {
    let (millis, seconds) = (nanoseconds / 1_000_000 % 1000, nanoseconds / 1_000_000_000);
    format!("{:04}:{:02}:{:02}.{millis:03}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("64k", 65536),
            ("1.5G", 3 << 29),
            ("3b", 3),
            ("2T", 2 << 40),
            ("7E", 7 << 60),
            ("0x100000", 1 << 20),
            ("0x1e", 30),
        ] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for text in [
            "0x", "0x10k", "0x+1", "0x1.8k", "", "k", "1Z", "-5", "1.5", "16E", "1..5k", "x", "1 k",
        ] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_and_times_are_printed_as_qemu_prints_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (200_704, "196 KiB"),
            (197_120, "192 KiB"),
            (1_331_200, "1.27 MiB"),
            (10 << 20, "10 MiB"),
            (1 << 40, "1 TiB"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
        assert_eq!(clock(0), "0000:00:00.000");
        assert_eq!(clock(3_723_004_000_000), "0001:02:03.004");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
    }
}
