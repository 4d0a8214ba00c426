//! Faults on demand, so that what a broken candidate does to a run can be seen: `verify:hang:cpu 32x64`.
#![allow(unsafe_code, reason = "launches a kernel that is made to fail")]

use crate::gpu_subject::GpuLab;
use crate::protocol::Reply;
use crate::race::{Failure, Subject};
use cudarc::driver::LaunchConfig;
use cudarc::nvrtc::Ptx;
use std::fmt;
use std::process;
use std::str::FromStr;
use std::thread;
use std::time::Duration;
use swiglu_kernels::Config;

/// What happens, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    at: Step,
    how: Kind,
    /// Part of the text of the configs it strikes.
    config: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Verify,
    Sample,
    Sustain,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The process ends at once.
    Crash,
    /// It never answers.
    Hang,
    /// The device no longer works in the process.
    Poison,
    /// It answers what it was not asked.
    Babble,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = match self.at {
            Step::Verify => "verify",
            Step::Sample => "sample",
            Step::Sustain => "sustain",
        };
        let how = match self.how {
            Kind::Crash => "crash",
            Kind::Hang => "hang",
            Kind::Poison => "poison",
            Kind::Babble => "babble",
        };
        write!(f, "{at}:{how}:{}", self.config)
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (at, rest) = text.split_once(':')?;
            let (how, config) = rest.split_once(':')?;
            let at = match at {
                "verify" => Step::Verify,
                "sample" => Step::Sample,
                "sustain" => Step::Sustain,
                _ => return None,
            };
            let how = match how {
                "crash" => Kind::Crash,
                "hang" => Kind::Hang,
                "poison" => Kind::Poison,
                "babble" => Kind::Babble,
                _ => return None,
            };
            Some(Self { at, how, config: config.into() })
        };
        parse().ok_or_else(|| "use verify|sample|sustain:crash|hang|poison|babble:PART OF A CONFIG".into())
    }
}

/// A subject some of whose candidates break it.
pub(crate) struct Faulty<'a, S> {
    pub(crate) inner: S,
    pub(crate) faults: &'a [Fault],
    /// Where kernels are made to hang or to fail; none on the CPU.
    pub(crate) lab: Option<&'a GpuLab>,
    pub(crate) is_lost: bool,
}

impl<S: Subject> Faulty<'_, S> {
    fn strike(&mut self, at: Step, config: &Config) -> Result<(), Failure> {
        let strikes = |fault: &&Fault| fault.at == at && config.to_string().contains(&fault.config);
        let Some(fault) = self.faults.iter().find(strikes) else { return Ok(()) };
        match (fault.how, self.lab) {
            (Kind::Crash, _) => process::abort(),
            (Kind::Hang, Some(lab)) => launch(lab, ENDLESS),
            (Kind::Hang, None) => loop {
                thread::sleep(Duration::from_secs(1));
            },
            (Kind::Poison, Some(lab)) => launch(lab, TRAP),
            (Kind::Poison, None) => {
                self.is_lost = true;
                Err(Failure::new("launch", "an illegal address, say"))
            }
            (Kind::Babble, _) => {
                println!("{}", serde_json::json!(Reply::Settled));
                Ok(())
            }
        }
    }
}

impl<S: Subject> Subject for Faulty<'_, S> {
    fn verify(&mut self, config: &Config) -> Result<f64, Failure> {
        self.strike(Step::Verify, config)?;
        self.inner.verify(config)
    }
    fn settle(&mut self, config: &Config) {
        self.inner.settle(config);
    }
    fn sample(&mut self, configs: &[Config]) -> Vec<Result<f64, Failure>> {
        match configs.iter().try_for_each(|config| self.strike(Step::Sample, config)) {
            Ok(()) => self.inner.sample(configs),
            Err(failure) => vec![Err(failure); configs.len()],
        }
    }
    fn sustain(&mut self, config: &Config) -> Result<f64, Failure> {
        self.strike(Step::Sustain, config)?;
        self.inner.sustain(config)
    }
    fn is_lost(&mut self) -> bool {
        self.is_lost || self.inner.is_lost()
    }
}

const TRAP: &str = ".version 6.0\n.target sm_70\n.address_size 64\n.visible .entry broken() { trap; }";
const ENDLESS: &str =
    ".version 6.0\n.target sm_70\n.address_size 64\n.visible .entry broken() { again: bra.uni again; }";

/// Launches a kernel without arguments and waits for its end.
fn launch(lab: &GpuLab, ptx: &str) -> Result<(), Failure> {
    let failed = |error: cudarc::driver::DriverError| Failure::new("launch", error);
    let module = lab.gpu.context.load_module(Ptx::from_src(ptx)).map_err(failed)?;
    let kernel = module.load_function("broken").map_err(failed)?;
    let one = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: the kernel has no arguments and touches no memory.
    unsafe { lab.stream.launch_builder(&kernel).launch(one) }.map_err(failed)?;
    lab.stream.synchronize().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_named_by_its_step_its_kind_and_its_config() {
        let fault = Fault { at: Step::Sample, how: Kind::Crash, config: "cpu 32x64 threads 1".into() };
        assert_eq!(fault.to_string().parse(), Ok(fault.clone()));
        assert_eq!("sample:crash:cpu 32x64 threads 1".parse(), Ok(fault));
        for wrong in ["", "verify", "verify:crash", "start:crash:x", "verify:smoke:x"] {
            assert!(wrong.parse::<Fault>().is_err(), "{wrong}");
        }
    }
}
