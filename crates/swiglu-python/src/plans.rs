//! The plans of this process, one per device and problem, and the runtimes that made them.

use crate::error::Failure;
use crate::gpu;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use swiglu_runtime::cpu::CpuPlan;
use swiglu_runtime::{CpuRuntime, ForwardSpec, Options, Runtime};

/// Where a plan runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Device {
    /// Any thread of this process.
    Cpu,
    /// CUDA's number of the GPU, which is torch's.
    Gpu(u32),
}

/// What a plan is kept under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) device: Device,
    /// Number format, layout, gate order, N and K.
    pub(crate) spec: ForwardSpec,
}

/// A prepared problem, shared by every caller.
#[derive(Debug, Clone)]
pub(crate) enum Plan {
    Gpu(Arc<swiglu_runtime::Plan>),
    Cpu(Arc<CpuPlan>),
}

/// Makes plans; under a lock, so that two threads never compile the same kernels.
#[derive(Default)]
struct Runtimes {
    cpu: Option<CpuRuntime>,
    gpus: HashMap<u32, Runtime>,
}

static PLANS: OnceLock<RwLock<HashMap<Key, Plan>>> = OnceLock::new();
static RUNTIMES: Mutex<Option<Runtimes>> = Mutex::new(None);
static NVRTC_FOLDER: OnceLock<PathBuf> = OnceLock::new();

pub(crate) fn set_nvrtc_folder(folder: PathBuf) {
    // The first one stays: a library is loaded once per process.
    let _ = NVRTC_FOLDER.set(folder);
}

/// The plan, if there is one.
pub(crate) fn get(key: &Key) -> Option<Plan> {
    // A poisoned map is still whole: it is only ever inserted into.
    PLANS.get()?.read().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
}

/// The plan, prepared now if there is none. Call it without the interpreter: it may compile for seconds.
pub(crate) fn get_or_prepare(key: Key) -> Result<Plan, Failure> {
    let mut runtimes = RUNTIMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(plan) = get(&key) {
        return Ok(plan);
    }
    let plan = runtimes.get_or_insert_default().prepare(&key)?;
    let plans = PLANS.get_or_init(RwLock::default);
    plans.write().unwrap_or_else(PoisonError::into_inner).insert(key, plan.clone());
    Ok(plan)
}

impl Runtimes {
    fn prepare(&mut self, key: &Key) -> Result<Plan, Failure> {
        match key.device {
            Device::Cpu => {
                let runtime = self.cpu.get_or_insert_with(|| CpuRuntime::new(&options()));
                Ok(Plan::Cpu(Arc::new(runtime.prepare(&key.spec)?)))
            }
            Device::Gpu(ordinal) => gpu::keep_current(|| {
                let runtime = match self.gpus.entry(ordinal) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(new) => new.insert(gpu::runtime(ordinal, &options())?),
                };
                Ok(Plan::Gpu(Arc::new(runtime.prepare(&key.spec)?)))
            }),
        }
    }
}

fn options() -> Options {
    let options = Options::from_env();
    Options { nvrtc: options.nvrtc.or_else(|| NVRTC_FOLDER.get().cloned()), ..options }
}
