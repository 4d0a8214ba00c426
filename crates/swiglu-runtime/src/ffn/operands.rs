//! The operands of a whole FFN as slices, on a GPU or on the CPU, and the one place where they are checked.

use super::{FfnSpec, Gradients, Keep};
use crate::operands::{ArgumentError, MAX_ROWS, Matrix};
use swiglu_kernels::WeightMajor;

/// The weights and biases of an FFN.
#[derive(Debug, Clone, Copy)]
pub struct FfnWeights<S> {
    /// Wg: `[N, K]` where the spec is k_major, else `[K, N]`.
    pub gate: Matrix<S>,
    /// Wu, like the gate's.
    pub up: Matrix<S>,
    /// Wd: `[K, N]` where the spec is k_major, else `[N, K]`.
    pub down: Matrix<S>,
    /// bg `[N]`, if any.
    pub gate_bias: Option<S>,
    /// bu `[N]`, if any.
    pub up_bias: Option<S>,
    /// bd `[K]`, if any.
    pub down_bias: Option<S>,
}

/// Operands of `y = (silu(x·Wg + bg) ⊙ (x·Wu + bu))·Wd + bd`.
#[derive(Debug)]
pub struct FfnForward<S, O> {
    /// `[M, K]`.
    pub x: Matrix<S>,
    /// The weights.
    pub weights: FfnWeights<S>,
    /// `[M, K]`: the output.
    pub y: Matrix<O>,
    /// [`FfnSpec::saved_bytes`] for the backward; given where, and only where, the spec keeps them.
    pub saved: Option<O>,
    /// [`FfnSpec::forward_workspace_bytes`]; what it holds afterwards has no meaning.
    pub workspace: O,
}

/// The gradients of the weights, in the weights' orders, and of the biases.
#[derive(Debug)]
pub struct FfnGradients<G> {
    /// dWg.
    pub gate: Matrix<G>,
    /// dWu.
    pub up: Matrix<G>,
    /// dWd.
    pub down: Matrix<G>,
    /// dbg `[N]`, dbu `[N]` and dbd `[K]`; given where, and only where, [`FfnSpec::bias_gradients`] is set.
    pub biases: Option<[G; 3]>,
}

/// Operands of the backward.
#[derive(Debug)]
pub struct FfnBackward<S, O, G> {
    /// `[M, K]`, as in the forward.
    pub x: Matrix<S>,
    /// As in the forward.
    pub weights: FfnWeights<S>,
    /// `[M, K]`.
    pub dy: Matrix<S>,
    /// `[M, K]`: an output.
    pub dx: Matrix<O>,
    /// Outputs, fp32 where they are added to; given where, and only where, the weights are not frozen.
    pub gradients: Option<FfnGradients<G>>,
    /// What the forward saved; its gradients take its place. Given where, and only where, the spec keeps them.
    pub saved: Option<O>,
    /// [`FfnSpec::backward_workspace_bytes`]; none where that is 0.
    pub workspace: Option<O>,
}

/// A slice of at least `bytes`, given where `wanted`.
fn check_buffer<O>(
    argument: &'static str,
    buffer: Option<&O>,
    wanted: bool,
    bytes: u64,
    len_bytes: &impl Fn(&O) -> u64,
) -> Result<(), ArgumentError> {
    match buffer {
        Some(_) if !wanted => Err(ArgumentError::new(argument, "is given, but the plan uses none; pass None")),
        None if wanted => Err(ArgumentError::new(argument, format!("is missing: {bytes} bytes are needed"))),
        Some(buffer) if len_bytes(buffer) < bytes => {
            Err(ArgumentError::new(argument, format!("has {} bytes, {bytes} are needed", len_bytes(buffer))))
        }
        _ => Ok(()),
    }
}

fn check_vector<S>(
    argument: &'static str,
    vector: Option<&S>,
    needed: usize,
    len: &impl Fn(&S) -> usize,
) -> Result<(), ArgumentError> {
    match vector.map(len).filter(|&elements| elements < needed) {
        Some(elements) => Err(ArgumentError::new(argument, format!("has {elements} elements, expected {needed}"))),
        None => Ok(()),
    }
}

impl FfnSpec {
    /// Rows and columns of Wg and Wu, then those of Wd.
    pub fn weight_shapes(&self) -> [(usize, usize); 2] {
        let (n, k) = (self.n as usize, self.k as usize);
        match self.weight_major {
            WeightMajor::K => [(n, k), (k, n)],
            WeightMajor::N => [(k, n), (n, k)],
        }
    }
}

impl<S> FfnWeights<S> {
    fn check(&self, spec: &FfnSpec, len: &impl Fn(&S) -> usize) -> Result<(), ArgumentError> {
        let [(rows, cols), (down_rows, down_cols)] = spec.weight_shapes();
        self.gate.check("weights.gate", rows, cols, len(&self.gate.data))?;
        self.up.check("weights.up", rows, cols, len(&self.up.data))?;
        self.down.check("weights.down", down_rows, down_cols, len(&self.down.data))?;
        check_vector("weights.gate_bias", self.gate_bias.as_ref(), spec.n as usize, len)?;
        check_vector("weights.up_bias", self.up_bias.as_ref(), spec.n as usize, len)?;
        check_vector("weights.down_bias", self.down_bias.as_ref(), spec.k as usize, len)
    }
}

fn check_rows(rows: usize) -> Result<u32, ArgumentError> {
    let m = u32::try_from(rows).ok().filter(|_| rows <= MAX_ROWS);
    m.ok_or_else(|| ArgumentError::new("x", format!("has {rows} rows, at most {MAX_ROWS} are supported")))
}

impl<S, O> FfnForward<S, O> {
    /// Checks every operand and tells M; `len` and `len_out` tell the elements behind a slice, of `element_bytes` each.
    pub(crate) fn check(
        &self,
        spec: &FfnSpec,
        element_bytes: u64,
        len: impl Fn(&S) -> usize,
        len_out: impl Fn(&O) -> usize,
    ) -> Result<u32, ArgumentError> {
        let (m, k) = (check_rows(self.x.rows)?, spec.k as usize);
        self.x.check("x", self.x.rows, k, len(&self.x.data))?;
        self.weights.check(spec, &len)?;
        self.y.check("y", self.x.rows, k, len_out(&self.y.data))?;
        let bytes = |buffer: &O| len_out(buffer) as u64 * element_bytes;
        let wanted = spec.keep == Keep::Preactivations;
        // Slices of wider elements than the spec's hold as many of them.
        let scale = element_bytes / u64::from(spec.dtype.bytes()).max(1);
        check_buffer("saved", self.saved.as_ref(), wanted, scale * spec.saved_bytes(m), &bytes)?;
        check_buffer("workspace", Some(&self.workspace), true, scale * spec.forward_workspace_bytes(m), &bytes)?;
        Ok(m)
    }
}

impl<S, O, G> FfnBackward<S, O, G> {
    /// As [`FfnForward::check`].
    pub(crate) fn check(
        &self,
        spec: &FfnSpec,
        element_bytes: u64,
        len: impl Fn(&S) -> usize,
        len_out: impl Fn(&O) -> usize,
        len_gradient: impl Fn(&G) -> usize,
    ) -> Result<u32, ArgumentError> {
        let (m, k) = (check_rows(self.x.rows)?, spec.k as usize);
        self.x.check("x", self.x.rows, k, len(&self.x.data))?;
        self.weights.check(spec, &len)?;
        self.dy.check("dy", self.x.rows, k, len(&self.dy.data))?;
        self.dx.check("dx", self.x.rows, k, len_out(&self.dx.data))?;
        match (&self.gradients, spec.gradients) {
            (None, Gradients::Input) => {}
            (Some(_), Gradients::Input) => {
                return Err(ArgumentError::new("gradients", "is given, but the weights are frozen; pass None"));
            }
            (None, Gradients::All | Gradients::Added) => {
                return Err(ArgumentError::new("gradients", "is missing: the plan computes them"));
            }
            (Some(gradients), Gradients::All | Gradients::Added) => gradients.check(spec, &len_gradient)?,
        }
        let bytes = |buffer: &O| len_out(buffer) as u64 * element_bytes;
        let scale = element_bytes / u64::from(spec.dtype.bytes()).max(1);
        let wanted = spec.keep == Keep::Preactivations;
        check_buffer("saved", self.saved.as_ref(), wanted, scale * spec.saved_bytes(m), &bytes)?;
        let wanted = spec.backward_workspace_bytes(1) > 0;
        check_buffer("workspace", self.workspace.as_ref(), wanted, scale * spec.backward_workspace_bytes(m), &bytes)?;
        Ok(m)
    }
}

impl<G> FfnGradients<G> {
    fn check(&self, spec: &FfnSpec, len: &impl Fn(&G) -> usize) -> Result<(), ArgumentError> {
        let [(rows, cols), (down_rows, down_cols)] = spec.weight_shapes();
        self.gate.check("gradients.gate", rows, cols, len(&self.gate.data))?;
        self.up.check("gradients.up", rows, cols, len(&self.up.data))?;
        self.down.check("gradients.down", down_rows, down_cols, len(&self.down.data))?;
        match (&self.biases, spec.bias_gradients) {
            (Some([gate, up, down]), true) => {
                check_vector("gradients.biases.gate", Some(gate), spec.n as usize, len)?;
                check_vector("gradients.biases.up", Some(up), spec.n as usize, len)?;
                check_vector("gradients.biases.down", Some(down), spec.k as usize, len)
            }
            (None, false) => Ok(()),
            (Some(_), false) => {
                Err(ArgumentError::new("gradients.biases", "is given, but the plan computes none; pass None"))
            }
            (None, true) => Err(ArgumentError::new("gradients.biases", "is missing: the plan computes them")),
        }
    }
}
