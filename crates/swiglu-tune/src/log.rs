//! What goes to stdout, results, and to stderr: lines to read, or one JSON object a line and nothing between.

use anyhow::{Context, Result};
use clap::ValueEnum;
use std::fmt::Display;
use std::io::{IsTerminal, Write};
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
    // A line that cannot be written is lost: telling so would go the same way, and panic.
    let log = log.log_internal_errors(false);
    // On a terminal colours are as NO_COLOR has them, which the log reads itself.
    let log = if std::io::stderr().is_terminal() { log } else { log.with_ansi(false) };
    match FORMAT.get_or_init(|| format) {
        LogFormat::Text => log.without_time().init(),
        LogFormat::Json => log.json().init(),
    }
}

fn is_json() -> bool {
    FORMAT.get() == Some(&LogFormat::Json)
}

/// Prints a result as it stands, whose line's end is its own.
pub(crate) fn emit(result: impl Display) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    let written = write!(stdout, "{result}").and_then(|()| stdout.flush());
    written.context("standard output cannot be written")
}

/// Tells the user something.
pub(crate) fn notice(message: impl Display) {
    if is_json() {
        tracing::info!(target: "notice", "{message}");
    } else {
        tell(message);
    }
}

/// A line on stderr; lost where that cannot be written, which there is no other place to say.
fn tell(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Tells why the command failed.
pub(crate) fn failure(error: &anyhow::Error) {
    if is_json() {
        tracing::error!("{error:#}");
    } else {
        tell(format_args!("error: {error:#}"));
    }
}
