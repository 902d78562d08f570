use proptest::prelude::*;
use serde_json::{Value, json};

use super::writer::to_bytes;
use super::*;

/// All outcomes of `input`, fed in these portions.
fn outcomes(limits: Limits, portions: &[&[u8]]) -> Vec<Result<Value, String>> {
    let mut parser = Parser::new(limits);
    let mut all = Vec::new();
    for portion in portions {
        let mut rest = *portion;
        while let Some(outcome) = parser.next(&mut rest) {
            all.push(outcome.map_err(|error| error.0));
        }
        assert!(rest.is_empty(), "input was left over without an outcome");
    }
    all
}

fn parse(input: &[u8]) -> Vec<Result<Value, String>> {
    outcomes(Limits::default(), &[input])
}

/// The only outcome, a value.
fn value(input: &str) -> Value {
    match <[_; 1]>::try_from(parse(input.as_bytes())) {
        Ok([Ok(value)]) => value,
        other => panic!("{input}: {other:?}"),
    }
}

/// The outcomes as error texts, "ok" for a value. All rows here were observed with QEMU 10.0.2.
fn texts(input: &[u8]) -> Vec<String> {
    let text = |outcome: Result<Value, String>| match outcome {
        Ok(_) => "ok".to_owned(),
        Err(text) => match text.strip_prefix("JSON parse error, ") {
            Some(rest) => rest.to_owned(),
            None => text,
        },
    };
    parse(input).into_iter().map(text).collect()
}

#[track_caller]
fn assert_texts(rows: &[(&[u8], &[&str])]) {
    for (input, expected) in rows {
        assert_eq!(texts(input), *expected, "{}", input.escape_ascii());
    }
}

#[test]
fn values_of_every_type_are_read() {
    assert_eq!(value("null "), json!(null));
    assert_eq!(value("[true,false]"), json!([true, false]));
    assert_eq!(value(r#"{"a":{"b":[1,{}]},"c":[]}"#), json!({"a": {"b": [1, {}]}, "c": []}));
    assert_eq!(value(r#""\"\\\/\b\f\n\r\t\u00e9""#), json!("\"\\/\u{8}\u{c}\n\r\té"));
    assert_eq!(value(r"'it\'s \u0000 a \ud83d\ude00'"), json!("it's \0 a 😀"));
    assert_eq!(parse(b"'\xc0\x80'"), [Ok(json!("\0"))]);
}

#[test]
fn numbers_take_the_smallest_type_that_holds_them() {
    for (text, expected) in [
        ("[-0]", json!([0])),
        ("[9223372036854775807]", json!([i64::MAX])),
        ("[-9223372036854775808]", json!([i64::MIN])),
        ("[18446744073709551615]", json!([u64::MAX])),
        ("[18446744073709551616]", json!([1.8446744073709552e19])),
        ("[-9223372036854775809]", json!([-9_223_372_036_854_775_808.0])),
        ("[1e3,0.5,1.5e-7,1E+2]", json!([1000.0, 0.5, 1.5e-7, 100.0])),
        ("[1e-400]", json!([0.0])),
    ] {
        assert_eq!(value(text), expected, "{text}");
    }
    assert_eq!(texts(b"[1e400]"), ["number out of range"]);
}

#[test]
fn commands_are_framed_by_value_not_by_line() {
    let input = b"{\"a\":1}{\"b\":\n2} \r\n [3]";
    assert_eq!(parse(input), [Ok(json!({"a": 1})), Ok(json!({"b": 2})), Ok(json!([3]))]);
}

#[test]
fn a_bare_scalar_needs_something_after_it() {
    assert_texts(&[
        (b"5", &[]),
        (b"5\n", &["ok"]),
        (b"abc", &[]),
        (b"abc\"", &["invalid keyword 'abc'"]),
        (b"nulltrue ", &["invalid keyword 'nulltrue'"]),
        (b"null true ", &["ok", "ok"]),
        (b"0e1 ", &["ok", "invalid keyword 'e'", "ok"]),
    ]);
}

#[test]
fn a_wrong_value_is_one_error_where_it_ends() {
    assert_texts(&[
        (br#"{"a":1,"a":}"#, &["expecting value"]),
        (br#"{"a":1,"a":2}"#, &["duplicate key"]),
        (br#"{"a":1,}"#, &["expecting value"]),
        (b"{1:2}", &["key is not a string in object"]),
        (b"{[1]:2}", &["key is not a string in object"]),
        (b"{[1 1]:2}", &["expected separator in list"]),
        (br#"{"a" 1}"#, &["missing : in object pair"]),
        (br#"{"a":1 "b":2}"#, &["expected separator in dict"]),
        (b"[1 2]", &["expected separator in list"]),
        (b"[1,]", &["expecting value"]),
        (br#"{"a":1]"#, &["expected separator in dict"]),
        (b"[}", &["expecting value"]),
        (b"{]", &["expecting value"]),
        (br#"{"a":"\x","b":}"#, &["invalid escape sequence in string"]),
        (b"[xyz]", &["invalid keyword 'xyz'"]),
        (b",:\n", &["expecting value", "expecting value"]),
        (b"{}}[", &["ok", "expecting value"]),
        (b"}{}", &["expecting value", "ok"]),
        (b"]]", &["expecting value", "expecting value"]),
    ]);
}

#[test]
fn bad_escapes_and_bad_utf8_are_named() {
    let unicode = |escape: &str| format!("{escape} is not a valid Unicode character");
    for (input, shown) in [
        (r#""\ud83d""#, r"\ud83d"),
        (r#""\ud83d\u0041""#, r"\ud83d"),
        (r#""\ud83d\n""#, r"\ud83d"),
        (r#""\uD83D\uD83D""#, r"\uD83D"),
        (r#""\udc00""#, r"\udc00"),
        (r#""\ufffe""#, r"\ufffe"),
        (r#""\uzzzz""#, r"\uzzzz"),
        (r#""\u12""#, r#"\u12""#),
        (r"'\u00'", r"\u00'"),
    ] {
        assert_eq!(texts(input.as_bytes()), [unicode(shown)], "{input}");
    }
    for input in ["\"\\x\"", "\"\\é\""] {
        assert_eq!(texts(input.as_bytes()), ["invalid escape sequence in string"], "{input}");
    }
    for input in [
        &b"'\xc3'"[..],
        b"'\xc3('",
        b"'\xed\xa0\xbd'",
        b"'\xef\xbf\xbe'",
        b"'\xef\xb7\x90'",
        b"'\xf4\x90\x80\x80'",
        b"'\xc0\x81'",
    ] {
        assert_eq!(texts(input), ["invalid UTF-8 sequence in string"], "{}", input.escape_ascii());
    }
}

#[test]
fn after_a_stray_byte_reading_starts_anew_at_a_structural_or_control_character() {
    assert_texts(&[
        (b"\"a\x01b\"{}", &["stray '\"a\u{1}'", "ok"]),
        (b"\xff{}", &["stray '\u{fffd}'", "ok"]),
        (b"\"abc\xfe\"  {}", &["stray '\"abc\u{fffd}'", "ok"]),
        (b"01 junk {}", &["stray '01'", "ok"]),
        (b"-s junk, {}", &["stray '-s'", "expecting value", "ok"]),
        (b"-s\" junk\" 7 {}", &["stray '-s'", "ok"]),
        (b"A B {}", &["stray 'A'", "ok"]),
        (b"%d {}", &["stray '%'", "ok"]),
        (b"+1 {}", &["stray '+'", "ok"]),
        (b"/ : 5\n", &["stray '/'", "expecting value", "ok"]),
        (b"/ 'a' [] ", &["stray '/'", "ok"]),
        (b"# \t5 \x7f\n5\r", &["stray '#'", "ok"]),
        (b"'\xc0\x80\xef\xbf\xbe\x01", &["stray ''\0\u{fffd}\u{1}'"]),
        (b"\x1a\x1b", &["stray '\u{1a}'", "stray '\u{1b}'"]),
        (b"\x00\n", &["stray ''"]),
        (b"\"a\x00\"\n", &["stray '\"a'"]),
        (b"\"\\\x01\" \n", &["stray '\"\\\u{1}'"]),
        (b"xyz\x80 ", &["invalid keyword 'xyz'", "stray '\u{fffd}'"]),
        (b"12\x80 \n{}", &["ok", "stray '\u{fffd}'", "ok"]),
        (b"xyz\"\n", &["invalid keyword 'xyz'", "stray '\"\n'"]),
        (b"1.x ", &["stray '1.x'"]),
        (b"1e+ ", &["stray '1e+ '"]),
        (b"1ex\n", &["stray '1ex'"]),
        (b"{\"a\":1.}", &["stray '1.}'"]),
        (b"{'a':1,#'id':1}", &["stray '#'", "expecting value", "ok", "expecting value"]),
        (b"{\"a\"\x01}\n", &["stray '\u{1}'", "expecting value"]),
    ]);
}

#[test]
fn depth_1024_is_read_and_1025_refused() {
    let nested = |depth: usize| [vec![b'['; depth], vec![b']'; depth]].concat();
    assert_eq!(texts(&nested(1024)), ["ok"]);
    let mut expected = vec!["JSON nesting depth limit exceeded"];
    expected.extend(["expecting value"; 1025]);
    assert_eq!(texts(&nested(1025)), expected);
    // As with QEMU, the brackets after the limit open another value.
    assert_eq!(texts(&[vec![b'['; 1026], vec![b']'; 1]].concat()).len(), 2);
}

const SMALL: Limits = Limits { bytes: 1000, tokens: 100, depth: 10 };

#[test]
fn an_oversized_value_is_one_error_and_the_next_line_is_read() {
    let string = ["'", &"a".repeat(5000), "' junk {} \n {}"].concat();
    let keyword = ["a".repeat(5000), "\n{}".into()].concat();
    let many = ["[", &"'01234567890123456789012345',".repeat(40), "1]]]\n{}"].concat();
    for input in [string, keyword, many] {
        let expected = [Err("JSON token size limit exceeded".to_owned()), Ok(json!({}))];
        assert_eq!(outcomes(SMALL, &[input.as_bytes()]), expected);
    }
    let tokens = ["[", &"1,".repeat(500), "1]\n{}"].concat();
    let expected = [Err("JSON token count limit exceeded".to_owned()), Ok(json!({}))];
    assert_eq!(outcomes(SMALL, &[tokens.as_bytes()]), expected);
}

#[test]
fn a_value_at_the_size_limit_is_read() {
    for (length, fits) in [(998, true), (999, false)] {
        let input = ["'", &"a".repeat(length), "'\n"].concat();
        assert_eq!(outcomes(SMALL, &[input.as_bytes()])[0].is_ok(), fits, "{length}");
    }
}

#[test]
fn a_gibibyte_without_an_end_costs_no_more_than_the_limit() {
    let mut parser = Parser::new(Limits { bytes: 1 << 20, ..Limits::default() });
    let chunk = vec![b'a'; 1 << 20];
    let mut errors = 0;
    assert_eq!(parser.next(&mut &b"\""[..]), None);
    for _ in 0..1024 {
        let mut rest = &chunk[..];
        while let Some(outcome) = parser.next(&mut rest) {
            assert!(outcome.is_err());
            errors += 1;
        }
        assert!(parser.lexer.capacity() <= 4 << 20, "{}", parser.lexer.capacity());
    }
    assert_eq!(errors, 1);
    assert_eq!(parser.next(&mut &b"\"\n{}"[..]), Some(Ok(json!({}))));
}

#[test]
fn a_stray_token_is_shown_up_to_1023_bytes() {
    let input = ["'", &"x".repeat(5000), "\x01"].concat();
    assert_eq!(texts(input.as_bytes()), [format!("stray ''{}'", "x".repeat(1022))]);
}

#[test]
fn output_is_ascii_on_one_line_with_crlf() {
    let value = json!({"k": ["\u{7f} / \u{8}\u{c}\n\r\t\u{1f}\"'é\\", "😀", null, 1, -2, 0.5]});
    let expected = concat!(
        r#"{"k": ["\u007F / \b\f\n\r\t\u001F\"'\u00E9\\", "\uD83D\uDE00", null, 1, -2, 0.5]}"#,
        "\r\n"
    );
    assert_eq!(String::from_utf8(to_message(&value).unwrap()).unwrap(), expected);
    assert_eq!(to_bytes(&json!([[], {}, [[1]]])).unwrap(), b"[[], {}, [[1]]]");
}

fn any_value() -> impl Strategy<Value = Value> {
    let scalar = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        "[^\u{fdd0}-\u{fdef}\u{fffe}\u{ffff}]{0,8}".prop_filter_map("noncharacter", |text| {
            let reserved = |c: char| u32::from(c) & 0xfffe == 0xfffe;
            (!text.contains(reserved)).then(|| Value::from(text))
        }),
    ];
    scalar.prop_recursive(4, 32, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map("[ -~é]{0,4}", inner, 0..6)
                .prop_map(|map| map.into_iter().collect::<Value>()),
        ]
    })
}

/// Bytes that are likely to mean something.
fn garbage() -> impl Strategy<Value = Vec<u8>> {
    let words: Vec<&'static [u8]> = vec![
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\"",
        b"'",
        b"\\",
        b"\\u",
        b"d83d",
        b"\\udc00",
        b"0",
        b"1",
        b"-",
        b".",
        b"e",
        b"+",
        b" ",
        b"\n",
        b"null",
        b"true",
        b"x",
        b"\"a\":",
        b"\xff",
        b"\xc0\x80",
        b"\xc3",
        b"\xa9",
        b"\x00",
        b"%",
        b"A",
    ];
    prop::collection::vec(prop::sample::select(words), 0..60).prop_map(|words| words.concat())
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(value in any_value()) {
        let text = to_message(&value).unwrap();
        prop_assert!(text.is_ascii());
        prop_assert_eq!(parse(&text), [Ok(value)]);
    }

    #[test]
    fn random_bytes_do_no_harm(input in prop::collection::vec(any::<u8>(), 0..300)) {
        outcomes(SMALL, &[&input]);
    }

    #[test]
    fn portions_change_nothing(input in garbage(), cuts in prop::collection::vec(0..200_usize, 0..8)) {
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(input.len())).collect();
        cuts.extend([0, input.len()]);
        cuts.sort_unstable();
        let portions: Vec<&[u8]> = cuts.windows(2).map(|cut| &input[cut[0]..cut[1]]).collect();
        let bytes: Vec<&[u8]> = input.chunks(1).collect();
        let whole = outcomes(SMALL, &[&input]);
        prop_assert_eq!(&outcomes(SMALL, &portions), &whole);
        prop_assert_eq!(&outcomes(SMALL, &bytes), &whole);
    }

    #[test]
    fn a_control_character_always_starts_anew(input in garbage()) {
        let mut parser = Parser::new(SMALL);
        let mut rest = &input[..];
        while parser.next(&mut rest).is_some() {}
        let mut rest = &b"\x01\n{}"[..];
        let last = std::iter::from_fn(|| parser.next(&mut rest)).last();
        prop_assert_eq!(last, Some(Ok(json!({}))));
    }
}
