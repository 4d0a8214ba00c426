//! What the tuner and its workers say to each other: one JSON object a line.

use crate::race::{Conditions, Failure};
use serde::{Deserialize, Serialize};
use swiglu_db::Device;
use swiglu_kernels::{Config, Problem};

/// What a worker is asked. It answers each request with one [`Reply`], after any number of [`Reply::Alive`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// Make the candidates of one problem ready to race.
    Open {
        problem: Problem,
        configs: Vec<Config>,
        /// Those that are timed however slow they are.
        pinned: Vec<Config>,
    },
    /// Run a config once and hold it to the oracle.
    Verify(Config),
    /// Run a config for a while.
    Settle(Config),
    /// One sample of each.
    Sample(Vec<Config>),
    /// One sample of a config alone, for long.
    Sustain(Config),
    /// Compile into the cache, for a worker that will need it.
    Compile { problem: Problem, configs: Vec<Config> },
}

/// What a worker answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    /// Its first words.
    Ready(Facts),
    /// It is still at work.
    Alive,
    /// The problem is open; registers a thread of each config that compiled.
    Opened(Vec<(Config, u32)>),
    /// The problem cannot be opened, by no fault of a candidate.
    Refused(Failure),
    /// The error against the oracle.
    Verified(Result<f64, Failure>),
    /// It has run.
    Settled,
    /// The times, in microseconds.
    Sampled { times: Vec<Result<f64, Failure>>, conditions: Conditions },
    /// What did not compile.
    Compiled(Vec<(Config, Failure)>),
    /// The device no longer works in this process, which ends.
    Lost(Failure),
}

/// What a worker works on, and with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Facts {
    pub(crate) device: Device,
    /// Empty on the CPU, as is the driver.
    pub(crate) nvrtc: String,
    pub(crate) driver: String,
    /// Why the library's configs cannot be raced here, if they cannot.
    pub(crate) no_library: Option<String>,
}
