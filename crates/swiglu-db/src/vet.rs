//! Whether a tuner can have written a record. What comes from elsewhere was edited by hand or by another tool, and serves
//! only if it was not.

use crate::record::{InvalidRecord, Measurement, Origin, Outcome, Record};
use swiglu_kernels::Problem;
use swiglu_kernels::problem::MAX_ACCESS_BYTES;

/// Largest error of a record in tolerances of its format. The tuner stores none above its tolerance, or 1.1 times what the
/// reference loses when it is rounded to the format, which is 2.2 tolerances at most; and it lets no single element be off
/// by more than this.
const TOLERANCES: f64 = 16.0;

/// How the tuner writes a date, up to the fraction of the second.
const DATE: &str = "%Y-%m-%dT%H:%M:%S";

impl Record {
    /// Whether a tuner can have written it: it can be stored, its sizes, times and error are possible, its date can be
    /// compared, and no text of it steers a terminal.
    ///
    /// # Errors
    /// The first field that is wrong, and what it should be.
    pub fn vet(&self) -> Result<(), InvalidRecord> {
        self.check()?;
        self.vet_problem()?;
        self.vet_texts()?;
        if let Outcome::Measured(measured) = &self.outcome {
            self.vet_measurement(measured)?;
        }
        let date = &self.environment.date;
        if is_date(date) {
            return Ok(());
        }
        Err(self.invalid("environment.date", format!("is {date:?}; it must be like 2026-11-22T23:30:22Z")))
    }

    fn vet_problem(&self) -> Result<(), InvalidRecord> {
        let Problem { alignment, n, k, m, .. } = self.problem;
        let sizes = [("problem.m", m), ("problem.n", n), ("problem.k", k)];
        if let Some((field, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(self.invalid(field, "is 0; it must be at least 1".into()));
        }
        if alignment.is_power_of_two() && alignment <= MAX_ACCESS_BYTES {
            return Ok(());
        }
        let reason = format!("is {alignment}; it must be a power of two up to {MAX_ACCESS_BYTES}");
        Err(self.invalid("problem.alignment", reason))
    }

    /// The reason of a failure is a compiler's text, of many lines.
    fn vet_texts(&self) -> Result<(), InvalidRecord> {
        let environment = &self.environment;
        let origin = match &self.origin {
            Origin::Local => "",
            Origin::Import(name) | Origin::Merge(name) => name,
        };
        let texts = [
            ("device.name", self.device.name.as_str()),
            ("environment.nvrtc", &environment.nvrtc),
            ("environment.driver", &environment.driver),
            ("environment.version", &environment.version),
            ("environment.source_digest", &environment.source_digest),
            ("origin", origin),
        ];
        match texts.into_iter().find(|(_, text)| text.contains(char::is_control)) {
            Some((field, text)) => {
                Err(self.invalid(field, format!("is {text:?}; it must not hold a control character")))
            }
            None => Ok(()),
        }
    }

    fn vet_measurement(&self, measured: &Measurement) -> Result<(), InvalidRecord> {
        if let Some((field, time)) = measured.times().find(|(_, time)| *time <= 0.0) {
            return Err(self.invalid(field, format!("is {time}; a time must be above 0")));
        }
        let &Measurement { median_us, p10_us, p90_us, samples, error, interval_us, .. } = measured;
        if !(p10_us <= median_us && median_us <= p90_us) {
            let reason = format!("is {median_us}; it must not be outside of p10_us, {p10_us}, and p90_us, {p90_us}");
            return Err(self.invalid("measurement.median_us", reason));
        }
        if let Some([low, high]) = interval_us.filter(|[low, high]| low > high) {
            let reason = format!("is [{low}, {high}]; the lower bound comes first");
            return Err(self.invalid("measurement.interval_us", reason));
        }
        if samples == 0 {
            return Err(self.invalid("measurement.samples", "is 0; it must be at least 1".into()));
        }
        let dtype = self.problem.dtype;
        let limit = TOLERANCES * dtype.tolerance();
        if (0.0..=limit).contains(&error) {
            return Ok(());
        }
        Err(self.invalid("measurement.error", format!("is {error}; it must be from 0 to {limit:.1e} for {dtype}")))
    }
}

/// Dates are compared as texts, so that they must have one form.
fn is_date(text: &str) -> bool {
    let Ok(time) = text.parse::<jiff::Timestamp>() else { return false };
    text.ends_with('Z') && text.starts_with(&time.strftime(DATE).to_string())
}
