//! `--machine help` and the like: what an option takes.

use clap::CommandFactory;

use super::{Cli, MachineArgs};

/// The help of the first option whose value asks for it: it is `help`, or ends with `,help`.
pub fn asked(args: &MachineArgs) -> Option<String> {
    let one = |value: &Option<String>| value.iter().cloned().collect::<Vec<_>>();
    let values = [
        ("machine", vec![args.machine.clone()]),
        ("accel", one(&args.accel)),
        ("cpu", one(&args.cpu)),
        ("smp", one(&args.smp)),
        ("blockdev", args.blockdev.clone()),
        ("nbd-server", one(&args.nbd_server)),
        ("export", args.export.clone()),
        ("device", args.device.clone()),
        ("qmp", args.qmp.clone()),
        ("serial", one(&args.serial)),
    ];
    let asks = |value: &String| value == "help" || value.ends_with(",help");
    let (name, _) = values.iter().find(|(_, values)| values.iter().any(asks))?;
    let command = Cli::command();
    let option = command.get_arguments().find(|arg| arg.get_long() == Some(name))?;
    let value = option.get_value_names()?.first()?;
    Some(format!("--{name} {value}\n  {}", option.get_help()?))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn of(args: &[&str]) -> Option<String> {
        let all = std::iter::once(&"tardigrade").chain(args);
        asked(&Cli::try_parse_from(all).unwrap().machine)
    }

    #[test]
    fn an_option_that_is_asked_tells_what_it_takes() {
        let text = of(&["--nbd-server", "help"]).unwrap();
        assert!(text.starts_with("--nbd-server OPTIONS\n  NBD server: addr.type=unix"), "{text}");
        let text = of(&["--kernel", "k", "--device", "virtio-blk-device,help"]).unwrap();
        assert!(text.contains("rerror=R"), "{text}");
        for option in ["machine", "accel", "cpu", "smp", "blockdev", "export", "qmp", "serial"] {
            let text = of(&[&format!("--{option}"), "help"]).unwrap();
            assert!(text.starts_with(&format!("--{option} ")), "{text}");
        }
    }

    #[test]
    fn names_and_files_called_help_are_no_question() {
        assert_eq!(of(&["--kernel", "help", "--name", "help", "--append", "help"]), None);
        assert_eq!(of(&["--serial", "file:help"]), None);
    }
}
