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
    /// A sample is one candidate alone for [`SUSTAINED_US`], at the clock that its own power leaves it.
    sustained: bool,
}

impl Round {
    const fn short(samples: usize, within: f64, most: usize) -> Self {
        Self { samples, within, most, sustained: false }
    }
}

/// The last round decides, by its own samples, taken when the clocks have settled under load; so does a sustained one.
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
    Round { sustained: true, ..Round::short(2, 1.03, 16) },
    Round { sustained: true, ..Round::short(8, 1.02, 6) },
];

/// Length of a sample, in microseconds: long against the events' resolution and the launch gaps, and long enough for the power
/// limit to be felt.
pub(crate) const SAMPLE_US: f64 = 1000.0;

/// Length of a sustained sample, in microseconds. Clocks follow the power within some 30 ms: its first quarter does not count.
const SUSTAINED_US: f64 = 130_000.0;

/// How many passes of a race are taken again because the device slowed itself down; then times are taken as they are.
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
    /// Of the last pass.
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
        conditions: race.subject.conditions(),
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
                settle(self.subject, &mut self.entries);
            }
            for _ in 0..round.samples {
                if self.stop.is_set() || !self.pass(round.sustained) {
                    return false;
                }
            }
        }
        true
    }

    /// One sample of each that is still racing; whether the device still works.
    fn pass(&mut self, sustained: bool) -> bool {
        let mut racing: Vec<&mut Entry> = self.entries.iter_mut().filter(|entry| entry.racing()).collect();
        // Clocks lag behind power, so that every candidate shall have every predecessor.
        racing.shuffle(&mut rand::rng());
        let runs: Vec<(Config, usize)> = racing.iter().map(|entry| (entry.config, entry.run(sustained))).collect();
        let mut samples = sample(self.subject, &runs);
        while self.repeated < REPEATS {
            let Some(why) = self.subject.conditions().slowdown else { break };
            tracing::warn!(why, "the GPU slows itself down; the pass is taken again");
            self.repeated += 1;
            samples = sample(self.subject, &runs);
        }
        if samples.iter().any(Result::is_err) && self.subject.is_lost() {
            return false;
        }
        for (entry, sample) in racing.iter_mut().zip(samples) {
            match sample {
                Ok(time) => {
                    entry.samples.push(time);
                    if Some(entry.config) == self.canary {
                        self.canary_us.push(time);
                    }
                }
                Err(failure) => entry.failure = Some(failure),
            }
        }
        true
    }
}

/// A time of each config, which runs that many times in a row; of several its middle, without the first quarter.
fn sample(subject: &mut dyn Subject, runs: &[(Config, usize)]) -> Vec<Result<f64, Failure>> {
    if runs.iter().all(|&(_, count)| count == 1) {
        let configs: Vec<Config> = runs.iter().map(|&(config, _)| config).collect();
        return subject.sample(&configs);
    }
    let steady = |&(config, count): &(Config, usize)| {
        let times: Vec<f64> = subject.sample(&vec![config; count]).into_iter().collect::<Result<_, _>>()?;
        Ok(quantile(&times[times.len() / 4..], 0.5))
    };
    runs.iter().map(steady).collect()
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

/// Takes the drift of the clocks out of the last round: each of its passes is scaled to the same middle.
fn level(entries: &mut [Entry]) {
    let mut racing: Vec<&mut Entry> = entries.iter_mut().filter(|entry| entry.racing()).collect();
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
fn settle(subject: &mut dyn Subject, entries: &mut [Entry]) {
    let racing = || entries.iter().filter(|entry| entry.racing());
    if let Some(best) = racing().min_by(|a, b| a.median().total_cmp(&b.median())) {
        subject.settle(&best.config);
    }
    for entry in entries.iter_mut().filter(|entry| entry.racing()) {
        entry.about_us = entry.median();
        entry.samples.clear();
    }
}

struct Entry {
    config: Config,
    /// Stays until the end.
    pinned: bool,
    error: f64,
    samples: Vec<f64>,
    /// Its time when it last started afresh.
    about_us: f64,
    failure: Option<Failure>,
    /// Its time over the best one's, when it went out.
    dropped: Option<f64>,
}

impl Entry {
    fn new(config: Config, pinned: bool) -> Self {
        Self { config, pinned, error: 0.0, samples: Vec::new(), about_us: f64::NAN, failure: None, dropped: None }
    }

    fn racing(&self) -> bool {
        self.failure.is_none() && self.dropped.is_none()
    }

    fn median(&self) -> f64 {
        quantile(&self.samples, 0.5)
    }

    /// Samples in a row that make one of a round.
    fn run(&self, sustained: bool) -> usize {
        let about_us = if self.samples.is_empty() { self.about_us } else { self.median() };
        if sustained { (SUSTAINED_US / about_us.max(SAMPLE_US)).ceil().max(2.0) as usize } else { 1 }
    }
}

/// What is stored. Only times of one round compare: those of candidates that went out early are given as the winner's time
/// times the ratio at that moment, so that none of them, timed on a cooler GPU, looks faster than the winner.
fn outcomes(entries: Vec<Entry>, repeated: u32) -> Vec<(Config, Outcome)> {
    let winner = entries.iter().filter(|entry| entry.racing()).map(Entry::median).fold(f64::INFINITY, f64::min);
    let outcome = |entry: Entry| match entry.failure {
        Some(failure) => (entry.config, failure.into()),
        None => {
            // All finalists may have failed in the last round.
            let ratio = entry.dropped.filter(|_| winner.is_finite());
            let scale = ratio.map_or(1.0, |ratio| winner * ratio / entry.median());
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
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use swiglu_kernels::families::{CpuConfig, Target, candidates};
    use swiglu_kernels::{Problem, WeightMajor};

    /// Candidate i takes 100 + i µs with noise; two are broken.
    struct Fake {
        calls: u32,
        configs: Vec<Config>,
    }

    impl Fake {
        fn index(&self, config: &Config) -> usize {
            self.configs.iter().position(|known| known == config).unwrap()
        }
    }

    impl Subject for Fake {
        fn verify(&mut self, config: &Config) -> Result<f64, Failure> {
            if self.index(config) == 1 { Err(Failure::new("verify", "wrong")) } else { Ok(1e-7) }
        }
        fn sample(&mut self, configs: &[Config]) -> Vec<Result<f64, Failure>> {
            configs.iter().map(|config| self.one(config)).collect()
        }
    }

    impl Fake {
        fn one(&mut self, config: &Config) -> Result<f64, Failure> {
            self.calls += 1;
            let index = self.index(config);
            if index == 2 {
                return Err(Failure::new("launch", "refused"));
            }
            let noise = f64::from(self.calls.wrapping_mul(2_654_435_761) % 100) / 100.0;
            Ok(if index == 0 { 130.0 } else { 100.0 + 10.0 * index as f64 } + noise)
        }
    }

    fn field(candidates: &[Config]) -> Field<'_> {
        Field { candidates, pinned: &[], rounds: &ROUNDS }
    }

    fn stopped() -> (Arc<AtomicBool>, Stop) {
        let signal = Arc::new(AtomicBool::new(false));
        (Arc::clone(&signal), Stop::new(signal, None))
    }

    fn fake() -> Fake {
        let problem = Problem::forward(DType::F32, WeightMajor::K, 8, 8, 8);
        Fake { calls: 0, configs: candidates(&problem, Target::Cpu { threads: 1 }) }
    }

    #[test]
    fn the_fastest_that_works_wins_and_failures_keep_their_reason() {
        let mut subject = fake();
        let configs = subject.configs.clone();
        let results = race(&mut subject, &field(&configs), &Stop::default()).outcomes;
        assert_eq!(results.len(), configs.len());
        assert_eq!(results[1].1, Failure::new("verify", "wrong").into());
        assert_eq!(results[2].1, Failure::new("launch", "refused").into());
        let time = |outcome: &Outcome| match outcome {
            Outcome::Measured(measurement) => measurement.median_us,
            Outcome::Failed { .. } => f64::INFINITY,
        };
        let best = results.iter().min_by(|a, b| time(&a.1).total_cmp(&time(&b.1))).unwrap();
        assert!(best.0 == configs[0] || best.0 == configs[3], "{}", best.0);
        let samples = |index: usize| match &results[index].1 {
            Outcome::Measured(measurement) => measurement.samples,
            Outcome::Failed { .. } => 0,
        };
        assert!(samples(0) == 40 && samples(configs.len() - 1) <= 4, "the slow are dropped early");
    }

    #[test]
    fn a_stopped_race_reports_nothing_as_measured_that_was_not() {
        let mut subject = fake();
        let configs = [Config::Cpu(CpuConfig { block_m: 32, block_n: 64, threads: 1 })];
        let (signal, stop) = stopped();
        signal.store(true, Ordering::Relaxed);
        let results = race(&mut subject, &field(&configs), &stop).outcomes;
        assert!(matches!(&results[0].1, Outcome::Failed { stage, .. } if stage == "interrupted"));
    }

    /// Stops the race, or loses the device, after so many calls of `sample`.
    struct Ending<'a> {
        fake: Fake,
        samples_left: usize,
        stop: Option<&'a AtomicBool>,
        lost: bool,
    }

    impl Subject for Ending<'_> {
        fn verify(&mut self, config: &Config) -> Result<f64, Failure> {
            self.fake.verify(config)
        }
        fn sample(&mut self, configs: &[Config]) -> Vec<Result<f64, Failure>> {
            self.samples_left = self.samples_left.saturating_sub(1);
            if self.samples_left > 0 {
                return self.fake.sample(configs);
            }
            match self.stop {
                Some(stop) => stop.store(true, Ordering::Relaxed),
                None => self.lost = true,
            }
            configs.iter().map(|_| Err(Failure::new("launch", "lost"))).collect()
        }
        fn is_lost(&mut self) -> bool {
            self.lost
        }
    }

    #[test]
    fn whenever_a_race_ends_early_no_time_of_it_is_stored() {
        for samples_left in [1, 2, 4, 12, 13, 40] {
            for by_signal in [true, false] {
                let (signal, stop) = stopped();
                let signal = by_signal.then_some(&*signal);
                let mut subject = Ending { fake: fake(), samples_left, stop: signal, lost: false };
                let configs = subject.fake.configs.clone();
                for (config, outcome) in race(&mut subject, &field(&configs), &stop).outcomes {
                    assert!(matches!(&outcome, Outcome::Failed { .. }), "{config}: {outcome:?}");
                }
            }
        }
    }

    #[test]
    fn after_a_candidate_has_taken_the_device_down_no_other_is_blamed() {
        let mut subject = Ending { fake: fake(), samples_left: 1, stop: None, lost: true };
        let configs = subject.fake.configs.clone();
        let outcomes = race(&mut subject, &field(&configs), &Stop::default()).outcomes;
        let stages = outcomes.iter().map(|(_, outcome)| match outcome {
            Outcome::Failed { stage, .. } => stage.as_str(),
            Outcome::Measured(_) => "measured",
        });
        let stages: Vec<_> = stages.collect();
        assert_eq!(stages[..2], ["interrupted", "verify"]);
        assert!(stages[2..].iter().all(|stage| *stage == "interrupted"), "{stages:?}");
    }

    #[test]
    fn drift_that_all_share_is_levelled() {
        let problem = Problem::forward(DType::F32, WeightMajor::K, 8, 8, 8);
        let configs = candidates(&problem, Target::Cpu { threads: 1 });
        let mut entries: Vec<Entry> = configs.into_iter().take(3).map(|config| Entry::new(config, false)).collect();
        for (index, entry) in entries.iter_mut().enumerate() {
            // Time 10 % longer in each pass; candidates 1 % apart.
            entry.samples = (0..5).map(|pass| 100.0 * 1.1f64.powi(pass) * (1.0 + 0.01 * index as f64)).collect();
        }
        level(&mut entries);
        for entry in &entries {
            let spread = quantile(&entry.samples, 1.0) / quantile(&entry.samples, 0.0);
            assert!(spread < 1.0 + 1e-9, "{spread}");
        }
        assert!((entries[2].median() / entries[0].median() - 1.02).abs() < 1e-9);
    }

    #[test]
    fn the_default_and_the_present_winner_stay_until_the_end_and_tell_the_drift() {
        let mut subject = fake();
        let configs = subject.configs.clone();
        let (slowest, slow) = (configs[configs.len() - 1], configs[configs.len() - 2]);
        let raced = race(&mut subject, &Field { pinned: &[slowest, slow], ..field(&configs) }, &Stop::default());
        let finalists: Vec<Config> = raced
            .outcomes
            .iter()
            .filter(|(_, outcome)| matches!(outcome, Outcome::Measured(measured) if measured.samples == 40))
            .map(|(config, _)| *config)
            .collect();
        assert!(finalists.contains(&slowest) && finalists.contains(&slow), "{finalists:?}");
        assert!((0.98..1.02).contains(&raced.drift.unwrap()), "{:?}", raced.drift);
        let with_interval =
            |outcome: &Outcome| matches!(outcome, Outcome::Measured(measured) if measured.interval_us.is_some());
        assert_eq!(raced.outcomes.iter().filter(|(_, outcome)| with_interval(outcome)).count(), finalists.len());
    }

    /// Two that tie in short samples; alone for long the second is faster, once the clock has followed.
    struct Capped {
        configs: Vec<Config>,
    }

    impl Subject for Capped {
        fn verify(&mut self, _: &Config) -> Result<f64, Failure> {
            Ok(1e-7)
        }
        fn sample(&mut self, configs: &[Config]) -> Vec<Result<f64, Failure>> {
            let alone = configs.iter().all(|config| *config == configs[0]);
            let time = |(at, config): (usize, &Config)| {
                let saves = alone && at * 5 >= configs.len() && *config == self.configs[1];
                Ok(if saves { 2700.0 } else { 2800.0 + at as f64 / 100.0 })
            };
            configs.iter().enumerate().map(time).collect()
        }
    }

    #[test]
    fn of_two_that_tie_the_sustained_race_takes_the_one_that_needs_less_power() {
        let configs: Vec<Config> = fake().configs.into_iter().take(2).collect();
        let by = |rounds: &'static [Round]| {
            let mut subject = Capped { configs: configs.clone() };
            race(&mut subject, &Field { rounds, ..field(&configs) }, &Stop::default()).outcomes
        };
        let times = |outcomes: Vec<(Config, Outcome)>| -> Vec<f64> {
            let time = |outcome| match outcome {
                Outcome::Measured(Measurement { median_us, .. }) => median_us,
                Outcome::Failed { reason, .. } => panic!("{reason}"),
            };
            outcomes.into_iter().map(|(_, outcome)| time(outcome)).collect()
        };
        let short = times(by(&ROUNDS));
        assert!((short[0] / short[1] - 1.0).abs() < 1e-3, "{short:?}");
        let sustained = times(by(&SUSTAINED));
        assert!((sustained[0] / sustained[1] - 2800.0 / 2700.0).abs() < 1e-3, "{sustained:?}");
    }

    /// Slows itself down in the passes of these numbers.
    struct Hot {
        fake: Fake,
        pass: u32,
        slowed: std::ops::Range<u32>,
    }

    impl Subject for Hot {
        fn verify(&mut self, config: &Config) -> Result<f64, Failure> {
            self.fake.verify(config)
        }
        fn sample(&mut self, configs: &[Config]) -> Vec<Result<f64, Failure>> {
            self.pass += 1;
            let factor = if self.slowed.contains(&self.pass) { 3.0 } else { 1.0 };
            self.fake.sample(configs).into_iter().map(|time| time.map(|time| factor * time)).collect()
        }
        fn conditions(&self) -> Conditions {
            let slowdown = self.slowed.contains(&self.pass).then(|| "thermal".to_owned());
            Conditions { sm_mhz: Some(1500), power_w: Some(600), slowdown }
        }
    }

    #[test]
    fn slowed_passes_are_taken_again_a_bounded_number_of_times_and_counted() {
        for (slowed, repeated) in [(15..17, 2), (15..1000, REPEATS)] {
            let mut subject = Hot { fake: fake(), pass: 0, slowed };
            let configs = subject.fake.configs.clone();
            let raced = race(&mut subject, &field(&configs), &Stop::default());
            let Outcome::Measured(measured) = &raced.outcomes[3].1 else { panic!("{raced:?}") };
            assert_eq!(measured.repeated, repeated);
            if repeated == 2 {
                assert!(measured.p90_us < 150.0, "no slowed time is among the samples: {measured:?}");
            }
        }
    }

    #[test]
    fn the_interval_of_the_median_covers_it_19_times_of_20() {
        assert_eq!(interval(&[1.0; 7]), None);
        assert_eq!(interval(&[8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]), Some([1.0, 8.0]));
        let mut noise = 1u64;
        let mut uniform = || {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (noise >> 33) as f64 / f64::from(1u32 << 31)
        };
        let covers = |samples: Vec<f64>| interval(&samples).is_some_and(|[low, high]| low <= 0.5 && 0.5 <= high);
        let covered = (0..2000).filter(|_| covers((0..40).map(|_| uniform()).collect())).count();
        assert!((1900..1999).contains(&covered), "{covered}");
    }

    #[test]
    fn quantiles_by_nearest_rank() {
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 0.5), 2.0);
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.9), 5.0);
        assert!(quantile(&[], 0.5).is_nan());
    }
}
