//! The whole FFN, `y = (silu(x·Wg + bg) ⊙ (x·Wu + bu))·Wd + bd`, forward and backward, as prepared steps on the caller's
//! stream with one workspace of the caller's.
#![allow(unsafe_code, reason = "launches steps on addresses that the caller vouches for")]

pub mod operands;
mod typed;

use crate::launch::{RawForward, RawScales};
use crate::operands::{ArgumentError, ForwardSpec};
use crate::plan::{LaunchError, Plan, StepPlan};
use crate::runtime::{PrepareError, Runtime};
use crate::step::{RawMatrix, RawStep, missing};
use cudarc::driver::sys;
use swiglu_kernels::{DType, GateOrder, Op, Problem, WeightLayout, WeightMajor};

/// What stays between the forward and the backward beside x.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Keep {
    /// The pre-activations `[M, 2N]`: least time.
    Preactivations,
    /// Nothing; the backward computes them again: least memory.
    Nothing,
}

/// Which gradients the backward computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Gradients {
    /// Of x alone: the weights are frozen.
    Input,
    /// Of x and of the three weights, in the spec's number format.
    All,
    /// Of x, and of the three weights added to fp32 matrices.
    Added,
}

/// What an [`FfnPlan`] is prepared for; M is given at launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FfnSpec {
    /// Number format of every operand.
    pub dtype: DType,
    /// Memory order of all three weights: K for `nn.Linear` (gate and up `[N,K]`, down `[K,N]`), N for its transpose.
    pub weight_major: WeightMajor,
    /// Intermediate size.
    pub n: u32,
    /// Hidden size: columns of x and y.
    pub k: u32,
    /// What stays for the backward.
    pub keep: Keep,
    /// What the backward computes.
    pub gradients: Gradients,
    /// Whether it computes the gradients of the three biases beside those of the weights; nothing where these are frozen.
    pub bias_gradients: bool,
}

impl FfnSpec {
    pub(crate) fn step(&self, op: Op) -> Problem {
        Problem::forward(self.dtype, self.weight_major, 1, self.n, self.k).with_op(op)
    }

    pub(crate) fn gated(&self, save_preactivations: bool) -> ForwardSpec {
        let layout = match self.weight_major {
            WeightMajor::K => WeightLayout::SeparateNk,
            WeightMajor::N => WeightLayout::SeparateKn,
        };
        let &Self { dtype, n, k, .. } = self;
        ForwardSpec {
            dtype,
            layout,
            gate_order: GateOrder::GateFirst,
            n,
            k,
            save_preactivations,
            static_weights: false,
        }
    }

    /// Bytes of one `[M, N]` matrix, rounded up so that what follows it is well aligned.
    fn tokens_n(&self, m: u32) -> u64 {
        let bytes = (u64::from(m) * u64::from(self.n)).saturating_mul(u64::from(self.dtype.bytes()));
        bytes.checked_next_multiple_of(256).unwrap_or(u64::MAX)
    }

    /// Bytes of the pre-activations that the forward leaves for the backward.
    pub fn saved_bytes(&self, m: u32) -> u64 {
        match self.keep {
            Keep::Preactivations => self.tokens_n(m).saturating_mul(2),
            Keep::Nothing => 0,
        }
    }

    /// Bytes of workspace that the forward of `m` tokens needs: z.
    pub fn forward_workspace_bytes(&self, m: u32) -> u64 {
        self.tokens_n(m)
    }

    /// Bytes of workspace that the backward of `m` tokens needs: z, and the pre-activations where they were not kept.
    pub fn backward_workspace_bytes(&self, m: u32) -> u64 {
        let z = if self.gradients == Gradients::Input && self.keep == Keep::Preactivations { 0 } else { 1 };
        let preactivations = if self.keep == Keep::Nothing { 2 } else { 0 };
        self.tokens_n(m).saturating_mul(z + preactivations)
    }
}

/// The weights and biases of an FFN; a bias is the address of N (of down K) elements, or 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawWeights {
    /// Wg.
    pub gate: RawMatrix,
    /// Wu.
    pub up: RawMatrix,
    /// Wd.
    pub down: RawMatrix,
    /// bg.
    pub gate_bias: u64,
    /// bu.
    pub up_bias: u64,
    /// bd.
    pub down_bias: u64,
}

/// Addresses of one forward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawFfn {
    /// Tokens.
    pub m: u32,
    /// x `[M, K]`.
    pub x: RawMatrix,
    /// The weights.
    pub weights: RawWeights,
    /// y `[M, K]`: the output.
    pub y: RawMatrix,
    /// Device address of [`FfnSpec::saved_bytes`], a multiple of 16; 0 where that is 0.
    pub saved: u64,
    /// Device address of [`FfnSpec::forward_workspace_bytes`], a multiple of 16.
    pub workspace: u64,
}

/// Addresses of one backward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RawFfnBackward {
    /// Tokens.
    pub m: u32,
    /// x `[M, K]`, as in the forward.
    pub x: RawMatrix,
    /// The weights, as in the forward.
    pub weights: RawWeights,
    /// dy `[M, K]`.
    pub dy: RawMatrix,
    /// dx `[M, K]`: an output.
    pub dx: RawMatrix,
    /// dWg, dWu and dWd, in the orders of the weights: outputs unless these are frozen, then unused.
    pub weight_grads: [RawMatrix; 3],
    /// Device addresses of dbg `[N]`, dbu `[N]` and dbd `[K]`, of the weights' gradients' number format: outputs where
    /// [`FfnSpec::bias_gradients`] is set, else unused.
    pub bias_grads: [u64; 3],
    /// What the forward saved; their gradients take its place. 0 where nothing was kept.
    pub saved: u64,
    /// Device address of [`FfnSpec::backward_workspace_bytes`], a multiple of 16; 0 where that is 0.
    pub workspace: u64,
}

/// A prepared FFN on one GPU. `Send` and `Sync`. What a [`Plan`] says of locks, memory and graphs holds for it.
#[derive(Debug)]
pub struct FfnPlan {
    spec: FfnSpec,
    /// With the pre-activations where they are kept.
    gated: Plan,
    /// The same for a backward that computes them again.
    again: Option<Plan>,
    down: StepPlan,
    dgated: StepPlan,
    input_grad: StepPlan,
    /// Of gate and up, and of down; none where the weights are frozen.
    weight_grads: Option<[StepPlan; 2]>,
    /// Of the biases of gate and up, and of down; none where they are not asked for.
    bias_grads: Option<[StepPlan; 2]>,
}

impl Runtime {
    /// Prepares every step of an FFN. Not during stream capture.
    ///
    /// # Errors
    /// As [`Runtime::prepare_step`].
    pub fn prepare_ffn(&self, spec: &FfnSpec) -> Result<FfnPlan, PrepareError> {
        let step = |op| self.prepare_step(&spec.step(op));
        let again = match spec.keep {
            Keep::Preactivations => None,
            Keep::Nothing => Some(self.prepare(&spec.gated(true))?),
        };
        let weight_grads = match spec.gradients {
            Gradients::Input => None,
            Gradients::All => Some([step(Op::WeightGrad)?, step(Op::DownWeightGrad)?]),
            Gradients::Added => Some([step(Op::WeightGradAdd)?, step(Op::DownWeightGradAdd)?]),
        };
        let bias_grads = match spec.gradients {
            Gradients::All if spec.bias_gradients => Some([step(Op::BiasGrad)?, step(Op::DownBiasGrad)?]),
            Gradients::Added if spec.bias_gradients => Some([step(Op::BiasGradAdd)?, step(Op::DownBiasGradAdd)?]),
            Gradients::Input | Gradients::All | Gradients::Added => None,
        };
        Ok(FfnPlan {
            spec: *spec,
            gated: self.prepare(&spec.gated(spec.keep == Keep::Preactivations))?,
            again,
            down: step(Op::Down)?,
            dgated: step(Op::Dgated)?,
            input_grad: step(Op::InputGrad)?,
            weight_grads,
            bias_grads,
        })
    }
}

/// Gate and up, or their gradients, beside each other in one `[M, 2N]` buffer.
fn halves(spec: &FfnSpec, address: u64) -> [RawMatrix; 2] {
    let half = u64::from(spec.n) * u64::from(spec.dtype.bytes());
    [0, half].map(|offset| RawMatrix { address: address + offset, stride: 2 * i64::from(spec.n) })
}

/// The first argument that is needed and has no address.
fn unmet<const COUNT: usize>(arguments: [(&'static str, u64, bool); COUNT]) -> Result<(), ArgumentError> {
    match missing(arguments) {
        Some(argument) => Err(ArgumentError::new(argument, "is 0, but the FFN needs it")),
        None => Ok(()),
    }
}

impl RawFfn {
    /// Everything that the forward needs of its operands, before anything is launched.
    fn check(&self, spec: &FfnSpec) -> Result<(), ArgumentError> {
        require("saved", self.saved, spec.saved_bytes(self.m))?;
        require("workspace", self.workspace, spec.forward_workspace_bytes(self.m))?;
        let tokens = self.m > 0;
        unmet([
            ("x", self.x.address, tokens),
            ("weights.gate", self.weights.gate.address, tokens),
            ("weights.up", self.weights.up.address, tokens),
            ("weights.down", self.weights.down.address, tokens),
            ("y", self.y.address, tokens),
        ])
    }
}

impl RawFfnBackward {
    /// As [`RawFfn::check`], for the backward.
    fn check(&self, spec: &FfnSpec) -> Result<(), ArgumentError> {
        require("saved", self.saved, spec.saved_bytes(self.m))?;
        require("workspace", self.workspace, spec.backward_workspace_bytes(self.m))?;
        let tokens = self.m > 0;
        // Of no tokens gradients of weights are zero, or nothing to add.
        let grads = match spec.gradients {
            Gradients::Input => false,
            Gradients::All => true,
            Gradients::Added => tokens,
        };
        let biases = grads && spec.bias_gradients;
        let reads_x = tokens && (grads || spec.keep == Keep::Nothing);
        unmet([
            ("x", self.x.address, reads_x),
            ("weights.gate", self.weights.gate.address, tokens),
            ("weights.up", self.weights.up.address, tokens),
            ("weights.down", self.weights.down.address, tokens),
            ("dy", self.dy.address, tokens),
            ("dx", self.dx.address, tokens),
            ("weight_grads[0]", self.weight_grads[0].address, grads),
            ("weight_grads[1]", self.weight_grads[1].address, grads),
            ("weight_grads[2]", self.weight_grads[2].address, grads),
            ("bias_grads[0]", self.bias_grads[0], biases),
            ("bias_grads[1]", self.bias_grads[1], biases),
            ("bias_grads[2]", self.bias_grads[2], biases),
        ])
    }
}

fn require(argument: &'static str, address: u64, bytes: u64) -> Result<(), ArgumentError> {
    if bytes == 0 || address != 0 && address.is_multiple_of(16) {
        return Ok(());
    }
    Err(ArgumentError::new(argument, format!("is {address:#x}; {bytes} bytes at a multiple of 16 are needed")))
}

const NONE: RawMatrix = RawMatrix { address: 0, stride: 0 };

impl FfnPlan {
    /// What it was prepared for.
    pub fn spec(&self) -> &FfnSpec {
        &self.spec
    }

    /// The forward: the fused gate and up, then the down projection.
    ///
    /// # Errors
    /// [`LaunchError::Argument`] names what is missing; nothing was launched then.
    ///
    /// # Safety
    /// Every address that is not 0 is of memory of this plan's GPU that holds what its field says in the spec's number format
    /// and stays allocated until the work has finished; y, `saved` and `workspace` overlap nothing else; `stream` is live and
    /// of the GPU's context, which is current on this thread.
    pub unsafe fn forward_raw(&self, stream: sys::CUstream, args: &RawFfn) -> Result<(), LaunchError> {
        let spec = &self.spec;
        args.check(spec)?;
        if args.m == 0 {
            return Ok(());
        }
        let z = RawMatrix { address: args.workspace, stride: i64::from(spec.n) };
        let saved = if spec.keep == Keep::Preactivations { halves(spec, args.saved) } else { [NONE; 2] };
        let down = RawStep {
            m: args.m,
            left: [z, NONE],
            right: [args.weights.down, NONE],
            out: [args.y, NONE, NONE],
            bias: args.weights.down_bias,
            ..RawStep::default()
        };
        // SAFETY: by this function's own contract.
        unsafe { self.gated.launch_raw(stream, &gated(args.m, args.x, &args.weights, z, saved)) }?;
        // SAFETY: as above; z was written by the launch before, on the same stream.
        unsafe { self.down.launch_raw(stream, &down) }
    }

    /// The backward: the gate's backward behind the dz GEMM, then dx, then the gradients of the weights and biases that
    /// are not frozen.
    ///
    /// # Errors
    /// [`LaunchError::Argument`] names what is missing; nothing was launched then.
    ///
    /// # Safety
    /// As [`FfnPlan::forward_raw`]; the outputs are dx, the gradients of weights and biases, `saved` and `workspace`.
    pub unsafe fn backward_raw(&self, stream: sys::CUstream, args: &RawFfnBackward) -> Result<(), LaunchError> {
        let spec = &self.spec;
        let RawFfnBackward { m, x, weights, dy, dx, weight_grads, .. } = *args;
        args.check(spec)?;
        let z = RawMatrix { address: args.workspace, stride: i64::from(spec.n) };
        let preactivations = match spec.keep {
            Keep::Preactivations => args.saved,
            Keep::Nothing => args.workspace + spec.tokens_n(m),
        };
        let pair = halves(spec, preactivations);
        if let Some(again) = &self.again {
            // SAFETY: by this function's own contract.
            unsafe { again.launch_raw(stream, &gated(m, x, &weights, z, pair)) }?;
        }
        // What was computed again has left z already; frozen weights need none.
        let z_out = if self.again.is_none() && self.weight_grads.is_some() { z } else { NONE };
        let step = RawStep { m, ..RawStep::default() };
        let dgated = RawStep {
            left: [dy, NONE],
            right: [weights.down, NONE],
            saved: pair,
            out: [pair[0], pair[1], z_out],
            ..step
        };
        let input = RawStep { left: pair, right: [weights.gate, weights.up], out: [dx, NONE, NONE], ..step };
        if m > 0 {
            // SAFETY: by this function's own contract; dgate and dup may take the places of gate and up.
            unsafe { self.dgated.launch_raw(stream, &dgated) }?;
            // SAFETY: as above; the pair holds the gradients that the launch before wrote, on the same stream.
            unsafe { self.input_grad.launch_raw(stream, &input) }?;
        }
        let Some([gate_up, down]) = &self.weight_grads else { return Ok(()) };
        let (x, dy, z) = ([x, NONE], [dy, NONE], [z, NONE]);
        let ((left, right), (down_left, down_right)) = match spec.weight_major {
            WeightMajor::K => ((pair, x), (dy, z)),
            WeightMajor::N => ((x, pair), (z, dy)),
        };
        let [dgate, dup, ddown] = weight_grads;
        let gate_up_step = RawStep { left, right, out: [dgate, dup, NONE], ..step };
        let down_step = RawStep { left: down_left, right: down_right, out: [ddown, NONE, NONE], ..step };
        // SAFETY: as above.
        unsafe { gate_up.launch_raw(stream, &gate_up_step) }?;
        // SAFETY: as above.
        unsafe { down.launch_raw(stream, &down_step) }?;
        let Some([gate_up, down]) = &self.bias_grads else { return Ok(()) };
        let [dgate, dup, ddown] = args.bias_grads.map(|address| RawMatrix { address, stride: 0 });
        let gate_up_step = RawStep { right: pair, out: [dgate, dup, NONE], ..step };
        let down_step = RawStep { right: dy, out: [ddown, NONE, NONE], ..step };
        // SAFETY: as above.
        unsafe { gate_up.launch_raw(stream, &gate_up_step) }?;
        // SAFETY: as above.
        unsafe { down.launch_raw(stream, &down_step) }
    }
}

fn gated(m: u32, x: RawMatrix, weights: &RawWeights, z: RawMatrix, [gate, up]: [RawMatrix; 2]) -> RawForward {
    RawForward {
        m,
        x: x.address,
        x_stride: x.stride,
        scales: RawScales::default(),
        gate: weights.gate.address,
        gate_stride: weights.gate.stride,
        up: weights.up.address,
        up_stride: weights.up.stride,
        gate_bias: weights.gate_bias,
        up_bias: weights.up_bias,
        z: z.address,
        z_stride: z.stride,
        saved_gate: gate.address,
        saved_gate_stride: gate.stride,
        saved_up: up.address,
        saved_up_stride: up.stride,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> FfnSpec {
        FfnSpec {
            dtype: DType::Bf16,
            weight_major: WeightMajor::K,
            n: 14336,
            k: 4096,
            keep: Keep::Preactivations,
            gradients: Gradients::All,
            bias_gradients: false,
        }
    }

    const HERE: RawMatrix = RawMatrix { address: 256, stride: 4096 };

    fn weights() -> RawWeights {
        RawWeights { gate: HERE, up: HERE, down: HERE, ..RawWeights::default() }
    }

    #[test]
    fn memory_is_what_each_mode_says() {
        let spec = spec();
        let matrix = 8192 * 14336 * 2;
        let bytes = |spec: FfnSpec| {
            [spec.saved_bytes(8192), spec.forward_workspace_bytes(8192), spec.backward_workspace_bytes(8192)]
                .map(|bytes| bytes / matrix)
        };
        assert_eq!(bytes(spec), [2, 1, 1]);
        assert_eq!(bytes(FfnSpec { gradients: Gradients::Input, ..spec }), [2, 1, 0]);
        assert_eq!(bytes(FfnSpec { keep: Keep::Nothing, ..spec }), [0, 1, 3]);
        assert_eq!(spec.saved_bytes(0), 0);
    }

    #[test]
    fn a_workspace_is_asked_for_by_name() {
        assert!(require("workspace", 0, 0).is_ok() && require("workspace", 4096, 8).is_ok());
        assert_eq!(require("workspace", 0, 8).unwrap_err().argument, "workspace");
        assert_eq!(require("saved", 4104, 8).unwrap_err().argument, "saved");
    }

    #[test]
    fn what_a_forward_needs_is_missed_by_its_own_name() {
        let all = RawFfn { m: 8, x: HERE, weights: weights(), y: HERE, saved: 512, workspace: 512 };
        let missed = |args: RawFfn| args.check(&spec()).map_err(|error| error.argument);
        assert_eq!(missed(all), Ok(()));
        assert_eq!(missed(RawFfn::default()), Ok(()), "no tokens need nothing");
        assert_eq!(missed(RawFfn { x: NONE, ..all }), Err("x"));
        assert_eq!(missed(RawFfn { weights: RawWeights { gate: NONE, ..weights() }, ..all }), Err("weights.gate"));
        assert_eq!(missed(RawFfn { weights: RawWeights { up: NONE, ..weights() }, ..all }), Err("weights.up"));
        assert_eq!(missed(RawFfn { weights: RawWeights { down: NONE, ..weights() }, ..all }), Err("weights.down"));
        assert_eq!(missed(RawFfn { y: NONE, ..all }), Err("y"));
        assert_eq!(missed(RawFfn { saved: 0, ..all }), Err("saved"));
        assert_eq!(missed(RawFfn { workspace: 520, ..all }), Err("workspace"));
    }

    #[test]
    fn what_a_backward_needs_is_missed_before_anything_is_launched() {
        let all = RawFfnBackward {
            m: 8,
            x: HERE,
            weights: weights(),
            dy: HERE,
            dx: HERE,
            weight_grads: [HERE; 3],
            bias_grads: [256; 3],
            saved: 512,
            workspace: 512,
        };
        let of = |gradients, keep, args: RawFfnBackward| {
            let spec = FfnSpec { gradients, keep, bias_gradients: true, ..spec() };
            args.check(&spec).map_err(|error| error.argument)
        };
        let kept = |gradients, args| of(gradients, Keep::Preactivations, args);
        for gradients in [Gradients::Input, Gradients::All, Gradients::Added] {
            assert_eq!(kept(gradients, all), Ok(()));
            assert_eq!(kept(gradients, RawFfnBackward { dx: NONE, ..all }), Err("dx"));
            assert_eq!(kept(gradients, RawFfnBackward { dy: NONE, ..all }), Err("dy"));
        }
        let without_x = RawFfnBackward { x: NONE, ..all };
        assert_eq!(kept(Gradients::Input, without_x), Ok(()), "the gradient of x needs no x");
        assert_eq!(of(Gradients::Input, Keep::Nothing, without_x), Err("x"));
        assert_eq!(kept(Gradients::Added, without_x), Err("x"));
        let weight_grads = [HERE, HERE, NONE];
        assert_eq!(kept(Gradients::Input, RawFfnBackward { weight_grads, ..all }), Ok(()));
        assert_eq!(kept(Gradients::All, RawFfnBackward { weight_grads, ..all }), Err("weight_grads[2]"));
        let bias_grads = [256, 0, 256];
        assert_eq!(kept(Gradients::Added, RawFfnBackward { bias_grads, ..all }), Err("bias_grads[1]"));
        let nothing = RawFfnBackward::default();
        assert_eq!(kept(Gradients::All, nothing), Err("weight_grads[0]"), "they become zero");
        assert_eq!(kept(Gradients::Added, nothing), Ok(()), "there is nothing to add");
    }
}
