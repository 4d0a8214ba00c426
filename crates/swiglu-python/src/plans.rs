//! The plans of this process, one per device and problem, and the runtimes that made them.

use crate::error::Failure;
use crate::gpu;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError, RwLock};
use swiglu_kernels::Problem;
use swiglu_runtime::cpu::CpuPlan;
use swiglu_runtime::{CpuRuntime, ForwardSpec, Options, Runtime, StepPlan};

/// Where a plan runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Device {
    /// Any thread of this process.
    Cpu,
    /// CUDA's number of the GPU, which is torch's.
    Gpu(u32),
}

/// What a plan of the forward is kept under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) device: Device,
    /// Number format, layout, gate order, N and K.
    pub(crate) spec: ForwardSpec,
}

/// What a plan of a step is kept under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct StepKey {
    /// CUDA's number of the GPU.
    pub(crate) gpu: u32,
    /// At M = 1.
    pub(crate) problem: Problem,
}

/// A prepared forward, shared by every caller.
#[derive(Debug, Clone)]
pub(crate) enum Plan {
    Gpu(Arc<swiglu_runtime::Plan>),
    Cpu(Arc<CpuPlan>),
}

/// Something that is prepared once and kept for the life of the process.
pub(crate) trait Prepared: Copy + Eq + Hash + Send + Sync + 'static {
    type Plan: Clone + Send + 'static;

    /// Where the plan runs.
    fn device(&self) -> Device;
    fn plans() -> &'static RwLock<HashMap<Self, Self::Plan>>;
    fn prepare(&self, runtimes: &mut Runtimes) -> Result<Self::Plan, Failure>;
}

/// Makes plans; under a lock, so that two threads never compile the same kernels.
#[derive(Default)]
pub(crate) struct Runtimes {
    cpu: Option<CpuRuntime>,
    gpus: HashMap<u32, Runtime>,
}

static RUNTIMES: Mutex<Option<Runtimes>> = Mutex::new(None);
static NVRTC_FOLDER: OnceLock<PathBuf> = OnceLock::new();

pub(crate) fn set_nvrtc_folder(folder: PathBuf) {
    // The first one stays: a library is loaded once per process.
    let _ = NVRTC_FOLDER.set(folder);
}

/// The plan, if there is one.
pub(crate) fn get<K: Prepared>(key: &K) -> Option<K::Plan> {
    // A poisoned map is still whole: it is only ever inserted into.
    K::plans().read().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
}

/// The plan, prepared now if there is none. Call it without the interpreter: it may compile for seconds.
pub(crate) fn get_or_prepare<K: Prepared>(key: K) -> Result<K::Plan, Failure> {
    let mut runtimes = RUNTIMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(plan) = get(&key) {
        return Ok(plan);
    }
    let plan = key.prepare(runtimes.get_or_insert_default())?;
    K::plans().write().unwrap_or_else(PoisonError::into_inner).insert(key, plan.clone());
    Ok(plan)
}

impl Prepared for Key {
    type Plan = Plan;

    fn device(&self) -> Device {
        self.device
    }

    fn plans() -> &'static RwLock<HashMap<Self, Plan>> {
        static PLANS: LazyLock<RwLock<HashMap<Key, Plan>>> = LazyLock::new(RwLock::default);
        &PLANS
    }

    fn prepare(&self, runtimes: &mut Runtimes) -> Result<Plan, Failure> {
        match self.device {
            Device::Cpu => {
                let runtime = runtimes.cpu.get_or_insert_with(|| CpuRuntime::new(&options()));
                Ok(Plan::Cpu(Arc::new(runtime.prepare(&self.spec)?)))
            }
            Device::Gpu(ordinal) => runtimes.on_gpu(ordinal, |gpu| Ok(Plan::Gpu(Arc::new(gpu.prepare(&self.spec)?)))),
        }
    }
}

impl Prepared for StepKey {
    type Plan = Arc<StepPlan>;

    fn device(&self) -> Device {
        Device::Gpu(self.gpu)
    }

    fn plans() -> &'static RwLock<HashMap<Self, Arc<StepPlan>>> {
        static PLANS: LazyLock<RwLock<HashMap<StepKey, Arc<StepPlan>>>> = LazyLock::new(RwLock::default);
        &PLANS
    }

    fn prepare(&self, runtimes: &mut Runtimes) -> Result<Arc<StepPlan>, Failure> {
        runtimes.on_gpu(self.gpu, |gpu| Ok(Arc::new(gpu.prepare_step(&self.problem)?)))
    }
}

impl Runtimes {
    /// `work` on the GPU's runtime, which is made now if there is none.
    fn on_gpu<T>(&mut self, ordinal: u32, work: impl FnOnce(&Runtime) -> Result<T, Failure>) -> Result<T, Failure> {
        gpu::keep_current(|| {
            let runtime = match self.gpus.entry(ordinal) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => new.insert(gpu::runtime(ordinal, &options())?),
            };
            work(runtime)
        })
    }
}

fn options() -> Options {
    let options = Options::from_env();
    Options { nvrtc: options.nvrtc.or_else(|| NVRTC_FOLDER.get().cloned()), ..options }
}
