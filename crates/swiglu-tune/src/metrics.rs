//! What a long run tells those who watch it: a stream of JSON lines, and TensorBoard's scalars.

use crate::report::median_us;
use crate::tensorboard::Board;
use anyhow::{Context, Result};
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};
use swiglu_db::{Device, Record};
use swiglu_kernels::{Config, Problem};

/// Where it is told; nowhere unless asked for.
#[derive(Debug)]
pub(crate) struct Logbook {
    begun: Instant,
    lines: Option<File>,
    board: Option<Board>,
    step: u64,
}

/// One race, when it is over.
#[derive(Debug, Serialize)]
pub(crate) struct Race<'a> {
    pub(crate) device: &'a Device,
    pub(crate) problem: Problem,
    /// Candidates in it, and how many of those failed.
    pub(crate) candidates: usize,
    pub(crate) failed: usize,
    pub(crate) race_s: f64,
    /// Time of the canary at the end over that at the start.
    pub(crate) drift: Option<f64>,
    pub(crate) sm_mhz: Option<u32>,
    pub(crate) power_w: Option<u32>,
    /// What serves now.
    pub(crate) winner: Option<Config>,
    pub(crate) median_us: Option<f64>,
    pub(crate) tflops: Option<f64>,
    /// Problems that nobody has taken yet.
    pub(crate) left: usize,
}

#[derive(Serialize)]
struct Line<'a, T> {
    event: &'static str,
    elapsed_s: f64,
    #[serde(flatten)]
    what: &'a T,
}

impl Logbook {
    /// Lines are appended to `metrics`; `board` is given a file of its own.
    pub(crate) fn open(metrics: Option<&Path>, board: Option<&Path>) -> Result<Self> {
        let open = |path: &Path| {
            let file = OpenOptions::new().append(true).create(true).open(path);
            file.with_context(|| format!("opening {} for the metrics", path.display()))
        };
        let create =
            |dir: &Path| Board::create(dir).with_context(|| format!("writing TensorBoard events to {}", dir.display()));
        let (lines, board) = (metrics.map(open).transpose()?, board.map(create).transpose()?);
        Ok(Self { begun: Instant::now(), lines, board, step: 0 })
    }

    /// A line for every candidate that has come to its end.
    pub(crate) fn candidates(&mut self, records: &[Record]) {
        for record in records {
            self.line("candidate", record);
        }
    }

    /// A line and the scalars of a finished problem.
    pub(crate) fn problem(&mut self, race: &Race) {
        self.line("problem", race);
        self.step += 1;
        let step = self.step;
        let scalars = [
            ("problem/median_us", race.median_us),
            ("problem/tflops", race.tflops),
            ("race/seconds", Some(race.race_s)),
            ("race/candidates", Some(race.candidates as f64)),
            ("race/failed", Some(race.failed as f64)),
            ("race/drift", race.drift),
            ("device/sm_mhz", race.sm_mhz.map(f64::from)),
            ("device/power_w", race.power_w.map(f64::from)),
            ("run/problems_left", Some(race.left as f64)),
        ];
        let known: Vec<(&str, f64)> = scalars.into_iter().filter_map(|(tag, value)| Some((tag, value?))).collect();
        told(&mut self.board, |board| board.scalars(step, &known));
    }

    fn line(&mut self, event: &'static str, what: &impl Serialize) {
        let line = Line { event, elapsed_s: self.begun.elapsed().as_secs_f64(), what };
        told(&mut self.lines, |file| {
            let mut text = serde_json::to_string(&line)?;
            text.push('\n');
            file.write_all(text.as_bytes())
        });
    }
}

/// A full disk costs the metrics, not the run.
fn told<T>(to: &mut Option<T>, tell: impl FnOnce(&mut T) -> io::Result<()>) {
    if let Some(error) = to.as_mut().and_then(|to| tell(to).err()) {
        tracing::warn!(%error, "metrics cannot be written any more");
        *to = None;
    }
}

impl<'a> Race<'a> {
    /// Adds what serves the problem now.
    pub(crate) fn won_by(self, winner: Option<&Record>) -> Self {
        let median_us = winner.map(median_us);
        let tflops = median_us.map(|us| self.problem.flops() / us * 1e-6);
        Self { winner: winner.map(|record| record.config), median_us, tflops, ..self }
    }
}

/// Rounded for a line.
pub(crate) fn seconds(elapsed: Duration) -> f64 {
    (elapsed.as_secs_f64() * 1e3).round() / 1e3
}
