//! `swiglu-tune`: tunes SwiGLU kernels for the machine it runs on.

mod bench;
mod cli;
mod compile;
mod cpu_subject;
mod db;
mod device_memory;
mod doctor;
mod gpu_subject;
mod inspect;
mod race;
mod records;
mod report;
mod tune;
mod workload;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let level = if cli.verbose { "info" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::builder().parse_lossy(format!("{level},sled=error"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    match cli::run(&cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
