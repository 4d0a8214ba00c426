//! fp32 operands cut in two: where the parts lie, and the launch that writes them. `templates/wgmma_tma/split.cuh` has the design.
//!
//! Contract: `SplitParams` mirrors the template's.
#![allow(unsafe_code, reason = "hands raw device pointers to the driver")]

use crate::launch::{self, Geometry, KernelParams, RawForward, RawScales};
use cudarc::driver::{CudaFunction, DeviceRepr, DriverError, sys};
use std::ffi::c_void;
use swiglu_kernels::{Problem, WeightMajor};

/// Neighbours along K whose parts lie together: one 128-byte row.
const GROUP: u32 = 32;
/// Threads of a block of the launch, and columns of N-major weights that one cuts.
const THREADS: u32 = 256;
const COLUMNS: u32 = 32;
/// What matrices and scales start at a multiple of.
const ALIGNED: u64 = 256;

/// `SplitParams` of `templates/wgmma_tma/split.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SplitParams {
    x: u64,
    gate: u64,
    up: u64,
    x_scale: u64,
    gate_scale: u64,
    up_scale: u64,
    row_bytes: i64,
}

// SAFETY: plain integers in C layout.
unsafe impl DeviceRepr for SplitParams {}

/// The parts of one launch's operands in memory of its own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Split {
    params: SplitParams,
    /// Device memory that they take; as much as the operands, and a scale a row.
    pub(crate) bytes: u64,
    m: u32,
}

impl Split {
    /// As laid out from address 0.
    pub(crate) fn new(problem: &Problem, m: u32) -> Self {
        let row_bytes = 4 * u64::from(problem.k.next_multiple_of(GROUP));
        let mut end = 0_u64;
        let mut place = |bytes: u64| {
            let start = end;
            end = end.saturating_add(bytes).checked_next_multiple_of(ALIGNED).unwrap_or(u64::MAX);
            start
        };
        let [rows, columns] = [m, problem.n].map(u64::from);
        let [x, gate, up] = [rows, columns, columns].map(|count| place(count.saturating_mul(row_bytes)));
        let [x_scale, gate_scale, up_scale] = [rows, columns, columns].map(|count| place(4 * count));
        let params = SplitParams { x, gate, up, x_scale, gate_scale, up_scale, row_bytes: row_bytes.cast_signed() };
        Self { params, bytes: end, m }
    }

    /// The same from address `base`.
    pub(crate) fn at(&self, base: u64) -> Self {
        let SplitParams { x, gate, up, x_scale, gate_scale, up_scale, row_bytes } = self.params;
        let [x, gate, up, x_scale, gate_scale, up_scale] =
            [x, gate, up, x_scale, gate_scale, up_scale].map(|offset| base + offset);
        Self { params: SplitParams { x, gate, up, x_scale, gate_scale, up_scale, row_bytes }, ..*self }
    }

    /// What the product reads through its tensor maps: the parts, K-major, as matrices of fp32.
    pub(crate) fn operands(&self, problem: &Problem, args: &RawForward) -> (Problem, RawForward) {
        let stride = self.params.row_bytes / 4;
        let SplitParams { x, gate, up, .. } = self.params;
        let k = problem.k.next_multiple_of(GROUP);
        let problem = Problem { weight_major: WeightMajor::K, k, ..*problem };
        (problem, RawForward { x, gate, up, x_stride: stride, gate_stride: stride, up_stride: stride, ..*args })
    }

    /// The caller's operands with the scales of the parts: the product sums anew from them what has none.
    pub(crate) fn scaled(&self, args: &RawForward) -> RawForward {
        let SplitParams { x_scale, gate_scale, up_scale, .. } = self.params;
        let scales =
            RawScales { x: x_scale, gate: gate_scale, up: up_scale, stride: 0, x_rows: true, weight_rows: true };
        RawForward { scales, ..*args }
    }

    /// Blocks of the launch: one for each row, or 32 columns.
    pub(crate) fn blocks(&self, problem: &Problem) -> u32 {
        let of_weight = match problem.weight_major {
            WeightMajor::K => problem.n,
            WeightMajor::N => problem.n.div_ceil(COLUMNS),
        };
        self.m + 2 * of_weight
    }

    /// What the launch takes, in its order.
    pub(crate) fn arguments<'a>(&'a self, params: &'a KernelParams) -> [*mut c_void; 2] {
        [(&raw const self.params).cast_mut().cast(), std::ptr::from_ref(params).cast_mut().cast()]
    }

    /// Launches `function`, the template's `swiglu_split`, which writes the parts.
    ///
    /// # Safety
    /// `self` is [`Split::at`] memory of `self.bytes`, which stays allocated until the launch has finished; for `params` as
    /// [`launch::forward`].
    pub(crate) unsafe fn launch(
        &self,
        function: &CudaFunction,
        problem: &Problem,
        stream: sys::CUstream,
        params: &KernelParams,
    ) -> Result<(), DriverError> {
        let geometry =
            Geometry { blocks: self.blocks(problem), threads: THREADS, smem_bytes: 0, cluster: 1, dependent: false };
        // SAFETY: the kernel takes a `SplitParams` and a `Params` by value, both alive here; addresses by contract.
        unsafe { launch::entry(function, &geometry, stream, &mut self.arguments(params)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiglu_kernels::DType;

    #[test]
    fn parts_take_as_much_as_the_operands_and_nothing_overlaps() {
        let problem = Problem::forward(DType::F32, WeightMajor::N, 3, 40, 33);
        let split = Split::new(&problem, 3).at(1 << 20);
        let SplitParams { x, gate, up, x_scale, gate_scale, up_scale, row_bytes } = split.params;
        assert_eq!(row_bytes, 256);
        let matrices =
            [(x, 3 * 256), (gate, 40 * 256), (up, 40 * 256), (x_scale, 12), (gate_scale, 160), (up_scale, 160)];
        for ((start, bytes), (next, _)) in matrices.iter().zip(&matrices[1..]) {
            assert!(start + bytes <= *next && next.is_multiple_of(ALIGNED));
        }
        assert!(up_scale + 160 <= (1 << 20) + split.bytes && split.bytes < 84 * 256 + 4 * ALIGNED);
        assert_eq!(split.blocks(&problem), 3 + 4);
        assert_eq!(split.blocks(&Problem { weight_major: WeightMajor::K, ..problem }), 83);
        let (of_maps, args) = split.operands(&problem, &RawForward { z: 7, ..RawForward::default() });
        assert_eq!((of_maps.k, of_maps.weight_major, args.gate_stride, args.z), (64, WeightMajor::K, 64, 7));
        assert_eq!(Split::new(&problem.with_m(u32::MAX), u32::MAX).at(0).params.x, 0);
    }
}
