//! What goes to stderr: lines to read, or one JSON object a line and nothing between.

use clap::ValueEnum;
use std::fmt::Display;
use std::io::IsTerminal;
use std::sync::OnceLock;
use tracing_subscriber::EnvFilter;

/// How the log is written to stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines to read.
    Text,
    /// One JSON object a line, messages and errors included.
    Json,
}

static FORMAT: OnceLock<LogFormat> = OnceLock::new();

/// Starts the log.
pub(crate) fn start(format: LogFormat, verbose: bool) {
    let level = if verbose { "info" } else { "warn" };
    let filter = EnvFilter::builder().parse_lossy(format!("{level},notice=info,sled=error"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let log = log.with_ansi(std::io::stderr().is_terminal());
    match FORMAT.get_or_init(|| format) {
        LogFormat::Text => log.without_time().init(),
        LogFormat::Json => log.json().init(),
    }
}

fn is_json() -> bool {
    FORMAT.get() == Some(&LogFormat::Json)
}

/// Tells the user something.
pub(crate) fn notice(message: impl Display) {
    if is_json() {
        tracing::info!(target: "notice", "{message}");
    } else {
        eprintln!("{message}");
    }
}

/// Tells why the command failed.
pub(crate) fn failure(error: &anyhow::Error) {
    if is_json() {
        tracing::error!("{error:#}");
    } else {
        eprintln!("error: {error:#}");
    }
}
