//! What ends a run early: Ctrl-C or another signal, or the end of its budget.

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The signals that end a run, once what is being done has been kept.
const ENDING: [i32; 3] = [SIGHUP, SIGINT, SIGTERM];

/// Which of them came last.
#[derive(Debug, Default)]
pub(crate) struct Signal(Arc<AtomicUsize>);

impl Signal {
    /// Has Ctrl-C, SIGTERM and SIGHUP set `told` instead of ending the process; the last not where it was started to ignore that, as
    /// by `nohup`.
    pub(crate) fn heard_by(told: &Arc<AtomicBool>) -> io::Result<Self> {
        let came = Arc::default();
        let outlives_terminal = ignores(SIGHUP);
        for number in ENDING.into_iter().filter(|&number| number != SIGHUP || !outlives_terminal) {
            flag::register_usize(number, Arc::clone(&came), number.unsigned_abs() as usize)?;
            flag::register(number, Arc::clone(told))?;
        }
        Ok(Self(came))
    }

    /// What a process returns that a signal has ended, as shells count; `None` where none came.
    pub(crate) fn exit_code(&self) -> Option<u8> {
        u8::try_from(self.0.load(Ordering::Relaxed)).ok().filter(|&number| number != 0).map(|number| 128 + number)
    }
}

/// Whether this process ignores a signal; not where Linux does not say.
fn ignores(number: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // The lowest bit is of number 1.
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask >> (number - 1) & 1 == 1)
}

/// Shared by everything that works on one run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop {
    signal: Arc<AtomicBool>,
    /// There is nothing left to be done, or no way to do it.
    over: Arc<AtomicBool>,
    /// End of the budget, and what it may be overrun by.
    deadline: Option<(Instant, Duration)>,
}

/// A race that has begun may end this share of the budget late; what it has measured would else be lost.
const OVERRUN: f64 = 0.08;

impl Stop {
    /// Set by `signal`, and for good once `budget` is overrun.
    pub(crate) fn new(signal: Arc<AtomicBool>, budget: Option<Duration>) -> Self {
        // A budget that no clock can tell is none.
        let deadline = |budget: Duration| Some((Instant::now().checked_add(budget)?, budget.mul_f64(OVERRUN)));
        Self { signal, over: Arc::default(), deadline: budget.and_then(deadline) }
    }

    /// Whether what is being done must end.
    pub(crate) fn is_set(&self) -> bool {
        self.by_signal()
            || self.over.load(Ordering::Relaxed)
            || self.deadline.is_some_and(|(end, overrun)| end.elapsed() >= overrun && Instant::now() >= end)
    }

    /// Ends what is still being done.
    pub(crate) fn set(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub(crate) fn by_signal(&self) -> bool {
        self.signal.load(Ordering::Relaxed)
    }

    /// Of the budget, if there is one.
    pub(crate) fn left(&self) -> Option<Duration> {
        self.deadline.map(|(end, _)| end.saturating_duration_since(Instant::now()))
    }
}
