//! The workers of a run, each driven by a thread of its own; what they find comes back as events.

use crate::protocol::Facts;
use crate::race::{Failure, Field, Raced, Round, race};
use crate::remote::{Fault, Remote, Worker};
use crate::share::Item;
use crate::stop::Stop;
use std::collections::BTreeMap;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::Scope;
use std::time::{Duration, Instant};
use swiglu_kernels::{Config, Problem};

/// One race to run.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) item: Item,
    pub(crate) problem: Problem,
    pub(crate) candidates: Vec<Config>,
    /// In the race until its end.
    pub(crate) pinned: Vec<Config>,
    /// Times every candidate properly, however slow.
    pub(crate) exhaustive: bool,
    pub(crate) rounds: &'static [Round],
}

/// What has happened.
#[derive(Debug)]
pub(crate) enum Event {
    /// A worker has run a race.
    Raced { worker: usize, task: Task, elapsed: Duration, result: Result<Finding, Fault> },
    /// The kernels of a group are compiled, but for these.
    Compiled {
        front: usize,
        group: usize,
        problem: Problem,
        elapsed: Duration,
        result: Result<Vec<(Config, Failure)>, Fault>,
    },
}

/// What a race has found.
#[derive(Debug)]
pub(crate) struct Finding {
    pub(crate) raced: Raced,
    /// Registers a thread.
    pub(crate) registers: BTreeMap<Config, u32>,
    /// What ended it, by no fault of one candidate: of its outcomes the failures alone are known.
    pub(crate) lost: Option<Fault>,
}

/// A worker that takes tasks.
pub(crate) struct Station {
    pub(crate) facts: Facts,
    pub(crate) tasks: Sender<Task>,
    pub(crate) is_busy: bool,
    /// Races in a row that could not be run.
    pub(crate) faults: u32,
}

impl Station {
    /// Puts `worker`, the `number`th, to work.
    pub(crate) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        number: usize,
        mut worker: Worker,
        events: Sender<Event>,
        stop: Stop,
    ) -> Self {
        let facts = worker.facts.clone();
        let (tasks, received) = mpsc::channel::<Task>();
        scope.spawn(move || {
            for task in received {
                let begun = Instant::now();
                let result = run(&mut worker, &task, &stop);
                let elapsed = begun.elapsed();
                if events.send(Event::Raced { worker: number, task, elapsed, result }).is_err() {
                    return;
                }
            }
        });
        Self { facts, tasks, is_busy: false, faults: 0 }
    }
}

fn run(worker: &mut Worker, task: &Task, stop: &Stop) -> Result<Finding, Fault> {
    let always = if task.exhaustive { &task.candidates } else { &task.pinned };
    let mut subject = Remote::open(worker, task.problem, &task.candidates, always)?;
    let field = Field { candidates: &task.candidates, pinned: &task.pinned, rounds: task.rounds };
    let raced = race(&mut subject, &field, stop);
    // A stop is no loss: what failed before it is stored alike, and the problem is left for another run.
    let lost = subject.lost.filter(|fault| !matches!(fault, Fault::Stopped));
    Ok(Finding { raced, registers: subject.registers, lost })
}

/// What to compile ahead: the number of the group, one of its problems, its candidates.
pub(crate) type Batch = (usize, Problem, Vec<Config>);

/// Compiles ahead of those who measure on one device class.
pub(crate) struct Compiler {
    pub(crate) batches: Sender<Batch>,
    pub(crate) is_busy: bool,
}

impl Compiler {
    pub(crate) fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        front: usize,
        mut worker: Worker,
        events: Sender<Event>,
    ) -> Self {
        let (batches, received): (_, Receiver<Batch>) = mpsc::channel();
        scope.spawn(move || {
            for (group, problem, configs) in received {
                let begun = Instant::now();
                let result = worker.compile(problem, &configs);
                if events.send(Event::Compiled { front, group, problem, elapsed: begun.elapsed(), result }).is_err() {
                    return;
                }
            }
        });
        Self { batches, is_busy: false }
    }
}
