//! What ends a run early: Ctrl-C or another signal, or the end of its budget.
#![allow(unsafe_code, reason = "a handler that tells one signal from another is set through C")]

use std::ffi::c_int;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// The numbers of SIGHUP, SIGINT and SIGTERM, the same on every Unix.
const ENDING: [u8; 3] = [1, 2, 15];

/// The signal that came last; 0 before one did.
static CAME: AtomicU8 = AtomicU8::new(0);
/// What is set when one comes.
static TOLD: OnceLock<Arc<AtomicBool>> = OnceLock::new();

unsafe extern "C" {
    fn signal(number: c_int, handler: extern "C" fn(c_int)) -> usize;
}

/// Only atomics: it may interrupt anything.
extern "C" fn note(number: c_int) {
    CAME.store(u8::try_from(number).unwrap_or(0), Ordering::Relaxed);
    if let Some(told) = TOLD.get() {
        told.store(true, Ordering::Relaxed);
    }
}

/// Has Ctrl-C, SIGTERM and SIGHUP set `told` instead of ending the process.
pub(crate) fn on_signals(told: Arc<AtomicBool>) -> io::Result<()> {
    const SIG_ERR: usize = usize::MAX;
    TOLD.get_or_init(|| told);
    for number in ENDING {
        // SAFETY: C's own declaration; the handler lives as long as the process and does what a handler may.
        if unsafe { signal(c_int::from(number), note) } == SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// What a process returns that a signal has ended, as shells count; `None` where none came.
pub(crate) fn exit_code_of_signal() -> Option<u8> {
    Some(CAME.load(Ordering::Relaxed)).filter(|&number| number != 0).map(|number| 128 + number)
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
