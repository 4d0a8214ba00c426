//! `doctor`: what is found where, what is missing, how to mend it.

use crate::records;
use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use swiglu_db::{Layer, TuningTable};
use swiglu_runtime::gpu::{self, Gpu, GpuError};
use swiglu_runtime::nvrtc::Nvrtc;
use swiglu_runtime::{Options, library};

/// One thing looked at.
#[derive(Debug, Serialize)]
struct Check {
    what: &'static str,
    ok: bool,
    found: String,
}

impl Check {
    fn new<T: ToString, E: ToString>(what: &'static str, found: Result<T, E>) -> Self {
        match found {
            Ok(found) => Self { what, ok: true, found: found.to_string() },
            Err(missing) => Self { what, ok: false, found: missing.to_string() },
        }
    }
}

/// Prints every check; exit code 1 when tuning on a GPU would not work.
pub(crate) fn run(json: bool, options: &Options) -> Result<ExitCode> {
    let mut checks = vec![Check::new("driver", driver())];
    let nvrtc = Nvrtc::load(options.nvrtc.as_deref());
    checks.push(Check::new(
        "NVRTC",
        nvrtc.as_ref().map(|nvrtc| {
            format!("{} at {}, compiles for sm_{:?}", nvrtc.version_string(), nvrtc.path.display(), nvrtc.supported)
        }),
    ));
    let count = gpu::count();
    for ordinal in 0..*count.as_ref().unwrap_or(&0) {
        let gpu = Gpu::open(ordinal);
        checks.push(Check::new(
            "GPU",
            gpu.as_ref().map(|gpu| format!("{ordinal}: {} ({})", gpu.device.name, gpu.device.class)),
        ));
        if let (Ok(gpu), Ok(nvrtc)) = (&gpu, &nvrtc) {
            checks.push(Check::new(
                "NVRTC for this GPU",
                nvrtc.check_arch(gpu.arch).map(|()| format!("compiles for {}", gpu.arch)),
            ));
        }
    }
    const NO_GPU: &str = "none; `swiglu-tune --gpu auto` tunes the CPU backend";
    match &count {
        Ok(1..) => {}
        Ok(0) | Err(GpuError::Missing(_)) => checks.push(Check::new("GPU", Err::<String, _>(NO_GPU))),
        Err(why) => checks.push(Check::new("GPU", Err::<String, _>(why))),
    }
    // Optional: `ok` either way.
    let library = library::cublaslt()
        .map_or_else(|why| format!("none, which is no fault: {why}"), |path| path.display().to_string());
    checks.push(Check::new("cuBLASLt", Ok::<_, String>(library)));
    checks.push(Check::new("CPU", Ok::<_, String>(swiglu_runtime::cpu::device().class)));
    checks.push(Check::new("database", database(options)));
    checks.push(Check::new("layers", layers(options)));
    checks.push(Check::new("compiled kernels", Ok::<_, String>(options.cubin_dir().display())));
    if json {
        println!("{}", serde_json::to_string_pretty(&checks)?);
    } else {
        for check in &checks {
            println!("{:4} {}: {}", if check.ok { "ok" } else { "MISS" }, check.what, check.found);
        }
    }
    Ok(if checks.iter().all(|check| check.ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn driver() -> Result<String, String> {
    swiglu_runtime::library::driver().map_err(|error| error.to_string())?;
    Ok(driver_version().unwrap_or_else(|| "found, version unknown".into()))
}

/// The driver's version, from NVML.
pub(crate) fn driver_version() -> Option<String> {
    let nvml = nvml_wrapper::Nvml::init().ok()?;
    nvml.sys_driver_version().ok()
}

fn database(options: &Options) -> Result<String, String> {
    let records = || Ok((records::read(options)?, records::db_dir(options)?));
    let (records, dir) = records().map_err(|error: anyhow::Error| format!("{error:#}"))?;
    // Without a GPU the CPU is what would be tuned.
    let class = Gpu::open(0).map_or_else(|_| swiglu_runtime::cpu::device().class, |gpu| gpu.device.class);
    let whose = records::foreign(&records, &class).map(|whose| format!("; {whose}, so `swiglu-tune --gpu auto` pays"));
    Ok(format!("{} records in {}{}", records.len(), dir.display(), whose.unwrap_or_default()))
}

/// Where configs come from, highest first, with what each layer has.
fn layers(options: &Options) -> Result<String, String> {
    let (table, skipped) = TuningTable::load(&options.layers());
    let used: BTreeMap<Layer, usize> = table.layers().collect();
    let places: BTreeMap<Layer, PathBuf> = options.layers().into_iter().collect();
    let layer = |layer: Layer| {
        let place = places.get(&layer).map_or_else(String::new, |path| format!(" at {}", path.display()));
        match used.get(&layer) {
            Some(count) => format!("{layer} {count}{place}"),
            None => format!("{layer} none{place}"),
        }
    };
    let named = [Layer::Override, Layer::User, Layer::Site, Layer::Shipped].map(layer).join(", ");
    let text = format!("records: {named}; then the model, then the default");
    let reasons: Vec<String> = skipped.iter().map(ToString::to_string).collect();
    if reasons.is_empty() { Ok(text) } else { Err(format!("{text}; {}", reasons.join("; "))) }
}
