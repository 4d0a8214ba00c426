//! The library's GEMM as a peer: with every algorithm that it has, on a workspace of its own.
#![allow(unsafe_code, reason = "hands addresses of buffers to the library")]

use crate::gpu_subject::GpuLab;
use crate::race::Failure;
use anyhow::Result;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use std::ops::Range;
use std::sync::Arc;
use swiglu_kernels::Problem;
use swiglu_runtime::cublaslt::{CublasLt, Gemm, Reductions, WORKSPACE_BYTES};
use swiglu_runtime::gemm::{GemmAt, Gemms, NoGemm};

/// One size, ready to launch.
pub(crate) struct LibraryGemm {
    library: Arc<CublasLt>,
    gemm: Gemm,
    workspace: CudaSlice<u8>,
    stream: Arc<CudaStream>,
}

impl LibraryGemm {
    /// For the formats of `problem` and what has the sizes and strides of `at`.
    pub(crate) fn new(lab: &GpuLab, problem: &Problem, at: &GemmAt) -> Result<Self> {
        let library = lab.library()?;
        let gemm = library.gemm(problem, at, Reductions::Any)?;
        let workspace = lab.stream.alloc_zeros::<u8>(WORKSPACE_BYTES)?;
        Ok(Self { library, gemm, workspace, stream: Arc::clone(&lab.stream) })
    }

    pub(crate) fn algorithms(&self) -> Range<usize> {
        0..self.gemm.algorithm_count()
    }

    /// Launches it on the lab's stream.
    ///
    /// # Safety
    /// `at` has the sizes and strides that this was made for, and addresses of buffers that hold its matrices and outlive the
    /// work, the output apart from the others.
    pub(crate) unsafe fn launch(&self, algorithm: usize, at: &GemmAt) -> Result<(), Failure> {
        let (workspace, _guard) = self.workspace.device_ptr(&self.stream);
        // SAFETY: by this function's own contract; the workspace is as large as any algorithm wants it.
        let launched = unsafe { self.library.run(&self.gemm, algorithm, at, workspace, self.stream.cu_stream()) };
        launched.map_err(|error| Failure::new("launch", error))
    }
}

/// The one GEMM of operands whose pairs lie together, as an arena's do.
pub(crate) fn only(gemms: Result<Gemms, NoGemm>) -> Result<GemmAt, Failure> {
    match gemms {
        Ok([Some(at), None]) => Ok(at),
        Ok(_) => Err(Failure::new("launch", "the peer's operands do not lie together")),
        Err(why) => Err(Failure::new("launch", why)),
    }
}
