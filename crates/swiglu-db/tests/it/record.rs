//! Keys, their order, and who wins.

use crate::fixture::{CLASS, failed, measured, problem};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use swiglu_db::record::{InvalidKey, winners};
use swiglu_db::{Record, TuningKey};
use swiglu_kernels::families::candidates;
use swiglu_kernels::problem::{DType, WeightMajor};

proptest! {
    #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..Default::default() })]

    #[test]
    fn keys_round_trip_and_sort_by_their_sizes(
        n in any::<[u32; 2]>(), k in any::<[u32; 2]>(), m in any::<[u32; 2]>(), dtype in 0..4_usize,
    ) {
        let keys = [0, 1].map(|i| {
            let mut problem = problem(m[i], n[i], k[i]);
            problem.alignment = 16;
            problem.dtype = DType::ALL[dtype];
            problem.weight_major = WeightMajor::N;
            TuningKey { device_class: CLASS.into(), problem }
        });
        let [a, b] = keys.each_ref().map(ToString::to_string);
        prop_assert_eq!(a.parse(), Ok(keys[0].clone()));
        prop_assert_eq!(a.cmp(&b), (n[0], k[0], m[0]).cmp(&(n[1], k[1], m[1])));
        prop_assert!(a.starts_with(&keys[0].shape_prefix()));
    }

    #[test]
    fn any_text_is_a_key_or_an_error(text in ".*") {
        let parsed: Result<TuningKey, InvalidKey> = text.parse();
        prop_assert!(parsed.is_err());
    }
}

#[test]
fn a_key_with_more_or_fewer_parts_is_refused() {
    let key = TuningKey { device_class: "cpu-x-8".into(), problem: problem(1, 64, 64) }.to_string();
    assert_eq!(key, "cpu-x-8|forward|silu|bf16|k_major|a16|n0000000064|k0000000064|m0000000001");
    assert!(format!("{key}|").parse::<TuningKey>().is_err());
    assert!(key.rsplit_once('|').unwrap().0.parse::<TuningKey>().is_err());
}

#[test]
fn the_lowest_median_wins_and_ties_go_to_the_first_config() {
    let problem = problem(64, 1024, 1024);
    let mut configs = candidates(&problem, crate::fixture::target());
    configs.sort();
    let at = |config: usize, median_us| Record { config: configs[config], ..measured(CLASS, problem, median_us) };
    let (slow, late, early) = (at(0, 9.0), at(2, 5.0), at(1, 5.0));
    let records = [slow, late, early.clone(), failed(CLASS, problem)];
    assert_eq!(winners(records.iter().cloned()), std::slice::from_ref(&early));
    assert_eq!(winners(records.into_iter().rev()), [early]);
}
