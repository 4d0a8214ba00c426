//! What becomes of results and of the log where they cannot be written, and of colours.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod home;

use assert_cmd::Command;
use assert_cmd::assert::Assert;
use home::{Home, SHIPPED};
use predicates::prelude::*;
use predicates::str::contains;

/// Runs a line of shell in the home; `$TUNE` is the program.
fn shell(home: &Home, line: &str) -> Assert {
    let mut command = Command::new("sh");
    for (name, value) in home.command().get_envs() {
        command.env(name, value.unwrap());
    }
    command.args(["-c", line]).env("TUNE", home.command().get_program()).assert()
}

#[test]
fn results_that_cannot_be_written_are_an_error() {
    let home = Home::new();
    home.tune(&["db", "import", SHIPPED]).success();
    let page = home.path().join("page.html").display().to_string();
    let page = format!("report --html {page}");
    for command in [
        "report",
        "report --json",
        "report --csv",
        "report --markdown",
        &page,
        "doctor",
        "doctor --json",
        "list",
        "list --configs",
        "render",
    ] {
        shell(&home, &format!("exec \"$TUNE\" {command} >/dev/full"))
            .code(1)
            .stderr(contains("standard output cannot be written").and(contains("No space left on device")));
    }
}

#[test]
fn a_log_that_cannot_be_written_stops_nothing() {
    let home = Home::new();
    let shapes = home.shapes("[1]");
    for log in ["text", "json"] {
        shell(&home, &format!("exec \"$TUNE\" --log {log} report 2>/dev/full")).success();
        shell(&home, &format!("exec \"$TUNE\" --log {log} render --arch sm_1 2>/dev/full")).code(1);
        let tune = format!("exec \"$TUNE\" --log {log} --gpu cpu --retune --shapes {shapes} 2>/dev/full");
        shell(&home, &tune).success().stdout(contains("db"));
    }
    home.tune(&["report"]).success().stdout(contains("cpu"));
}

#[test]
fn a_terminal_has_colours_unless_no_color_is_set() {
    let home = Home::new();
    home.tune_cpu("[1]").success();
    home.write("db/snapshot.tsv", "garbage");
    // `script` runs it on a terminal of its own.
    let warn = "script -qec '\"$TUNE\" why --m 1 --n 48 --k 32' /dev/null";
    let colour = "\u{1b}[";
    shell(&home, &format!("unset NO_COLOR; {warn}")).stdout(contains("WARN").and(contains(colour)));
    shell(&home, &format!("NO_COLOR=1 {warn}")).stdout(contains("WARN").and(contains(colour).not()));
}
