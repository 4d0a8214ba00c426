//! From candidates to measured times: verify each, then time them in rounds that drop the slow ones.

use rand::seq::SliceRandom;
use std::sync::atomic::{AtomicBool, Ordering};
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
    /// Whether the device no longer works, so that a failure says nothing of a candidate. Asked after one.
    fn is_lost(&mut self) -> bool {
        false
    }
}

/// Why a candidate is out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// `compile`, `spill`, `launch`, `verify` or `pruned`.
    pub(crate) stage: &'static str,
    pub(crate) reason: String,
}

impl Failure {
    pub(crate) fn new(stage: &'static str, reason: impl ToString) -> Self {
        Self { stage, reason: reason.to_string() }
    }
}

impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Self {
        Self::Failed { stage: failure.stage.into(), reason: failure.reason }
    }
}

/// A round of the race.
struct Round {
    /// Per candidate.
    samples: usize,
    /// Candidates slower than the best by more than this factor are out before the round,
    within: f64,
    /// and all but so many of the fastest.
    most: usize,
}

/// The last round decides, by its own samples, taken when the clocks have settled under load.
const ROUNDS: [Round; 4] = [
    Round { samples: 1, within: f64::INFINITY, most: usize::MAX },
    Round { samples: 3, within: 2.0, most: 48 },
    Round { samples: 8, within: 1.2, most: 24 },
    Round { samples: 40, within: 1.06, most: 8 },
];

/// Races `candidates`; the outcome of each, in their order. What a race that `stop` or a lost device ended has not failed
/// is `interrupted`: a later run races it again, all against all.
pub(crate) fn race(subject: &mut dyn Subject, candidates: &[Config], stop: &AtomicBool) -> Vec<(Config, Outcome)> {
    let mut entries: Vec<Entry> = candidates.iter().map(|&config| Entry::new(config)).collect();
    let mut lost = false;
    for entry in &mut entries {
        if lost || stop.load(Ordering::Relaxed) {
            break;
        }
        match subject.verify(&entry.config) {
            Ok(error) => entry.error = error,
            Err(failure) => {
                entry.failure = Some(failure);
                lost = subject.is_lost();
            }
        }
    }
    if lost || stop.load(Ordering::Relaxed) {
        return interrupted(entries);
    }
    for (index, round) in ROUNDS.into_iter().enumerate() {
        drop_slow(&mut entries, &round);
        if index + 1 == ROUNDS.len() {
            settle(subject, &mut entries);
        }
        for _ in 0..round.samples {
            if stop.load(Ordering::Relaxed) {
                return interrupted(entries);
            }
            let mut racing: Vec<&mut Entry> = entries.iter_mut().filter(|entry| entry.racing()).collect();
            // Clocks lag behind power, so that every candidate shall have every predecessor.
            racing.shuffle(&mut rand::rng());
            let configs: Vec<Config> = racing.iter().map(|entry| entry.config).collect();
            let samples = subject.sample(&configs);
            if samples.iter().any(Result::is_err) && subject.is_lost() {
                return interrupted(entries);
            }
            for (entry, sample) in racing.iter_mut().zip(samples) {
                match sample {
                    Ok(time) => entry.samples.push(time),
                    Err(failure) => entry.failure = Some(failure),
                }
            }
        }
    }
    level(&mut entries);
    outcomes(entries)
}

/// Times of a race that was not run to its end do not compare.
fn interrupted(mut entries: Vec<Entry>) -> Vec<(Config, Outcome)> {
    for entry in entries.iter_mut().filter(|entry| entry.failure.is_none()) {
        entry.failure = Some(Failure::new("interrupted", "stopped before the race was over"));
    }
    outcomes(entries)
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
        if rank >= round.most || entry.median() > best * round.within {
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
        entry.samples.clear();
    }
}

struct Entry {
    config: Config,
    error: f64,
    samples: Vec<f64>,
    failure: Option<Failure>,
    /// Its time over the best one's, when it went out.
    dropped: Option<f64>,
}

impl Entry {
    fn new(config: Config) -> Self {
        Self { config, error: 0.0, samples: Vec::new(), failure: None, dropped: None }
    }

    fn racing(&self) -> bool {
        self.failure.is_none() && self.dropped.is_none()
    }

    fn median(&self) -> f64 {
        quantile(&self.samples, 0.5)
    }
}

/// What is stored. Only times of one round compare: those of candidates that went out early are given as the winner's time
/// times the ratio at that moment, so that none of them, timed on a cooler GPU, looks faster than the winner.
fn outcomes(entries: Vec<Entry>) -> Vec<(Config, Outcome)> {
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

#[cfg(test)]
mod tests {
    use super::*;
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

    fn fake() -> Fake {
        let problem = Problem::forward(DType::F32, WeightMajor::K, 8, 8, 8);
        Fake { calls: 0, configs: candidates(&problem, Target::Cpu { threads: 1 }) }
    }

    #[test]
    fn the_fastest_that_works_wins_and_failures_keep_their_reason() {
        let mut subject = fake();
        let configs = subject.configs.clone();
        let results = race(&mut subject, &configs, &AtomicBool::new(false));
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
        let results = race(&mut subject, &configs, &AtomicBool::new(true));
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
                let stop = AtomicBool::new(false);
                let signal = by_signal.then_some(&stop);
                let mut subject = Ending { fake: fake(), samples_left, stop: signal, lost: false };
                let configs = subject.fake.configs.clone();
                for (config, outcome) in race(&mut subject, &configs, &stop) {
                    assert!(matches!(&outcome, Outcome::Failed { .. }), "{config}: {outcome:?}");
                }
            }
        }
    }

    #[test]
    fn after_a_candidate_has_taken_the_device_down_no_other_is_blamed() {
        let mut subject = Ending { fake: fake(), samples_left: 1, stop: None, lost: true };
        let configs = subject.fake.configs.clone();
        let outcomes = race(&mut subject, &configs, &AtomicBool::new(false));
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
        let mut entries: Vec<Entry> = configs.into_iter().take(3).map(Entry::new).collect();
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
    fn quantiles_by_nearest_rank() {
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 0.5), 2.0);
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.9), 5.0);
        assert!(quantile(&[], 0.5).is_nan());
    }
}
