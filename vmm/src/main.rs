//! The `tardigrade` binary.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use signal_hook::consts::SIGXFSZ;
use tracing_subscriber::EnvFilter;
use vmm::cli::{self, Cli, Subcommand};

fn main() -> ExitCode {
    let cli = match Cli::try_parse_from(cli::doubled(std::env::args_os())) {
        Ok(cli) => cli,
        Err(asked) => {
            // Help and version come this way too. There is no one to tell if the terminal is gone.
            let _ = asked.print();
            return if asked.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let filter =
        EnvFilter::try_from_env("TARDIGRADE_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    // A write past the limit of file sizes (ulimit -f) is to fail, not to end all disks with it.
    if let Err(error) = signal_hook::flag::register(SIGXFSZ, Arc::default()) {
        tracing::warn!("a write past the limit of file sizes ends the process: {error}");
    }
    // A chain of backing files takes two descriptors an image. Without it, shorter ones work still.
    if let Err(error) = block::storage::raise_descriptor_limit() {
        tracing::warn!("the limit of open files stays as it is: {error}");
    }
    if let Some(Subcommand::Image(args)) = &cli.subcommand {
        // A check has more exit statuses than two.
        return vmm::image::run(&args.command);
    }
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tardigrade: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<(), Box<dyn std::error::Error>> {
    if let Some(text) = cli::help::asked(&cli.machine) {
        return Ok(writeln!(std::io::stdout(), "{text}")?);
    }
    match &cli.subcommand {
        None => Ok(vmm::run::run(&cli.machine)?),
        Some(subcommand) => Ok(vmm::client::run(subcommand)?),
    }
}
