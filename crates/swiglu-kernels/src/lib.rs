//! SwiGLU problems, the tuning spaces of the kernel families, and the templates that turn a
//! configuration into CUDA source. Pure: no GPU, no CUDA library, no file or environment access.
//!
//! The data flow is `Problem -> Config -> KernelSource`:
//!
//! ```
//! use swiglu_kernels::{arch, families, render, problem::*};
//!
//! let problem = Problem::forward(DType::Bf16, WeightMajor::K, 2048, 14336, 4096);
//! let arch = arch::by_name("sm_90a")?;
//! let config = families::default_config(&problem, arch)?;
//! let source = render::render(&problem, &config, arch)?;
//! assert!(source.text.contains("constexpr int kBlockM"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod arch;
pub mod families;
pub mod layout;
pub mod model;
pub mod oracle;
pub mod problem;
pub mod quant;
pub mod render;

pub use arch::ArchSpec;
pub use families::{Config, Family, Rejected, Target};
pub use layout::{GateOrder, WeightLayout};
pub use problem::{Activation, DType, Format, Op, Problem, WeightMajor};
pub use render::KernelSource;
