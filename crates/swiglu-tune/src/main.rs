//! `swiglu-tune`: tunes SwiGLU kernels for the machine it runs on.

mod arena;
mod bench;
mod bench_steps;
mod cli;
mod compile;
mod cpu_subject;
mod crew;
mod db;
mod device_memory;
mod doctor;
mod fault;
mod gpu_subject;
mod inspect;
mod log;
mod metrics;
mod protocol;
mod race;
mod records;
mod regret;
mod remote;
mod report;
mod search;
mod share;
mod space;
mod stop;
mod telemetry;
mod tensorboard;
mod tune;
mod why;
mod worker;
mod workload;

use std::process::ExitCode;

fn main() -> ExitCode {
    let (cli, misplaced) = cli::parse();
    if cli.prints_answers() {
        // `swiglu-tune report | head` ends quietly, as other commands do. Who writes to another process must outlive it.
        sigpipe::reset();
    }
    log::start(cli.log, cli.verbose);
    match cli::run(&cli, misplaced.as_deref()) {
        Ok(code) => code,
        Err(error) => {
            log::failure(&error);
            ExitCode::FAILURE
        }
    }
}
