//! QEMU's users write long options with one dash, `-kernel`, which clap reads as a heap of short ones.

use std::ffi::OsString;

use clap::{Arg, Command, CommandFactory};

use super::Cli;

/// The arguments of the process with a second dash where there is one before the name of a long option.
/// Values are left alone, and so is what belongs to a subcommand.
pub fn doubled(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut command = Cli::command();
    // Adds --help and --version.
    command.build();
    let mut args = args.into_iter();
    let mut out: Vec<OsString> = args.by_ref().take(1).collect();
    while let Some(mut arg) = args.next() {
        let option = arg.to_str().and_then(|text| Known::find(&command, text));
        let Some(option) = option else {
            // A subcommand; or what clap will complain of.
            out.push(arg);
            break;
        };
        if option.lacks_dash {
            let mut both = OsString::from("-");
            both.push(arg);
            arg = both;
        }
        out.push(arg);
        if option.value_follows {
            out.extend(args.next());
        }
    }
    out.extend(args);
    out
}

/// An option that the program has, as it was written.
struct Known {
    lacks_dash: bool,
    value_follows: bool,
}

impl Known {
    fn find(command: &Command, text: &str) -> Option<Self> {
        let word = text.strip_prefix('-')?;
        let (dashed, word) = match word.strip_prefix('-') {
            Some(word) => (true, word),
            None => (false, word),
        };
        let (name, value) = match word.split_once('=') {
            Some((name, _)) => (name, true),
            None => (word, false),
        };
        let mut letters = name.chars();
        let single = letters.next().filter(|_| letters.next().is_none() && !dashed);
        let is = |arg: &&Arg| match single {
            Some(letter) => arg.get_short() == Some(letter),
            None => arg.get_long() == Some(name),
        };
        let arg = command.get_arguments().find(is)?;
        Some(Self {
            lacks_dash: !dashed && single.is_none(),
            value_follows: arg.get_action().takes_values() && !value,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(args: &[&str], wanted: &[&str]) {
        let with = |args: &[&str]| -> Vec<OsString> {
            std::iter::once("tardigrade").chain(args.iter().copied()).map(OsString::from).collect()
        };
        assert_eq!(doubled(with(args)), with(wanted), "{args:?}");
    }

    #[test]
    fn one_dash_is_enough_for_a_long_option() {
        check(&["-kernel", "k", "-smp=2"], &["--kernel", "k", "--smp=2"]);
        check(&["-no-reboot", "-incoming", "defer"], &["--no-reboot", "--incoming", "defer"]);
        check(&["-version"], &["--version"]);
        check(&["-help"], &["--help"]);
    }

    #[test]
    fn short_options_and_two_dashes_stay() {
        let args = ["-m", "64M", "-S", "--m", "1", "--name", "-kernel", "-h", "-V"];
        check(&args, &args);
    }

    #[test]
    fn values_stay_whatever_they_look_like() {
        check(&["-append", "-kernel", "-name", "-S"], &["--append", "-kernel", "--name", "-S"]);
        check(&["-append=-kernel", "-qmp", "stdio"], &["--append=-kernel", "--qmp", "stdio"]);
        check(&["-m", "-smp", "-smp", "1"], &["-m", "-smp", "--smp", "1"]);
    }

    #[test]
    fn what_follows_a_subcommand_or_an_unknown_option_stays() {
        check(&["snapshot", "list", "-qmp", "x"], &["snapshot", "list", "-qmp", "x"]);
        check(&["-drive", "file=x", "-kernel", "k"], &["-drive", "file=x", "-kernel", "k"]);
        check(&["--", "-kernel"], &["--", "-kernel"]);
        check(&["-"], &["-"]);
        check(&["-m64M", "-smp", "1"], &["-m64M", "-smp", "1"]);
    }
}
