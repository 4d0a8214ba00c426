//! Records to store, and reproducible noise.

use swiglu_db::{Device, Environment, Measurement, Origin, Outcome, Record};
use swiglu_kernels::arch;
use swiglu_kernels::families::{Config, Target, default_config};
use swiglu_kernels::problem::{DType, Problem, WeightMajor};

pub(crate) const CLASS: &str = "sm_90a-sm132-l2_60m-smem227k-bus6144";

pub(crate) fn target() -> Target {
    Target::Gpu(arch::by_name("sm_90a").unwrap())
}

pub(crate) fn problem(m: u32, n: u32, k: u32) -> Problem {
    Problem::forward(DType::Bf16, WeightMajor::K, m, n, k)
}

pub(crate) fn default_of(problem: &Problem) -> Config {
    default_config(problem, arch::by_name("sm_90a").unwrap()).unwrap()
}

/// The default config of `problem`, measured.
pub(crate) fn measured(class: &str, problem: Problem, median_us: f64) -> Record {
    let (p10_us, p90_us) = (median_us * 0.99, median_us * 1.01);
    Record {
        device: Device { class: class.into(), name: "NVIDIA H200".into() },
        problem,
        config: default_of(&problem),
        outcome: Outcome::Measured(Measurement {
            median_us,
            p10_us,
            p90_us,
            samples: 50,
            error: 1.234e-4,
            ..Measurement::default()
        }),
        environment: Environment {
            nvrtc: "13.0".into(),
            driver: "580.159.04".into(),
            version: "0.1.0".into(),
            source_digest: "a1b2".into(),
            registers: 168,
            date: "2026-11-21T01:15:44Z".into(),
            ..Environment::default()
        },
        origin: Origin::Local,
    }
}

pub(crate) fn failed(class: &str, problem: Problem) -> Record {
    let outcome = Outcome::Failed { stage: "compile".into(), reason: "line 1\nline\t2 \"é\"".into() };
    Record { outcome, ..measured(class, problem, 1.0) }
}

/// Record number `i` of a series with distinct keys and times that no short decimal names.
pub(crate) fn series(i: u32) -> Record {
    let problem = problem(1 << (i % 14), 1024 * (1 + i / 14), 4096);
    if i % 7 == 3 { failed(CLASS, problem) } else { measured(CLASS, problem, 10.0 / 3.0 + f64::from(i).sqrt()) }
}

/// By key and config, as the database orders them.
pub(crate) fn sorted(records: impl IntoIterator<Item = Record>) -> Vec<Record> {
    let mut records: Vec<_> = records.into_iter().collect();
    records.sort_by_key(|record| (record.key().to_string(), record.config.to_string()));
    records
}

/// SplitMix64.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) % bound as u64) as usize
    }
}
