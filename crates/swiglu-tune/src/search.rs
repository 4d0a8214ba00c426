//! Which candidates are measured at all: the model's best, what won nearby, the default.

use clap::ValueEnum;
use std::collections::{BTreeMap, BTreeSet};
use swiglu_db::Record;
use swiglu_kernels::families::LaunchShape;
use swiglu_kernels::model::Chip;
use swiglu_kernels::{Config, Problem};

/// How candidates are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Search {
    /// Every candidate is tried; slow ones go out early.
    All,
    /// A tenth of them: the model's best, what won nearby, the default.
    Model,
    /// Every candidate is timed properly, with nothing pruned.
    #[value(skip)]
    Exhaustive,
}

/// The share of the candidates that is measured.
const SHARE: f64 = 0.09;
/// A space of fewer candidates is not worth a search.
pub(crate) const WORTH: usize = 100;
/// Configs taken from neighbours.
const SEEDS: usize = 8;
/// Raster orders that one source is measured in: they differ by little, and sources by much.
const ORDERS: usize = 2;

/// The candidates of `problem` to measure, the most promising first: `wanted` and the library's, of which the model knows
/// nothing, in any case, then the winners of `seeds` near it, then by the model's order. All of them where there is no model, as
/// of the steps, where it errs, as of weights in few bits, or they are few.
pub(crate) fn pick(
    chip: Option<&Chip>,
    problem: &Problem,
    candidates: &BTreeMap<Config, String>,
    wanted: &[Config],
    seeds: &[Record],
) -> Vec<Config> {
    let is_modelled = problem.op.is_forward() && problem.dtype.x() == problem.dtype.weights();
    let Some(chip) = chip.filter(|_| is_modelled && candidates.len() >= WORTH) else {
        return candidates.keys().copied().collect();
    };
    let most = (SHARE * candidates.len() as f64) as usize;
    let mut picked: Vec<Config> = Vec::new();
    let mut taken: BTreeSet<Config> = BTreeSet::new();
    let library = candidates.keys().copied().filter(|config| config.family().is_library());
    let wanted = wanted.iter().copied().filter(|config| candidates.contains_key(config));
    for config in wanted.chain(library).chain(nearest(problem, seeds, candidates)) {
        if taken.insert(config) {
            picked.push(config);
        }
    }
    let mut of_source: BTreeMap<&str, usize> = BTreeMap::new();
    for (config, source) in by_model(chip, problem, candidates) {
        let orders = of_source.entry(source).or_default();
        if picked.len() >= most {
            break;
        }
        if *orders < orders_that_differ(problem, &config) && taken.insert(config) {
            *orders += 1;
            picked.push(config);
        }
    }
    picked
}

/// Where one tile covers all rows or all columns, every order walks the same way.
fn orders_that_differ(problem: &Problem, config: &Config) -> usize {
    let one_band = |shape: LaunchShape| problem.m <= shape.block_m || problem.n <= shape.block_n;
    if config.launch_shape(problem).is_some_and(one_band) { 1 } else { ORDERS }
}

fn by_model<'a>(
    chip: &Chip,
    problem: &Problem,
    candidates: &'a BTreeMap<Config, String>,
) -> impl Iterator<Item = (Config, &'a str)> {
    let time = |config: &Config| chip.predict_us(problem, config).unwrap_or(f64::INFINITY);
    let mut all: Vec<_> = candidates.iter().map(|(config, source)| (time(config), *config, source.as_str())).collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
    all.into_iter().map(|(_, config, source)| (config, source))
}

/// The winners of the nearest problems of the same kind that are candidates, each config once.
fn nearest(problem: &Problem, seeds: &[Record], candidates: &BTreeMap<Config, String>) -> Vec<Config> {
    let log2 = |size: u32| f64::from(size.max(1)).log2();
    let far = |seed: &Problem| {
        // The number of tokens decides more than the width.
        2.0 * (log2(seed.m) - log2(problem.m)).abs()
            + (log2(seed.n) - log2(problem.n)).abs()
            + (log2(seed.k) - log2(problem.k)).abs()
    };
    let same = |seed: &&Record| {
        let theirs = &seed.problem;
        (theirs.op.is_forward(), theirs.dtype, theirs.weight_major, theirs.alignment)
            == (problem.op.is_forward(), problem.dtype, problem.weight_major, problem.alignment)
            && candidates.contains_key(&seed.config)
    };
    let mut near: Vec<&Record> = seeds.iter().filter(same).collect();
    near.sort_by(|a, b| far(&a.problem).total_cmp(&far(&b.problem)));
    let mut configs = Vec::new();
    for record in near {
        if !configs.contains(&record.config) {
            configs.push(record.config);
        }
        if configs.len() == SEEDS {
            break;
        }
    }
    configs
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::space::Space;
    use swiglu_db::shipped;
    use swiglu_kernels::DType;

    pub(crate) fn shipped_h200() -> Vec<Record> {
        let text = shipped::TABLES.iter().find(|(name, _)| *name == "nvidia-h200.toml").unwrap().1;
        let mut records = shipped::parse("nvidia-h200.toml".as_ref(), text).unwrap();
        // What there is a model for, calibrated.
        records.retain(|record| record.problem.op.is_forward() && record.problem.dtype == DType::Bf16);
        records
    }

    #[test]
    fn the_model_meets_what_was_measured_on_an_h200_within_a_third() {
        for record in shipped_h200() {
            let chip = Chip::of_class(&record.device.class).unwrap();
            let Problem { m, n, k, .. } = record.problem;
            let measured = record.measurement().unwrap().median_us;
            let ratio = chip.predict_us(&record.problem, &record.config).unwrap() / measured;
            assert!((0.75..1.33).contains(&ratio), "M {m} N {n} K {k}, {}: {ratio:.2} of {measured} us", record.config);
        }
    }

    /// In the order of tuning, each problem seeded by those before it. Only winners are known here, not what others take;
    /// `regret` tells that, on a database of an exhaustive run.
    #[test]
    fn nearly_all_winners_on_an_h200_are_among_a_tenth_of_the_candidates() {
        let records = shipped_h200();
        let chip = Chip::of_class(&records[0].device.class).unwrap();
        let target = records[0].device.target().unwrap();
        let mut found = 0;
        let mut spaces = BTreeMap::new();
        for (at, record) in records.iter().enumerate() {
            let problem = record.problem;
            let space = spaces.entry(problem.with_m(1)).or_insert_with(|| Space::new(&problem, target).unwrap());
            let sources = &space.candidates;
            let picked = pick(Some(&chip), &problem, sources, &[], &records[..at]);
            assert!(picked.len() * 10 < sources.len(), "{} of {}", picked.len(), sources.len());
            // What differs in the order of tiles only is as good.
            found += usize::from(picked.iter().any(|config| sources[config] == sources[&record.config]));
        }
        assert!(found * 20 >= records.len() * 19, "{found} of {}", records.len());
    }

    #[test]
    fn what_is_wanted_and_what_won_nearby_is_measured_and_without_a_model_everything() {
        let records = shipped_h200();
        let (chip, target) = (Chip::of_class(&records[0].device.class).unwrap(), records[0].device.target().unwrap());
        let near = records.iter().find(|record| (record.problem.m, record.problem.n) == (512, 3584)).unwrap();
        let problem = near.problem.with_m(520);
        let sources = Space::new(&problem, target).unwrap().candidates;
        let wanted = *sources.keys().next().unwrap();
        let picked = pick(Some(&chip), &problem, &sources, &[wanted], &records);
        assert_eq!(picked[..2], [wanted, near.config]);
        assert_eq!(picked.iter().collect::<BTreeSet<_>>().len(), picked.len(), "each once");
        assert_eq!(pick(None, &problem, &sources, &[], &records).len(), sources.len());
        let wide = Problem { dtype: DType::F32, ..problem };
        let sources_of_wide = Space::new(&wide, target).unwrap().candidates;
        let picked = pick(Some(&chip), &wide, &sources_of_wide, &[], &records);
        assert!(picked[..5].iter().all(|config| config.family().is_library()), "{:?}", &picked[..5]);
        let few: BTreeMap<_, _> = sources.into_iter().take(20).collect();
        assert_eq!(pick(Some(&chip), &problem, &few, &[], &records).len(), 20);
    }
}
