//! The main job: for every problem, have what is missing raced and store what came out. This process alone writes the
//! database; it measures nothing itself.

use crate::crew::{Compiler, Event, Finding, Station, Task};
use crate::metrics::{self, Logbook, Race};
use crate::protocol::Facts;
use crate::race::{EXHAUSTIVE, Failure, ROUNDS, SUSTAINED};
use crate::remote::{Fault, Worker};
use crate::report;
use crate::search::{self, Search};
use crate::share::{Item, Share};
use crate::space::Space;
use crate::stop::Stop;
use crate::workload::Group;
use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};
use swiglu_db::{Environment, Origin, Outcome, Record, TuningDb, TuningKey, record, shipped};
use swiglu_kernels::families::{CublasltConfig, Rejected, Target, default_config, space};
use swiglu_kernels::model::Chip;
use swiglu_kernels::{Config, Problem};

/// What is to be done, and how.
pub(crate) struct Order<'a> {
    /// In this order.
    pub(crate) groups: &'a [Group],
    pub(crate) search: Search,
    /// Measure again what is measured.
    pub(crate) retune: bool,
    /// Finalists run for long.
    pub(crate) sustained: bool,
    pub(crate) quiet: bool,
    pub(crate) stop: Stop,
}

/// Starts a worker that compiles for the architecture of a name.
pub(crate) type StartCompiler = dyn Fn(&str) -> Result<Worker>;

/// The processes that do it.
pub(crate) struct Crew {
    pub(crate) measuring: Vec<Worker>,
    /// Not asked on the CPU.
    pub(crate) compiling: Box<StartCompiler>,
}

/// What a run did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Summary {
    /// Problems raced now.
    pub(crate) tuned: usize,
    /// Problems that had nothing missing.
    pub(crate) already: usize,
    /// Problems left for a later run: the budget or Ctrl-C ended this one.
    pub(crate) left: usize,
    /// Problems for which no candidate worked.
    pub(crate) without_winner: usize,
    /// Problems that could not be raced: the log says why.
    pub(crate) unraced: usize,
    /// Problems that no config may run on their device: the log says why.
    pub(crate) illegal: usize,
}

/// Readers see what is new at least so often.
const PUBLISH_EVERY: Duration = Duration::from_secs(2);
/// Races in a row that a worker may fail to run before it is left alone.
const FAULTS: u32 = 3;

/// Tunes until all is done, or until the order's stop.
pub(crate) fn tune(order: &Order, crew: Crew, db: &mut TuningDb, logbook: Logbook) -> Result<Summary> {
    let (events, happened) = mpsc::channel();
    thread::scope(|scope| {
        let mut tuner = Tuner::new(order, db, logbook);
        tuner.man(scope, crew, &events)?;
        drop(events);
        let ran = tuner.run(&happened);
        // Whatever happened, what is stored is seen.
        let published = tuner.db.publish().context("publishing the snapshot");
        tuner.progress.finish_and_clear();
        // A compiler may be ahead of what nobody will measure any more.
        order.stop.set();
        ran.and(published)?;
        Ok(tuner.summary)
    })
}

struct Tuner<'a> {
    order: &'a Order<'a>,
    db: &'a mut TuningDb,
    logbook: Logbook,
    fronts: Vec<Front<'a>>,
    /// With the number of the front each works on.
    stations: Vec<(usize, Station)>,
    summary: Summary,
    progress: ProgressBar,
    published: Instant,
}

/// The problems on one device class.
struct Front<'a> {
    facts: Facts,
    target: Target,
    chip: Option<Chip>,
    groups: &'a [Group],
    /// Winners on this class, of this database and of the shipped tables, stale ones too: what they won with may win again.
    winners: Vec<Record>,
    /// Of the groups that were looked at.
    spaces: BTreeMap<usize, Space>,
    share: Share,
    /// What a worker was refused, and left to another once.
    given_back: BTreeSet<Item>,
    /// Groups without a legal config, of which the log has said why.
    illegal: BTreeSet<usize>,
    compiler: Option<Compiler>,
    /// The next group to be compiled.
    ahead: usize,
    /// How long races have taken so far, and how many they were.
    raced: (Duration, u32),
}

impl<'a> Front<'a> {
    fn key(&self, (group, m): Item) -> Option<TuningKey> {
        let group = self.groups.get(group)?;
        let problem = group.problem(*group.m.get(m)?);
        Some(TuningKey { device_class: self.facts.device.class.clone(), problem })
    }

    fn space(&mut self, group: usize, problem: &Problem) -> Result<&mut Space> {
        if !self.spaces.contains_key(&group) {
            let space = Space::new(problem, self.target)?;
            let space = if self.facts.no_library.is_some() { space.without_library() } else { space };
            self.spaces.insert(group, space);
        }
        self.spaces.get_mut(&group).context("the space was just made")
    }

    /// Why none of the group's configs is legal; `None` where one is.
    fn illegality(&mut self, group: usize, problem: &Problem) -> Result<Option<Rejected>> {
        let target = self.target;
        if !self.space(group, problem)?.candidates.is_empty() {
            return Ok(None);
        }
        Ok(match target {
            Target::Gpu(arch) => default_config(problem, arch).err(),
            Target::Cpu { .. } => space(problem, target).iter().find_map(|config| config.check(problem, target).err()),
        })
    }

    /// Whether another race of the usual length ends in time.
    fn has_time(&self, stop: &Stop) -> bool {
        let (total, count) = self.raced;
        let expected = total.checked_div(count).unwrap_or_default();
        !stop.is_set() && stop.left().is_none_or(|left| !left.is_zero() && expected <= left)
    }

    fn record(&self, key: &TuningKey, config: Config, outcome: Outcome, environment: Environment) -> Record {
        let device = self.facts.device.clone();
        Record { device, problem: key.problem, config, outcome, environment, origin: Origin::Local }
    }

    /// What is the same for all records of one race.
    fn environment(&self) -> Environment {
        Environment {
            nvrtc: self.facts.nvrtc.clone(),
            driver: self.facts.driver.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            date: jiff::Timestamp::now().to_string(),
            ..Environment::default()
        }
    }
}

impl<'a> Tuner<'a> {
    fn new(order: &'a Order<'a>, db: &'a mut TuningDb, logbook: Logbook) -> Self {
        let (summary, progress, published) = (Summary::default(), ProgressBar::hidden(), Instant::now());
        Self { order, db, logbook, fronts: Vec::new(), stations: Vec::new(), summary, progress, published }
    }

    /// Puts the crew to work: a front for each device class.
    fn man<'scope>(&mut self, scope: &'scope Scope<'scope, '_>, crew: Crew, events: &Sender<Event>) -> Result<()> {
        for (number, worker) in crew.measuring.into_iter().enumerate() {
            let station = Station::start(scope, number, worker, events.clone(), self.order.stop.clone());
            let known = self.fronts.iter().position(|front| front.facts.device.class == station.facts.device.class);
            let front = match known {
                Some(front) => front,
                None => {
                    self.fronts.push(front(&station.facts, self.order.groups, self.db)?);
                    self.fronts.len() - 1
                }
            };
            self.stations.push((front, station));
        }
        for (at, front) in self.fronts.iter_mut().enumerate() {
            match front.target {
                Target::Gpu(arch) => {
                    let worker = (crew.compiling)(arch.name)?;
                    front.compiler = Some(Compiler::start(scope, at, worker, events.clone()));
                }
                Target::Cpu { .. } => (0..front.groups.len()).for_each(|group| front.share.set_ready(group)),
            }
        }
        let total = self.fronts.iter().map(|front| front.share.left()).sum();
        self.progress = progress_bar(total, self.order.quiet);
        Ok(())
    }

    fn run(&mut self, happened: &Receiver<Event>) -> Result<()> {
        loop {
            self.hand_out()?;
            let awaited = |front: &Front| {
                front.compiler.as_ref().is_some_and(|compiler| compiler.is_busy) && front.has_time(&self.order.stop)
            };
            let is_busy = self.stations.iter().any(|(_, station)| station.is_busy) || self.fronts.iter().any(awaited);
            if !is_busy {
                break;
            }
            match happened.recv().context("all workers are gone")? {
                Event::Compiled { front, group, problem, elapsed, result } => {
                    self.compiled(front, group, &problem, elapsed, result)?
                }
                Event::Raced { worker, task, elapsed, result } => self.raced(worker, &task, elapsed, result)?,
            }
            if self.published.elapsed() >= PUBLISH_EVERY {
                self.db.publish().context("publishing the snapshot")?;
                self.published = Instant::now();
            }
        }
        self.summary.left += self.fronts.iter().map(|front| front.share.left()).sum::<usize>();
        Ok(())
    }

    /// Gives every idle worker something to do.
    fn hand_out(&mut self) -> Result<()> {
        // Where nothing was missing the next groups may be due already.
        let mut is_settled = false;
        while !is_settled {
            is_settled = true;
            for front in 0..self.fronts.len() {
                self.compile_ahead(front)?;
            }
            for worker in 0..self.stations.len() {
                is_settled &= !self.employ(worker)?;
            }
        }
        Ok(())
    }

    /// Gives a worker its next race, if it is idle and there is one; whether problems with nothing missing were passed by.
    fn employ(&mut self, worker: usize) -> Result<bool> {
        let front = self.stations[worker].0;
        let mut passed = false;
        while !self.stations[worker].1.is_busy && self.stations[worker].1.faults < FAULTS {
            if !self.fronts[front].has_time(&self.order.stop) {
                break;
            }
            let Some(item) = self.fronts[front].share.next(worker) else { break };
            let Some(task) = self.task(front, item)? else {
                self.progress.inc(1);
                passed = true;
                continue;
            };
            let station = &mut self.stations[worker].1;
            station.is_busy = station.tasks.send(task).is_ok();
        }
        Ok(passed)
    }

    /// Has the next group compiled, unless there is enough to do for all: what is compiled in vain delays the end.
    fn compile_ahead(&mut self, at: usize) -> Result<()> {
        let workers = self.stations.iter().filter(|(front, _)| *front == at).count();
        loop {
            let front = &self.fronts[at];
            let is_idle = front.compiler.as_ref().is_some_and(|compiler| !compiler.is_busy);
            if !is_idle
                || front.share.waiting() > workers
                || front.ahead >= front.groups.len()
                || !front.has_time(&self.order.stop)
            {
                return Ok(());
            }
            let group = front.ahead;
            self.fronts[at].ahead += 1;
            let configs = self.missing_of_group(at, group)?;
            let front = &mut self.fronts[at];
            let (Some(problem), Some(compiler)) =
                (front.groups.get(group).map(|group| group.problem(1)), &mut front.compiler)
            else {
                return Ok(());
            };
            if configs.is_empty() {
                front.share.set_ready(group);
                continue;
            }
            self.progress.set_message(format!("compiling for n={} k={}", problem.n, problem.k));
            compiler.is_busy = compiler.batches.send((group, problem, configs)).is_ok();
        }
    }

    /// The candidates that any problem of the group will race.
    fn missing_of_group(&mut self, at: usize, group: usize) -> Result<Vec<Config>> {
        let mut configs = Vec::new();
        for m in 0..self.fronts[at].groups.get(group).map_or(0, |group| group.m.len()) {
            let Some(key) = self.fronts[at].key((group, m)) else { continue };
            configs.extend(self.candidates(at, group, &key)?);
        }
        configs.sort_unstable();
        configs.dedup();
        Ok(configs)
    }

    /// The candidates to measure for a problem.
    fn candidates(&mut self, at: usize, group: usize, key: &TuningKey) -> Result<Vec<Config>> {
        let (search, retune) = (self.order.search, self.order.retune);
        let front = &mut self.fronts[at];
        front.space(group, &key.problem)?;
        let Some(space) = front.spaces.get(&group) else { return Ok(Vec::new()) };
        let mut picked: Vec<Config> = match search {
            Search::All | Search::Exhaustive => space.candidates.keys().copied().collect(),
            Search::Model => {
                let wanted = pinned(front, self.db.best(key)?.as_ref(), &key.problem);
                search::pick(front.chip.as_ref(), &key.problem, &space.candidates, &wanted, &front.winners)
            }
        };
        if !retune {
            let missing = space.missing(self.db, key, search == Search::Exhaustive)?;
            picked.retain(|config| missing.contains(config));
        }
        Ok(picked)
    }

    /// The race of a problem; `None` where nothing is missing. What needs no race is stored at once.
    fn task(&mut self, at: usize, item: Item) -> Result<Option<Task>> {
        let Some(key) = self.fronts[at].key(item) else { return Ok(None) };
        let exhaustive = self.order.search == Search::Exhaustive;
        let missing = self.candidates(at, item.0, &key)?;
        let best = self.db.best(&key)?;
        let pinned = pinned(&self.fronts[at], best.as_ref(), &key.problem);
        let space = self.fronts[at].space(item.0, &key.problem)?;
        let hopeless = |config: &Config| space.hopeless(config).filter(|_| !exhaustive && !pinned.contains(config));
        let mut candidates = Vec::new();
        let mut out = Vec::new();
        for config in &missing {
            match space.broken.get(config).cloned().or_else(|| hopeless(config)) {
                Some(failure) => out.push((*config, failure.into())),
                None => candidates.push(*config),
            }
        }
        for config in space.gone(self.db, &key)? {
            out.push((config, Failure::new("gone", "no longer in the space").into()));
        }
        let is_sound = |config: &Config| space.candidates.contains_key(config) && !space.broken.contains_key(config);
        let pinned: Vec<Config> = pinned.into_iter().filter(is_sound).collect();
        if !out.is_empty() {
            self.store(at, item.0, &key, out, &Environment::default(), None)?;
        }
        if candidates.is_empty() {
            if let Some(why) = self.fronts[at].illegality(item.0, &key.problem)? {
                self.note_illegal(at, item.0, &key.problem, &why);
                return Ok(None);
            }
            match self.db.best(&key)? {
                Some(best) => self.note_winner(at, item.0, &key, &best)?,
                None => self.summary.without_winner += 1,
            }
            self.summary.already += 1;
            return Ok(None);
        }
        // Beside what is missing, so that all are timed in one race.
        candidates.extend(pinned.iter().filter(|config| !missing.contains(config)));
        // The families with the highest rates first: what they reach prunes the others.
        candidates.sort_by_key(|config| std::cmp::Reverse(config.family()));
        let Problem { dtype, weight_major, n, k, m, .. } = key.problem;
        self.progress.set_message(format!("{dtype} {weight_major} m={m} n={n} k={k}"));
        let rounds: &'static [_] = match (exhaustive, self.order.sustained) {
            (true, _) => &EXHAUSTIVE,
            (false, true) => &SUSTAINED,
            (false, false) => &ROUNDS,
        };
        Ok(Some(Task { item, problem: key.problem, candidates, pinned, exhaustive, rounds }))
    }

    /// Takes note that no config may run the problems of a group.
    fn note_illegal(&mut self, at: usize, group: usize, problem: &Problem, why: &Rejected) {
        self.summary.illegal += 1;
        if self.fronts[at].illegal.insert(group) {
            let Problem { op, dtype, n, k, .. } = *problem;
            tracing::error!(%op, %dtype, n, k, %why, "no kernel runs this here");
        }
    }

    fn compiled(
        &mut self,
        at: usize,
        group: usize,
        problem: &Problem,
        elapsed: Duration,
        result: Result<Vec<(Config, Failure)>, Fault>,
    ) -> Result<()> {
        let front = &mut self.fronts[at];
        if let Some(compiler) = &mut front.compiler {
            compiler.is_busy = false;
        }
        match result {
            Ok(failures) => {
                tracing::info!(dtype = %problem.dtype, failed = failures.len(), ?elapsed, "compiled");
                front.space(group, problem)?.broken.extend(failures);
            }
            Err(Fault::Stopped) => {}
            // Those who measure will compile for themselves.
            Err(fault) => tracing::warn!(%fault, "compiling ahead failed"),
        }
        front.share.set_ready(group);
        Ok(())
    }

    fn raced(&mut self, worker: usize, task: &Task, elapsed: Duration, result: Result<Finding, Fault>) -> Result<()> {
        let (at, station) = &mut self.stations[worker];
        let (at, stopped) = (*at, self.order.stop.is_set());
        station.is_busy = false;
        let is_whole = matches!(&result, Ok(finding) if finding.lost.is_none());
        station.faults = if is_whole { 0 } else { station.faults + 1 };
        let front = &mut self.fronts[at];
        let Some(key) = front.key(task.item) else { return Ok(()) };
        match result {
            Ok(Finding { raced, registers, lost: Some(fault) }) => {
                self.store(at, task.item.0, &key, raced.outcomes, &Environment::default(), Some(&registers))?;
                return self.faulted(worker, task.item, &key, &fault);
            }
            Ok(Finding { raced, registers, lost: None }) => {
                front.raced = (front.raced.0 + elapsed, front.raced.1 + 1);
                let Problem { m, n, k, .. } = key.problem;
                tracing::info!(m, n, k, raced = task.candidates.len(), ?elapsed, drift = raced.drift, "raced");
                let conditions = Environment {
                    sm_mhz: raced.conditions.sm_mhz.unwrap_or(0),
                    power_w: raced.conditions.power_w.unwrap_or(0),
                    ..Environment::default()
                };
                let failed =
                    raced.outcomes.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Failed { .. })).count();
                let race = Race {
                    device: &self.fronts[at].facts.device.clone(),
                    problem: key.problem,
                    candidates: task.candidates.len(),
                    failed,
                    race_s: metrics::seconds(elapsed),
                    drift: raced.drift,
                    sm_mhz: raced.conditions.sm_mhz,
                    power_w: raced.conditions.power_w,
                    winner: None,
                    median_us: None,
                    tflops: None,
                    left: self.fronts[at].share.left(),
                };
                self.store(at, task.item.0, &key, raced.outcomes, &conditions, Some(&registers))?;
                if !stopped {
                    self.logbook.problem(&race.won_by(self.db.best(&key)?.as_ref()));
                }
            }
            Err(Fault::Stopped) => {}
            Err(fault) => return self.faulted(worker, task.item, &key, &fault),
        }
        match (self.db.best(&key)?, stopped) {
            (_, true) => self.summary.left += 1,
            (Some(best), false) => {
                self.summary.tuned += 1;
                self.note_winner(at, task.item.0, &key, &best)?;
            }
            (None, false) => {
                self.summary.tuned += 1;
                self.summary.without_winner += 1;
            }
        }
        self.progress.inc(1);
        Ok(())
    }

    /// Takes note that `item` could not be raced on `worker`, and gives it back where another worker may do better.
    fn faulted(&mut self, worker: usize, item: Item, key: &TuningKey, fault: &Fault) -> Result<()> {
        let at = self.stations[worker].0;
        let Problem { m, n, k, .. } = key.problem;
        tracing::error!(m, n, k, %fault, "cannot tune");
        let mut others =
            self.stations.iter().enumerate().filter(|(other, (front, _))| *other != worker && *front == at);
        let others_work = others.any(|(_, (_, station))| station.faults < FAULTS);
        // Alone, a worker goes on with what is smaller: memory that others hold does not refuse everything.
        if matches!(fault, Fault::Refused(_)) && !others_work {
            self.stations[worker].1.faults = 0;
        } else if !others_work && self.stations[worker].1.faults >= FAULTS {
            bail!("no worker is left that can measure: {fault}");
        }
        // Another device may have what this one lacks; once, since none may.
        let front = &mut self.fronts[at];
        if others_work && front.given_back.insert(item) {
            front.share.give_back(item);
            return Ok(());
        }
        self.summary.unraced += 1;
        self.progress.inc(1);
        Ok(())
    }

    /// Stores the outcomes of a race but for those that an interrupt left unfinished: they are still missing.
    fn store(
        &mut self,
        at: usize,
        group: usize,
        key: &TuningKey,
        outcomes: Vec<(Config, Outcome)>,
        conditions: &Environment,
        registers: Option<&BTreeMap<Config, u32>>,
    ) -> Result<()> {
        let front = &self.fronts[at];
        let (common, space) = (front.environment(), front.spaces.get(&group));
        let interrupted =
            |outcome: &Outcome| matches!(outcome, Outcome::Failed { stage, .. } if stage == "interrupted");
        let finished = outcomes.into_iter().filter(|(_, outcome)| !interrupted(outcome));
        let record = |(config, outcome)| {
            let environment = Environment {
                source_digest: space.and_then(|space| space.candidates.get(&config)).cloned().unwrap_or_default(),
                registers: registers.and_then(|registers| registers.get(&config)).copied().unwrap_or(0),
                sm_mhz: conditions.sm_mhz,
                power_w: conditions.power_w,
                ..common.clone()
            };
            front.record(key, config, outcome, environment)
        };
        let mut records: Vec<Record> = finished.map(record).collect();
        let present = self.db.best(key)?.map(|best| best.config);
        record::choose(&mut records, present.as_ref());
        self.db.insert(&records).context("storing measurements")?;
        self.logbook.candidates(&records);
        Ok(())
    }

    fn note_winner(&mut self, at: usize, group: usize, key: &TuningKey, best: &Record) -> Result<()> {
        self.fronts[at].winners.retain(|winner| winner.problem != key.problem);
        self.fronts[at].winners.push(best.clone());
        self.fronts[at].space(group, &key.problem)?.note_slow(self.db, key, best)
    }
}

/// The default, the present winner and the library's first choice, as far as they are candidates: in every race to its end.
fn pinned(front: &Front, best: Option<&Record>, problem: &Problem) -> Vec<Config> {
    let default = report::default_config(*problem, front.target);
    let library = Config::Cublaslt(CublasltConfig { algorithm: 0 });
    let stand_in = best.and_then(|best| best.measurement()?.stand_in);
    default.into_iter().chain(best.map(|best| best.config)).chain(stand_in).chain([library]).collect()
}

fn front<'a>(facts: &Facts, groups: &'a [Group], db: &TuningDb) -> Result<Front<'a>> {
    let class = &facts.device.class;
    if let Some(why) = &facts.no_library {
        tracing::warn!(why, "cuBLASLt takes no part");
    }
    let target = facts.device.target().with_context(|| format!("no kernels are known for `{class}`"))?;
    let shipped = shipped::TABLES.iter().filter_map(|(name, text)| shipped::parse(name.as_ref(), text).ok()).flatten();
    Ok(Front {
        facts: facts.clone(),
        target,
        chip: Chip::of_class(&facts.device.class),
        groups,
        winners: db.winners()?.into_iter().chain(shipped).filter(|record| record.device.class == *class).collect(),
        spaces: BTreeMap::new(),
        share: Share::new(groups.iter().map(|group| group.m.len())),
        given_back: BTreeSet::new(),
        illegal: BTreeSet::new(),
        compiler: None,
        ahead: 0,
        raced: (Duration::ZERO, 0),
    })
}

fn progress_bar(total: usize, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} problems, {elapsed} gone, {eta} left  {msg}");
    ProgressBar::new(total as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiglu_db::Device;
    use swiglu_kernels::{DType, Op, WeightLayout};

    #[test]
    fn what_no_config_may_run_is_not_taken_for_tuned() {
        let folder = tempfile::tempdir().unwrap();
        let mut db = TuningDb::open(folder.path()).unwrap();
        let layout = WeightLayout::SeparateNk;
        let groups = [Group { op: Op::Forward, dtype: DType::E4m3, layout, n: 64, k: 64, m: vec![1, 2] }];
        let device = Device { class: "sm_75-sm40".into(), name: "a GPU of before e4m3".into() };
        let facts = Facts { device, nvrtc: String::new(), driver: String::new(), no_library: None };
        let (search, stop) = (Search::Model, Stop::default());
        let order = Order { groups: &groups, search, retune: false, sustained: false, quiet: true, stop };
        let front = front(&facts, &groups, &db).unwrap();
        let mut tuner = Tuner::new(&order, &mut db, Logbook::open(None, None).unwrap());
        tuner.fronts.push(front);
        assert!((0..2).all(|m| tuner.task(0, (0, m)).unwrap().is_none()));
        assert_eq!(tuner.summary, Summary { illegal: 2, ..Summary::default() });
        assert_eq!(tuner.fronts[0].illegal.len(), 1, "the log says why once");
        let why = tuner.fronts[0].illegality(0, &groups[0].problem(1)).unwrap().unwrap().to_string();
        assert!(why.contains("9.0"), "{why}");
    }
}
