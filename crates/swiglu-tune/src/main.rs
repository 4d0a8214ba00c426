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
mod why;
mod workload;

use clap::Parser;
use cli::LogFormat;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let level = if cli.verbose { "info" } else { "warn" };
    let filter = tracing_subscriber::EnvFilter::builder().parse_lossy(format!("{level},sled=error"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match cli.log {
        LogFormat::Text => log.without_time().init(),
        LogFormat::Json => log.json().init(),
    }
    match cli::run(&cli) {
        Ok(code) => code,
        Err(error) => {
            match cli.log {
                LogFormat::Text => eprintln!("error: {error:#}"),
                LogFormat::Json => tracing::error!("{error:#}"),
            }
            ExitCode::FAILURE
        }
    }
}
