//! The reference of commands, events and types for people: `docs/qmp-reference.md`.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::commands::features;
use super::{Branch, EVENTS, Member, OUT_OF_BAND, Type, commands};

const HEAD: &str = "\
# QMP reference

Made from the schema (`qmp/src/schema`); do not edit: `QMP_REFERENCE=write cargo test -p qmp --test reference` writes it anew.
Commands, arguments and members with `x-` are additions to QEMU's. *May be left out* is said of arguments that need not be given, and
of members that are not always told. [qmp.md](qmp.md) has the rules of the wire.
";

/// The page.
pub fn reference() -> String {
    let mut page = Page { text: HEAD.to_owned(), types: BTreeMap::new() };
    page.line("\n## Commands");
    let mut all: Vec<_> = commands().collect();
    all.sort_by_key(|info| info.name);
    for info in all {
        page.line(&format!("\n### {}\n\n{}", info.name, sentence(info.doc)));
        if OUT_OF_BAND.contains(&info.name) {
            page.line("May be run out of band (`exec-oob`).");
        }
        let features = features(info.name);
        if !features.is_empty() {
            page.line(&format!("\nFeatures: `{}`.", features.join("`, `")));
        }
        match &info.arguments_type {
            ty @ Type::Open(_) => {
                let name = page.name(ty);
                page.line(&format!("\nArguments: {name}."));
            }
            _ => page.members(info.arguments),
        }
        if !is_nothing(&info.returns) {
            let name = page.name(&info.returns);
            page.line(&format!("\nReturns {name}."));
        }
    }
    page.line("\n## Events");
    for info in EVENTS {
        page.line(&format!("\n### {}\n\n{}", info.name, sentence(info.doc)));
        page.members(info.data);
    }
    page.line("\n## Types");
    page.types();
    page.text
}

struct Page {
    text: String,
    /// Types that were named, and whether they were told.
    types: BTreeMap<&'static str, (Type, bool)>,
}

impl Page {
    fn line(&mut self, text: &str) {
        self.text.push_str(text);
        self.text.push('\n');
    }

    /// A type as it is named in the text.
    fn name(&mut self, ty: &Type) -> String {
        let name = match ty {
            Type::Str => return "string".to_owned(),
            Type::Int | Type::Uint | Type::Uint32 => return "integer".to_owned(),
            Type::Number => return "number".to_owned(),
            Type::Bool => return "boolean".to_owned(),
            Type::Any => return "any".to_owned(),
            Type::Null => return "null".to_owned(),
            Type::Array(element) => return format!("array of {}", self.name(element)),
            Type::Enum(info) => info.name,
            Type::Object(info) => info().name,
            Type::Union(info) => info.name,
            Type::Open(info) => info().name,
            Type::Alternate(info) => info.name,
        };
        self.types.entry(name).or_insert((*ty, false));
        format!("[{name}](#{})", name.to_lowercase())
    }

    fn members(&mut self, members: &[Member]) {
        if members.is_empty() {
            return;
        }
        self.line("\n| name | type | |\n|---|---|---|");
        self.rows(members);
    }

    fn rows(&mut self, members: &[Member]) {
        for member in members {
            let ty = self.name(&member.ty);
            let left_out = if member.optional { " *May be left out.*" } else { "" };
            let doc = sentence(member.doc);
            self.line(&format!("| `{}` | {ty} | {doc}{left_out} |", member.name));
        }
    }

    /// All types named so far, and those that they name.
    fn types(&mut self) {
        loop {
            let next = self.types.iter_mut().find(|(_, (_, told))| !told);
            let Some((name, (ty, told))) = next else { return };
            *told = true;
            let (name, ty) = (*name, *ty);
            let _ = writeln!(self.text, "\n### {name}\n");
            self.describe(&ty);
        }
    }

    fn describe(&mut self, ty: &Type) {
        match ty {
            Type::Enum(info) => {
                self.line(&sentence(info.doc));
                let values: Vec<String> =
                    info.values.iter().map(|value| format!("`{value}`")).collect();
                self.line(&format!("\nOne of {}.", values.join(", ")));
            }
            Type::Object(info) => {
                self.line(&sentence(info().doc));
                self.members(info().members);
            }
            Type::Union(info) => self.union(info.doc, info.tag, &[], info.branches),
            Type::Open(info) => {
                self.union(info().doc, info().tag, info().base, info().branches);
            }
            Type::Alternate(info) => {
                self.line(&sentence(info.doc));
                let choices: Vec<String> = info.choices.iter().map(|ty| self.name(ty)).collect();
                self.line(&format!("\nOne of: {}.", choices.join("; ")));
            }
            // They have no description of their own.
            Type::Str | Type::Int | Type::Uint | Type::Uint32 | Type::Number | Type::Bool => {}
            Type::Any | Type::Null | Type::Array(_) => {}
        }
    }

    fn union(&mut self, doc: &str, tag: &str, base: &[Member], branches: &[Branch]) {
        self.line(&sentence(doc));
        self.members(base);
        for branch in branches {
            self.line(&format!("\nWith `{tag}` `{}`:", branch.value));
            self.members(branch.members);
        }
    }
}

fn is_nothing(ty: &Type) -> bool {
    matches!(ty, Type::Object(info) if info().members.is_empty())
}

/// A doc comment in one line.
fn sentence(doc: &str) -> String {
    doc.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}
