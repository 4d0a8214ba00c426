//! Compiles, loads and launches tuned SwiGLU kernels.
//!
//! A caller brings its own CUDA context and stream, prepares a [`Plan`] for one
//! `(dtype, layout, K, N)` and launches it for any M. Nothing is compiled or loaded after
//! [`Runtime::prepare`], so launches can be captured in a CUDA graph: [`Plan::launch_raw`] always, those that take slices
//! while the context's event tracking is off. A plan outlives the graphs that were captured from it. Without a GPU the same
//! problem runs on the CPU through [`CpuRuntime`].

mod addresses;
mod buckets;
pub mod cpu;
pub mod cubin_cache;
pub mod cublaslt;
#[cfg(test)]
mod emulation;
pub mod ffn;
pub mod gemm;
pub mod gpu;
pub mod launch;
pub mod library;
mod library_call;
pub mod nvrtc;
pub mod operands;
pub mod options;
pub mod plan;
pub mod runtime;
pub mod scaled;
mod scratch;
mod split;
pub mod step;
mod tensor_map;

pub use buckets::serving_choice;
pub use cudarc;
pub use ffn::operands::{FfnBackward, FfnForward, FfnGradients, FfnWeights};
pub use ffn::{FfnPlan, FfnSpec};
pub use launch::{RawForward, RawScales};
pub use operands::{ArgumentError, Element, Forward, ForwardSpec, Matrix, Preactivations, Weights};
pub use options::Options;
pub use plan::{Choice, LaunchError, Plan, StepPlan};
pub use runtime::{Backend, CpuRuntime, PrepareError, Runtime};
pub use scaled::{ScaledForward, Stored, WeightScales};
pub use step::{RawMatrix, RawStep};
pub use swiglu_kernels::{DType, GateOrder, WeightLayout};
