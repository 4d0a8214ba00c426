//! What can fail, and the Python exception it becomes.

use cudarc::driver::DriverError;
use pyo3::PyErr;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use swiglu_runtime::{ArgumentError, LaunchError, PrepareError};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// An argument does not fit: `ValueError`.
    #[error("argument `{argument}`: {reason}")]
    Argument {
        /// Its name in Python.
        argument: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no plan.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The launch was refused.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The driver refused something else.
    #[error("the CUDA driver failed to {act}: {error}")]
    Driver {
        /// What was being done.
        act: &'static str,
        /// Its report.
        error: DriverError,
    },
    /// A plan would have to be compiled while a graph is captured.
    #[error(
        "no plan is prepared for these sizes, and kernels cannot be compiled while a CUDA graph is captured; call swiglu.prepare() before the capture, or run once what is captured"
    )]
    Capturing,
    /// A defect of ours or of a library below.
    #[error("internal error: {0}")]
    Panic(String),
}

impl Failure {
    pub(crate) fn argument(argument: &'static str, reason: impl Into<String>) -> Self {
        Self::Argument { argument, reason: reason.into() }
    }

    pub(crate) fn driver(act: &'static str) -> impl FnOnce(DriverError) -> Self {
        move |error| Self::Driver { act, error }
    }
}

impl From<ArgumentError> for Failure {
    fn from(error: ArgumentError) -> Self {
        Self::argument(error.argument, error.reason)
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Argument { .. }
            | Failure::Launch(LaunchError::Argument(_))
            | Failure::Prepare(
                PrepareError::TooLarge { .. } | PrepareError::Empty { .. } | PrepareError::NotAStep(_),
            ) => PyValueError::new_err(failure.to_string()),
            Failure::Prepare(_)
            | Failure::Launch(_)
            | Failure::Driver { .. }
            | Failure::Capturing
            | Failure::Panic(_) => PyRuntimeError::new_err(failure.to_string()),
        }
    }
}

/// Runs `work`; a panic becomes a `RuntimeError` like every other failure, because `PanicException` escapes
/// `except Exception`.
pub(crate) fn guarded<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, PyErr> {
    // Nothing that `work` borrows is changed halfway by it but the output, which is void after an error anyway.
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(Failure::Panic(message(&*panic))))
        .map_err(PyErr::from)
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without a message".into())
}
