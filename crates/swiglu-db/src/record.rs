//! What one measurement of one config says.

use serde::{Deserialize, Serialize};
use std::fmt;
use swiglu_kernels::{Config, Problem};

/// The device a record holds for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Device {
    /// What decides speed, in one word: `sm_90a-sm132-l2_60m-smem227k-bus6144` or `cpu-<model>-<threads>`.
    /// This is the key; two devices of one class share results.
    pub class: String,
    /// The product's name: a label, never a key.
    pub name: String,
}

/// What a tuned config is stored under.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TuningKey {
    /// Class of the device.
    pub device_class: String,
    /// The problem, M included.
    pub problem: Problem,
}

/// `class|op|activation|dtype|weight_major|aNN|nNNNNNNNN|kNNNNNNNN|mNNNNNNNN`: sorts by its parts, so
/// that all M of one (N, K) are neighbours and in order.
impl fmt::Display for TuningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problem { op, activation, dtype, weight_major, alignment, n, k, m } = self.problem;
        write!(
            f, "{}|{op}|{activation}|{dtype}|{weight_major}|a{alignment:02}|n{n:08}|k{k:08}|m{m:08}",
            self.device_class
        )
    }
}

/// Time of one launch, in microseconds, over all samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// Median.
    pub median_us: f64,
    /// 10th percentile.
    pub p10_us: f64,
    /// 90th percentile.
    pub p90_us: f64,
    /// Number of samples.
    pub samples: u32,
    /// `‖out − ref‖ / ‖ref‖` against the float64 oracle.
    pub error: f64,
}

/// What became of a candidate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// It matched the oracle and was timed.
    Measured(Measurement),
    /// It did not get that far.
    Failed {
        /// Where it failed: `compile`, `spill`, `launch` or `verify`.
        stage: String,
        /// What was reported.
        reason: String,
    },
}

/// What a measurement was made with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// NVRTC, e.g. `13.0`; empty on the CPU.
    pub nvrtc: String,
    /// Driver, e.g. `580.159.04`; empty on the CPU.
    pub driver: String,
    /// Version of this project.
    pub version: String,
    /// Digest of the rendered source; empty on the CPU.
    pub source_digest: String,
    /// Registers a thread; 0 on the CPU.
    pub registers: u32,
    /// UTC date and time, RFC 3339.
    pub date: String,
}

/// One candidate on one problem on one device: the unit that is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Where it was measured.
    pub device: Device,
    /// What was computed.
    pub problem: Problem,
    /// With which config.
    pub config: Config,
    /// What came out.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// With which tools.
    pub environment: Environment,
}

impl Record {
    /// The key this record answers.
    pub fn key(&self) -> TuningKey {
        TuningKey { device_class: self.device.class.clone(), problem: self.problem }
    }

    /// The measurement, if it got that far.
    pub fn measurement(&self) -> Option<&Measurement> {
        match &self.outcome {
            Outcome::Measured(measurement) => Some(measurement),
            Outcome::Failed { .. } => None,
        }
    }
}
