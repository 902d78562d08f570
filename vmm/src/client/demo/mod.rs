//! `tardigrade demo`: a guest that is frozen, changed, and taken back, before the user's eyes.

mod guest;

use std::io::{IsTerminal, stderr, stdin, stdout};
use std::path::{Path, PathBuf};
use std::time::Instant;

use qmp::client::Client;
use serde_json::json;

use super::Error;
use super::console;
use crate::cli::args::DemoArgs;
use guest::{Guest, GuestFiles};

/// The node of the demo's disk.
const DISK: &str = "disk0";
/// The demo's checkpoint.
const TAG: &str = "before-the-accident";
/// A file on the guest's disk.
const FILE: &str = "/mnt/notes";

/// Why the demo did not go through.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The guest's kernel or initramfs is not there.
    #[error("{} is missing: run the demo in the project's directory, or name the guest's with --guest", .0.display())]
    NoGuest(PathBuf),
    /// The directory for the demo's files cannot be made.
    #[error("cannot make a directory for the demo: {0}")]
    Directory(std::io::Error),
    /// A program could not be run.
    #[error("cannot run {program}: {reason}")]
    Program {
        /// Its name.
        program: &'static str,
        /// Why not, or what it said.
        reason: String,
    },
    /// The machine or the guest did something unexpected.
    #[error("{0}; the machine said: {1}")]
    Guest(String, String),
    /// The guest was not what it had been.
    #[error("the guest did not come back as it was: {0}")]
    Mismatch(String),
}

/// Runs the demo; on a terminal it ends with a shell in the guest.
pub(super) fn run(args: &DemoArgs) -> Result<(), Error> {
    let files = GuestFiles::find(&args.guest)?;
    let dir = DemoDir::create()?;
    let image = dir.0.join("disk.qcow2");
    say("Making a 1 GiB disk image with qemu-img ...");
    make_image(&image)?;

    say(
        "Booting Linux on it, with 2 vCPUs and 128 MiB of RAM (half a minute or more where KVM is slow) ...",
    );
    let mut guest = Guest::boot(&files, &dir.0, &image)?;
    let mut client = guest.qmp()?;
    done(&format!("booted in {:.1} s", guest.started.elapsed().as_secs_f64()));

    say("The guest makes an ext4 file system, writes a file, and keeps 4 MiB of RAM busy ...");
    for request in ["mkfs vda", "mount vda", &format!("write-text {FILE} all is well"), "dirty 4 1"]
    {
        guest.ask(request)?;
    }
    let before = observe(&mut guest)?;
    show(&before);

    say(&format!("Freezing the whole machine as '{TAG}': vCPUs, RAM, devices, disk ..."));
    job(&mut client, "snapshot-save", "frozen; the guest runs on")?;

    say("An accident: the file and the memory are overwritten ...");
    guest.ask(&format!("write-text {FILE} all is lost"))?;
    guest.ask("dirty 4 2")?;
    let after = observe(&mut guest)?;
    show(&after);
    if after.file == before.file || after.memory == before.memory {
        return Err(DemoError::Mismatch("the accident left no trace".to_owned()).into());
    }

    say("Back to the checkpoint, in the running machine ...");
    job(&mut client, "snapshot-load", "back")?;
    compare(&before, &observe(&mut guest)?)?;

    say("The machine is killed. A new process revives the checkpoint from the image alone ...");
    guest.kill()?;
    let mut guest = Guest::revive(&files, &dir.0, &image, TAG)?;
    compare(&before, &observe(&mut guest)?)?;
    done(&format!("revived in {:.2} s", guest.started.elapsed().as_secs_f64()));

    finish(guest, args.shell)?;
    say("What qemu-img says of the image:");
    print!("{}", guest::qemu_img(&["check", &image.display().to_string()])?);
    print!("{}", guest::qemu_img(&["snapshot", "-l", &image.display().to_string()])?);
    Ok(())
}

/// What the guest tells of itself.
#[derive(PartialEq, Eq)]
struct Observation {
    file: String,
    memory: String,
}

fn observe(guest: &mut Guest) -> Result<Observation, Error> {
    Ok(Observation {
        file: guest.ask(&format!("read-text {FILE}"))?,
        memory: guest.ask("check-memory")?,
    })
}

fn show(seen: &Observation) {
    println!("     {FILE}: {}", seen.file);
    println!("     memory: {}", seen.memory);
}

fn compare(before: &Observation, now: &Observation) -> Result<(), Error> {
    show(now);
    if before == now {
        return Ok(());
    }
    let text = format!("{} / {} became {} / {}", before.file, before.memory, now.file, now.memory);
    Err(DemoError::Mismatch(text).into())
}

fn job(client: &mut Client, command: &str, what: &str) -> Result<(), Error> {
    let started = Instant::now();
    let arguments = json!({ "job-id": "demo", "tag": TAG, "vmstate": DISK, "devices": [DISK] });
    client.run_job(command, arguments, guest::PATIENCE)?;
    done(&format!("{what}, after {:.0} ms", started.elapsed().as_secs_f64() * 1000.0));
    Ok(())
}

/// A shell for people; for others the guest is powered off at once.
fn finish(mut guest: Guest, shell: bool) -> Result<(), Error> {
    if shell && stdin().is_terminal() && stdout().is_terminal() {
        say("A shell in the guest. 'exit' or Ctrl-] ends the demo; from another terminal, try:");
        let program = std::env::args().next().unwrap_or_else(|| "tardigrade".to_owned());
        let socket = guest.qmp_path().display().to_string();
        println!("     {program} snapshot save --qmp {socket} mine");
        println!("     {program} snapshot load --qmp {socket} mine\n");
        let (stream, ended) = guest.open_shell()?;
        return console::attach_until(stream, Some(&ended))
            .map_err(|source| Error::Console { path: socket, source });
    }
    guest.ask("poweroff")?;
    guest.wait()
}

fn make_image(path: &Path) -> Result<(), Error> {
    guest::qemu_img(&["create", "-q", "-f", "qcow2", &path.display().to_string(), "1G"])?;
    Ok(())
}

fn say(text: &str) {
    let (bold, plain) = if stdout().is_terminal() { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
    println!("{bold}==> {text}{plain}");
}

fn done(text: &str) {
    println!("     {text}");
}

/// The demo's files; gone when it ends.
struct DemoDir(PathBuf);

impl DemoDir {
    fn create() -> Result<Self, Error> {
        let path = std::env::temp_dir().join(format!("tardigrade-demo-{}", std::process::id()));
        std::fs::create_dir(&path).map_err(DemoError::Directory)?;
        Ok(Self(path))
    }
}

impl Drop for DemoDir {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            let _ = std::io::Write::write_fmt(
                &mut stderr(),
                format_args!("cannot remove {}: {error}\n", self.0.display()),
            );
        }
    }
}
