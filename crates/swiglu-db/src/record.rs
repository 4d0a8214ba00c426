//! What one measurement of one config says.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use swiglu_kernels::families::Target;
use swiglu_kernels::{Config, Problem, arch};

/// The device a record holds for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Device {
    /// What decides speed, in one word: `sm_90a-sm132-l2_60m-smem227k-bus6144` or `cpu-<model>-<threads>`.
    /// This is the key; two devices of one class share results.
    pub class: String,
    /// The product's name: a label, never a key.
    pub name: String,
}

impl Device {
    /// What its class says kernels are legal for; `None` for a class this version does not know.
    pub fn target(&self) -> Option<Target> {
        let (first, rest) = self.class.split_once('-')?;
        if first == "cpu" {
            return Some(Target::Cpu { threads: rest.rsplit('-').next()?.parse().ok()? });
        }
        arch::by_name(first).ok().map(Target::Gpu)
    }
}

/// What a tuned config is stored under.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TuningKey {
    /// Class of the device.
    pub device_class: String,
    /// The problem, M included.
    pub problem: Problem,
}

/// `class|op|activation|dtype|weight_major|a16|n0000014336|k0000004096|m0000002048`: sorts by its parts,
/// so that all M of one (N, K) are neighbours and in order.
impl fmt::Display for TuningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:010}", self.shape_prefix(), self.problem.m)
    }
}

impl TuningKey {
    /// What the keys of all M of one (N, K) begin with.
    pub fn shape_prefix(&self) -> String {
        let Problem { alignment, n, k, .. } = self.problem;
        format!("{}a{alignment:02}|n{n:010}|k{k:010}|m", self.kind_prefix())
    }

    /// What the keys of all sizes begin with.
    pub(crate) fn kind_prefix(&self) -> String {
        let Problem { op, activation, dtype, weight_major, alignment: _, n: _, k: _, m: _ } = self.problem;
        format!("{}|{op}|{activation}|{dtype}|{weight_major}|", self.device_class)
    }
}

/// A text that is no [`TuningKey`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no tuning key")]
pub struct InvalidKey(pub String);

impl FromStr for TuningKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        parse_key(text).ok_or_else(|| InvalidKey(text.into()))
    }
}

fn parse_key(text: &str) -> Option<TuningKey> {
    let mut parts = text.split('|');
    let mut part = || parts.next();
    let key = TuningKey {
        device_class: part()?.into(),
        problem: Problem {
            op: part()?.parse().ok()?,
            activation: part()?.parse().ok()?,
            dtype: part()?.parse().ok()?,
            weight_major: part()?.parse().ok()?,
            alignment: part()?.strip_prefix('a')?.parse().ok()?,
            n: part()?.strip_prefix('n')?.parse().ok()?,
            k: part()?.strip_prefix('k')?.parse().ok()?,
            m: part()?.strip_prefix('m')?.parse().ok()?,
        },
    };
    part().is_none().then_some(key)
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

/// Where a record was before it came into its database.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// It was measured into it.
    #[default]
    Local,
    /// In an exported table of this name.
    Import(String),
    /// In another database's folder of this name.
    Merge(String),
}

impl Origin {
    fn is_local(&self) -> bool {
        *self == Self::Local
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.pad("measured here"),
            Self::Import(name) => write!(f, "imported from {name}"),
            Self::Merge(name) => write!(f, "merged from {name}"),
        }
    }
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
    /// Where it comes from.
    #[serde(default, skip_serializing_if = "Origin::is_local")]
    pub origin: Origin,
}

/// A record that no file could give back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[error("cannot store the record of {key}: {reason}")]
pub struct InvalidRecord {
    /// Key of the record.
    pub key: String,
    /// What is wrong with it.
    pub reason: String,
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

    /// One line of JSON: the only encoding that journal, index and snapshot use.
    pub(crate) fn to_json(&self) -> Result<String, InvalidRecord> {
        self.check()?;
        serde_json::to_string(self).map_err(|error| self.invalid(error.to_string()))
    }

    /// Whether a file could give the record back.
    pub(crate) fn check(&self) -> Result<(), InvalidRecord> {
        let class = &self.device.class;
        if class.is_empty() || class.contains(|c: char| c == '|' || c.is_control()) {
            return Err(self.invalid(format!("device class {class:?} is empty or holds `|` or a control character")));
        }
        // JSON has no NaN: it would be written as null and not be read again.
        if let Some(Measurement { median_us, p10_us, p90_us, samples: _, error }) = self.measurement()
            && ![median_us, p10_us, p90_us, error].into_iter().all(|number| number.is_finite())
        {
            return Err(self.invalid("a time or error is not a finite number".into()));
        }
        Ok(())
    }

    fn invalid(&self, reason: String) -> InvalidRecord {
        InvalidRecord { key: self.key().to_string(), reason }
    }

    /// Whether this record is to be trusted rather than `other`: a mismatch with the oracle before anything
    /// else, for it must not serve; then a measurement rather than a failure; then more samples; then the
    /// later date. Equals support neither.
    pub fn is_better_supported_than(&self, other: &Self) -> bool {
        self.support() > other.support()
    }

    fn support(&self) -> (u8, u32, &str) {
        let (rank, samples) = match &self.outcome {
            Outcome::Failed { stage, .. } if stage == "verify" => (2, 0),
            Outcome::Measured(measurement) => (1, measurement.samples),
            Outcome::Failed { .. } => (0, 0),
        };
        (rank, samples, &self.environment.date)
    }
}

/// The record that serves each key, in the order of the keys: of one origin the fastest, since only times of
/// one machine compare; between origins the better supported of those, and what was measured here when equal.
/// Equal medians: the first config in order.
pub fn winners(records: impl IntoIterator<Item = Record>) -> Vec<Record> {
    let mut fastest: BTreeMap<(String, Origin), (f64, Record)> = BTreeMap::new();
    for record in records {
        let Some(&Measurement { median_us, .. }) = record.measurement() else { continue };
        let group = (record.key().to_string(), record.origin.clone());
        let beaten = fastest.get(&group).is_some_and(|(best_us, best)| {
            best_us.total_cmp(&median_us).then_with(|| best.config.cmp(&record.config)).is_le()
        });
        if !beaten {
            fastest.insert(group, (median_us, record));
        }
    }
    let mut winners: BTreeMap<String, Record> = BTreeMap::new();
    // The origins of a key come in order, what was measured here first.
    for ((key, _), (_, record)) in fastest {
        if winners.get(&key).is_none_or(|winner| record.is_better_supported_than(winner)) {
            winners.insert(key, record);
        }
    }
    winners.into_values().collect()
}
