//! The handshake as a state machine: bytes of an option in, bytes of its replies out.
//!
//! ```text
//! greeting ──> client flags ──> option ──┬──> option ...
//!                                        ├──> transmission (EXPORT_NAME, GO)
//!                                        └──> end (ABORT, what breaks the protocol)
//! ```

use super::wire::option::{ContextRequest, InfoRequest, code, info, rep, reply};
use super::wire::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, MAX_PAYLOAD, MAX_STRING, Mode, flag, len32,
};

/// Preferred size of requests in bytes, as QEMU tells for images in files.
const PREFERRED_BLOCK: u32 = 4096;

/// The context that tells data, holes and zeroes.
pub(crate) const BASE_ALLOCATION: &str = "base:allocation";
/// The context that tells how deep in the backing chain data is.
pub(crate) const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// Start of the names of contexts that are dirty bitmaps.
pub(crate) const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// What a client may learn of an export before it uses it.
pub trait Offered {
    /// The name clients ask for.
    fn name(&self) -> &str;
    /// A text for people.
    fn description(&self) -> Option<&str>;
    /// Size in bytes at this moment.
    fn size(&self) -> u64;
    /// Whether writes are refused.
    fn read_only(&self) -> bool;
    /// Whether several connections at once see one disk.
    fn multi_conn(&self) -> bool;
    /// Names of the contexts of block status; a context's id is its index.
    fn contexts(&self) -> Vec<String>;
}

/// The exports of a server.
pub trait Exports {
    /// One of them.
    type Export: Offered;
    /// All of them.
    fn list(&self) -> Vec<Self::Export>;
    /// The one of that name.
    fn find(&self, name: &[u8]) -> Option<Self::Export>;
}

/// What an export and a client agreed on.
#[derive(Debug)]
pub struct Session<E> {
    /// The export chosen.
    pub export: E,
    /// How replies look.
    pub mode: Mode,
    /// Ids of the contexts that block status is told of, ascending.
    pub contexts: Vec<u32>,
}

/// What comes after an option.
#[derive(Debug)]
pub enum Step<E> {
    /// Another option.
    Continue,
    /// Transmission, once the replies are sent.
    Start(Session<E>),
    /// The end, once the replies are sent.
    Close,
}

/// A handshake under way.
#[derive(Debug, Default)]
pub struct Negotiation {
    fixed: bool,
    no_zeroes: bool,
    mode: Mode,
    contexts: Option<Chosen>,
}

/// The contexts that were set for an export: its name, and their ids and names.
#[derive(Debug)]
struct Chosen {
    export: Vec<u8>,
    contexts: Vec<(u32, String)>,
}

impl Negotiation {
    /// Takes the client's flags; says whether the session can go on.
    pub fn client_flags(&mut self, flags: u32) -> bool {
        let (fixed, no_zeroes) = (u32::from(FLAG_FIXED_NEWSTYLE), u32::from(FLAG_NO_ZEROES));
        self.fixed = flags & fixed != 0;
        self.no_zeroes = flags & no_zeroes != 0;
        flags & !(fixed | no_zeroes) == 0
    }

    /// Handles one option; replies are appended to `out`.
    pub fn option<X: Exports>(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &X,
        out: &mut Vec<u8>,
    ) -> Step<X::Export> {
        if option == code::EXPORT_NAME {
            return self.export_name(data, exports, out);
        }
        if !self.fixed {
            // "Newstyle negotiation": such a client understands no reply.
            return Step::Close;
        }
        let mut answer = Answer { option, out };
        match option {
            code::ABORT => {
                answer.ack();
                return Step::Close;
            }
            code::INFO | code::GO => return self.info(data, exports, &mut answer),
            code::LIST_META_CONTEXT | code::SET_META_CONTEXT => {
                self.meta_context(data, exports, &mut answer);
            }
            code::LIST | code::STARTTLS | code::STRUCTURED_REPLY | code::EXTENDED_HEADERS
                if !data.is_empty() =>
            {
                answer.fail(rep::ERR_INVALID, "the option has unexpected data");
            }
            code::LIST => list(exports, &mut answer),
            code::STARTTLS => answer.fail(rep::ERR_POLICY, "TLS not configured"),
            code::STRUCTURED_REPLY => self.raise_mode(Mode::Structured, &mut answer),
            code::EXTENDED_HEADERS => self.raise_mode(Mode::Extended, &mut answer),
            _ => answer.fail(rep::ERR_UNSUP, &format!("Unsupported option {option}")),
        }
        Step::Continue
    }

    /// Answers an option whose data is too long to be looked at.
    pub(crate) fn too_big(&self, option: u32, out: &mut Vec<u8>) -> bool {
        if self.fixed && option != code::EXPORT_NAME {
            Answer { option, out }.fail(rep::ERR_TOO_BIG, "the option's data is too long");
            return true;
        }
        false
    }

    fn export_name<X: Exports>(
        &mut self,
        name: &[u8],
        exports: &X,
        out: &mut Vec<u8>,
    ) -> Step<X::Export> {
        let Some(export) = exports.find(name) else {
            return Step::Close;
        };
        out.extend_from_slice(&export.size().to_be_bytes());
        out.extend_from_slice(&self.flags(&export).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        self.start(name, export)
    }

    fn start<E: Offered>(&mut self, name: &[u8], export: E) -> Step<E> {
        let contexts = match self.contexts.take() {
            Some(chosen) if chosen.export == name => {
                still_there(chosen.contexts, &export.contexts())
            }
            _ => Vec::new(),
        };
        Step::Start(Session { export, mode: self.mode, contexts })
    }

    fn flags(&self, export: &impl Offered) -> u16 {
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE;
        if export.read_only() {
            flags |= flag::READ_ONLY;
        } else {
            flags |= flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        }
        if export.multi_conn() {
            flags |= flag::CAN_MULTI_CONN;
        }
        if self.mode >= Mode::Structured {
            flags |= flag::SEND_DF;
        }
        flags
    }

    fn info<X: Exports>(
        &mut self,
        data: &[u8],
        exports: &X,
        answer: &mut Answer<'_>,
    ) -> Step<X::Export> {
        let Some(request) = InfoRequest::decode(data) else {
            answer.fail(rep::ERR_INVALID, "lengths do not fit the option's data");
            return Step::Continue;
        };
        let Some(export) = exports.find(request.name) else {
            answer.not_present(request.name);
            return Step::Continue;
        };
        if request.wants(info::NAME) {
            answer.info(info::NAME, &[export.name().as_bytes()]);
        }
        if let Some(text) = export.description() {
            answer.info(info::DESCRIPTION, &[text.as_bytes()]);
        }
        let sizes = [1, PREFERRED_BLOCK, MAX_PAYLOAD].map(u32::to_be_bytes);
        answer.info(info::BLOCK_SIZE, &sizes.each_ref().map(|size| &size[..]));
        let flags = self.flags(&export);
        answer.info(info::EXPORT, &[&export.size().to_be_bytes(), &flags.to_be_bytes()]);
        answer.ack();
        if answer.option == code::GO {
            return self.start(request.name, export);
        }
        Step::Continue
    }

    fn raise_mode(&mut self, mode: Mode, answer: &mut Answer<'_>) {
        if self.mode == Mode::Extended && mode == Mode::Structured {
            answer.fail(rep::ERR_EXT_HEADER_REQD, "extended headers were negotiated already");
        } else if self.mode == mode {
            answer.fail(rep::ERR_INVALID, "the option was negotiated already");
        } else {
            self.mode = mode;
            answer.ack();
        }
    }

    fn meta_context<X: Exports>(&mut self, data: &[u8], exports: &X, answer: &mut Answer<'_>) {
        let set = answer.option == code::SET_META_CONTEXT;
        if set {
            // Replaced "including when this command fails".
            self.contexts = None;
        }
        if self.mode == Mode::Simple {
            return answer.fail(rep::ERR_INVALID, "structured replies were not negotiated");
        }
        let Some(request) = ContextRequest::decode(data) else {
            return answer.fail(rep::ERR_INVALID, "lengths do not fit the option's data");
        };
        let Some(export) = exports.find(request.name) else {
            return answer.not_present(request.name);
        };
        let all = !set && request.queries.is_empty();
        let mut chosen = Vec::new();
        for (id, name) in (0..).zip(export.contexts()) {
            if all || request.queries.iter().any(|query| matches(query, &name, !set)) {
                let told: u32 = if set { id } else { 0 };
                answer.reply(rep::META_CONTEXT, &[&told.to_be_bytes(), name.as_bytes()]);
                chosen.push((id, name));
            }
        }
        if set {
            self.contexts = Some(Chosen { export: request.name.to_vec(), contexts: chosen });
        }
        answer.ack();
    }
}

/// The ids of chosen contexts, if the export has all of them: another may be there by its name since they were
/// chosen, and its contexts are not to pass for those. Without contexts block status is refused.
fn still_there(chosen: Vec<(u32, String)>, now: &[String]) -> Vec<u32> {
    let has = |(id, name): &(u32, String)| {
        usize::try_from(*id).ok().and_then(|id| now.get(id)) == Some(name)
    };
    if chosen.iter().all(has) {
        return chosen.into_iter().map(|(id, _)| id).collect();
    }
    Vec::new()
}

/// Whether a query means a context: its name, or when listing the start of it up to a colon.
fn matches(query: &[u8], name: &str, listing: bool) -> bool {
    let name = name.as_bytes();
    query == name || (listing && query.ends_with(b":") && name.starts_with(query))
}

fn list<X: Exports>(exports: &X, answer: &mut Answer<'_>) {
    for export in exports.list() {
        let name = export.name().as_bytes();
        let text = export.description().unwrap_or_default().as_bytes();
        answer.reply(rep::SERVER, &[&len32(name.len()).to_be_bytes(), name, text]);
    }
    answer.ack();
}

/// Replies to one option.
struct Answer<'a> {
    option: u32,
    out: &'a mut Vec<u8>,
}

impl Answer<'_> {
    fn reply(&mut self, kind: u32, parts: &[&[u8]]) {
        reply(self.out, self.option, kind, parts);
    }

    fn ack(&mut self) {
        self.reply(rep::ACK, &[]);
    }

    fn fail(&mut self, kind: u32, message: &str) {
        self.reply(kind, &[message.as_bytes()]);
    }

    fn not_present(&mut self, name: &[u8]) {
        let name = String::from_utf8_lossy(&name[..name.len().min(MAX_STRING / 8)]);
        self.fail(rep::ERR_UNKNOWN, &format!("export '{name}' not present"));
    }

    fn info(&mut self, kind: u16, parts: &[&[u8]]) {
        let kind = kind.to_be_bytes();
        let mut all: Vec<&[u8]> = vec![&kind];
        all.extend_from_slice(parts);
        self.reply(rep::INFO, &all);
    }
}

#[cfg(test)]
mod tests;
