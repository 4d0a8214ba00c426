//! NVIDIA's cuBLASLt, where it is installed: handle, descriptors, algorithms, the call. It is one of the tuner's candidates
//! (`library_call.rs`) and the peer of `bench`.
//!
//! Contract: every descriptor lives exactly as long as the [`Gemm`], every handle as long as the [`CublasLt`] that made it.
#![allow(unsafe_code, reason = "cuBLASLt is a C library; cudarc's safe layer asks for one algorithm only")]

use crate::gemm::{GemmAt, GemmShape};
use crate::library::{self, MissingLibrary};
use cudarc::cublaslt::{result, result::CublasError, sys};
use cudarc::driver::{CudaContext, DriverError, sys as driver};
use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::Arc;
use swiglu_kernels::families::cublaslt::ALGORITHMS;
use swiglu_kernels::problem::OperandMajor;
use swiglu_kernels::{DType, Problem};

/// Scratch memory that an algorithm may ask for; what NVIDIA recommends for Hopper. Most ask for none.
pub const WORKSPACE_BYTES: usize = 32 << 20;

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
    /// The driver does not answer, or its memory has no order of streams.
    #[error("the CUDA driver failed to {act} for cuBLASLt: {error}")]
    Driver {
        /// What was being done.
        act: &'static str,
        /// Its report.
        error: DriverError,
    },
    /// It multiplies other operands, not these.
    #[error("cuBLASLt does not take these operands: {0}")]
    Operands(&'static str),
}

impl CublasLtError {
    /// Whether the same question has the same answer later.
    pub(crate) fn is_lasting(&self) -> bool {
        let Self::Library { error, .. } = self else { return !matches!(self, Self::Driver { .. }) };
        error.0 == sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED
    }
}

pub(crate) fn failed(act: &'static str) -> impl FnOnce(CublasError) -> CublasLtError {
    move |error| CublasLtError::Library { act, error }
}

pub(crate) fn refused(act: &'static str) -> impl FnOnce(DriverError) -> CublasLtError {
    move |error| CublasLtError::Driver { act, error }
}

/// The library on one GPU.
#[derive(Debug)]
pub struct CublasLt {
    handle: sys::cublasLtHandle_t,
    /// The handle is of this context.
    _context: Arc<CudaContext>,
}

// SAFETY: the library's functions may be called from any thread, on one handle too; it is destroyed once.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

/// How the sums of one element may be put together where several blocks share them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reductions {
    /// In fp32 and in a fixed order: the same bits in every run.
    Repeatable,
    /// In every way that the library has.
    Any,
}

/// One size with its algorithms, the best by the library's heuristic first.
#[derive(Debug)]
pub struct Gemm {
    compute: sys::cublasComputeType_t,
    /// What `out` is multiplied with before the product is added to it: 0 or 1.
    beta: f32,
    description: Description,
    /// Of the right operand, the left one and the output.
    layouts: [Layout; 3],
    /// At least one, with the bytes of workspace that it wants.
    algorithms: Vec<(sys::cublasLtMatmulAlgo_t, usize)>,
}

// SAFETY: descriptors are memory of the host that nothing changes after `CublasLt::gemm`.
unsafe impl Send for Gemm {}
// SAFETY: as above.
unsafe impl Sync for Gemm {}

#[derive(Debug)]
struct Description(sys::cublasLtMatmulDesc_t);

#[derive(Debug)]
struct Layout(sys::cublasLtMatrixLayout_t);

impl CublasLt {
    /// Loads cuBLASLt for the GPU of `context`. Not during stream capture.
    ///
    /// # Errors
    /// [`CublasLtError::Missing`] where it is not installed.
    pub fn new(context: &Arc<CudaContext>) -> Result<Self, CublasLtError> {
        let path = library::cublaslt()?;
        // SAFETY: only opens what is loaded already, or the loader's own.
        if !unsafe { sys::is_culib_present() } {
            return Err(CublasLtError::UnknownName(path));
        }
        let pools = driver::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED;
        if context.attribute(pools).map_err(refused("read the GPU's properties"))? == 0 {
            return Err(refused("find memory pools")(DriverError(driver::CUresult::CUDA_ERROR_NOT_SUPPORTED)));
        }
        context.bind_to_thread().map_err(refused("make its context current"))?;
        let handle = result::create_handle().map_err(failed("start"))?;
        Ok(Self { handle, _context: Arc::clone(context) })
    }

    /// Descriptors and algorithms for the sizes and strides of `at`, in the formats and with the alignment of `problem`.
    /// Work of the host only.
    ///
    /// # Errors
    /// When no algorithm supports it.
    pub fn gemm(&self, problem: &Problem, at: &GemmAt, reductions: Reductions) -> Result<Gemm, CublasLtError> {
        let (data, compute) = match problem.dtype {
            DType::F32 => (sys::cudaDataType::CUDA_R_32F, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F),
            DType::Tf32 => (sys::cudaDataType::CUDA_R_32F, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32),
            DType::F16 => (sys::cudaDataType::CUDA_R_16F, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F),
            DType::Bf16 => (sys::cudaDataType::CUDA_R_16BF, sys::cublasComputeType_t::CUBLAS_COMPUTE_32F),
            DType::E4m3 | DType::Bf16E4m3 | DType::F16E4m3 | DType::Bf16Int4 | DType::F16Int4 => {
                return Err(CublasLtError::Scaled(problem.dtype));
            }
        };
        let adds = problem.op.accumulates();
        let out_data = if adds { sys::cudaDataType::CUDA_R_32F } else { data };
        let GemmShape { rows, cols, depth, left, right, strides, .. } = at.shape;
        // cuBLASLt is column-major: a row-major matrix is its transpose, so out^T = right^T left^T.
        let in_memory =
            |major, outer, depth| if major == OperandMajor::Depth { (depth, outer) } else { (outer, depth) };
        let [of_left, of_right, of_out] = strides;
        let layouts = [
            Layout::new(data, in_memory(right, cols, depth), of_right)?,
            Layout::new(data, in_memory(left, rows, depth), of_left)?,
            Layout::new(out_data, (cols, rows), of_out)?,
        ];
        let description = Description::new(compute, at)?;
        let algorithms = self.algorithms(&description, &layouts, problem.alignment, reductions)?;
        Ok(Gemm { compute, beta: f32::from(u8::from(adds)), description, layouts, algorithms })
    }

    fn algorithms(
        &self,
        description: &Description,
        [right, left, out]: &[Layout; 3],
        alignment: u32,
        reductions: Reductions,
    ) -> Result<Vec<(sys::cublasLtMatmulAlgo_t, usize)>, CublasLtError> {
        let preference = Preference::new(alignment, reductions)?;
        let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> = Vec::with_capacity(ALGORITHMS as usize);
        let mut count = 0;
        // SAFETY: every descriptor is live; the array has room for as many results as are asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                description.0,
                right.0,
                left.0,
                out.0,
                out.0,
                preference.0,
                ALGORITHMS as i32,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        status.result().map_err(failed("find an algorithm"))?;
        let count = usize::try_from(count).unwrap_or(0).min(ALGORITHMS as usize);
        // SAFETY: cuBLASLt has written the first `count` results.
        unsafe { found.set_len(count) };
        let usable = found.into_iter().filter(|result| result.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        let algorithms: Vec<_> = usable.map(|result| (result.algo, result.workspaceSize)).collect();
        if algorithms.is_empty() {
            return Err(failed("find an algorithm")(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)));
        }
        Ok(algorithms)
    }

    /// Runs `gemm` on the addresses of `at` with its algorithm `rank`, or the last where it has fewer.
    ///
    /// # Errors
    /// When cuBLASLt refuses.
    ///
    /// # Safety
    /// `gemm` was made for the sizes, strides and alignment of `at`, whose addresses are of device memory of this GPU that holds
    /// its matrices, `out` apart from the others; `workspace` is of [`Gemm::workspace_bytes`], a multiple of 256; all stay
    /// allocated until the work has finished; `stream` is live and of the context of this library, which is current on this
    /// thread.
    pub unsafe fn run(
        &self,
        gemm: &Gemm,
        rank: usize,
        at: &GemmAt,
        workspace: u64,
        stream: driver::CUstream,
    ) -> Result<(), CublasLtError> {
        // The address of a bias is part of the description.
        let biased = if at.shape.is_biased { Some(Description::new(gemm.compute, at)?) } else { None };
        let description = biased.as_ref().unwrap_or(&gemm.description);
        let (alpha, beta) = (1.0f32, gemm.beta);
        let [right, left, out] = &gemm.layouts;
        let pointer = |address: u64| address as *mut c_void;
        let (algorithm, bytes) =
            gemm.algorithm(rank).map_or((std::ptr::null(), 0), |(it, bytes)| (&raw const *it, *bytes));
        // SAFETY: descriptors are live, scalars outlive the call, addresses by contract.
        let status = unsafe {
            result::matmul(
                self.handle,
                description.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                pointer(at.right),
                right.0,
                pointer(at.left),
                left.0,
                pointer(at.out),
                out.0,
                pointer(at.out),
                out.0,
                algorithm,
                pointer(workspace),
                bytes,
                stream.cast(),
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

    /// Bytes of workspace that algorithm `rank` wants; at most [`WORKSPACE_BYTES`].
    pub fn workspace_bytes(&self, rank: usize) -> usize {
        self.algorithm(rank).map_or(0, |(_, bytes)| *bytes)
    }

    fn algorithm(&self, rank: usize) -> Option<&(sys::cublasLtMatmulAlgo_t, usize)> {
        self.algorithms.get(rank).or(self.algorithms.last())
    }
}

impl Description {
    fn new(compute: sys::cublasComputeType_t, at: &GemmAt) -> Result<Self, CublasLtError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let made = result::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F);
        let description = Self(made.map_err(failed("describe a GEMM"))?);
        let GemmShape { left, right, is_biased, .. } = at.shape;
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &i32::from(right == OperandMajor::Depth))?;
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &i32::from(left == OperandMajor::Outer))?;
        if is_biased {
            // Down the columns of out^T: along the rows of out.
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &at.bias)?;
        }
        Ok(description)
    }

    fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), CublasLtError> {
        let size = std::mem::size_of::<T>();
        // SAFETY: the descriptor is live; the library copies `size` bytes and refuses another size than the attribute's.
        unsafe { result::set_matmul_desc_attribute(self.0, attribute, (&raw const *value).cast::<c_void>(), size) }
            .map_err(failed("set an attribute of a GEMM"))
    }
}

impl Layout {
    /// Of a column-major matrix.
    fn new(data: sys::cudaDataType, (rows, cols): (u64, u64), stride: i64) -> Result<Self, CublasLtError> {
        result::create_matrix_layout(data, rows, cols, stride).map(Self).map_err(failed("describe a matrix"))
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(alignment: u32, reductions: Reductions) -> Result<Self, CublasLtError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Self(result::create_matmul_pref().map_err(failed("make a preference"))?);
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
        // Without these it takes addresses to be multiples of 256.
        for matrix in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preference.set(matrix, &alignment)?;
        }
        if reductions == Reductions::Repeatable {
            let mask = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
            preference.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &mask)?;
        }
        Ok(preference)
    }

    fn set<T>(&self, attribute: sys::cublasLtMatmulPreferenceAttributes_t, value: &T) -> Result<(), CublasLtError> {
        let size = std::mem::size_of::<T>();
        // SAFETY: the preference is live; the library copies `size` bytes and refuses another size than the attribute's.
        unsafe { result::set_matmul_pref_attribute(self.0, attribute, (&raw const *value).cast::<c_void>(), size) }
            .map_err(failed("set a preference"))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once. Nothing can be done on failure.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once. Nothing can be done on failure.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once. Nothing can be done on failure.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once. Nothing can be done on failure.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
