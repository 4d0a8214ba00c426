//! The library's plain GEMM, where cuBLASLt is installed: what our kernels are measured against.
//!
//! Contract: every descriptor lives exactly as long as the [`Gemm`] or [`CublasLt`] that made it.
#![allow(unsafe_code, reason = "cuBLASLt is a C library; cudarc's safe layer asks for one algorithm only")]

use crate::library::{self, MissingLibrary};
use cudarc::cublaslt::{result, result::CublasError, sys};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DriverError};
use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::Arc;
use swiglu_kernels::problem::{OperandMajor, Paired, Product};
use swiglu_kernels::{DType, WeightMajor};

/// Scratch memory that algorithms may use; what NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Algorithms asked for; the caller times them and takes the best.
const ALGORITHMS: usize = 8;

/// Why there is no library GEMM.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CublasLtError {
    /// cuBLASLt is not installed.
    #[error(transparent)]
    Missing(#[from] MissingLibrary),
    /// It is loaded, but the CUDA bindings cannot find it again.
    #[error("`{}` is loaded, but not under a name that these CUDA bindings know", .0.display())]
    UnknownName(PathBuf),
    /// cuBLASLt refused.
    #[error("cuBLASLt failed to {act}: {error:?}")]
    Library {
        /// What was being done.
        act: &'static str,
        /// Its status.
        error: CublasError,
    },
    /// It has no such product here.
    #[error("`{0}` has scales, which this peer does not apply; time it against `ours-bf16`")]
    Scaled(DType),
    /// No scratch memory.
    #[error("no device memory for cuBLASLt's workspace: {0}")]
    Memory(DriverError),
}

fn failed(act: &'static str) -> impl FnOnce(CublasError) -> CublasLtError {
    move |error| CublasLtError::Library { act, error }
}

/// A handle and its workspace, for one stream.
pub struct CublasLt {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    stream: Arc<CudaStream>,
}

/// `out = left · right` of contiguous row-major matrices, one algorithm per entry of `algorithms`.
pub struct Gemm {
    /// What `out` is multiplied with before the product is added to it: 0 or 1.
    beta: f32,
    description: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithms: Vec<sys::cublasLtMatmulAlgo_t>,
}

impl CublasLt {
    /// Loads cuBLASLt.
    ///
    /// # Errors
    /// [`CublasLtError::Missing`] where it is not installed.
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self, CublasLtError> {
        let path = library::cublaslt()?;
        // SAFETY: only opens what is loaded already, or the loader's own.
        if !unsafe { sys::is_culib_present() } {
            return Err(CublasLtError::UnknownName(path));
        }
        let handle = result::create_handle().map_err(failed("start"))?;
        let workspace = stream.alloc_zeros::<u8>(WORKSPACE_BYTES).map_err(CublasLtError::Memory)?;
        Ok(Self { handle, workspace, stream: Arc::clone(stream) })
    }

    /// `out[m, n] = x[m, k] · w`; `n` counts columns of `out`.
    ///
    /// # Errors
    /// When no algorithm supports it.
    pub fn gemm(&self, dtype: DType, weight_major: WeightMajor, m: u32, n: u32, k: u32) -> Result<Gemm, CublasLtError> {
        let right = match weight_major {
            WeightMajor::K => OperandMajor::Depth,
            WeightMajor::N => OperandMajor::Outer,
        };
        let left = OperandMajor::Depth;
        self.product(dtype, &Product { rows: m, cols: n, depth: k, left, right, paired: Paired::Nothing }, false)
    }

    /// Descriptors and algorithms for one size; halves that are paired are packed in one matrix. `adds` to an fp32 output.
    ///
    /// # Errors
    /// When no algorithm supports it.
    pub fn product(&self, dtype: DType, product: &Product, adds: bool) -> Result<Gemm, CublasLtError> {
        let (data, compute) = match dtype {
            DType::F32 => (sys::cudaDataType::CUDA_R_32F, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F),
            DType::Tf32 => (sys::cudaDataType::CUDA_R_32F, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32),
            DType::F16 => (sys::cudaDataType::CUDA_R_16F, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F),
            DType::Bf16 => (sys::cudaDataType::CUDA_R_16BF, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F),
            DType::E4m3 | DType::Bf16E4m3 | DType::F16E4m3 | DType::Bf16Int4 | DType::F16Int4 => {
                return Err(CublasLtError::Scaled(dtype));
            }
        };
        let out_data = if adds { sys::cudaDataType::CUDA_R_32F } else { data };
        let twice = |paired, size: u32| if product.paired == paired { 2 * u64::from(size) } else { size.into() };
        let rows = twice(Paired::Rows, product.rows);
        let cols = twice(Paired::Columns, product.cols);
        let depth = twice(Paired::Depth, product.depth);
        // cuBLASLt is column-major: a row-major matrix is its transpose, so out^T = right^T left^T.
        let (right, transpose_right) = match product.right {
            OperandMajor::Depth => ((depth, cols), true),
            OperandMajor::Outer => ((cols, depth), false),
        };
        let (left, transpose_left) = match product.left {
            OperandMajor::Depth => ((depth, rows), false),
            OperandMajor::Outer => ((rows, depth), true),
        };
        let description =
            result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F).map_err(failed("describe a GEMM"))?;
        let layouts = [std::ptr::null_mut(); 3];
        let mut gemm = Gemm { beta: f32::from(u8::from(adds)), description, layouts, algorithms: Vec::new() };
        let shapes = [(right, data), (left, data), ((cols, rows), out_data)];
        for (layout, ((rows, cols), data)) in gemm.layouts.iter_mut().zip(shapes) {
            *layout = result::create_matrix_layout(data, rows, cols, rows.cast_signed())
                .map_err(failed("describe a matrix"))?;
        }
        let attributes = [
            (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, transpose_right),
            (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, transpose_left),
        ];
        for (attribute, transpose) in attributes {
            let operation = i32::from(transpose);
            // SAFETY: the descriptor is live; the attribute is a 32-bit integer.
            unsafe {
                result::set_matmul_desc_attribute(
                    gemm.description,
                    attribute,
                    (&raw const operation).cast::<c_void>(),
                    std::mem::size_of::<i32>(),
                )
            }
            .map_err(failed("set the transpose"))?;
        }
        gemm.algorithms = self.algorithms(&gemm)?;
        Ok(gemm)
    }

    fn algorithms(&self, gemm: &Gemm) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, CublasLtError> {
        let preference = result::create_matmul_pref().map_err(failed("make a preference"))?;
        let workspace_bytes = WORKSPACE_BYTES;
        // SAFETY: the preference is live; the attribute is a size.
        let set = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace_bytes).cast::<c_void>(),
                std::mem::size_of::<usize>(),
            )
        };
        let [w, x, out] = gemm.layouts;
        let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> = Vec::with_capacity(ALGORITHMS);
        let mut count = 0;
        // SAFETY: every descriptor is live; the array has room for as many results as are asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                gemm.description,
                w,
                x,
                out,
                out,
                preference,
                ALGORITHMS as i32,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        // SAFETY: the preference was made above and is destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        set.map_err(failed("limit the workspace"))?;
        status.result().map_err(failed("find an algorithm"))?;
        let count = usize::try_from(count).unwrap_or(0).min(ALGORITHMS);
        // SAFETY: cuBLASLt has written the first `count` results.
        unsafe { found.set_len(count) };
        let usable = found.into_iter().filter(|result| result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        let algorithms: Vec<_> = usable.map(|result| result.algo).collect();
        if algorithms.is_empty() {
            return Err(failed("find an algorithm")(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)));
        }
        Ok(algorithms)
    }

    /// Runs the GEMM with its algorithm `index`.
    ///
    /// # Errors
    /// When cuBLASLt refuses.
    ///
    /// # Safety
    /// `left`, `right` and `out` are addresses of device memory of this stream's GPU that hold the GEMM's matrices, `out`
    /// apart from the others, all allocated until the work has finished.
    pub unsafe fn launch(
        &self,
        gemm: &Gemm,
        index: usize,
        left: u64,
        right: u64,
        out: u64,
    ) -> Result<(), CublasLtError> {
        let (alpha, beta) = (1.0f32, gemm.beta);
        let [right_layout, left_layout, out_layout] = gemm.layouts;
        let pointer = |address: u64| address as *mut c_void;
        let (workspace, _guard) = self.workspace.device_ptr(&self.stream);
        let algorithm = gemm.algorithms.get(index).map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: descriptors are live, scalars outlive the call, addresses by contract.
        let status = unsafe {
            result::matmul(
                self.handle,
                gemm.description,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                pointer(right),
                right_layout,
                pointer(left),
                left_layout,
                pointer(out),
                out_layout,
                pointer(out),
                out_layout,
                algorithm,
                pointer(workspace),
                WORKSPACE_BYTES,
                self.stream.cu_stream().cast(),
            )
        };
        status.map_err(failed("run a GEMM"))
    }
}

impl Gemm {
    /// Number of algorithms to choose from.
    pub fn algorithm_count(&self) -> usize {
        self.algorithms.len()
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        for layout in self.layouts.into_iter().filter(|layout| !layout.is_null()) {
            // SAFETY: made by `gemm`, destroyed once. Nothing can be done on failure.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
        }
        // SAFETY: made by `gemm`, destroyed once. Nothing can be done on failure.
        let _ = unsafe { result::destroy_matmul_desc(self.description) };
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once. Nothing can be done on failure.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
