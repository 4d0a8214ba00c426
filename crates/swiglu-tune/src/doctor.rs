//! `doctor`: what is found where, what is missing, how to mend it.

use crate::log::emit;
use crate::records;
use crate::report::one_line;
use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{Error, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use swiglu_db::snapshot::{self, Snapshot};
use swiglu_db::store::LOCK_NAME;
use swiglu_db::{Layer, Record, TuningTable, record};
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
            Ok(found) => Self { what, ok: true, found: one_line(&found.to_string()) },
            Err(missing) => Self { what, ok: false, found: one_line(&missing.to_string()) },
        }
    }
}

/// Prints every check; exit code 1 when tuning on a GPU would not work, or something else is to be mended.
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
            checks.push(Check::new("NVRTC for this driver", loads(gpu.driver_version, nvrtc.version)));
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
    let kept = options
        .cubin_dir()
        .map_or_else(|| Ok("not kept: there is no home; set SWIGLU_CUBIN_CACHE".into()), |dir| cache(&dir));
    checks.push(Check::new("compiled kernels", kept));
    if json {
        emit(serde_json::to_string_pretty(&checks)? + "\n")?;
    } else {
        for check in &checks {
            let mark = if check.ok { "ok" } else { "MISS" };
            emit(format_args!("{mark:4} {}: {}\n", check.what, check.found))?;
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

/// Whether a driver of this CUDA version, e.g. 12080, loads what that NVRTC compiles: CUBINs of its own major version or an
/// older one.
fn loads(driver: i32, (major, minor): (i32, i32)) -> Result<String, String> {
    let (has, nvrtc) = (driver / 1000, format!("NVRTC {major}.{minor}"));
    let cuda = format!("CUDA {has}.{}", driver % 1000 / 10);
    if has < major {
        return Err(format!(
            "the driver is of {cuda} and loads nothing that {nvrtc} compiles; update the driver, or set SWIGLU_NVRTC to the \
             NVRTC of CUDA {has}"
        ));
    }
    Ok(format!("the driver is of {cuda} and loads what {nvrtc} compiles"))
}

/// The folder of compiled kernels, made and written to as the runtime would.
fn cache(folder: &Path) -> Result<String, String> {
    let probe = folder.join(format!("doctor-{}", std::process::id()));
    let written = fs::create_dir_all(folder).and_then(|()| fs::write(&probe, "doctor"));
    let removed = fs::remove_file(&probe);
    let is_read_only =
        |error: &Error| matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem);
    let has_some = || fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some());
    match written.and(removed) {
        Ok(()) => Ok(folder.display().to_string()),
        Err(error) if is_read_only(&error) && has_some() => {
            Ok(format!("{}, read only ({error}): new ones are not kept", folder.display()))
        }
        Err(error) => Err(format!(
            "`{}` cannot be written: {error}; every process compiles again; set SWIGLU_CUBIN_CACHE to a folder that can be",
            folder.display()
        )),
    }
}

fn database(options: &Options) -> Result<String, String> {
    let records = || Ok((records::read(options)?, records::db_dir(options)?));
    let (records, dir) = records().map_err(|error: anyhow::Error| format!("{error:#}"))?;
    if let Err(why) = published(&records, &dir)
        && !is_at_work(&dir)
    {
        return Err(why);
    }
    // Without a GPU the CPU is what would be tuned.
    let class = Gpu::open(0).map_or_else(|_| swiglu_runtime::cpu::device().class, |gpu| gpu.device.class);
    let whose = records::foreign(&records, &class).map(|whose| format!("; {whose}, so `swiglu-tune --gpu auto` pays"));
    Ok(format!("{} records in {}{}", records.len(), dir.display(), whose.unwrap_or_default()))
}

/// Whether a tuner holds the lock: it publishes every other second.
fn is_at_work(dir: &Path) -> bool {
    let lock = File::open(dir.join(LOCK_NAME));
    lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// Whether readers are given what the journal says.
fn published(records: &[Record], dir: &Path) -> Result<(), String> {
    let fix = "`swiglu-tune db rebuild` publishes it again";
    let read = Snapshot::load(&dir.join(snapshot::FILE_NAME)).map_err(|error| format!("{error}; {fix}"))?;
    let winners = record::winners(records.iter().cloned());
    let is_read =
        |winner: &Record| read.get(&winner.key()).and_then(|entry| entry.record().ok()).as_ref() == Some(winner);
    if read.len() == winners.len() && winners.iter().all(is_read) {
        return Ok(());
    }
    Err(format!(
        "{} records in {}, but its snapshot, which programs read, is not of them ({} served, {} have won); unless a tuner is \
         running, {fix}",
        records.len(),
        dir.display(),
        read.len(),
        winners.len()
    ))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_elsewhere_reach_no_terminal_with_control_characters() {
        for found in [Ok("a\u{1b}[2J\nb"), Err("a\u{1b}[2J\nb")] {
            assert_eq!(Check::new("database", found).found, "a\u{fffd}[2J\u{fffd}b");
        }
    }

    #[test]
    fn a_driver_loads_what_a_compiler_of_its_major_version_or_an_older_one_makes() {
        for (driver, nvrtc) in [(13000, (13, 0)), (13000, (13, 1)), (13010, (12, 9)), (12000, (12, 8))] {
            assert!(loads(driver, nvrtc).is_ok(), "{driver} {nvrtc:?}");
        }
        let error = loads(12080, (13, 0)).unwrap_err();
        assert!(error.contains("CUDA 12.8 ") && error.contains("NVRTC 13.0") && error.ends_with("CUDA 12"), "{error}");
    }
}
