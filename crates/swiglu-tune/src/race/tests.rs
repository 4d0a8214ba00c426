//! The race on subjects that are made up.

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

/// All but the slow last tie in short samples; alone for long the second is the fastest, and the third fails.
struct Capped {
    configs: Vec<Config>,
    sustained: u32,
    hot: u32,
    stop: Option<(u32, Arc<AtomicBool>)>,
}

impl Subject for Capped {
    fn verify(&mut self, _: &Config) -> Result<f64, Failure> {
        Ok(1e-7)
    }
    fn sample(&mut self, configs: &[Config]) -> Vec<Result<f64, Failure>> {
        let slow = |config: &Config| *config == self.configs[self.configs.len() - 1];
        configs.iter().map(|config| Ok(if slow(config) { 3000.0 } else { 2800.0 })).collect()
    }
    fn sustain(&mut self, config: &Config) -> Result<f64, Failure> {
        self.sustained += 1;
        if let Some((after, signal)) = &self.stop {
            signal.store(self.sustained >= *after, Ordering::Relaxed);
        }
        match self.configs.iter().position(|known| known == config) {
            Some(1) => Ok(2700.0),
            Some(2) => Err(Failure::new("crash", "broke its worker")),
            _ => Ok(2750.0),
        }
    }
    fn conditions(&self) -> Conditions {
        let slowdown = (self.sustained == self.hot).then(|| "thermal".to_owned());
        Conditions { sm_mhz: Some(1000 + self.sustained), power_w: None, slowdown }
    }
}

fn capped(hot: u32, stop: Option<(u32, Arc<AtomicBool>)>) -> Capped {
    Capped { configs: fake().configs.into_iter().take(5).collect(), sustained: 0, hot, stop }
}

fn time_of(outcome: &Outcome) -> f64 {
    match outcome {
        Outcome::Measured(measured) => measured.median_us,
        Outcome::Failed { .. } => f64::NAN,
    }
}

#[test]
fn a_sustained_race_tells_apart_what_ties_in_short_samples() {
    let mut subject = capped(u32::MAX, None);
    let configs = subject.configs.clone();
    let short = race(&mut subject, &field(&configs), &Stop::default()).outcomes;
    assert_eq!((time_of(&short[0].1), time_of(&short[1].1), subject.sustained), (2800.0, 2800.0, 0));
    let raced = race(&mut subject, &Field { rounds: &SUSTAINED, ..field(&configs) }, &Stop::default());
    let times: Vec<f64> = raced.outcomes.iter().map(|(_, outcome)| time_of(outcome)).collect();
    assert_eq!(times[..2], [2750.0, 2700.0]);
    assert_eq!(raced.outcomes[2].1, Failure::new("crash", "broke its worker").into());
    // Out before the sustained rounds: behind all that came to them.
    assert!((times[4] - 2750.0 * 3000.0 / 2800.0).abs() < 1e-6, "{times:?}");
    let samples = |index: usize| match &raced.outcomes[index].1 {
        Outcome::Measured(measured) => (measured.samples, measured.interval_us),
        Outcome::Failed { reason, .. } => panic!("{reason}"),
    };
    assert_eq!(samples(1), (16, Some([2700.0, 2700.0])));
}

#[test]
fn a_sustained_sample_of_a_hot_gpu_is_taken_again_and_a_stop_ends_the_pass() {
    let mut subject = capped(2, None);
    let configs = subject.configs.clone();
    let raced = race(&mut subject, &Field { rounds: &SUSTAINED, ..field(&configs) }, &Stop::default());
    let Outcome::Measured(measured) = &raced.outcomes[1].1 else { panic!("{raced:?}") };
    assert_eq!(measured.repeated, 1);

    let (signal, stop) = stopped();
    let mut subject = capped(u32::MAX, Some((2, signal)));
    let raced = race(&mut subject, &Field { rounds: &SUSTAINED, ..field(&configs) }, &stop);
    assert_eq!(subject.sustained, 2, "not to the end of the pass");
    assert!(raced.outcomes.iter().all(|(_, outcome)| matches!(outcome, Outcome::Failed { .. })));
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
