//! The worker: measures on one device in a process of its own, so that a candidate which crashes it, hangs it or poisons
//! its CUDA context takes nothing else along. It stores nothing.

use crate::cli::{GpuChoice, open_gpu_lab};
use crate::cpu_subject::CpuSubject;
use crate::doctor::driver_version;
use crate::fault::{Fault, Faulty};
use crate::gpu_subject::{Compiled, GpuLab, GpuSubject};
use crate::protocol::{Facts, Reply, Request};
use crate::race::{Conditions, Failure, Subject};
use crate::stop::Signal;
use crate::telemetry::Telemetry;
use anyhow::{Context, Result, bail};
use clap::Args;
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, Write};
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use swiglu_kernels::{Config, Problem, arch, render};
use swiglu_runtime::cubin_cache::CubinCache;
use swiglu_runtime::gpu::Gpu;
use swiglu_runtime::nvrtc::Nvrtc;
use swiglu_runtime::{Options, cpu};

#[derive(Debug, Clone, Args)]
pub(crate) struct WorkerArgs {
    /// What it measures on.
    #[arg(long, value_name = "cpu|N", required_unless_present = "compile_for")]
    gpu: Option<GpuChoice>,
    /// Only compiles, for this architecture.
    #[arg(long, value_name = "ARCH", conflicts_with = "gpu")]
    compile_for: Option<String>,
    /// Breaks at some candidates.
    #[arg(long, value_name = "STEP:KIND:CONFIG")]
    fault: Vec<Fault>,
}

/// Answers requests from stdin on stdout until stdin ends.
pub(crate) fn run(args: &WorkerArgs, options: &Options) -> Result<ExitCode> {
    // A crash is told by its exit status; images of it would fill the disk.
    let _ = rlimit::setrlimit(rlimit::Resource::CORE, 0, 0);
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    // Ctrl-C reaches the whole process group; the tuner decides what is still to be finished.
    Signal::heard_by(&Arc::default()).context("ignoring Ctrl-C")?;
    let requests = requests();
    let worked = match (&args.compile_for, args.gpu) {
        (Some(name), _) => compile_on_request(name, options, &requests),
        (None, Some(GpuChoice::Cpu)) => on_cpu(&args.fault, &requests),
        (None, Some(GpuChoice::Ordinal(ordinal))) => on_gpu(ordinal, options, &args.fault, &requests),
        (None, _) => bail!("a worker measures on one device"),
    };
    // The tuner tells the user.
    worked.or_else(|error| reply(&Reply::Refused(Failure::new("launch", format!("{error:#}")))))?;
    Ok(ExitCode::SUCCESS)
}

/// The requests, read by a thread of their own: when the tuner is gone the process ends, whatever it is doing.
fn requests() -> Receiver<Request> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let lines = std::io::stdin().lock().lines();
        let parsed = lines.map_while(Result::ok).map_while(|line| serde_json::from_str(&line).ok());
        let _ = parsed.into_iter().try_for_each(|request| sender.send(request));
        // Not `exit`: the driver would wait for a kernel that hangs.
        process::abort();
    });
    receiver
}

fn reply(reply: &Reply) -> Result<()> {
    let mut line = serde_json::to_string(reply)?;
    line.push('\n');
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush()).context("answering the tuner")
}

/// Said from threads that compile: nobody is there to hear of an error.
fn alive() {
    let _ = reply(&Reply::Alive);
}

fn on_cpu(faults: &[Fault], requests: &Receiver<Request>) -> Result<()> {
    reply(&Reply::Ready(Facts {
        device: cpu::device(),
        nvrtc: String::new(),
        driver: String::new(),
        no_library: None,
    }))?;
    let mut next = requests.recv().ok();
    while let Some(request) = next {
        let Request::Open { problem, configs, .. } = request else { bail!("{request:?} before a problem is open") };
        let inner = match CpuSubject::new(problem, rand::random()) {
            Ok(subject) => subject,
            Err(failure) => {
                reply(&Reply::Refused(failure))?;
                next = requests.recv().ok();
                continue;
            }
        };
        let mut bench = Bench::new(Faulty { inner, faults, lab: None, is_lost: false }, Timing::OneByOne);
        reply(&Reply::Opened(configs.into_iter().map(|config| (config, 0)).collect()))?;
        next = bench.serve(requests)?;
    }
    Ok(())
}

fn on_gpu(ordinal: usize, options: &Options, faults: &[Fault], requests: &Receiver<Request>) -> Result<()> {
    let lab = &open_gpu_lab(Gpu::open(ordinal)?, options)?;
    let driver = driver_version().unwrap_or_default();
    let telemetry = Telemetry::start(lab.gpu.pci_bus_id()?);
    let no_library = lab.library().err().map(|why| why.to_string());
    let (device, nvrtc) = (lab.gpu.device.clone(), lab.nvrtc.version_string());
    reply(&Reply::Ready(Facts { device, nvrtc, driver, no_library }))?;
    let (mut kind, mut kernels) = (None, BTreeMap::new());
    let mut next = requests.recv().ok();
    while let Some(request) = next {
        let Request::Open { problem, configs, pinned } = request else { bail!("{request:?} before a problem is open") };
        // Kernels serve every M.
        if kind.replace(problem.with_m(1)) != Some(problem.with_m(1)) {
            kernels.clear();
        }
        load(lab, &problem, &configs, &mut kernels)?;
        let inner = match GpuSubject::new(lab, &kernels, problem, &pinned, rand::random()) {
            Ok(subject) => subject,
            // Memory that others hold, say: nothing a candidate has done.
            Err(failure) => {
                if lab.is_lost() {
                    bail!("the device no longer works: {}", failure.reason);
                }
                reply(&Reply::Refused(failure))?;
                next = requests.recv().ok();
                continue;
            }
        };
        let timing = Timing::Queued(telemetry.as_ref());
        let mut bench = Bench::new(Faulty { inner, faults, lab: Some(lab), is_lost: false }, timing);
        let registers = |config: Config| Some((config, kernels.get(&config)?.resources.registers));
        reply(&Reply::Opened(configs.into_iter().filter_map(registers).collect()))?;
        next = bench.serve(requests)?;
    }
    Ok(())
}

/// Compiles, or finds in the cache, and loads what is not loaded yet.
fn load(lab: &GpuLab, problem: &Problem, configs: &[Config], kernels: &mut BTreeMap<Config, Compiled>) -> Result<()> {
    let missing: Vec<Config> = configs.iter().filter(|config| !kernels.contains_key(config)).copied().collect();
    kernels.extend(lab.compile(problem, &missing, alive)?);
    Ok(())
}

/// How the candidates of a pass are timed.
enum Timing<'a> {
    /// All are queued before any is waited for.
    Queued(Option<&'a Telemetry>),
    /// On the CPU, where one may take long.
    OneByOne,
}

/// The open problem.
struct Bench<'a, S> {
    subject: S,
    timing: Timing<'a>,
    /// What this process has verified: a worker that was started anew has verified nothing.
    verified: BTreeSet<Config>,
}

impl<'a, S: Subject> Bench<'a, S> {
    fn new(subject: S, timing: Timing<'a>) -> Self {
        Self { subject, timing, verified: BTreeSet::new() }
    }

    /// Answers until another problem is asked for, which is returned, or nothing more.
    fn serve(&mut self, requests: &Receiver<Request>) -> Result<Option<Request>> {
        while let Ok(request) = requests.recv() {
            let answer = match request {
                Request::Verify(config) => Reply::Verified(self.verify(&config)),
                Request::Settle(config) => {
                    self.subject.settle(&config);
                    Reply::Settled
                }
                Request::Sample(configs) => self.sample(&configs),
                Request::Sustain(config) => self.sustain(&config),
                other @ (Request::Open { .. } | Request::Compile { .. }) => return Ok(Some(other)),
            };
            let failed = match &answer {
                Reply::Verified(Err(failure)) => Some(failure.clone()),
                Reply::Sampled { times, .. } => times.iter().find_map(|time| time.as_ref().err().cloned()),
                _ => None,
            };
            match failed.filter(|_| self.subject.is_lost()) {
                Some(failure) => {
                    reply(&Reply::Lost(failure))?;
                    // No destructor: the driver refuses to free what a broken context holds.
                    process::abort();
                }
                None => reply(&answer)?,
            }
        }
        Ok(None)
    }

    fn verify(&mut self, config: &Config) -> Result<f64, Failure> {
        let error = self.subject.verify(config)?;
        self.verified.insert(*config);
        Ok(error)
    }

    fn sample(&mut self, configs: &[Config]) -> Reply {
        let refuse = |config: &Config| Some((*config, self.unverified(config)?));
        let refused: BTreeMap<Config, Failure> = configs.iter().filter_map(refuse).collect();
        let sound: Vec<Config> = configs.iter().filter(|config| !refused.contains_key(config)).copied().collect();
        let one_by_one = matches!(self.timing, Timing::OneByOne);
        let (times, conditions) = self.watched(|subject| {
            if !one_by_one {
                return subject.sample(&sound);
            }
            let one = |config| {
                alive();
                subject.sample(std::slice::from_ref(config))
            };
            sound.iter().flat_map(one).collect()
        });
        let mut times = times.into_iter();
        let untimed = || Err(Failure::untimed());
        let time = |config| match refused.get(config) {
            Some(failure) => Err(failure.clone()),
            None => times.next().unwrap_or_else(untimed),
        };
        Reply::Sampled { times: configs.iter().map(time).collect(), conditions }
    }

    fn sustain(&mut self, config: &Config) -> Reply {
        let (time, conditions) = match self.unverified(config) {
            Some(failure) => (Err(failure), Conditions::default()),
            None => self.watched(|subject| subject.sustain(config)),
        };
        Reply::Sampled { times: vec![time], conditions }
    }

    /// Does `work` and tells how the device fared meanwhile, where that can be told.
    fn watched<T>(&mut self, work: impl FnOnce(&mut S) -> T) -> (T, Conditions) {
        match self.timing {
            Timing::Queued(Some(telemetry)) => telemetry.around(|| work(&mut self.subject)),
            Timing::Queued(None) | Timing::OneByOne => (work(&mut self.subject), Conditions::default()),
        }
    }

    /// Why `config` may not be timed; verifies it where this process has not.
    fn unverified(&mut self, config: &Config) -> Option<Failure> {
        if self.verified.contains(config) { None } else { self.verify(config).err() }
    }
}

fn compile_on_request(arch: &str, options: &Options, requests: &Receiver<Request>) -> Result<()> {
    let arch = arch::by_name(arch)?;
    let nvrtc = Nvrtc::load(options.nvrtc.as_deref())?;
    let cache = CubinCache::new(options.cubin_dir());
    // One core stays with those who measure meanwhile.
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get().saturating_sub(1).max(1));
    rayon::ThreadPoolBuilder::new().num_threads(cores).build_global().context("starting the compiler's threads")?;
    let device = swiglu_db::Device { class: arch.name.into(), name: "compiler".into() };
    reply(&Reply::Ready(Facts { device, nvrtc: nvrtc.version_string(), driver: String::new(), no_library: None }))?;
    while let Ok(request) = requests.recv() {
        let Request::Compile { problem, configs } = request else { bail!("{request:?} of a worker that compiles") };
        let sources = render::shared_sources(&problem, &configs, arch)?;
        let failed = sources.par_iter().flat_map_iter(|shared| {
            let compiled = cache.get_or_compile(&nvrtc, &shared.source, arch);
            alive();
            let failure = compiled.err().map(|error| Failure::new("compile", error));
            shared.configs.iter().filter_map(move |config| Some((*config, failure.clone()?)))
        });
        reply(&Reply::Compiled(failed.collect()))?;
    }
    Ok(())
}
