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
            alignment: number::<2>(part()?.strip_prefix('a')?)?,
            n: number::<10>(part()?.strip_prefix('n')?)?,
            k: number::<10>(part()?.strip_prefix('k')?)?,
            m: number::<10>(part()?.strip_prefix('m')?)?,
        },
    };
    part().is_none().then_some(key)
}

/// A number of so many digits: no key has two texts.
fn number<const DIGITS: usize>(text: &str) -> Option<u32> {
    let is_written_so = text.len() == DIGITS && text.bytes().all(|byte| byte.is_ascii_digit());
    is_written_so.then(|| text.parse().ok()).flatten()
}

/// Time of one launch, in microseconds, over all samples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
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
    /// 95 % confidence interval of the median, by order statistics; of those that were in the last round.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval_us: Option<[f64; 2]>,
    /// Passes of its race that were taken again because the device had slowed itself down.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub repeated: u32,
    /// Whether its race chose it among those that were as fast.
    #[serde(default, skip_serializing_if = "is_false")]
    pub chosen: bool,
    /// Of a library: the best kernel of ours in its race, for where the library is missing or declines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stand_in: Option<Config>,
}

/// Medians closer than this are one, however narrow their intervals: what two runs on one machine differ by at least.
pub const NOISE: f64 = 0.005;

/// What one race is not sure of is no reason to take what looks slower by more than this.
const FAR: f64 = 0.02;

impl Measurement {
    /// Whether the two cannot be told apart: their intervals, at least [`NOISE`] wide, meet. Without an interval only
    /// equal medians tie.
    pub fn ties_with(&self, other: &Self) -> bool {
        match (self.interval(), other.interval()) {
            (Some([low, high]), Some([their_low, their_high])) => low <= their_high && their_low <= high,
            _ => self.median_us == other.median_us,
        }
    }

    /// Its times and its error, by name.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = (&'static str, f64)> + use<> {
        self.times().chain([("measurement.error", self.error)])
    }

    /// Its times, by name.
    pub(crate) fn times(&self) -> impl Iterator<Item = (&'static str, f64)> + use<> {
        let &Self { median_us, p10_us, p90_us, interval_us, .. } = self;
        let quantiles =
            [("measurement.p10_us", p10_us), ("measurement.median_us", median_us), ("measurement.p90_us", p90_us)];
        let bounds = interval_us.into_iter().flatten().map(|bound| ("measurement.interval_us", bound));
        quantiles.into_iter().chain(bounds)
    }

    fn interval(&self) -> Option<[f64; 2]> {
        let margin = self.median_us * NOISE / 2.0;
        let [low, high] = self.interval_us?;
        Some([low.min(self.median_us - margin), high.max(self.median_us + margin)])
    }
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// What became of a candidate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// It matched the oracle and was timed.
    Measured(Measurement),
    /// It did not get that far.
    Failed {
        /// Where it failed: `compile`, `spill`, `launch` or `verify`; `crash` or `hang` of the process that ran it; or
        /// `pruned`, when it was not tried.
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
    /// Clock of the multiprocessors while it was timed, in MHz; 0 where it is not known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub sm_mhz: u32,
    /// Power drawn while it was timed, in watts; 0 where it is not known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub power_w: u32,
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

/// A record that no file could give back, or that no tuner can have written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[error("the record of {key} is invalid: {field} {reason}")]
pub struct InvalidRecord {
    /// Key of the record.
    pub key: String,
    /// The field that is wrong, e.g. `measurement.error`.
    pub field: &'static str,
    /// What is wrong with it, and what it should be.
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
        serde_json::to_string(self).map_err(|error| self.invalid("record", error.to_string()))
    }

    /// Whether a file could give the record back.
    pub(crate) fn check(&self) -> Result<(), InvalidRecord> {
        let class = &self.device.class;
        if class.is_empty() || class.contains(|c: char| c == '|' || c.is_control()) {
            let reason = format!("is {class:?}; it must not be empty, nor hold `|` or a control character");
            return Err(self.invalid("device.class", reason));
        }
        // JSON has no NaN: it would be written as null and not be read again.
        let numbers = self.measurement().into_iter().flat_map(Measurement::numbers);
        match numbers.into_iter().find(|(_, number)| !number.is_finite()) {
            Some((field, number)) => Err(self.invalid(field, format!("is {number}; it must be a finite number"))),
            None => Ok(()),
        }
    }

    pub(crate) fn invalid(&self, field: &'static str, reason: String) -> InvalidRecord {
        InvalidRecord { key: self.key().to_string(), field, reason }
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
/// Of those that tie with the fastest: the one its race chose, then one that needs no library, then the least shared memory,
/// the fewest registers, the first config in order.
pub fn winners(records: impl IntoIterator<Item = Record>) -> Vec<Record> {
    let mut groups: BTreeMap<(String, Origin), Vec<Record>> = BTreeMap::new();
    for record in records.into_iter().filter(|record| record.measurement().is_some()) {
        groups.entry((record.key().to_string(), record.origin.clone())).or_default().push(record);
    }
    let mut winners: BTreeMap<String, Record> = BTreeMap::new();
    // The origins of a key come in order, what was measured here first.
    for ((key, _), group) in groups {
        let Some(record) = fastest(group) else { continue };
        if winners.get(&key).is_none_or(|winner| record.is_better_supported_than(winner)) {
            winners.insert(key, record);
        }
    }
    winners.into_values().collect()
}

/// The winner among measured records of one key and origin.
fn fastest(group: Vec<Record>) -> Option<Record> {
    let median_us = |record: &Record| record.measurement().map_or(f64::INFINITY, |measured| measured.median_us);
    let best = *group.iter().min_by(|a, b| median_us(a).total_cmp(&median_us(b)))?.measurement()?;
    let near = |measured: &Measurement| measured.chosen || measured.median_us <= best.median_us * (1.0 + FAR);
    let ties =
        |record: &Record| record.measurement().is_some_and(|measured| measured.ties_with(&best) && near(measured));
    group.into_iter().filter(ties).min_by_key(Record::among_ties)
}

/// Marks the one of `records`, raced together, that is to serve: `present`, unless one is faster by more than the noise;
/// then the least of those that tie with the fastest. Those of a library are told which kernel of ours came next.
pub fn choose(records: &mut [Record], present: Option<&Config>) {
    mark(records, present.copied());
    let measured: Vec<Record> = records.iter().filter(|record| record.measurement().is_some()).cloned().collect();
    let of_ours: Vec<Record> = measured.iter().filter(|record| !record.is_of_library()).cloned().collect();
    let (winner, ours) = (fastest(measured), fastest(of_ours).map(|ours| ours.config));
    mark(records, winner.map(|winner| winner.config));
    for record in records.iter_mut().filter(|record| record.is_of_library()) {
        if let Outcome::Measured(measurement) = &mut record.outcome {
            measurement.stand_in = ours;
        }
    }
}

fn mark(records: &mut [Record], chosen: Option<Config>) {
    for record in records {
        if let Outcome::Measured(measurement) = &mut record.outcome {
            measurement.chosen = Some(record.config) == chosen;
        }
    }
}

impl Record {
    fn is_of_library(&self) -> bool {
        self.config.family().is_library()
    }

    /// Which of several that are as fast serves: a kernel of ours, which needs no library, and of those the least. Stable from
    /// run to run.
    fn among_ties(&self) -> (bool, bool, u32, u32, Config) {
        let chosen = self.measurement().is_some_and(|measured| measured.chosen);
        let smem = self.config.launch_shape(&self.problem).map_or(0, |shape| shape.smem_bytes);
        (!chosen, self.is_of_library(), smem, self.environment.registers, self.config)
    }
}
