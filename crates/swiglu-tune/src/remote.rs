//! The tuner's end of a worker: asks it, waits with patience, and starts it anew when it fails.

use crate::protocol::{Facts, Reply, Request};
use crate::race::{Conditions, Failure, Subject};
use crate::stop::Stop;
use anyhow::{Result, bail};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};
use swiglu_kernels::{Config, Problem};

/// How long a request may go on after the run was stopped.
const GRACE: Duration = Duration::from_secs(2);

/// How to start a worker, and what to expect of it.
#[derive(Debug, Clone)]
pub(crate) struct Recipe {
    /// Arguments of this program.
    pub(crate) args: Vec<String>,
    /// Without a word for so long it is killed.
    pub(crate) patience: Duration,
    pub(crate) stop: Stop,
}

/// A worker process, or the place of one that has failed.
#[derive(Debug)]
pub(crate) struct Worker {
    recipe: Recipe,
    pub(crate) facts: Facts,
    process: Option<Process>,
}

#[derive(Debug)]
struct Process {
    child: Child,
    requests: ChildStdin,
    replies: Receiver<Reply>,
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended by itself cannot be killed, and needs not be.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a worker failed.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Fault {
    #[error("its process died")]
    Crashed,
    #[error("it did not answer for {} s and was killed", .0.as_secs_f64())]
    Hung(Duration),
    #[error("{}; it took the device down with it", .0.reason)]
    Poisoned(Failure),
    #[error("the run was stopped")]
    Stopped,
    /// The worker works, but not on this problem: its operands do not fit, say.
    #[error("{0}")]
    Refused(String),
    /// Not by anything a candidate did.
    #[error("the worker does not work: {0}")]
    Broken(String),
}

impl Fault {
    /// What is recorded of the candidate that was being run.
    fn of_candidate(self) -> Failure {
        let stage = match &self {
            Self::Crashed => "crash",
            Self::Hung(_) => "hang",
            Self::Poisoned(failure) => return Failure { reason: self.to_string(), ..failure.clone() },
            Self::Stopped | Self::Refused(_) | Self::Broken(_) => "interrupted",
        };
        Failure::new(stage, self)
    }

    /// Nothing was asked of a process that dies as it starts: it is no problem's doing.
    fn at_launch(self) -> Self {
        if matches!(self, Self::Crashed) { Self::Broken("its process dies as it starts".into()) } else { self }
    }

    /// Whether trying again without a candidate can help.
    fn may_be_of_candidate(&self) -> bool {
        matches!(self, Self::Crashed | Self::Hung(_) | Self::Poisoned(_))
    }
}

impl Worker {
    pub(crate) fn start(recipe: Recipe) -> Result<Self> {
        match launch(&recipe) {
            Ok((process, facts)) => Ok(Self { recipe, facts, process: Some(process) }),
            Err(Fault::Broken(reason)) => bail!(reason),
            Err(fault) => bail!("the worker did not start: {fault}"),
        }
    }

    /// Whether there is one to ask. That one has died while nobody asked it is held against no candidate.
    fn is_running(&mut self) -> bool {
        let has_ended = |process: &mut Process| process.child.try_wait().ok().flatten().is_some();
        if self.process.as_mut().is_some_and(has_ended) {
            self.process = None;
        }
        self.process.is_some()
    }

    /// Its answer, of a process started anew where there is none. After a fault it is gone until it is asked again.
    pub(crate) fn ask(&mut self, request: &Request, patience: Duration) -> Result<Reply, Fault> {
        if !self.is_running() {
            let launched = again_if_killed(|| launch(&self.recipe));
            self.process = Some(launched.map_err(Fault::at_launch)?.0);
        }
        self.ask_as_it_is(request, patience)
    }

    /// The same of the process that is there: another would know nothing of what this one was told.
    fn ask_as_it_is(&mut self, request: &Request, patience: Duration) -> Result<Reply, Fault> {
        let mut process = self.process.take().ok_or(Fault::Crashed)?;
        let reply = send(&mut process, request).and_then(|()| wait(&process, patience, &self.recipe.stop))?;
        if let Reply::Lost(failure) = reply {
            return Err(Fault::Poisoned(failure));
        }
        self.process = Some(process);
        Ok(reply)
    }

    /// One that answers what it was not asked is out of step: it is started anew before it is asked again.
    fn misunderstood(&mut self, reply: Reply) -> Fault {
        self.process = None;
        unexpected(reply)
    }

    /// Compiles into the cache; what cannot be compiled, and why.
    pub(crate) fn compile(&mut self, problem: Problem, configs: &[Config]) -> Result<Vec<(Config, Failure)>, Fault> {
        let patience = self.recipe.patience;
        let mut failures = Vec::new();
        let mut attempt = |configs: &[Config]| {
            match self.ask(&Request::Compile { problem, configs: configs.to_vec() }, patience)? {
                Reply::Compiled(failed) => failures.extend(failed),
                other => return Err(self.misunderstood(other)),
            }
            Ok(())
        };
        let blamed = culprits(configs, &mut attempt)?;
        failures.extend(blamed);
        Ok(failures)
    }
}

fn launch(recipe: &Recipe) -> Result<(Process, Facts), Fault> {
    let broken = |error: std::io::Error| Fault::Broken(format!("it cannot be started: {error}"));
    let program = std::env::current_exe().map_err(broken)?;
    let mut command = Command::new(program);
    command.args(&recipe.args).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(broken)?;
    let (Some(requests), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(Fault::Broken("it has no pipes".into()));
    };
    let (sender, replies) = mpsc::channel();
    thread::spawn(move || {
        let lines = BufReader::new(stdout).lines().map_while(Result::ok);
        let parsed = lines.map_while(|line| serde_json::from_str(&line).ok());
        let _ = parsed.into_iter().try_for_each(|reply| sender.send(reply));
    });
    let process = Process { child, requests, replies };
    match wait(&process, recipe.patience, &recipe.stop)? {
        Reply::Ready(facts) => Ok((process, facts)),
        other => Err(unexpected(other)),
    }
}

fn unexpected(reply: Reply) -> Fault {
    Fault::Broken(match reply {
        Reply::Refused(failure) => failure.reason,
        other => format!("it answered {other:?}"),
    })
}

fn send(process: &mut Process, request: &Request) -> Result<(), Fault> {
    let mut line = serde_json::to_string(request).map_err(|error| Fault::Broken(error.to_string()))?;
    line.push('\n');
    // A closed pipe: it is dead.
    process.requests.write_all(line.as_bytes()).map_err(|_| Fault::Crashed)
}

fn wait(process: &Process, patience: Duration, stop: &Stop) -> Result<Reply, Fault> {
    const LOOK: Duration = Duration::from_millis(100);
    let (asked, mut heard) = (Instant::now(), Instant::now());
    loop {
        match process.replies.recv_timeout(LOOK) {
            Ok(Reply::Alive) => heard = Instant::now(),
            Ok(reply) => return Ok(reply),
            Err(RecvTimeoutError::Disconnected) => return Err(Fault::Crashed),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if heard.elapsed() > patience {
            return Err(Fault::Hung(patience));
        }
        if stop.is_set() && asked.elapsed() > GRACE {
            return Err(Fault::Stopped);
        }
    }
}

/// Acts once more where the process died: others may have killed it, for want of memory say.
fn again_if_killed<T>(mut act: impl FnMut() -> Result<T, Fault>) -> Result<T, Fault> {
    match act() {
        Err(Fault::Crashed) => act(),
        done => done,
    }
}

/// The configs that make `attempt` fail, by halving; `Err` where it fails without any. Who is alone when the process dies is tried
/// again before it is blamed.
fn culprits(
    configs: &[Config],
    attempt: &mut impl FnMut(&[Config]) -> Result<(), Fault>,
) -> Result<Vec<(Config, Failure)>, Fault> {
    let attempted = if configs.len() == 1 { again_if_killed(|| attempt(configs)) } else { attempt(configs) };
    match (attempted, configs) {
        (Ok(()), _) => Ok(Vec::new()),
        (Err(fault), [config]) if fault.may_be_of_candidate() => {
            attempt(&[])?;
            Ok(vec![(*config, fault.of_candidate())])
        }
        (Err(fault), [] | [_]) => Err(fault),
        (Err(fault), _) if !fault.may_be_of_candidate() => Err(fault),
        (Err(_), _) => {
            let (left, right) = configs.split_at(configs.len() / 2);
            let mut blamed = culprits(left, attempt)?;
            blamed.extend(culprits(right, attempt)?);
            Ok(blamed)
        }
    }
}

/// One problem on a worker, as a subject to race.
pub(crate) struct Remote<'a> {
    worker: &'a mut Worker,
    problem: Problem,
    configs: Vec<Config>,
    pinned: Vec<Config>,
    patience: Duration,
    /// Candidates that broke the worker before they could be verified.
    blamed: BTreeMap<Config, Failure>,
    /// Registers a thread.
    pub(crate) registers: BTreeMap<Config, u32>,
    conditions: Conditions,
    /// What ended the work on the problem, by no fault of one candidate.
    pub(crate) lost: Option<Fault>,
}

/// What the CPU does at least, in operations a second: a large problem may be silent for longer.
const CPU_FLOPS: f64 = 1e9;
/// The same of the float64 oracle on a GPU that has few such units.
const GPU_F64_FLOPS: f64 = 1e11;

impl<'a> Remote<'a> {
    /// Opens `problem` on `worker`.
    pub(crate) fn open(
        worker: &'a mut Worker,
        problem: Problem,
        configs: &[Config],
        pinned: &[Config],
    ) -> Result<Self, Fault> {
        let on_cpu = configs.iter().any(|config| matches!(config, Config::Cpu(_)));
        let rate = if on_cpu { CPU_FLOPS } else { GPU_F64_FLOPS };
        let work = Duration::try_from_secs_f64(problem.flops() / rate).ok();
        let mut remote = Self {
            patience: worker.recipe.patience.saturating_add(work.unwrap_or_default()),
            worker,
            problem,
            configs: configs.to_vec(),
            pinned: pinned.to_vec(),
            blamed: BTreeMap::new(),
            registers: BTreeMap::new(),
            conditions: Conditions::default(),
            lost: None,
        };
        let mut attempts = 0;
        let blamed = culprits(configs, &mut |configs| {
            attempts += 1;
            remote.open_with(configs)
        })?;
        remote.configs.retain(|config| !blamed.iter().any(|(blamed, _)| blamed == config));
        remote.blamed.extend(blamed);
        // The last attempt was made with some of them.
        if attempts > 1 {
            remote.reopen()?;
        }
        Ok(remote)
    }

    fn reopen(&mut self) -> Result<(), Fault> {
        let configs = self.configs.clone();
        again_if_killed(|| self.open_with(&configs))
    }

    fn open_with(&mut self, configs: &[Config]) -> Result<(), Fault> {
        let (problem, pinned) = (self.problem, self.pinned.clone());
        let request = Request::Open { problem, configs: configs.to_vec(), pinned };
        match self.worker.ask(&request, self.patience)? {
            Reply::Opened(registers) => self.registers.extend(registers),
            Reply::Refused(failure) => return Err(Fault::Refused(failure.reason)),
            other => return Err(self.worker.misunderstood(other)),
        }
        Ok(())
    }

    fn ask(&mut self, request: &Request) -> Result<Reply, Fault> {
        if let Some(fault) = &self.lost {
            return Err(fault.clone());
        }
        if !self.worker.is_running() {
            tracing::info!("the worker is started anew");
            self.reopen().map_err(|fault| self.lose(fault))?;
        }
        match self.worker.ask_as_it_is(request, self.patience) {
            // Nothing helps against these.
            Err(fault @ (Fault::Broken(_) | Fault::Stopped)) => Err(self.lose(fault)),
            reply => reply,
        }
    }

    /// Notes that the work ends by `fault`, which it gives back.
    fn lose(&mut self, fault: Fault) -> Fault {
        self.lost = Some(fault.clone());
        fault
    }

    /// The `count` times that `request` asks for.
    fn times(&mut self, request: &Request, count: usize) -> Result<Vec<Result<f64, Failure>>, Fault> {
        match self.ask(request)? {
            Reply::Sampled { times, conditions } if times.len() == count => {
                self.conditions = conditions;
                Ok(times)
            }
            other => Err(self.misunderstood(other)),
        }
    }

    fn try_sample(&mut self, configs: &[Config]) -> Result<Vec<Result<f64, Failure>>, Fault> {
        self.times(&Request::Sample(configs.to_vec()), configs.len())
    }

    /// The time of `config` that `request` asks for: whatever breaks the worker, twice if it dies, is its doing.
    fn alone(&mut self, config: &Config, request: &Request) -> Result<f64, Failure> {
        let times = again_if_killed(|| self.times(request, 1));
        let mut times = times.map_err(|fault| blame(config, fault))?;
        times.pop().unwrap_or_else(|| Err(Failure::untimed()))
    }

    fn misunderstood(&mut self, reply: Reply) -> Fault {
        let fault = self.worker.misunderstood(reply);
        self.lose(fault)
    }
}

fn blame(config: &Config, fault: Fault) -> Failure {
    if fault.may_be_of_candidate() {
        tracing::warn!(%config, %fault, "a candidate broke its worker");
    }
    fault.of_candidate()
}

impl Subject for Remote<'_> {
    fn verify(&mut self, config: &Config) -> Result<f64, Failure> {
        if let Some(failure) = self.blamed.get(config) {
            return Err(failure.clone());
        }
        match again_if_killed(|| self.ask(&Request::Verify(*config))) {
            Ok(Reply::Verified(result)) => result,
            Ok(other) => Err(self.misunderstood(other).of_candidate()),
            Err(fault) => Err(blame(config, fault)),
        }
    }

    fn settle(&mut self, config: &Config) {
        // What is wrong with it shows again in the samples that follow.
        let _ = self.ask(&Request::Settle(*config));
    }

    fn sample(&mut self, configs: &[Config]) -> Vec<Result<f64, Failure>> {
        // Of a pass that breaks the worker nothing is known.
        self.conditions = Conditions::default();
        let first = match self.try_sample(configs) {
            Ok(times) => return times,
            Err(fault) => fault,
        };
        // Who of them broke the worker is not known until each has run alone.
        let mut alone = Vec::new();
        for config in configs {
            if self.lost.is_some() {
                break;
            }
            alone.push(self.alone(config, &Request::Sample(vec![*config])));
        }
        let sound: Vec<Config> =
            configs.iter().zip(&alone).filter(|(_, time)| time.is_ok()).map(|(config, _)| *config).collect();
        if self.lost.is_some() {
            return vec![Err(first.of_candidate()); configs.len()];
        }
        // Those that are left are timed together, as ever. Where that are all and it fails again: the device or the machine, or all
        // of them together.
        let mut together = match self.try_sample(&sound) {
            Ok(times) => times.into_iter(),
            Err(fault) => return vec![Err(self.lose(fault).of_candidate()); configs.len()],
        };
        alone
            .into_iter()
            .map(|time| time.and_then(|_| together.next().unwrap_or_else(|| Err(Failure::untimed()))))
            .collect()
    }

    fn sustain(&mut self, config: &Config) -> Result<f64, Failure> {
        self.conditions = Conditions::default();
        self.alone(config, &Request::Sustain(*config))
    }

    fn conditions(&self) -> Conditions {
        self.conditions.clone()
    }

    fn is_lost(&mut self) -> bool {
        self.lost.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use swiglu_kernels::families::{Target, candidates};
    use swiglu_kernels::{DType, WeightMajor};

    /// A worker whose process takes no more requests, though it has not ended.
    fn deaf() -> Worker {
        let mut command = Command::new("sh");
        command.args(["-c", "exec <&-; echo; sleep 60"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (requests, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        std::io::Read::read_exact(&mut stdout, &mut [0]).unwrap();
        let (_, replies) = mpsc::channel();
        let recipe = Recipe { args: Vec::new(), patience: Duration::from_secs(60), stop: Stop::default() };
        let device = swiglu_db::Device { class: "cpu".into(), name: "a CPU".into() };
        let facts = Facts { device, nvrtc: String::new(), driver: String::new(), no_library: None };
        Worker { recipe, facts, process: Some(Process { child, requests, replies }) }
    }

    #[test]
    fn whoever_was_told_of_a_problem_is_not_replaced_by_one_that_was_not() {
        let mut worker = deaf();
        let request = Request::Sample(Vec::new());
        for _ in 0..2 {
            let fault = worker.ask_as_it_is(&request, Duration::from_secs(60)).unwrap_err();
            assert!(matches!(fault, Fault::Crashed), "{fault}");
            assert!(!worker.is_running());
        }
    }

    #[test]
    fn what_others_killed_is_done_again_once_and_nothing_else_is() {
        let tries = |faults: &[Fault]| {
            let mut tried = 0;
            let done = again_if_killed(|| {
                tried += 1;
                faults.get(tried - 1).map_or(Ok(()), |fault| Err(fault.clone()))
            });
            (tried, done.is_ok())
        };
        assert_eq!(tries(&[Fault::Crashed]), (2, true));
        assert_eq!(tries(&[Fault::Crashed, Fault::Crashed]), (2, false));
        assert_eq!(tries(&[Fault::Hung(Duration::ZERO)]), (1, false));
        assert_eq!(tries(&[Fault::Stopped]), (1, false));
    }

    #[test]
    fn who_was_alone_when_others_killed_the_process_is_not_blamed() {
        let problem = Problem::forward(DType::F32, WeightMajor::K, 8, 8, 8);
        let configs = candidates(&problem, Target::Cpu { threads: 1 });
        let mut killed = false;
        let mut attempt =
            |_: &[Config]| if std::mem::replace(&mut killed, true) { Ok(()) } else { Err(Fault::Crashed) };
        assert!(culprits(&configs[..1], &mut attempt).unwrap().is_empty());
    }

    #[test]
    fn culprits_are_found_by_halving_and_nobody_is_blamed_for_a_broken_machine() {
        let problem = Problem::forward(DType::F32, WeightMajor::K, 8, 8, 8);
        let configs = candidates(&problem, Target::Cpu { threads: 4 });
        let bad = BTreeSet::from([configs[3], configs[4], configs[configs.len() - 1]]);
        let mut attempts = 0;
        let mut attempt = |tried: &[Config]| {
            attempts += 1;
            if tried.iter().any(|config| bad.contains(config)) { Err(Fault::Crashed) } else { Ok(()) }
        };
        let blamed = culprits(&configs, &mut attempt).unwrap();
        assert_eq!(blamed.iter().map(|(config, _)| *config).collect::<BTreeSet<_>>(), bad);
        assert!(blamed.iter().all(|(_, failure)| failure.stage == "crash"));
        assert!(attempts < configs.len(), "{attempts}");

        assert!(culprits(&configs, &mut |_| Err(Fault::Crashed)).is_err(), "it fails without any of them");
        let mut attempts = 0;
        let mut broken = |_: &[Config]| {
            attempts += 1;
            Err(Fault::Broken("no GPU".into()))
        };
        assert!(culprits(&configs, &mut broken).is_err());
        assert_eq!(attempts, 1);
    }
}
