//! The operands of one call, as Python passes them.

use crate::error::Failure;
use swiglu_runtime::{ForwardSpec, RawForward};

/// Addresses and strides in elements; both weights are separate matrices, a packed one is passed as its two halves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    /// CUDA stream; without meaning on the CPU.
    pub(crate) stream: u64,
    pub(crate) m: u64,
    pub(crate) x: u64,
    pub(crate) x_stride: i64,
    pub(crate) gate: u64,
    pub(crate) gate_stride: i64,
    pub(crate) up: u64,
    pub(crate) up_stride: i64,
    /// 0 where there is none.
    pub(crate) gate_bias: u64,
    /// 0 where there is none.
    pub(crate) up_bias: u64,
    pub(crate) z: u64,
    pub(crate) z_stride: i64,
    /// The gate's pre-activation; 0 where none are saved.
    pub(crate) saved_gate: u64,
    pub(crate) saved_gate_stride: i64,
    /// The up pre-activation; 0 where none are saved.
    pub(crate) saved_up: u64,
    pub(crate) saved_up_stride: i64,
}

impl Call {
    /// The same for the runtime, M held to its range.
    pub(crate) fn raw(&self) -> Result<RawForward, Failure> {
        let too_many = || Failure::argument("x", format!("has {} rows, at most {} are supported", self.m, i32::MAX));
        let m = i32::try_from(self.m).map_err(|_| too_many())?.unsigned_abs();
        Ok(RawForward {
            m,
            x: self.x,
            x_stride: self.x_stride,
            gate: self.gate,
            gate_stride: self.gate_stride,
            up: self.up,
            up_stride: self.up_stride,
            gate_bias: self.gate_bias,
            up_bias: self.up_bias,
            z: self.z,
            z_stride: self.z_stride,
            saved_gate: self.saved_gate,
            saved_gate_stride: self.saved_gate_stride,
            saved_up: self.saved_up,
            saved_up_stride: self.saved_up_stride,
        })
    }

    /// An error where an output shares memory with another operand: kernels read while others write.
    pub(crate) fn check_overlap(&self, spec: &ForwardSpec) -> Result<(), Failure> {
        let (n, k) = (u64::from(spec.n), u64::from(spec.k));
        let (rows, cols) = spec.layout.shape(spec.n as usize, spec.k as usize);
        let (rows, cols) = (rows as u64, cols as u64);
        let bytes = u64::from(spec.dtype.bytes());
        let range = |address: u64, rows: u64, cols: u64, stride: i64| {
            let elements = rows.saturating_sub(1).saturating_mul(stride.unsigned_abs()).saturating_add(cols);
            let empty = address == 0 || rows == 0 || cols == 0;
            address..if empty { address } else { address.saturating_add(elements.saturating_mul(bytes)) }
        };
        let inputs = [
            ("x", range(self.x, self.m, k, self.x_stride)),
            ("gate", range(self.gate, rows, cols, self.gate_stride)),
            ("up", range(self.up, rows, cols, self.up_stride)),
            ("gate_bias", range(self.gate_bias, 1, n, 0)),
            ("up_bias", range(self.up_bias, 1, n, 0)),
        ];
        let outputs = [
            ("out", range(self.z, self.m, n, self.z_stride)),
            ("saved_gate", range(self.saved_gate, self.m, n, self.saved_gate_stride)),
            ("saved_up", range(self.saved_up, self.m, n, self.saved_up_stride)),
        ];
        for (index, (name, output)) in outputs.iter().enumerate() {
            let others = inputs.iter().chain(&outputs[..index]);
            let mut others = others.filter(|(_, other)| other.start < output.end && output.start < other.end);
            if let Some((other, _)) = others.next() {
                return Err(Failure::argument(name, format!("overlaps `{other}` in memory")));
            }
        }
        Ok(())
    }
}
