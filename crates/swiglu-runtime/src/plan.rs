//! A prepared problem: every kernel it may need is compiled and loaded, a launch only picks one.
#![allow(unsafe_code, reason = "vouches for the addresses of checked slices")]

use crate::addresses::{Held, stride};
use crate::buckets::BucketTable;
use crate::cublaslt::CublasLtError;
use crate::gpu::{Gpu, Kernel};
use crate::launch::{self, RawForward, RawScales, Refusal};
use crate::operands::{ArgumentError, Element, Forward, ForwardSpec, MAX_ROWS, Preactivations, Weights};
use crate::step::{Named, RawStep, misaligned};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DriverError, sys};
use std::sync::Once;
use swiglu_db::{Match, Record};
use swiglu_kernels::problem::MAX_ACCESS_BYTES;
use swiglu_kernels::{Config, Problem};

/// Why a launch did not happen.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// An argument does not fit the plan.
    #[error(transparent)]
    Argument(#[from] ArgumentError),
    /// The plan's context could not be made current on this thread.
    #[error("the plan's CUDA context cannot be made current: {0}")]
    Context(DriverError),
    /// The launch's stream cannot wait for what was launched before on one of the slices. Nothing was launched.
    #[error(
        "the stream cannot wait for earlier work on an operand: {0}; work before may have failed, or the stream is captured with the \
         context's event tracking on, where raw addresses can be launched"
    )]
    Order(DriverError),
    /// The driver refused the launch, or an earlier one failed.
    #[error("the CUDA driver refused the launch of `{config}`: {error}")]
    Driver {
        /// The config that was to be launched.
        config: Box<Config>,
        /// Its report.
        error: DriverError,
    },
    /// The library failed, or does not take these operands and the plan has nothing else for them.
    #[error("`{config}` was not launched: {error}")]
    Library {
        /// The config that was to be launched.
        config: Box<Config>,
        /// The library's report.
        error: CublasLtError,
    },
}

impl LaunchError {
    fn of(config: Config, refusal: Refusal) -> Self {
        let config = Box::new(config);
        match refusal {
            Refusal::Driver(error) | Refusal::NoMemory(error) => Self::Driver { config, error },
            Refusal::Declined(error) | Refusal::Library(error) => Self::Library { config, error },
        }
    }
}

/// Where the config for some M came from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The M that it was tuned for, if it was.
    pub anchor: u32,
    /// The config.
    pub config: Config,
    /// Which rung of the ladder answered.
    pub matched: Match,
    /// What was measured at the anchor, in microseconds.
    pub median_us: Option<f64>,
    /// Of a library: the kernel of ours that came next.
    pub stand_in: Option<Config>,
}

impl Choice {
    /// What the tuning table has at an anchor.
    pub fn tuned(anchor: u32, record: &Record, matched: Match) -> Self {
        let (median_us, stand_in) =
            record.measurement().map_or((None, None), |measured| (Some(measured.median_us), measured.stand_in));
        Self { anchor, config: record.config, matched, median_us, stand_in }
    }

    /// A config that nothing was measured of.
    pub fn untuned(anchor: u32, config: Config, matched: Match) -> Self {
        Self { anchor, config, matched, median_us: None, stand_in: None }
    }
}

/// Said once in a process.
static NO_MEMORY: Once = Once::new();

/// What serves from one anchor to the next.
#[derive(Debug)]
pub(crate) struct Serving {
    pub(crate) choice: Choice,
    pub(crate) kernel: Kernel,
    /// Before the fallback, for operands that a library declines.
    pub(crate) instead: Option<Kernel>,
}

/// The kernels of one problem, loaded, and which of them serves which M and alignment.
#[derive(Debug)]
pub(crate) struct Selection {
    pub(crate) table: BucketTable,
    /// One per anchor, ascending.
    pub(crate) anchors: Vec<Serving>,
    /// Legal for every address and stride. The scaled formats have none, nor has a plan for which it does not compile.
    pub(crate) fallback: Option<Kernel>,
}

impl Selection {
    fn choice(&self, m: u32) -> &Choice {
        &self.serving(m).choice
    }

    fn serving(&self, m: u32) -> &Serving {
        &self.anchors[self.table.anchor(m)]
    }

    /// Two array reads; `None` where no kernel is legal for the alignment.
    fn select(&self, m: u32, alignment: u32) -> Option<&Kernel> {
        let kernel = &self.serving(m).kernel;
        if alignment.is_multiple_of(kernel.access_bytes()) { Some(kernel) } else { self.fallback.as_ref() }
    }

    /// Has `launch` launch what serves; `None` where nothing is legal for the alignment.
    fn launch(
        &self,
        m: u32,
        alignment: u32,
        launch: impl Fn(&Kernel) -> Result<(), Refusal>,
    ) -> Option<Result<(), LaunchError>> {
        let first = self.select(m, alignment)?;
        let others = [&self.serving(m).instead, &self.fallback].into_iter().flatten();
        let (kernel, launched) = in_turn(first, others, launch, |kernel, error| {
            let config = kernel.config;
            NO_MEMORY.call_once(|| tracing::warn!(%config, %error, "slower kernels serve where memory is short"));
        });
        Some(launched.map_err(|refusal| LaunchError::of(kernel.config, refusal)))
    }
}

/// Launches `kernel`, and as long as what was launched last is declined or has no memory, of which `short` is told, the next of
/// `others`. Tells what was launched last, and how that went.
fn in_turn<K: Copy>(
    mut kernel: K,
    others: impl Iterator<Item = K>,
    launch: impl Fn(K) -> Result<(), Refusal>,
    short: impl Fn(K, &DriverError),
) -> (K, Result<(), Refusal>) {
    let mut launched = launch(kernel);
    for other in others {
        match &launched {
            Err(Refusal::NoMemory(error)) => short(kernel, error),
            Err(Refusal::Declined(_)) => {}
            Ok(()) | Err(Refusal::Driver(_) | Refusal::Library(_)) => break,
        }
        kernel = other;
        launched = launch(kernel);
    }
    (kernel, launched)
}

/// A prepared forward problem on one GPU. `Send` and `Sync`. It outlives the graphs that were captured from it: they launch what
/// it has loaded.
///
/// Launches take no lock and no device memory, but for two kinds of config, which a [`Choice`] tells. A library's looks its
/// algorithm up under a read lock, and fp32 in parts finds a pool of memory under one; both may have memory of their own,
/// allocated and freed in the order of the stream, as nodes of a graph that captures them.
#[derive(Debug)]
pub struct Plan {
    pub(crate) gpu: Gpu,
    pub(crate) spec: ForwardSpec,
    pub(crate) selection: Selection,
}

/// A prepared step of the FFN on one GPU: the gate, its backward, or one GEMM. `Send` and `Sync`. What a [`Plan`] says of locks,
/// memory and graphs holds for it.
#[derive(Debug)]
pub struct StepPlan {
    pub(crate) gpu: Gpu,
    /// M comes with each launch.
    pub(crate) problem: Problem,
    pub(crate) selection: Selection,
}

impl StepPlan {
    /// The problem it was prepared for, at M = 1.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The GPU it launches on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// What is launched for `m` well aligned tokens, and why.
    pub fn choice(&self, m: u32) -> &Choice {
        self.selection.choice(m)
    }

    /// Launches without checks. Of no tokens gradients of weights are zero, or nothing to add.
    ///
    /// # Errors
    /// [`LaunchError::Argument`] when an operand that the op needs has no address; [`LaunchError::Driver`] or
    /// [`LaunchError::Library`] when these refuse the launch.
    ///
    /// # Safety
    /// Every address that is not 0 is of memory of this plan's GPU that holds its whole matrix, as [`RawStep`] says, and
    /// stays allocated until the launch has finished; outputs overlap no other operand but where [`RawStep`] allows it;
    /// addresses are multiples of the element's size; `stream` is live and of the GPU's context, which is current on this
    /// thread.
    pub unsafe fn launch_raw(&self, stream: sys::CUstream, args: &RawStep) -> Result<(), LaunchError> {
        if args.m as usize > MAX_ROWS {
            return Err(ArgumentError::new("m", format!("is {}, at most {MAX_ROWS} are supported", args.m)).into());
        }
        if let Some(argument) = args.missing(&self.problem) {
            return Err(ArgumentError::new(argument, format!("is 0, but `{}` needs it", self.problem.op)).into());
        }
        // SAFETY: by this function's own contract; `Selection::launch` has held the alignment to `access_bytes`.
        let launch = |kernel: &Kernel| unsafe { launch::step(kernel, stream, args) };
        let launched = self.selection.launch(args.m, args.alignment(&self.problem), launch);
        launched.unwrap_or_else(|| Err(not_aligned(args.operands(&self.problem), &self.problem).into()))
    }
}

impl Plan {
    /// What it was prepared for.
    pub fn spec(&self) -> &ForwardSpec {
        &self.spec
    }

    /// The GPU it launches on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// What is launched for `m` well aligned tokens, and why.
    pub fn choice(&self, m: u32) -> &Choice {
        self.selection.choice(m)
    }

    /// The kernel for `m` tokens at this alignment: two array reads. `None` where none is legal for it.
    pub fn select(&self, m: u32, alignment: u32) -> Option<&Kernel> {
        self.selection.select(m, alignment)
    }

    /// Launches on `stream`; every shape is checked first. Empty M or N returns without a launch.
    ///
    /// A CUDA graph captures it only while the context's event tracking is off
    /// ([`disable_event_tracking`](cudarc::driver::CudaContext::disable_event_tracking)): with it `stream` waits for events of
    /// each slice, which no capture takes. [`Plan::launch_raw`] waits for none.
    ///
    /// # Errors
    /// [`LaunchError::Argument`] names the operand that does not fit, [`LaunchError::Order`] tells why `stream` cannot wait for
    /// one; nothing was launched then.
    pub fn launch<T, S, O>(&self, stream: &CudaStream, forward: Forward<&S, &mut O>) -> Result<(), LaunchError>
    where
        T: Element,
        S: DevicePtr<T> + ?Sized,
        O: DevicePtrMut<T> + ?Sized,
    {
        if self.spec.dtype.is_scaled() {
            let reason = format!("`{}` has scales; use `Plan::launch_scaled`", self.spec.dtype);
            return Err(ArgumentError::new("x", reason).into());
        }
        if !T::stores(self.spec.dtype) {
            let reason = format!("its element type does not store `{}`", self.spec.dtype);
            return Err(ArgumentError::new("x", reason).into());
        }
        let offsets = forward.check(&self.spec, |slice| slice.len(), |slice| slice.len())?;
        self.check_device("stream", stream)?;
        for (argument, slice) in named_slices(&forward) {
            self.check_device(argument, slice.stream())?;
        }
        self.check_device("z", forward.z.data.stream())?;
        match &forward.preactivations {
            Some(Preactivations::Packed(saved)) => self.check_device("preactivations", saved.data.stream())?,
            Some(Preactivations::Separate { gate, up }) => {
                self.check_device("preactivations.gate", gate.data.stream())?;
                self.check_device("preactivations.up", up.data.stream())?;
            }
            None => {}
        }
        let m = u32::try_from(forward.x.rows).unwrap_or(u32::MAX);
        if m == 0 || self.spec.n == 0 {
            return Ok(());
        }
        let element_bytes = std::mem::size_of::<T>() as u64;
        let mut held = Held::on(stream)?;
        let x = held.read(forward.x);
        let (gate, up) = match forward.weights {
            Weights::Packed(packed) => (packed.data, packed.data),
            Weights::Separate { gate, up } => (gate.data, up.data),
        };
        let [gate, up] = [gate, up].map(|weights| held.address(weights));
        let biases = [forward.gate_bias, forward.up_bias];
        let [gate_bias, up_bias] = biases.map(|bias| bias.map_or(0, |bias| held.address(bias)));
        let z = held.written(forward.z);
        let half_bytes = u64::from(self.spec.n) * element_bytes;
        let [saved_gate, saved_up] = held.preactivations(forward.preactivations, half_bytes);
        let raw = RawForward {
            m,
            x: x.address,
            x_stride: x.stride,
            gate: gate + offsets.gate as u64 * element_bytes,
            gate_stride: stride(offsets.gate_stride),
            up: up + offsets.up as u64 * element_bytes,
            up_stride: stride(offsets.up_stride),
            gate_bias,
            up_bias,
            z: z.address,
            z_stride: z.stride,
            saved_gate: saved_gate.address,
            saved_gate_stride: saved_gate.stride,
            saved_up: saved_up.address,
            saved_up_stride: saved_up.stride,
            scales: RawScales::default(),
        };
        held.ordered()?;
        // SAFETY: `check` has held every matrix to its slice, the borrows keep the slices alive and the outputs apart,
        // `check_device` has held them to this plan's GPU; cudarc orders their release after this stream's work.
        unsafe { self.launch_raw(stream.cu_stream(), &raw) }
    }

    /// Launches without checks, for callers that have addresses only. Empty M or N returns without a launch.
    ///
    /// # Errors
    /// When the driver or a library refuses the launch, or the plan saves pre-activations and has no address for them.
    ///
    /// # Safety
    /// Every address is of memory of this plan's GPU that holds its whole matrix in the plan's number format and
    /// stays allocated until the launch has finished; biases have N elements or are 0; the outputs overlap no other
    /// operand; addresses are multiples of the element's size; `stream` is live and of the GPU's context, which
    /// is current on this thread.
    pub unsafe fn launch_raw(&self, stream: sys::CUstream, args: &RawForward) -> Result<(), LaunchError> {
        if args.m == 0 || self.spec.n == 0 {
            return Ok(());
        }
        if args.m as usize > MAX_ROWS {
            return Err(ArgumentError::new("m", format!("is {}, at most {MAX_ROWS} are supported", args.m)).into());
        }
        for (argument, address) in [("saved_gate", args.saved_gate), ("saved_up", args.saved_up)] {
            if self.spec.save_preactivations && address == 0 {
                return Err(ArgumentError::new(argument, "is 0, but the plan saves the pre-activations").into());
            }
        }
        if let Some(argument) = args.scales.missing(self.spec.dtype) {
            let reason = format!("is 0, but `{}` has scales", self.spec.dtype);
            return Err(ArgumentError::new(argument, reason).into());
        }
        let dtype = self.spec.dtype;
        // SAFETY: by this function's own contract; `Selection::launch` has held the alignment to `access_bytes`.
        let launch = |kernel: &Kernel| unsafe { launch::forward(kernel, stream, args) };
        let launched = self.selection.launch(args.m, args.alignment(dtype), launch);
        launched.unwrap_or_else(|| Err(not_aligned(args.operands(dtype), &self.spec.problem(args.m)).into()))
    }

    pub(crate) fn check_device(&self, argument: &'static str, stream: &CudaStream) -> Result<(), ArgumentError> {
        let (here, there) = (&self.gpu.context, stream.context());
        if here.cu_ctx() == there.cu_ctx() {
            return Ok(());
        }
        let reason =
            format!("is on GPU {}, the plan on GPU {} or another context of it", there.ordinal(), here.ordinal());
        Err(ArgumentError::new(argument, reason))
    }
}

/// Names the first operand at fault.
fn not_aligned<const COUNT: usize>(operands: [Named; COUNT], problem: &Problem) -> ArgumentError {
    let (argument, alignment) = misaligned(operands).unwrap_or((operands[0].0, MAX_ACCESS_BYTES));
    let reason = format!(
        "starts or steps at a multiple of {alignment} bytes; `{}` needs {MAX_ACCESS_BYTES} here, copy it",
        problem.dtype
    );
    ArgumentError::new(argument, reason)
}

/// The inputs with their names.
fn named_slices<'a, S: ?Sized, O: ?Sized>(
    forward: &Forward<&'a S, &mut O>,
) -> impl Iterator<Item = (&'static str, &'a S)> {
    let (gate, up) = match &forward.weights {
        Weights::Packed(packed) => (("weights", packed.data), None),
        Weights::Separate { gate, up } => (("gate", gate.data), Some(("up", up.data))),
    };
    let biases = [forward.gate_bias.map(|bias| ("gate_bias", bias)), forward.up_bias.map(|bias| ("up_bias", bias))];
    [("x", forward.x.data), gate].into_iter().chain(up).chain(biases.into_iter().flatten())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    fn declined() -> Refusal {
        Refusal::Declined(CublasLtError::Operands("not these"))
    }

    fn library() -> Refusal {
        Refusal::Library(CublasLtError::Operands("it failed"))
    }

    fn no_memory() -> Refusal {
        Refusal::NoMemory(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY))
    }

    fn driver() -> Refusal {
        Refusal::Driver(DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE))
    }

    /// What is launched in turn where the first kernels are refused so, the kernels that memory was short for, and whether the
    /// last launch went well.
    fn sequence(refusals: &[fn() -> Refusal]) -> (Vec<usize>, Vec<usize>, bool) {
        let (launches, short) = (RefCell::default(), RefCell::default());
        let launch = |kernel: usize| {
            let launches: &RefCell<Vec<usize>> = &launches;
            launches.borrow_mut().push(kernel);
            refusals.get(kernel).map_or(Ok(()), |refusal| Err(refusal()))
        };
        let (last, launched) = in_turn(0, [1, 2].into_iter(), launch, |kernel, _| {
            let short: &RefCell<Vec<usize>> = &short;
            short.borrow_mut().push(kernel);
        });
        let launches = launches.into_inner();
        assert_eq!(launches.last(), Some(&last), "the error names what was launched last");
        (launches, short.into_inner(), launched.is_ok())
    }

    #[test]
    fn what_is_declined_or_has_no_memory_leaves_the_launch_to_the_next() {
        assert_eq!(sequence(&[]), (vec![0], vec![], true));
        assert_eq!(sequence(&[declined]), (vec![0, 1], vec![], true));
        assert_eq!(sequence(&[no_memory]), (vec![0, 1], vec![0], true));
        assert_eq!(sequence(&[declined, no_memory]), (vec![0, 1, 2], vec![1], true));
        assert_eq!(sequence(&[no_memory, declined]), (vec![0, 1, 2], vec![0], true));
        assert_eq!(sequence(&[declined, declined, no_memory]), (vec![0, 1, 2], vec![], false));
    }

    #[test]
    fn what_failed_is_not_launched_again_with_another_kernel() {
        for failure in [driver, library] {
            assert_eq!(sequence(&[failure]), (vec![0], vec![], false));
            assert_eq!(sequence(&[declined, failure]), (vec![0, 1], vec![], false));
            assert_eq!(sequence(&[no_memory, failure]), (vec![0, 1], vec![0], false));
        }
    }
}
