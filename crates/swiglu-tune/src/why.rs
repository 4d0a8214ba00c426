//! `why`: which config serves a problem, rung by rung, and what came second.

use crate::inspect::ProblemArgs;
use crate::log::emit;
use crate::records;
use crate::report;
use anyhow::{Context, Result};
use clap::Args;
use std::process::ExitCode;
use swiglu_db::lookup::Rung;
use swiglu_db::{Answer, Device, Explanation, Layer, Match, Origin, Record, TuningKey, TuningTable};
use swiglu_kernels::model::Chip;
use swiglu_kernels::{Config, Problem, Target};
use swiglu_runtime::gpu::Gpu;
use swiglu_runtime::{Options, cpu, runtime};

#[derive(Debug, Clone, Args)]
pub(crate) struct WhyArgs {
    #[command(flatten)]
    problem: ProblemArgs,
    /// Class of the device, as `report` prints it [default: the first GPU, else the CPU].
    #[arg(long, value_name = "CLASS")]
    device: Option<String>,
}

/// Prints the ladder and the answer.
pub(crate) fn run(args: &WhyArgs, options: &Options) -> Result<ExitCode> {
    let (records, table) = (records::read(options)?, runtime::load_table(options));
    let device = match &args.device {
        Some(class) => {
            let known = records.iter().find(|record| record.device.class == *class);
            known.map_or_else(|| Device { class: class.clone(), name: "a device".into() }, |known| known.device.clone())
        }
        None => Gpu::open(0).map_or_else(|_| cpu::device(), |gpu| gpu.device),
    };
    let target = device.target().with_context(|| {
        format!("`{}` names no device known here; `report` and `doctor` print device classes", device.class)
    })?;
    let problem = args.problem.problem_on(target);
    let explanation = table.explain(&device.class, &problem, target);
    let (name, class) = (report::one_line(&device.name), report::one_line(&device.class));
    emit(format_args!("{} on {name} ({class})\n\n", words(&problem)))?;
    emit(format_args!("{}\n\n", ladder(&explanation, &device, &problem, target)))?;
    if let Some(whose) = records::foreign(&records, &device.class) {
        emit(format_args!("{}: {}\n", records::db_dir(options)?.display(), report::one_line(&whose)))?;
    }
    let key = TuningKey { device_class: device.class.clone(), problem };
    let in_a_plan = in_a_plan(&table, &device.class, &problem, target);
    for line in conclusion(&explanation, &records, &key, target).into_iter().chain(in_a_plan) {
        emit(format_args!("{line}\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn words(problem: &Problem) -> String {
    let &Problem { op, activation, dtype, weight_major, alignment, n, k, m } = problem;
    format!("{op} {activation} {dtype} {weight_major}, M {m}, N {n}, K {k}, aligned to {alignment} bytes,")
}

fn ladder(explanation: &Explanation, device: &Device, problem: &Problem, target: Target) -> comfy_table::Table {
    let mut table = report::terminal_table(["", "rung", "layer", "records", "nearest that could serve"]);
    let serving = explanation.serving.as_ref().map(|answer| (answer.matched, answer.layer));
    for rung in &explanation.rungs {
        let mark = if serving == Some((rung.matched, rung.layer)) { "=>" } else { "" };
        let (layer, entries) = (rung.layer.to_string(), rung.entries.to_string());
        table.add_row([mark.to_owned(), rung.matched.to_string(), layer, entries, nearest(rung, problem)]);
    }
    let default = report::default_config(*problem, target);
    let better = match target {
        Target::Gpu(_) => default.and_then(|default| Chip::of_class(&device.class)?.better_than(&default, problem)),
        Target::Cpu { .. } => None,
    };
    let mark = |serves: bool| if serves { "=>" } else { "" }.to_owned();
    let untuned = serving.is_none() && default.is_some();
    let model = better.map_or_else(|| "nothing surely better than the default".into(), |config| config.to_string());
    let default = default.map_or_else(|| "no family runs this problem here".into(), |config| config.to_string());
    table.add_row([mark(untuned && better.is_some()), Match::Model.to_string(), "-".into(), "-".into(), model]);
    table.add_row([mark(untuned && better.is_none()), "default".into(), "-".into(), "-".into(), default]);
    table
}

fn nearest(rung: &Rung, asked: &Problem) -> String {
    let passed_over = rung.reason.as_ref().map(|reason| format!("{} passed over, {reason}", rung.passed_over));
    let nearest = rung.nearest.as_ref().map(|record| {
        let Problem { m, n, k, alignment, .. } = record.problem;
        match rung.matched {
            Match::Exact | Match::Model | Match::Untuned => record.config.to_string(),
            Match::OtherOp => format!("{}, M {m}: {}", record.problem.op, record.config),
            Match::NearestM if alignment == asked.alignment => format!("M {m}: {}", record.config),
            Match::NearestM => format!("M {m}, aligned to {alignment}: {}", record.config),
            Match::NearestShape => format!("M {m}, N {n}, K {k}: {}", record.config),
            Match::SameArch => {
                format!("{}, M {m}, N {n}, K {k}: {}", report::one_line(&record.device.name), record.config)
            }
        }
    });
    let parts: Vec<String> = nearest.into_iter().chain(passed_over).collect();
    if parts.is_empty() { "-".into() } else { parts.join("; ") }
}

/// The answer in words: what serves, what came second in time and on the ladder, what the default takes.
fn conclusion(explanation: &Explanation, records: &[Record], key: &TuningKey, target: Target) -> Vec<String> {
    let Some(serving) = &explanation.serving else {
        if report::default_config(key.problem, target).is_none() {
            return vec!["nothing serves: no family runs this problem here".into()];
        }
        return vec![
            "untuned: the last rung that is marked serves; `swiglu-tune --gpu auto --shapes FILE.toml` tunes the shape"
                .into(),
        ];
    };
    let mut lines = vec![format!(
        "serves: {}, {}, {} ({} layer); {}, {}",
        serving.record.config,
        time(&serving.record),
        serving.matched,
        serving.layer,
        origin(serving),
        report::stale(&serving.record).unwrap_or_else(|| "up to date".into())
    )];
    if serving.matched != Match::Exact {
        lines.push("its time is that of the problem it was tuned for; tune this shape to be sure".into());
    }
    let tuned_for = serving.record.key();
    let mut measured: Vec<&Record> = records
        .iter()
        .filter(|record| record.key() == tuned_for && record.origin == serving.record.origin)
        .filter(|record| record.measurement().is_some() && record.config != serving.record.config)
        .collect();
    measured.sort_by(|a, b| report::median_us(a).total_cmp(&report::median_us(b)));
    let behind = |record: &Record| 100.0 * (report::median_us(record) / report::median_us(&serving.record) - 1.0);
    lines.push(match measured.first() {
        Some(second) => {
            format!("second in time: {}, {}, {:+.2} %", second.config, time(second), behind(second))
        }
        None => "second in time: not known, no other config of that problem has a time in the database".into(),
    });
    let default = report::default_config(tuned_for.problem, target);
    let of_default = |config: Config| measured.iter().find(|record| record.config == config);
    lines.push(match default {
        Some(config) if config == serving.record.config => "untuned default: the same config".into(),
        Some(config) => match of_default(config) {
            Some(record) => format!("untuned default: {config}, {}, {:+.2} %", time(record), behind(record)),
            None => format!("untuned default: {config}, not measured"),
        },
        None => "untuned default: none".into(),
    });
    lines.push(match &explanation.second {
        Some(second) => format!(
            "next on the ladder: {}, {} ({} layer), tuned for {}",
            second.record.config,
            second.matched,
            second.layer,
            distance(&second.record.problem, &key.problem)
        ),
        None => "next on the ladder: the default".into(),
    });
    lines
}

/// Where the record was measured: what a layer's maker measured itself was not measured into the user's database.
fn origin(answer: &Answer) -> String {
    match (answer.layer, &answer.record.origin) {
        (Layer::User, origin) => origin.to_string(),
        (_, Origin::Local) => "measured there".into(),
        (_, origin) => origin.to_string(),
    }
}

/// How far a tuned problem is from the one asked.
fn distance(tuned: &Problem, asked: &Problem) -> String {
    let sizes = [("M", tuned.m, asked.m), ("N", tuned.n, asked.n), ("K", tuned.k, asked.k)];
    let differing = sizes.into_iter().filter(|(_, tuned, asked)| tuned != asked);
    let differing: Vec<String> = differing
        .map(|(name, tuned, asked)| format!("{:.2} times the {name}", f64::from(tuned) / f64::from(asked.max(1))))
        .collect();
    if differing.is_empty() { "the same sizes".into() } else { differing.join(", ") }
}

fn time(record: &Record) -> String {
    record.measurement().map_or_else(
        || "no time".into(),
        |measured| format!("{:.1} us in {} samples", measured.median_us, measured.samples),
    )
}

/// A plan is prepared once for all M, so that its M may be served by the kernel of a neighbour.
fn in_a_plan(table: &TuningTable, class: &str, problem: &Problem, target: Target) -> Option<String> {
    let (anchor, record, matched) = records::serving(table, class, problem, target)?;
    Some(format!("in a prepared plan: {}, the kernel of its anchor M {anchor} ({matched})", record.config))
}
