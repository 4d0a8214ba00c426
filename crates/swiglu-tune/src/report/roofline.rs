//! What a device could reach at best, by the bytes that must move and the sums that must be made.

use swiglu_db::Device;
use swiglu_kernels::model::{bandwidth, flops_per_clock};
use swiglu_kernels::{DType, Problem, Target};
use swiglu_runtime::gpu::Gpu;

/// The ceilings of one device, as far as they are known.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Roofline {
    bytes_per_second: Option<f64>,
    /// Operations a second of all multiprocessors for one operation a clock in each.
    clocks_per_second: Option<f64>,
    /// Named by the user, for a GPU that is not in this machine.
    named_tflops: Option<f64>,
    arch: Option<&'static str>,
}

impl Roofline {
    /// Bandwidth comes from the class; the clock only from the GPU itself, if it is in this machine.
    pub(crate) fn of(device: &Device, here: Option<&Gpu>, named_tflops: Option<f64>) -> Self {
        let Some(Target::Gpu(arch)) = device.target() else { return Self::default() };
        let here = here.filter(|gpu| gpu.device.class == device.class);
        Self {
            bytes_per_second: bandwidth(&device.class),
            // `peak_fma_flops` counts two operations on 128 lanes.
            clocks_per_second: here.map(|gpu| gpu.peak_fma_flops / 256.0),
            named_tflops,
            arch: Some(arch.name),
        }
    }

    /// Operations a second that the arithmetic units of `dtype` reach at most.
    fn flops_per_second(&self, dtype: DType) -> Option<f64> {
        let by_clock = || Some(self.clocks_per_second? * flops_per_clock(self.arch?, dtype)?);
        self.named_tflops.map(|tflops| tflops * 1e12).or_else(by_clock)
    }

    /// The least time of `problem` in microseconds, and what bounds it.
    pub(crate) fn bound(&self, problem: &Problem) -> Option<(f64, &'static str)> {
        let bytes_us = self.bytes_per_second.map(|rate| problem.bytes() / rate * 1e6);
        let flops_us = self.flops_per_second(problem.dtype).map(|rate| problem.flops() / rate * 1e6);
        match (bytes_us, flops_us) {
            (Some(bytes_us), Some(flops_us)) if flops_us > bytes_us => Some((flops_us, "arithmetic")),
            (None, Some(flops_us)) => Some((flops_us, "arithmetic")),
            (Some(bytes_us), _) => Some((bytes_us, "bytes")),
            (None, None) => None,
        }
    }

    /// Whether both ceilings are known.
    pub(crate) fn is_whole(&self, dtype: DType) -> bool {
        self.bytes_per_second.is_some() && self.flops_per_second(dtype).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiglu_kernels::WeightMajor;

    #[test]
    fn few_tokens_are_bound_by_bytes_and_many_by_arithmetic() {
        let class = "sm_90a-sm132-l2_60m-smem227k-bus6016-mem3201mhz";
        let device = Device { class: class.into(), name: "NVIDIA H200".into() };
        let bytes_only = Roofline::of(&device, None, None);
        let both = Roofline::of(&device, None, Some(989.0));
        let [one, many] = [1, 8192].map(|m| Problem::forward(DType::Bf16, WeightMajor::K, m, 14336, 4096));
        let (us, by) = both.bound(&one).unwrap();
        assert_eq!((by, bytes_only.bound(&one).unwrap().0), ("bytes", us));
        // 235 MB at 4.8 TB/s.
        assert!((48.0..50.0).contains(&us), "{us}");
        let (us, by) = both.bound(&many).unwrap();
        assert_eq!(by, "arithmetic");
        assert!((1940.0..1950.0).contains(&us), "{us}");
        assert!(both.is_whole(DType::Bf16) && !bytes_only.is_whole(DType::Bf16));
        let cpu = Device { class: "cpu-x-8".into(), name: "x".into() };
        assert_eq!(Roofline::of(&cpu, None, Some(1.0)).bound(&one), None);
    }
}
