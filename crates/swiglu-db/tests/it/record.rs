//! Keys, their order, and who wins.

use crate::fixture::{CLASS, failed, measured, problem};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use swiglu_db::record::{InvalidKey, choose, winners};
use swiglu_db::{Measurement, Outcome, Record, TuningKey, shipped};
use swiglu_kernels::families::{CublasltConfig, candidates};
use swiglu_kernels::problem::{DType, WeightMajor};
use swiglu_kernels::{Config, Op, Target, arch};

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
    fn a_changed_key_is_another_key_or_an_error(
        at in any::<prop::sample::Index>(), from in 0..=1_usize, by in "[0-9+|amnk_ é\\-]{0,2}",
    ) {
        let key = TuningKey { device_class: CLASS.into(), problem: problem(1, 64, 4096) };
        let mut text = key.to_string();
        let at = at.index(text.len());
        text.replace_range(at..at + from, &by);
        let parsed: Result<TuningKey, InvalidKey> = text.parse();
        prop_assert_eq!(parsed.as_ref() == Ok(&key), text == key.to_string());
        match parsed {
            Ok(parsed) => prop_assert_eq!(parsed.to_string(), text),
            Err(error) => prop_assert_eq!(error.0, text),
        }
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

/// Four configs from small to large shared memory, each with its median and interval.
fn raced(times: [(f64, Option<[f64; 2]>); 4]) -> [Record; 4] {
    let problem = problem(64, 1024, 1024);
    let mut configs = candidates(&problem, crate::fixture::target());
    configs.sort_by_key(|config| (config.launch_shape(&problem).unwrap().smem_bytes, *config));
    let step = configs.len() / 4;
    std::array::from_fn(|at| {
        let (median_us, interval_us) = times[at];
        let mut record = Record { config: configs[at * step], ..measured(CLASS, problem, median_us) };
        record.outcome = Outcome::Measured(Measurement { interval_us, ..*record.measurement().unwrap() });
        record
    })
}

#[test]
fn of_those_that_cannot_be_told_apart_the_least_serves_unless_its_race_chose_another() {
    let around = |us: f64| (us, Some([us - 0.01, us + 0.01]));
    // The second and the last are within the noise of the third, which is the fastest; the first is not.
    let mut records = raced([around(102.0), around(100.3), around(100.0), around(100.4)]);
    assert_eq!(winners(records.to_vec()), [records[1].clone()]);

    let present = records[3].config;
    choose(&mut records, Some(&present));
    let chosen = |record: &Record| record.measurement().unwrap().chosen;
    assert_eq!(records.each_ref().map(chosen), [false, false, false, true]);
    assert_eq!(winners(records.to_vec()), [records[3].clone()], "the present winner stays among equals");

    let beaten = records[0].config;
    choose(&mut records, Some(&beaten));
    assert_eq!(records.each_ref().map(chosen), [false, true, false, false], "one that is slower by more does not");
}

#[test]
fn an_interval_wider_than_the_noise_counts_and_without_intervals_only_equal_times_tie() {
    let with = |us| raced([(us, Some([99.0, 121.0])), (104.0, None), (100.0, Some([99.9, 100.1])), (100.0, None)]);
    let near = with(101.5);
    assert_eq!(winners(near.to_vec()), [near[0].clone()]);
    // What looks slower by a tenth is not taken, however unsure its race was.
    let far = with(110.0);
    assert_eq!(winners(far.to_vec()), [far[2].clone()]);
    let without = raced([(100.1, None), (104.0, None), (100.0, None), (100.0, None)]);
    assert_eq!(winners(without.to_vec()), [without[2].clone()]);
}

#[test]
fn a_librarys_record_round_trips_and_serves_only_where_no_kernel_of_ours_ties_with_it() {
    let problem = problem(64, 1024, 1024).with_op(Op::Down);
    let ours = measured(CLASS, problem, 100.0);
    let config = Config::Cublaslt(CublasltConfig { algorithm: 1 });
    let library = |median_us| {
        let mut record = Record { config, ..measured(CLASS, problem, median_us) };
        record.environment.registers = 0;
        record
    };
    let tie = [ours.clone(), library(100.0)];
    assert_eq!(winners(tie), std::slice::from_ref(&ours));
    assert_eq!(winners([ours.clone(), library(90.0)]), [library(90.0)]);
    let text = shipped::export(&library(90.0).device, &[library(90.0)]).unwrap();
    assert!(text.contains(r#"config = { family = "cublaslt", algorithm = 1 }"#), "{text}");
    assert_eq!(shipped::parse("a.toml".as_ref(), &text).unwrap()[0].config, config);
    let line = serde_json::to_string(&library(90.0)).unwrap();
    assert_eq!(serde_json::from_str::<Record>(&line).unwrap(), library(90.0));
}

#[test]
fn a_librarys_record_names_the_kernel_of_ours_that_came_next() {
    let problem = problem(64, 1024, 1024).with_op(Op::Down);
    let target = Target::Gpu(arch::by_name("sm_90a").unwrap());
    let all = candidates(&problem, target);
    let slow = Record { config: all[0], ..measured(CLASS, problem, 100.0) };
    let next = Record { config: all[1], ..measured(CLASS, problem, 95.0) };
    let config = Config::Cublaslt(CublasltConfig { algorithm: 1 });
    let mut raced = [slow, Record { config, ..measured(CLASS, problem, 90.0) }, next];
    choose(&mut raced, None);
    let stand_ins = raced.each_ref().map(|record| record.measurement().unwrap().stand_in);
    assert_eq!(stand_ins, [None, Some(all[1]), None]);
    let text = shipped::export(&raced[1].device, &raced[1..2]).unwrap();
    let read = shipped::parse("a.toml".as_ref(), &text).unwrap();
    assert_eq!(read[0].measurement().unwrap().stand_in, Some(all[1]));
}

#[test]
fn a_record_from_before_intervals_clocks_and_choices_reads() {
    let record = measured(CLASS, problem(64, 1024, 1024), 5.0);
    let text = serde_json::to_string(&record).unwrap();
    for name in ["interval_us", "repeated", "chosen", "sm_mhz", "power_w"] {
        assert!(!text.contains(name), "{name} is written although there is none");
    }
    assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
}
