//! What ends a run early: Ctrl-C, or the end of its budget.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

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
