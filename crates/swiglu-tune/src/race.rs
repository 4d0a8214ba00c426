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

/// Races `candidates`; the outcome of each, in their order. Stops early, with what is known, when `stop` is set.
pub(crate) fn race(subject: &mut dyn Subject, candidates: &[Config], stop: &AtomicBool) -> Vec<(Config, Outcome)> {
    let mut entries: Vec<Entry> = candidates.iter().map(|&config| Entry::new(config)).collect();
    for entry in &mut entries {
        if stop.load(Ordering::Relaxed) {
            entry.failure = Some(Failure::new("interrupted", "stopped before it was verified"));
            continue;
        }
        match subject.verify(&entry.config) {
            Ok(error) => entry.error = error,
            Err(failure) => entry.failure = Some(failure),
        }
    }
    for (index, round) in ROUNDS.into_iter().enumerate() {
        drop_slow(&mut entries, &round);
        if index + 1 == ROUNDS.len() {
            settle(subject, &mut entries);
        }
        for _ in 0..round.samples {
            if stop.load(Ordering::Relaxed) {
                return outcomes(entries);
            }
            let mut racing: Vec<&mut Entry> = entries.iter_mut().filter(|entry| entry.racing()).collect();
            // Clocks lag behind power, so that every candidate shall have every predecessor.
            racing.shuffle(&mut rand::rng());
            let configs: Vec<Config> = racing.iter().map(|entry| entry.config).collect();
            for (entry, sample) in racing.iter_mut().zip(subject.sample(&configs)) {
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
        None if entry.samples.is_empty() => {
            (entry.config, Failure::new("interrupted", "stopped before it was timed").into())
        }
        None => {
            let scale = entry.dropped.map_or(1.0, |ratio| winner * ratio / entry.median());
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
