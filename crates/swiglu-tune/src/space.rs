//! The candidates of one group of problems, and which of them are still to be measured.

use crate::race::Failure;
use anyhow::Result;
use std::collections::BTreeMap;
use swiglu_db::{Origin, Outcome, Record, TuningDb, TuningKey};
use swiglu_kernels::families::{Target, candidates};
use swiglu_kernels::model::Chip;
use swiglu_kernels::{Config, Problem, render};

/// The candidates of problems that differ in M only: legality and sources do not depend on it.
pub(crate) struct Space {
    /// With the digest of its source ([`render::digest`]), empty on the CPU.
    pub(crate) candidates: BTreeMap<Config, String>,
    /// Hopeless from here on: the time over the best one's, by [`ratio`].
    slow: BTreeMap<Config, f64>,
    /// What does not compile.
    pub(crate) broken: BTreeMap<Config, Failure>,
}

/// A candidate slower than the best by the factor at one M, by [`ratio`], is not tried at the next larger one: from the M on which
/// the ranking no longer turns over by as much.
const HOPELESS: [(u32, f64); 3] = [(2048, 1.25), (512, 1.5), (256, 3.0)];

impl Space {
    pub(crate) fn new(problem: &Problem, target: Target) -> Result<Self> {
        let configs = candidates(problem, target);
        let candidates = match target {
            Target::Cpu { .. } => configs.into_iter().map(|config| (config, String::new())).collect(),
            Target::Gpu(arch) => {
                let sources = render::shared_sources(problem, &configs, arch)?;
                let of_source = sources
                    .iter()
                    .flat_map(|shared| shared.configs.iter().map(|config| (*config, shared.source.digest.clone())));
                let mut digests: BTreeMap<Config, String> = of_source.collect();
                for config in configs.iter().filter(|config| !config.family().has_source()) {
                    digests.insert(*config, render::digest(problem, config, arch)?);
                }
                digests
            }
        };
        Ok(Self { candidates, slow: BTreeMap::new(), broken: BTreeMap::new() })
    }

    /// The same without the library's candidates: it is not there.
    pub(crate) fn without_library(mut self) -> Self {
        self.candidates.retain(|config, _| !config.family().is_library());
        self
    }

    /// Candidates without a record, or whose source has changed since. `every` counts those that were pruned as missing.
    pub(crate) fn missing(&self, db: &TuningDb, key: &TuningKey, every: bool) -> Result<Vec<Config>> {
        let mut missing = Vec::new();
        for (config, digest) in &self.candidates {
            let pruned = every && db.record(key, config)?.is_some_and(|record| is_pruned(&record));
            if pruned || !db.is_measured(key, config, digest)? {
                missing.push(*config);
            }
        }
        Ok(missing)
    }

    /// What was measured here, and is no candidate any more: no race compares it with those that are.
    pub(crate) fn gone(&self, db: &TuningDb, key: &TuningKey) -> Result<Vec<Config>> {
        let is_gone = |record: &Record| {
            let here = record.origin == Origin::Local && record.measurement().is_some();
            here && record.config.family().has_source() && !self.candidates.contains_key(&record.config)
        };
        Ok(db.of_key(key)?.into_iter().filter(is_gone).map(|record| record.config).collect())
    }

    /// Why a candidate is not worth a try.
    pub(crate) fn hopeless(&self, config: &Config) -> Option<Failure> {
        let ratio = self.slow.get(config)?;
        Some(Failure::new("pruned", format!("{ratio:.1}x the best at a smaller m")))
    }

    /// Notes who is hopeless from here on; `best` is not, whatever it was before.
    pub(crate) fn note_slow(&mut self, db: &TuningDb, key: &TuningKey, best: &Record) -> Result<()> {
        self.slow.remove(&best.config);
        let factor = HOPELESS.into_iter().find(|(from_m, _)| key.problem.m >= *from_m);
        let (Some((_, factor)), Some(least)) = (factor, best.measurement()) else { return Ok(()) };
        let chip = Chip::of_class(&key.device_class);
        let least = (least.median_us, &best.config);
        for config in self.candidates.keys() {
            let record = db.record(key, config)?;
            if let Some(time) = record.as_ref().and_then(Record::measurement) {
                let ratio = ratio(chip.as_ref(), &key.problem, (time.median_us, config), least);
                if ratio > factor {
                    self.slow.insert(*config, ratio);
                }
            }
        }
        Ok(())
    }
}

/// One time over another: at this M, or at twice as many tokens where that is less, since tiles that leave multiprocessors idle here
/// take as long there. What the model says nothing of, the library, is taken to double.
fn ratio(chip: Option<&Chip>, problem: &Problem, slow: (f64, &Config), best: (f64, &Config)) -> f64 {
    let twice = problem.m.saturating_mul(2);
    let there = |(us, config): (f64, &Config)| {
        chip.and_then(|chip| chip.at_other_m(us, problem, config, twice)).unwrap_or(2.0 * us)
    };
    (slow.0 / best.0).min(there(slow) / there(best))
}

fn is_pruned(record: &Record) -> bool {
    matches!(&record.outcome, Outcome::Failed { stage, .. } if stage == "pruned")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::tests::shipped_h200;
    use crate::workload::ANCHORS;
    use swiglu_kernels::Op;
    use swiglu_kernels::families::{Raster, Schedule, WgmmaTmaConfig, default_config};
    use swiglu_kernels::{DType, WeightMajor, arch};

    #[test]
    fn the_librarys_candidates_have_digests_and_are_left_out_where_it_is_missing() {
        let target = Target::Gpu(arch::by_name("sm_90a").unwrap());
        let problem = Problem::forward(DType::Bf16, WeightMajor::K, 1, 1024, 1024).with_op(Op::Down);
        let count = |space: &Space| space.candidates.keys().filter(|it| it.family().is_library()).count();
        let space = Space::new(&problem, target).unwrap();
        assert_eq!(count(&space), 5);
        assert!(space.candidates.values().all(|digest| digest.len() == 64));
        let all = space.candidates.len();
        let without = space.without_library();
        assert_eq!((count(&without), without.candidates.len()), (0, all - 5));
    }

    /// An order of tiles that the space no longer draws.
    #[test]
    fn what_left_the_space_is_gone_and_nothing_else() {
        let of_tma = |record: &Record| matches!(record.config, Config::WgmmaTma(it) if it.raster == Raster::Resident);
        let present = Record { origin: Origin::Local, ..shipped_h200().into_iter().find(of_tma).unwrap() };
        let Config::WgmmaTma(tile) = present.config else { panic!("wgmma_tma") };
        let config = Config::WgmmaTma(WgmmaTmaConfig { raster: Raster::AlongM, raster_group: 4, ..tile });
        let left = Record { config, ..present.clone() };
        let elsewhere = Record {
            config: Config::WgmmaTma(WgmmaTmaConfig { raster: Raster::AlongM, raster_group: 8, ..tile }),
            origin: Origin::Import("other.toml".into()),
            ..present.clone()
        };
        let folder = tempfile::tempdir().unwrap();
        let mut db = TuningDb::open(folder.path()).unwrap();
        db.insert(&[present.clone(), left.clone(), elsewhere]).unwrap();
        let space = Space::new(&present.problem, present.device.target().unwrap()).unwrap();
        assert_eq!(space.gone(&db, &present.key()).unwrap(), [left.config]);
    }

    /// The times are an H200's.
    #[test]
    fn tiles_that_leave_multiprocessors_idle_are_not_hopeless_yet() {
        let chip = Chip::of_class("sm_90a-sm132-l2_60m-smem227k-bus6016-mem3201mhz");
        let problem = Problem::forward(DType::Bf16, WeightMajor::K, 512, 8192, 2048).with_op(Op::InputGrad);
        let all = candidates(&problem, Target::Gpu(arch::by_name("sm_90a").unwrap()));
        let find = |schedule: Schedule, block_n: u32| {
            let is_it = |config: &&Config| match config {
                Config::WgmmaGemm(it) => {
                    (it.schedule, it.block_m, it.block_n, it.cluster_k) == (schedule, 128, block_n, 1)
                }
                _ => false,
            };
            all.iter().find(is_it).unwrap()
        };
        let library = all.iter().find(|config| config.family().is_library()).unwrap();
        // 64 tiles, and 128 at twice as many tokens: the same time. Of half the width they fill the device already.
        let over_library = |us: f64, config| ratio(chip.as_ref(), &problem, (us, config), (53.8, library));
        assert!((over_library(94.4, find(Schedule::Cooperative, 128)) - 94.4 / 107.6).abs() < 1e-9);
        assert!((over_library(70.7, find(Schedule::Pingpong, 64)) - 70.7 / 53.8).abs() < 1e-9);
    }

    #[test]
    fn the_default_is_always_a_candidate() {
        let arch = arch::by_name("sm_90a").unwrap();
        for (dtype, weight_major) in
            DType::ALL.into_iter().flat_map(|dtype| WeightMajor::ALL.map(|major| (dtype, major)))
        {
            for (n, k) in [(14336, 4096), (8192, 2048), (1000, 1000), (1001, 999)] {
                let problem = Problem::forward(dtype, weight_major, 1, n, k);
                let space = Space::new(&problem, Target::Gpu(arch)).unwrap();
                for m in ANCHORS {
                    // Scaled formats ask for a layout and an alignment that not every size has.
                    let default = match default_config(&problem.with_m(m), arch) {
                        Ok(default) => default,
                        Err(_) if dtype.is_scaled() => continue,
                        Err(why) => panic!("{dtype} {weight_major} {m} {n} {k}: {why}"),
                    };
                    assert!(space.candidates.contains_key(&default), "{dtype} {weight_major} {m} {n} {k}: {default}");
                }
            }
        }
    }
}
