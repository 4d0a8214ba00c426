//! The operands of one call, as Python passes them.

use crate::error::Failure;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use swiglu_runtime::operands::MAX_ROWS;
use swiglu_runtime::{ForwardSpec, RawForward, RawMatrix};

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
        Ok(RawForward { m: tokens(self.m)?, ..self.operands })
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

/// M, held to its range.
pub(crate) fn tokens(m: u64) -> Result<u32, Failure> {
    let rows = u32::try_from(m).ok().filter(|&rows| rows as usize <= MAX_ROWS);
    rows.ok_or_else(|| Failure::argument("x", format!("has {m} rows, at most {MAX_ROWS} are supported")))
}

/// The matrices of one group of a step's operands, an address and a row stride in turn; at most as many as the group has.
pub(crate) fn matrices<const COUNT: usize>(
    argument: &'static str,
    given: &Bound<'_, PyTuple>,
) -> PyResult<[RawMatrix; COUNT]> {
    let len = given.len();
    if len % 2 != 0 || len > 2 * COUNT {
        let reason = format!("has {len} numbers, expected an address and a stride of each of at most {COUNT} matrices");
        return Err(Failure::argument(argument, reason).into());
    }
    let mut matrices = [RawMatrix::default(); COUNT];
    for (index, matrix) in matrices.iter_mut().take(len / 2).enumerate() {
        matrix.address = given.get_item(2 * index)?.extract()?;
        matrix.stride = given.get_item(2 * index + 1)?.extract()?;
    }
    Ok(matrices)
}
