//! The operands of one call, as Python passes them.

use crate::error::Failure;
use swiglu_runtime::{ForwardSpec, RawForward};

/// Where and on what; both weights are separate matrices, a packed one is passed as its two halves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    /// CUDA stream; without meaning on the CPU.
    pub(crate) stream: u64,
    /// Tokens, as Python counts them.
    pub(crate) m: u64,
    /// All else; its own `m` is set by [`Call::raw`].
    pub(crate) operands: RawForward,
}

impl Call {
    /// The operands, M held to its range.
    pub(crate) fn raw(&self) -> Result<RawForward, Failure> {
        let too_many = || Failure::argument("x", format!("has {} rows, at most {} are supported", self.m, i32::MAX));
        let m = i32::try_from(self.m).map_err(|_| too_many())?.unsigned_abs();
        Ok(RawForward { m, ..self.operands })
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
        let operands = &self.operands;
        let inputs = [
            ("x", range(operands.x, self.m, k, operands.x_stride)),
            ("gate", range(operands.gate, rows, cols, operands.gate_stride)),
            ("up", range(operands.up, rows, cols, operands.up_stride)),
            ("gate_bias", range(operands.gate_bias, 1, n, 0)),
            ("up_bias", range(operands.up_bias, 1, n, 0)),
        ];
        let outputs = [
            ("out", range(operands.z, self.m, n, operands.z_stride)),
            ("saved_gate", range(operands.saved_gate, self.m, n, operands.saved_gate_stride)),
            ("saved_up", range(operands.saved_up, self.m, n, operands.saved_up_stride)),
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
