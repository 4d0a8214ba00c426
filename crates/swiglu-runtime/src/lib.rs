//! Compiles, loads and launches tuned SwiGLU kernels.
//!
//! A caller brings its own CUDA context and stream, prepares a plan for one
//! `(dtype, layout, K, N)` and launches it for any M. Nothing is compiled or loaded after `prepare`,
//! so launches can be captured in a CUDA graph. Without a GPU the same problem runs on [`cpu`].

pub mod cpu;
pub mod operands;

pub use operands::{ArgumentError, Element, Forward, ForwardSpec, Matrix, Weights};
