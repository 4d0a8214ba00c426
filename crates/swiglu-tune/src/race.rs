//! From candidates to measured times: verify each, then time them in rounds that drop the slow ones.

use crate::stop::Stop;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use swiglu_db::{Measurement, Outcome};
use swiglu_kernels::{Config, DType};

/// Something whose candidates can be verified and timed, on whatever device.
pub(crate) trait Subject {
    /// Runs `config` once on fresh poisoned output and holds it to the oracle; the relative error.
    fn verify(&mut self, config: &Config) -> Result<f64, Failure>;
    /// Runs `config` for a while, so that clocks and power are those of steady work.
    fn settle(&mut self, _config: &Config) {}
    /// One sample of the time of a launch of each config, in microseconds, one after the other without a pause.
    fn sample(&mut self, configs: &[Config]) -> Vec<Result<f64, Failure>>;
    /// The time of a launch of `config` in microseconds while it runs alone, long enough for the clock to follow its power. Where
    /// there is no such clock, one sample.
    fn sustain(&mut self, config: &Config) -> Result<f64, Failure> {
        self.sample(std::slice::from_ref(config)).pop().unwrap_or_else(|| Err(Failure::untimed()))
    }
    /// How the device fared during the last sample.
    fn conditions(&self) -> Conditions {
        Conditions::default()
    }
    /// Whether the device no longer works, so that a failure says nothing of a candidate. Asked after one.
    fn is_lost(&mut self) -> bool {
        false
    }
}

/// What NVML tells of a GPU under load; empty where it tells nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Conditions {
    /// Clock of the multiprocessors.
    pub(crate) sm_mhz: Option<u32>,
    pub(crate) power_w: Option<u32>,
    /// Why the device slowed itself down, if it did, other than by its ordinary power cap.
    pub(crate) slowdown: Option<String>,
}

/// Why a candidate is out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failure {
    /// `compile`, `spill`, `launch`, `verify`, `crash`, `hang`, `pruned` or `interrupted`.
    pub(crate) stage: Cow<'static, str>,
    pub(crate) reason: String,
}

impl Failure {
    pub(crate) fn new(stage: &'static str, reason: impl ToString) -> Self {
        Self { stage: stage.into(), reason: reason.to_string() }
    }

    /// Of a candidate that was to be timed and has no time.
    pub(crate) fn untimed() -> Self {
        Self::new("launch", "was not timed")
    }
}

impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Self {
        Self::Failed { stage: failure.stage.into(), reason: failure.reason }
    }
}

/// A round of the race.
#[derive(Debug)]
pub(crate) struct Round {
    /// Per candidate.
    samples: usize,
    /// Candidates slower than the best by more than this factor are out before the round,
    within: f64,
    /// and all but so many of the fastest.
    most: usize,
    /// A sample is one candidate alone, at the clock that its own power leaves it.
    sustained: bool,
}

impl Round {
    const fn short(samples: usize, within: f64, most: usize) -> Self {
        Self { samples, within, most, sustained: false }
    }
}

/// The last round decides, by its own samples, taken when the clocks have settled under load.
pub(crate) const ROUNDS: [Round; 4] = [
    Round::short(1, f64::INFINITY, usize::MAX),
    Round::short(3, 2.0, 48),
    Round::short(8, 1.2, 24),
    Round::short(40, 1.06, 8),
];

/// For reference: every candidate is timed well enough to be told from its neighbours.
pub(crate) const EXHAUSTIVE: [Round; 3] =
    [Round::short(5, f64::INFINITY, usize::MAX), Round::short(10, 1.15, 64), Round::short(40, 1.06, 16)];

/// For work that runs at the power cap: in short samples all finalists share the clock that their mean power leaves, and tie;
/// alone, the one that takes the least energy is the fastest.
pub(crate) const SUSTAINED: [Round; 5] = [
    Round::short(1, f64::INFINITY, usize::MAX),
    Round::short(3, 2.0, 48),
    Round::short(8, 1.2, 24),
    Round { sustained: true, ..Round::short(3, 1.03, 16) },
    Round { sustained: true, ..Round::short(16, 1.02, 6) },
];

/// How many passes of a race, or sustained samples, are taken again because the device slowed itself down; then times are taken as
/// they are.
const REPEATS: u32 = 12;

/// Who races, and how long.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Field<'a> {
    pub(crate) candidates: &'a [Config],
    /// Those that stay until the end however slow they are: the default, the present winner. The first is the canary,
    /// which is timed in every pass and so tells what all times drift by.
    pub(crate) pinned: &'a [Config],
    pub(crate) rounds: &'a [Round],
}

/// What came out.
#[derive(Debug)]
pub(crate) struct Raced {
    /// Of each candidate, in their order.
    pub(crate) outcomes: Vec<(Config, Outcome)>,
    /// Of the fastest, in the last pass.
    pub(crate) conditions: Conditions,
    /// Time of the canary at the end over that at the start.
    pub(crate) drift: Option<f64>,
}

/// Races `field`. What a race that `stop` or a lost device ended has not failed is `interrupted`: a later run races it
/// again, all against all.
pub(crate) fn race(subject: &mut dyn Subject, field: &Field, stop: &Stop) -> Raced {
    let mut race = Race {
        entries: field.candidates.iter().map(|config| Entry::new(*config, field.pinned.contains(config))).collect(),
        subject,
        stop,
        canary: field.pinned.first().copied(),
        canary_us: Vec::new(),
        repeated: 0,
    };
    let finished = race.verify() && race.run(field.rounds);
    if finished {
        level(&mut race.entries);
    } else {
        interrupt(&mut race.entries);
    }
    Raced {
        conditions: fastest(&race.entries).map_or_else(Conditions::default, |entry| entry.conditions.clone()),
        drift: drift(&race.canary_us),
        outcomes: outcomes(race.entries, race.repeated),
    }
}

struct Race<'a> {
    subject: &'a mut dyn Subject,
    stop: &'a Stop,
    entries: Vec<Entry>,
    canary: Option<Config>,
    /// Its time in every pass.
    canary_us: Vec<f64>,
    /// Passes taken again.
    repeated: u32,
}

impl Race<'_> {
    /// Verifies every candidate; whether the race goes on.
    fn verify(&mut self) -> bool {
        for entry in &mut self.entries {
            if self.stop.is_set() {
                return false;
            }
            match self.subject.verify(&entry.config) {
                Ok(error) => entry.error = error,
                Err(failure) => {
                    entry.failure = Some(failure);
                    if self.subject.is_lost() {
                        return false;
                    }
                }
            }
        }
        !self.stop.is_set()
    }

    /// Times in rounds; whether it came to the end.
    fn run(&mut self, rounds: &[Round]) -> bool {
        for (index, round) in rounds.iter().enumerate() {
            drop_slow(&mut self.entries, round);
            if index + 1 == rounds.len() || round.sustained {
                settle(self.subject, &mut self.entries, round);
            }
            if round.sustained {
                self.canary_us.clear(); // times at another clock
            }
            for _ in 0..round.samples {
                if self.stop.is_set() || !self.pass(round.sustained) {
                    return false;
                }
            }
        }
        true
    }

    /// One sample of each that is still racing, all without a pause or each alone and for long; whether the race goes on.
    fn pass(&mut self, sustained: bool) -> bool {
        let mut racing = shuffled(&mut self.entries);
        let together = if sustained { 1 } else { racing.len().max(1) };
        for group in racing.chunks_mut(together) {
            if self.stop.is_set() {
                return false;
            }
            let configs: Vec<Config> = group.iter().map(|entry| entry.config).collect();
            let mut samples = sample(self.subject, &configs, sustained);
            while let Some(why) = self.subject.conditions().slowdown {
                if self.stop.is_set() {
                    return false;
                }
                if self.repeated == REPEATS {
                    break;
                }
                tracing::warn!(why, "the GPU slows itself down; what it timed is timed again");
                self.repeated += 1;
                samples = sample(self.subject, &configs, sustained);
            }
            if samples.iter().any(Result::is_err) && self.subject.is_lost() {
                return false;
            }
            let conditions = self.subject.conditions();
            for (entry, sample) in group.iter_mut().zip(samples) {
                entry.take(sample, &conditions, self.canary, &mut self.canary_us);
            }
        }
        true
    }
}

fn sample(subject: &mut dyn Subject, configs: &[Config], sustained: bool) -> Vec<Result<f64, Failure>> {
    if sustained { configs.iter().map(|config| subject.sustain(config)).collect() } else { subject.sample(configs) }
}

/// Those still racing. Clocks lag behind power, so that every candidate shall have every predecessor.
fn shuffled(entries: &mut [Entry]) -> Vec<&mut Entry> {
    let mut racing: Vec<&mut Entry> = entries.iter_mut().filter(|entry| entry.racing()).collect();
    racing.shuffle(&mut rand::rng());
    racing
}

fn fastest(entries: &[Entry]) -> Option<&Entry> {
    entries.iter().filter(|entry| entry.racing()).min_by(|a, b| a.median().total_cmp(&b.median()))
}

/// The last quarter of the canary's times over the first; `None` where that is too few to say.
fn drift(canary_us: &[f64]) -> Option<f64> {
    let quarter = canary_us.len() / 4;
    let middle = |times: &[f64]| quantile(times, 0.5);
    (quarter > 0).then(|| middle(&canary_us[canary_us.len() - quarter..]) / middle(&canary_us[..quarter]))
}

/// Times of a race that was not run to its end do not compare.
fn interrupt(entries: &mut [Entry]) {
    for entry in entries.iter_mut().filter(|entry| entry.failure.is_none()) {
        entry.failure = Some(Failure::new("interrupted", "stopped before the race was over"));
    }
}

/// Two finalists do not tell what both share from what is one's own.
const LEVELLED: usize = 3;

/// Takes the drift of the clocks out of the last round: each of its passes is scaled to the same middle. Sustained samples lie
/// seconds apart and share little.
fn level(entries: &mut [Entry]) {
    let mut racing: Vec<&mut Entry> = entries.iter_mut().filter(|entry| entry.racing()).collect();
    if racing.len() < LEVELLED || racing.iter().any(|entry| entry.sustained) {
        return;
    }
    let passes = racing.iter().map(|entry| entry.samples.len()).min().unwrap_or(0);
    let middle = |times: Vec<f64>| quantile(&times, 0.5);
    let overall = middle(racing.iter().flat_map(|entry| entry.samples.iter().copied()).collect());
    for pass in 0..passes {
        let scale = overall / middle(racing.iter().filter_map(|entry| entry.samples.get(pass).copied()).collect());
        for time in racing.iter_mut().filter_map(|entry| entry.samples.get_mut(pass)) {
            *time *= scale;
        }
    }
}

/// Takes out what `round` does not admit. Before the first round nothing has a time, and nothing is slow.
fn drop_slow(entries: &mut [Entry], round: &Round) {
    let mut racing: Vec<&mut Entry> = entries.iter_mut().filter(|entry| entry.racing()).collect();
    racing.sort_by(|a, b| a.median().total_cmp(&b.median()));
    let best = racing.first().map_or(f64::NAN, |entry| entry.median());
    for (rank, entry) in racing.into_iter().enumerate() {
        if !entry.pinned && (rank >= round.most || entry.median() > best * round.within) {
            entry.dropped = Some(entry.median() / best);
        }
    }
}

/// Steady load, and a fresh start for those still racing.
fn settle(subject: &mut dyn Subject, entries: &mut [Entry], round: &Round) {
    if let Some(best) = fastest(entries) {
        subject.settle(&best.config);
    }
    for entry in entries.iter_mut().filter(|entry| entry.racing()) {
        entry.samples.clear();
        entry.sustained = round.sustained;
    }
}

struct Entry {
    config: Config,
    /// Stays until the end.
    pinned: bool,
    error: f64,
    samples: Vec<f64>,
    /// Its samples are sustained ones.
    sustained: bool,
    /// When it was timed last.
    conditions: Conditions,
    failure: Option<Failure>,
    /// Its time over the best one's, when it went out.
    dropped: Option<f64>,
}

impl Entry {
    fn new(config: Config, pinned: bool) -> Self {
        Self {
            config,
            pinned,
            error: 0.0,
            samples: Vec::new(),
            sustained: false,
            conditions: Conditions::default(),
            failure: None,
            dropped: None,
        }
    }

    fn take(
        &mut self,
        sample: Result<f64, Failure>,
        conditions: &Conditions,
        canary: Option<Config>,
        canary_us: &mut Vec<f64>,
    ) {
        self.conditions = conditions.clone();
        match sample {
            Ok(time) => {
                self.samples.push(time);
                if Some(self.config) == canary {
                    canary_us.push(time);
                }
            }
            Err(failure) => self.failure = Some(failure),
        }
    }

    fn racing(&self) -> bool {
        self.failure.is_none() && self.dropped.is_none()
    }

    fn median(&self) -> f64 {
        quantile(&self.samples, 0.5)
    }
}

/// What is stored. Only times of one round compare: those of candidates that went out early are given as the winner's time
/// times the ratio at that moment, so that none of them, timed on a cooler GPU, looks faster than the winner. What a short round
/// took out of a sustained race tied there with what the sustained rounds told apart: the slowest of those stands for the winner.
fn outcomes(entries: Vec<Entry>, repeated: u32) -> Vec<(Config, Outcome)> {
    let winner = fastest(&entries).map_or(f64::INFINITY, Entry::median);
    let of_sustained = |entry: &Entry| entry.dropped.map_or_else(|| entry.median(), |ratio| winner * ratio);
    let sound = entries.iter().filter(|entry| entry.failure.is_none());
    let slowest_sustained = sound.filter(|entry| entry.sustained).map(of_sustained).fold(winner, f64::max);
    let outcome = |entry: Entry| match entry.failure {
        Some(failure) => (entry.config, failure.into()),
        None => {
            // All finalists may have failed in the last round.
            let ratio = entry.dropped.filter(|_| winner.is_finite());
            let ahead = if entry.sustained { winner } else { slowest_sustained };
            let scale = ratio.map_or(1.0, |ratio| ahead * ratio / entry.median());
            let measurement = Measurement {
                median_us: scale * entry.median(),
                p10_us: scale * quantile(&entry.samples, 0.1),
                p90_us: scale * quantile(&entry.samples, 0.9),
                samples: u32::try_from(entry.samples.len()).unwrap_or(u32::MAX),
                error: entry.error,
                // Samples of several rounds, on other clocks, tell no interval.
                interval_us: if entry.dropped.is_none() { interval(&entry.samples) } else { None },
                repeated,
                chosen: false,
                stand_in: None,
            };
            (entry.config, Outcome::Measured(measurement))
        }
    };
    entries.into_iter().map(outcome).collect()
}

/// Largest relative error a candidate may show. `rounding` is that of the reference rounded to the number format:
/// where few elements carry the norm, it can exceed the format's own bar, and nothing can do better.
pub(crate) fn tolerance(dtype: DType, rounding: f64) -> f64 {
    dtype.tolerance().max(1.1 * rounding)
}

/// The `q` quantile by nearest rank; NaN of nothing.
pub(crate) fn quantile(samples: &[f64], q: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (q * sorted.len().saturating_sub(1) as f64).round() as usize;
    sorted.get(rank).copied().unwrap_or(f64::NAN)
}

/// A confidence interval of the median, of at least 95 %, by order statistics: it holds for any distribution. Fewer than 8
/// samples have none.
pub(crate) fn interval(samples: &[f64]) -> Option<[f64; 2]> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let count = sorted.len() as f64;
    let rank = ((count - 1.96 * count.sqrt()) / 2.0) as usize;
    Some([*sorted.get(rank.checked_sub(1)?)?, *sorted.get(sorted.len() - rank)?])
}

#[cfg(test)]
mod tests;
