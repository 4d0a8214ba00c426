//! Which record answers a problem: the ladder from an exact match to nothing.
//!
//! Sizes are compared by the distance of their logarithms. An entry of another size is only an answer
//! when its config is legal for the problem asked; else the next nearest is tried.

use crate::error::{Context, FileError};
use crate::journal::{self, JournalError};
use crate::record::{InvalidRecord, Record, TuningKey, winners};
use crate::shipped::{self, ShippedError};
use crate::snapshot::{self, Entry, Snapshot, SnapshotError};
use etcetera::BaseStrategy;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use swiglu_kernels::families::Target;
use swiglu_kernels::{Op, Problem};

/// How near a record is to the problem asked, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Match {
    /// Tuned for this problem on this device class.
    Exact,
    /// Tuned for this (N, K), at another M or alignment.
    NearestM,
    /// Tuned for another operation whose products are the same.
    OtherOp,
    /// Tuned on this device class, for another (N, K).
    NearestShape,
    /// Tuned on another device class of this architecture.
    SameArch,
    /// No record is of use; the analytic model's choice serves.
    Model,
    /// No record is of use; the default serves.
    Untuned,
}

impl Match {
    /// Whether it was tuned for this (N, K).
    const fn is_of_shape(self) -> bool {
        matches!(self, Self::Exact | Self::NearestM | Self::OtherOp)
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Exact => "exact",
            Self::NearestM => "nearest M",
            Self::OtherOp => "other op",
            Self::NearestShape => "nearest shape",
            Self::SameArch => "same architecture",
            Self::Model => "model",
            Self::Untuned => "untuned",
        })
    }
}

/// Why a layer is left out, or what is wrong with it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// What the user named is not there.
    #[error("the {layer} layer `{}` is not there", path.display())]
    Absent {
        /// The layer.
        layer: Layer,
        /// Where it was to be.
        path: PathBuf,
    },
    /// A table cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A snapshot cannot be used, and no journal has winners; the layer is left out.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A snapshot cannot be used or is not there, and its journal answers.
    #[error("{0}; until then its journal answers")]
    FromJournal(#[source] SnapshotError),
    /// There is no snapshot, and the journal cannot be read; the layer is left out.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A table cannot be used, or some of its records.
    #[error(transparent)]
    Shipped(#[from] ShippedError),
    /// The records of a table cannot be indexed.
    #[error(transparent)]
    Record(#[from] InvalidRecord),
}

/// No directory is known to keep the tuning database in.
#[derive(Debug, thiserror::Error)]
#[error("no home directory to keep the tuning database in: {0}; name a directory")]
pub struct NoHome(#[from] etcetera::HomeDirError);

/// Where the tuning database is kept unless the user names a directory: `$XDG_DATA_HOME/swiglu-tune`.
///
/// # Errors
/// The user has no home directory.
pub fn default_dir() -> Result<PathBuf, NoHome> {
    Ok(etcetera::choose_base_strategy()?.data_dir().join("swiglu-tune"))
}

/// Where a table has an entry from, highest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Layer {
    /// What the user named for this process.
    Override,
    /// The user's published snapshot.
    User,
    /// What the site's administrator provides for all users.
    Site,
    /// The tables compiled in.
    Shipped,
    /// One that the caller gave, by its number.
    Given(usize),
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Override => f.pad("override"),
            Self::User => f.pad("user"),
            Self::Site => f.pad("site"),
            Self::Shipped => f.pad("shipped"),
            Self::Given(number) => write!(f, "layer {number}"),
        }
    }
}

/// Everything that was tuned, in layers.
#[derive(Debug, Default)]
pub struct TuningTable {
    /// Of equally near entries, the one of the first layer wins.
    layers: Vec<(Layer, Records)>,
}

#[derive(Debug)]
enum Records {
    Loaded(Snapshot),
    /// Parsed at the first question, once for the process: a runtime starts without.
    Shipped,
}

impl Records {
    fn snapshot(&self) -> &Snapshot {
        static SHIPPED: LazyLock<Snapshot> = LazyLock::new(shipped_records);
        match self {
            Self::Loaded(snapshot) => snapshot,
            Self::Shipped => &SHIPPED,
        }
    }
}

/// A record that could serve, and from where.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// How near it is.
    pub matched: Match,
    /// Where it is from.
    pub layer: Layer,
    /// The record, whose config is legal for the problem asked.
    pub record: Record,
}

/// What one layer has on one rung of the ladder.
#[derive(Debug, Clone, PartialEq)]
pub struct Rung {
    /// The rung.
    pub matched: Match,
    /// The layer.
    pub layer: Layer,
    /// Entries so near.
    pub entries: usize,
    /// Entries passed over, nearer than the answer: illegal for the problem, or of another version.
    pub passed_over: usize,
    /// Why the nearest of those was.
    pub reason: Option<String>,
    /// The nearest entry that could serve.
    pub nearest: Option<Record>,
}

/// What serves a problem, and how that was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Explanation {
    /// Every rung of every layer, best first.
    pub rungs: Vec<Rung>,
    /// The nearest record whose config is legal for the problem; `None` when untuned.
    pub serving: Option<Answer>,
    /// What would serve in its place.
    pub second: Option<Answer>,
}

impl TuningTable {
    /// The layers of `sources`, highest first, over the shipped tables. Each is a tuning directory or the file of an exported
    /// table. A layer that cannot be used is left out; in place of a snapshot that is missing, damaged or of a newer schema its
    /// journal answers; single records of a table that cannot be read are passed over. What was wrong is returned. A directory
    /// without records is an empty layer, but for the override, which has to be there.
    pub fn load(sources: &[(Layer, PathBuf)]) -> (Self, Vec<LayerError>) {
        let mut wrong = Vec::new();
        let mut layers = Vec::new();
        for (layer, path) in sources {
            match load_layer(*layer, path, &mut wrong) {
                Ok(snapshot) => layers.push((*layer, Records::Loaded(snapshot))),
                Err(error) => wrong.push(error),
            }
        }
        layers.push((Layer::Shipped, Records::Shipped));
        (Self { layers }, wrong)
    }

    /// The layers that are in use, highest first, and the number of records each has.
    pub fn layers(&self) -> impl Iterator<Item = (Layer, usize)> {
        self.layers.iter().map(|(layer, records)| (*layer, records.snapshot().len()))
    }

    /// The layers given, highest first.
    pub fn from_layers(layers: Vec<Snapshot>) -> Self {
        let given = |(at, layer)| (Layer::Given(at + 1), Records::Loaded(layer));
        Self { layers: layers.into_iter().enumerate().map(given).collect() }
    }

    /// The nearest record whose config `target` can run `problem` with, what came second, and how many there were on each rung.
    pub fn explain(&self, device_class: &str, problem: &Problem, target: Target) -> Explanation {
        self.explain_for(problem.op, device_class, problem, target)
    }

    /// As [`TuningTable::explain`], for `op`, which the op of `problem` stands in for: configs are legal for `op`.
    fn explain_for(&self, op: Op, device_class: &str, problem: &Problem, target: Target) -> Explanation {
        let wanted = problem.with_op(op);
        let asked = TuningKey { device_class: device_class.into(), problem: *problem };
        let candidates = self.nearest_first(arch_of(device_class), &asked);
        let mut rungs = Vec::new();
        for matched in [Match::Exact, Match::NearestM, Match::NearestShape, Match::SameArch] {
            for &(layer, _) in &self.layers {
                let here = candidates.iter().filter(|entry| entry.rank.matched == matched && entry.layer == layer);
                rungs.push(rung(matched, layer, here, &wanted, target));
            }
        }
        let answers = candidates.iter().filter_map(|entry| {
            let record = entry.legal_record(&wanted, target)?;
            Some(Answer { matched: entry.rank.matched, layer: entry.layer, record })
        });
        let mut answers: Vec<(Match, Answer)> = answers.take(2).map(|answer| (answer.matched, answer)).collect();
        if let Some(plain) = problem.op.stand_in() {
            let plain = self.explain_for(op, device_class, &problem.with_op(plain), target);
            rungs.extend(self.layers.iter().map(|(layer, _)| other_op(*layer, &plain.rungs)));
            rungs.sort_by_key(|rung| rung.matched);
            // Of another (N, K) it comes last, as in a plan.
            let rank = |answer: &Answer| if answer.matched.is_of_shape() { Match::OtherOp } else { Match::Untuned };
            let ranked = |answer| (rank(&answer), Answer { matched: Match::OtherOp, ..answer });
            answers.extend(plain.serving.into_iter().chain(plain.second).map(ranked));
            answers.sort_by_key(|(rank, _)| *rank);
        }
        let mut answers = answers.into_iter().map(|(_, answer)| answer);
        let (serving, second) = (answers.next(), answers.next());
        Explanation { rungs, serving, second }
    }

    /// The tuned M of the (N, K) of `problem`, ascending; without any, those of the nearest (N, K) that
    /// has legal configs. Each config is legal for `problem` at that M. The M of `problem` is not used.
    /// The answers of [`stand_in`](swiglu_kernels::Op::stand_in) serve at the M where the op itself was not tuned for the (N, K), and
    /// their configs are legal for it.
    pub fn anchors(&self, device_class: &str, problem: &Problem, target: Target) -> Vec<(u32, Record, Match)> {
        self.anchors_for(problem.op, device_class, problem, target)
    }

    /// As [`TuningTable::anchors`], for `op`, as above.
    fn anchors_for(&self, op: Op, device_class: &str, problem: &Problem, target: Target) -> Vec<(u32, Record, Match)> {
        let asked = TuningKey { device_class: device_class.into(), problem: *problem };
        let prefixes = [asked.kind_prefix(), arch_of(device_class).into()];
        let found = prefixes
            .iter()
            .map(|prefix| self.anchors_under(op, prefix, &asked, target))
            .find(|anchors| !anchors.is_empty());
        let own = found.unwrap_or_default();
        let of_shape = |anchors: &[(u32, Record, Match)]| anchors.iter().any(|(_, _, matched)| matched.is_of_shape());
        let Some(plain) = problem.op.stand_in() else { return own };
        let plain = self.anchors_for(op, device_class, &problem.with_op(plain), target);
        if !own.is_empty() && !of_shape(&plain) {
            return own;
        }
        let mut all: BTreeMap<u32, (Record, Match)> =
            plain.into_iter().map(|(m, record, _)| (m, (record, Match::OtherOp))).collect();
        if of_shape(&own) {
            all.extend(own.into_iter().map(|(m, record, matched)| (m, (record, matched))));
        }
        all.into_iter().map(|(m, (record, matched))| (m, record, matched)).collect()
    }

    fn anchors_under(&self, op: Op, prefix: &str, asked: &TuningKey, target: Target) -> Vec<(u32, Record, Match)> {
        let mut anchors = BTreeMap::new();
        let mut shape = None;
        for candidate in self.nearest_first(prefix, asked) {
            let Problem { n, k, m, .. } = candidate.key.problem;
            let this_shape = (candidate.key.device_class.clone(), n, k);
            if anchors.contains_key(&m) || shape.as_ref().is_some_and(|shape| *shape != this_shape) {
                continue;
            }
            if let Some(record) = candidate.legal_record(&asked.problem.with_op(op).with_m(m), target) {
                shape = Some(this_shape);
                anchors.insert(m, (record, candidate.rank.at_its_own_m()));
            }
        }
        anchors.into_iter().map(|(m, (record, matched))| (m, record, matched)).collect()
    }

    /// The entries under `prefix` that compute the same in the same format, nearest first.
    fn nearest_first(&self, prefix: &str, asked: &TuningKey) -> Vec<Candidate<'_>> {
        let mut candidates: Vec<_> = self
            .layers
            .iter()
            .flat_map(|(name, layer)| layer.snapshot().get_range(prefix).map(|entry| (*name, entry)))
            .filter_map(|(layer, entry)| Candidate::new(layer, entry, asked))
            .collect();
        // Stable: equally near entries stay in the order of layers and keys.
        candidates.sort_by_key(|candidate| candidate.rank);
        candidates
    }
}

/// Distances in the order they count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    matched: Match,
    // Before sizes: a config tuned for narrow access wastes bandwidth at any size.
    alignment: u32,
    shape: u32,
    m: u32,
}

impl Rank {
    /// How near the entry is to the problem when that has the M of the entry.
    fn at_its_own_m(self) -> Match {
        match self.matched {
            Match::NearestM if self.alignment == 0 => Match::Exact,
            matched => matched,
        }
    }
}

struct Candidate<'a> {
    rank: Rank,
    layer: Layer,
    key: TuningKey,
    entry: Entry<'a>,
}

impl<'a> Candidate<'a> {
    /// `None` when the entry is of another architecture, operation or format.
    fn new(layer: Layer, entry: Entry<'a>, asked: &TuningKey) -> Option<Self> {
        let key: TuningKey = entry.key.parse().ok()?;
        let (theirs, ours) = (&key.problem, &asked.problem);
        let same_kind = (theirs.op, theirs.activation, theirs.dtype, theirs.weight_major)
            == (ours.op, ours.activation, ours.dtype, ours.weight_major);
        if !same_kind || arch_of(&key.device_class) != arch_of(&asked.device_class) {
            return None;
        }
        let matched = if key == *asked {
            Match::Exact
        } else if key.device_class != asked.device_class {
            Match::SameArch
        } else if (theirs.n, theirs.k) != (ours.n, ours.k) {
            Match::NearestShape
        } else {
            Match::NearestM
        };
        let rank = Rank {
            matched,
            alignment: distance(theirs.alignment, ours.alignment),
            shape: distance(theirs.n, ours.n) + distance(theirs.k, ours.k),
            m: distance(theirs.m, ours.m),
        };
        Some(Self { rank, layer, key, entry })
    }

    fn legal_record(&self, problem: &Problem, target: Target) -> Option<Record> {
        let unreadable = |reason: &String| tracing::debug!(key = self.entry.key, reason, "passed over a record");
        self.record_or_reason(problem, target).inspect_err(unreadable).ok()
    }

    fn record_or_reason(&self, problem: &Problem, target: Target) -> Result<Record, String> {
        let record = self.entry.record().map_err(|error| format!("of another version: {error}"))?;
        record.config.check(problem, target).map_err(|why| format!("not legal here: {why}"))?;
        Ok(record)
    }
}

/// Sums up the candidates of one rung, which come nearest first.
fn rung<'a>(
    matched: Match,
    layer: Layer,
    candidates: impl Iterator<Item = &'a Candidate<'a>>,
    problem: &Problem,
    target: Target,
) -> Rung {
    let mut rung = Rung { matched, layer, entries: 0, passed_over: 0, reason: None, nearest: None };
    for candidate in candidates {
        rung.entries += 1;
        if rung.nearest.is_some() {
            continue;
        }
        match candidate.record_or_reason(problem, target) {
            Ok(record) => rung.nearest = Some(record),
            Err(reason) => {
                rung.passed_over += 1;
                rung.reason.get_or_insert(reason);
            }
        }
    }
    rung
}

/// What `layer` has for the plain operation, on whatever rung, as one rung of the operation asked for.
fn other_op(layer: Layer, plain: &[Rung]) -> Rung {
    let mut sum = Rung { matched: Match::OtherOp, layer, entries: 0, passed_over: 0, reason: None, nearest: None };
    for rung in plain.iter().filter(|rung| rung.layer == layer) {
        sum.entries += rung.entries;
        if sum.nearest.is_none() {
            sum.passed_over += rung.passed_over;
            sum.reason = sum.reason.or_else(|| rung.reason.clone());
            sum.nearest = rung.nearest.clone();
        }
    }
    sum
}

/// `|log2(a / b)|` in millionths, which order exactly.
fn distance(a: u32, b: u32) -> u32 {
    let log2 = |size: u32| f64::from(size.max(1)).log2();
    ((log2(a) - log2(b)).abs() * 1e6).round() as u32
}

/// The architecture of a device class: all before the first `-`.
fn arch_of(device_class: &str) -> &str {
    device_class.split_once('-').map_or(device_class, |(arch, _)| arch)
}

fn load_layer(layer: Layer, path: &Path, wrong: &mut Vec<LayerError>) -> Result<Snapshot, LayerError> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => load_dir(layer, path, wrong),
        Ok(_) => load_table(path, wrong),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => nothing(layer, path),
        Err(cause) => Err(cause).context("read", path)?,
    }
}

fn load_table(path: &Path, wrong: &mut Vec<LayerError>) -> Result<Snapshot, LayerError> {
    let text = fs::read_to_string(path).context("read", path)?;
    let (records, unreadable) = shipped::read(path, &text)?;
    wrong.extend(unreadable.map(LayerError::from));
    Ok(Snapshot::from_records(&winners(records))?)
}

fn load_dir(layer: Layer, dir: &Path, wrong: &mut Vec<LayerError>) -> Result<Snapshot, LayerError> {
    let path = dir.join(snapshot::FILE_NAME);
    let error = match Snapshot::published(&path) {
        Ok(Some(snapshot)) => return Ok(snapshot),
        Ok(None) => None,
        Err(error) => Some(error),
    };
    match (from_journal(dir), error) {
        (Ok(Some(snapshot)), error) => {
            wrong.push(LayerError::FromJournal(error.unwrap_or(SnapshotError::Missing { path })));
            Ok(snapshot)
        }
        (_, Some(error)) => Err(error.into()),
        (Err(error), None) => Err(error),
        (Ok(None), None) => nothing(layer, &path),
    }
}

/// A folder in which nothing was ever stored is another one than was meant; of the other layers it is a machine without one.
fn nothing(layer: Layer, path: &Path) -> Result<Snapshot, LayerError> {
    if layer == Layer::Override {
        Err(LayerError::Absent { layer, path: path.into() })
    } else {
        Ok(Snapshot::default())
    }
}

/// What the journal in `dir` would publish, if it is there and has winners.
fn from_journal(dir: &Path) -> Result<Option<Snapshot>, LayerError> {
    let contents = journal::read(&dir.join(journal::FILE_NAME))?;
    let snapshot = Snapshot::from_records(&winners(contents.current().cloned()))?;
    Ok((!snapshot.is_empty()).then_some(snapshot))
}

/// Tests hold every shipped table to be whole; should one not be, the others serve.
fn shipped_records() -> Snapshot {
    let table = |(name, text): &(&str, &str)| {
        let (records, unreadable) = shipped::read(Path::new(name), text)
            .inspect_err(|error| tracing::warn!(%error, "a shipped table is left out"))
            .ok()?;
        if let Some(error) = unreadable {
            tracing::warn!(%error, "records of a shipped table are left out");
        }
        Some(records)
    };
    let records: Vec<Record> = shipped::TABLES.iter().filter_map(table).flatten().collect();
    let snapshot = Snapshot::from_records(&records);
    snapshot.inspect_err(|error| tracing::warn!(%error, "the shipped tables are left out")).unwrap_or_default()
}
