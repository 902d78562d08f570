use super::*;
use crate::nbd::wire::Reader;

#[derive(Debug, Clone, Copy)]
struct Disk {
    name: &'static str,
    read_only: bool,
    bitmap: &'static str,
}

impl Offered for Disk {
    fn name(&self) -> &str {
        self.name
    }
    fn description(&self) -> Option<&str> {
        (self.name == "a").then_some("first")
    }
    fn size(&self) -> u64 {
        12345
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn multi_conn(&self) -> bool {
        true
    }
    fn contexts(&self) -> Vec<String> {
        ["base:allocation", "qemu:dirty-bitmap:x", self.bitmap].map(String::from).into()
    }
}

struct Disks;

const BITMAP: &str = "qemu:dirty-bitmap:y";
const DISKS: [Disk; 2] = [
    Disk { name: "a", read_only: true, bitmap: BITMAP },
    Disk { name: "b", read_only: false, bitmap: BITMAP },
];

/// Others of the same names.
struct Later;

impl Exports for Later {
    type Export = Disk;
    fn list(&self) -> Vec<Disk> {
        Disks.list()
    }
    fn find(&self, name: &[u8]) -> Option<Disk> {
        Disks.find(name).map(|disk| Disk { bitmap: "qemu:dirty-bitmap:z", ..disk })
    }
}

impl Exports for Disks {
    type Export = Disk;
    fn list(&self) -> Vec<Disk> {
        DISKS.into()
    }
    fn find(&self, name: &[u8]) -> Option<Disk> {
        DISKS.into_iter().find(|disk| disk.name.as_bytes() == name)
    }
}

fn fixed() -> Negotiation {
    let mut negotiation = Negotiation::default();
    assert!(negotiation.client_flags(3));
    negotiation
}

/// Kind and data of each reply.
fn replies(out: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut reader = Reader::new(out);
    let mut all = Vec::new();
    while !reader.is_empty() {
        reader.u64().unwrap();
        reader.u32().unwrap();
        let kind = reader.u32().unwrap();
        all.push((kind, reader.string().unwrap().to_vec()));
    }
    all
}

fn ask(
    negotiation: &mut Negotiation,
    option: u32,
    data: &[u8],
) -> (Vec<(u32, Vec<u8>)>, Step<Disk>) {
    let mut out = Vec::new();
    let step = negotiation.option(option, data, &Disks, &mut out);
    (replies(&out), step)
}

fn kinds(negotiation: &mut Negotiation, option: u32, data: &[u8]) -> Vec<u32> {
    ask(negotiation, option, data).0.into_iter().map(|(kind, _)| kind).collect()
}

fn go_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = len32(name.len()).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&u16::try_from(wanted.len()).unwrap().to_be_bytes());
    wanted.iter().for_each(|kind| data.extend_from_slice(&kind.to_be_bytes()));
    data
}

fn context_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Vec::new();
    for (n, string) in std::iter::once(&name).chain(queries).enumerate() {
        data.extend_from_slice(&len32(string.len()).to_be_bytes());
        data.extend_from_slice(string.as_bytes());
        if n == 0 {
            data.extend_from_slice(&len32(queries.len()).to_be_bytes());
        }
    }
    data
}

#[test]
fn unknown_client_flags_end_the_session() {
    assert!(Negotiation::default().client_flags(0));
    assert!(!Negotiation::default().client_flags(4));
}

#[test]
fn client_without_fixed_newstyle_can_only_choose_by_name() {
    let mut negotiation = Negotiation::default();
    assert!(negotiation.client_flags(0));
    let mut out = Vec::new();
    let step = negotiation.option(code::LIST, &[], &Disks, &mut out);
    assert!(matches!(step, Step::Close) && out.is_empty());
    let step = negotiation.option(code::EXPORT_NAME, b"b", &Disks, &mut out);
    assert!(matches!(step, Step::Start(session) if session.export.name == "b"));
    assert_eq!(out.len(), 8 + 2 + 124);
}

#[test]
fn choosing_an_unknown_export_by_name_ends_the_session() {
    let (replies, step) = ask(&mut fixed(), code::EXPORT_NAME, b"zz");
    assert!(replies.is_empty() && matches!(step, Step::Close));
}

#[test]
fn list_names_all_exports_with_their_descriptions() {
    let (replies, _) = ask(&mut fixed(), code::LIST, &[]);
    let expected = [
        (rep::SERVER, [&[0, 0, 0, 1, b'a'], &b"first"[..]].concat()),
        (rep::SERVER, vec![0, 0, 0, 1, b'b']),
        (rep::ACK, vec![]),
    ];
    assert_eq!(replies, expected);
    assert_eq!(kinds(&mut fixed(), code::LIST, &[1]), [rep::ERR_INVALID]);
}

#[test]
fn go_tells_what_was_asked_and_starts_while_info_does_not() {
    let data = go_data("a", &[info::NAME]);
    let (told, step) = ask(&mut fixed(), code::INFO, &data);
    assert!(matches!(step, Step::Continue));
    let mut negotiation = fixed();
    let (replies, step) = ask(&mut negotiation, code::GO, &data);
    assert_eq!(told, replies);
    assert!(matches!(step, Step::Start(session) if session.mode == Mode::Simple));
    let flags = flag::HAS_FLAGS
        | flag::READ_ONLY
        | flag::SEND_FLUSH
        | flag::SEND_FUA
        | flag::SEND_CACHE
        | flag::CAN_MULTI_CONN;
    let export = [&[0, 0][..], &12345u64.to_be_bytes(), &flags.to_be_bytes()].concat();
    assert_eq!(replies[0], (rep::INFO, b"\0\x01a".to_vec()));
    assert_eq!(replies[1], (rep::INFO, b"\0\x02first".to_vec()));
    assert_eq!(replies[2], (rep::INFO, b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0".to_vec()));
    assert_eq!(replies[3], (rep::INFO, export));
    assert_eq!(replies[4], (rep::ACK, vec![]));
}

#[test]
fn go_to_an_unknown_export_or_with_bad_data_fails_and_the_session_goes_on() {
    let mut negotiation = fixed();
    let (replies, step) = ask(&mut negotiation, code::GO, &go_data("zz", &[]));
    assert_eq!(replies, [(rep::ERR_UNKNOWN, b"export 'zz' not present".to_vec())]);
    assert!(matches!(step, Step::Continue));
    assert_eq!(kinds(&mut negotiation, code::GO, &[0, 0, 0, 9]), [rep::ERR_INVALID]);
}

#[test]
fn modes_are_negotiated_once_and_upwards() {
    let mut negotiation = fixed();
    assert_eq!(kinds(&mut negotiation, code::STRUCTURED_REPLY, &[]), [rep::ACK]);
    assert_eq!(kinds(&mut negotiation, code::STRUCTURED_REPLY, &[]), [rep::ERR_INVALID]);
    assert_eq!(kinds(&mut negotiation, code::EXTENDED_HEADERS, &[]), [rep::ACK]);
    assert_eq!(kinds(&mut negotiation, code::STRUCTURED_REPLY, &[]), [rep::ERR_EXT_HEADER_REQD]);
    assert_eq!(kinds(&mut negotiation, code::EXTENDED_HEADERS, &[0]), [rep::ERR_INVALID]);
    let (_, step) = ask(&mut negotiation, code::GO, &go_data("b", &[]));
    assert!(matches!(step, Step::Start(session) if session.mode == Mode::Extended));
}

#[test]
fn contexts_need_structured_replies_and_belong_to_the_export_they_were_set_for() {
    let mut negotiation = fixed();
    let data = context_data("a", &["base:allocation", "qemu:dirty-bitmap:y", "x:y"]);
    assert_eq!(kinds(&mut negotiation, code::SET_META_CONTEXT, &data), [rep::ERR_INVALID]);
    assert_eq!(kinds(&mut negotiation, code::STRUCTURED_REPLY, &[]), [rep::ACK]);
    for (chosen, contexts) in [("b", vec![]), ("a", vec![0, 2])] {
        let (replies, _) = ask(&mut negotiation, code::SET_META_CONTEXT, &data);
        let expected = [
            (rep::META_CONTEXT, b"\0\0\0\0base:allocation".to_vec()),
            (rep::META_CONTEXT, b"\0\0\0\x02qemu:dirty-bitmap:y".to_vec()),
            (rep::ACK, vec![]),
        ];
        assert_eq!(replies, expected);
        let (_, step) = ask(&mut negotiation, code::GO, &go_data(chosen, &[]));
        assert!(matches!(step, Step::Start(session) if session.contexts == contexts));
    }
}

#[test]
fn contexts_of_an_export_that_made_way_for_another_of_its_name_are_not_those_of_the_other() {
    for (query, contexts) in [(BITMAP, vec![]), ("qemu:dirty-bitmap:x", vec![1])] {
        let mut negotiation = fixed();
        assert_eq!(kinds(&mut negotiation, code::STRUCTURED_REPLY, &[]), [rep::ACK]);
        let data = context_data("a", &["base:allocation", query]);
        let set = kinds(&mut negotiation, code::SET_META_CONTEXT, &data);
        assert_eq!(set, [rep::META_CONTEXT, rep::META_CONTEXT, rep::ACK]);
        let mut out = Vec::new();
        let step = negotiation.option(code::GO, &go_data("a", &[]), &Later, &mut out);
        let Step::Start(session) = step else { panic!("it did not start") };
        let expected = if contexts.is_empty() { vec![] } else { [vec![0], contexts].concat() };
        assert_eq!(session.contexts, expected, "{query}");
    }
}

#[test]
fn listing_contexts_takes_wildcards_and_setting_does_not() {
    let mut negotiation = fixed();
    kinds(&mut negotiation, code::STRUCTURED_REPLY, &[]);
    for (queries, found) in
        [(&[][..], 3), (&["qemu:"], 2), (&["base:", "qemu:dirty-bitmap:x"], 2), (&["base:x"], 0)]
    {
        let kinds = kinds(&mut negotiation, code::LIST_META_CONTEXT, &context_data("b", queries));
        assert_eq!(kinds.len(), found + 1, "{queries:?}");
    }
    let set = kinds(&mut negotiation, code::SET_META_CONTEXT, &context_data("b", &["qemu:"]));
    assert_eq!(set, [rep::ACK]);
    let unknown = kinds(&mut negotiation, code::LIST_META_CONTEXT, &context_data("zz", &[]));
    assert_eq!(unknown, [rep::ERR_UNKNOWN]);
}

#[test]
fn tls_is_refused_abort_is_acknowledged_and_unknown_options_are_named() {
    let (replies, step) = ask(&mut fixed(), code::STARTTLS, &[]);
    assert_eq!(replies, [(rep::ERR_POLICY, b"TLS not configured".to_vec())]);
    assert!(matches!(step, Step::Continue));
    let (replies, step) = ask(&mut fixed(), code::ABORT, &[]);
    assert!(replies[0].0 == rep::ACK && matches!(step, Step::Close));
    assert_eq!(kinds(&mut fixed(), 99, &[]), [rep::ERR_UNSUP]);
}
