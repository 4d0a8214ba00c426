//! Launches of the scaled formats: e4m3 and int4 operands with their scales.
#![allow(unsafe_code, reason = "vouches for the addresses of checked slices")]

use crate::addresses::{Held, stride};
use crate::launch::{RawForward, RawScales};
use crate::operands::{ArgumentError, Forward, ForwardSpec, Matrix, Preactivations, Weights, sealed};
use crate::plan::{LaunchError, Plan};
use crate::step::RawMatrix;
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceSlice};
use half::{bf16, f16};
use swiglu_kernels::problem::INT4_GROUP;
use swiglu_kernels::{Format, GateOrder};

/// A Rust type that a [`Format`] is stored as: `f16`, `bf16`, `u8` (codes of e4m3), `u32` (words of eight int4).
pub trait Stored: sealed::Sealed + Copy + Send + Sync + 'static {
    /// The format.
    const FORMAT: Format;
}

impl Stored for f16 {
    const FORMAT: Format = Format::F16;
}

impl Stored for bf16 {
    const FORMAT: Format = Format::Bf16;
}

impl Stored for u8 {
    const FORMAT: Format = Format::E4m3;
}

impl Stored for u32 {
    const FORMAT: Format = Format::Int4;
}

/// Scales of both weights.
#[derive(Debug)]
pub enum WeightScales<'a, O> {
    /// Of e4m3: one for all columns of z, or one for each (`[N]`).
    Columns {
        /// Of the gate.
        gate: CudaView<'a, f32>,
        /// Of the other factor.
        up: CudaView<'a, f32>,
    },
    /// Of int4: `[ceil(K / 128), 2N]`, or twice `[ceil(K / 128), N]`, packed as the weights are.
    Groups(Weights<CudaView<'a, O>>),
}

/// Operands of `z = silu(x·Wg + bg) ⊙ (x·Wu + bu)`, where x or the weights stand for numbers times scales.
#[derive(Debug)]
pub struct ScaledForward<'a, X, W, O> {
    /// `[M, K]`.
    pub x: Matrix<CudaView<'a, X>>,
    /// Of x in e4m3, and only then: one for all rows, or one for each (`[M]`).
    pub x_scales: Option<CudaView<'a, f32>>,
    /// Gate and up weights. Rows of int4 are words of eight along K: `[K / 8, N]` or `[K / 8, 2N]`.
    pub weights: Weights<CudaView<'a, W>>,
    /// Their scales.
    pub weight_scales: WeightScales<'a, O>,
    /// `[N]`, if any.
    pub gate_bias: Option<CudaView<'a, O>>,
    /// `[N]`, if any.
    pub up_bias: Option<CudaView<'a, O>>,
    /// `[M, N]`: the output.
    pub z: Matrix<CudaViewMut<'a, O>>,
    /// Given where, and only where, the plan saves them.
    pub preactivations: Option<Preactivations<CudaViewMut<'a, O>>>,
}

/// The same matrix with the length of its storage in place of it.
fn lengths<S: DeviceSlice<T>, T>(matrix: &Matrix<S>) -> Matrix<usize> {
    Matrix::strided(matrix.data.len(), matrix.rows, matrix.cols, matrix.row_stride)
}

/// The same matrix behind a reference.
fn by_ref<S>(matrix: &Matrix<S>) -> Matrix<&S> {
    Matrix::strided(&matrix.data, matrix.rows, matrix.cols, matrix.row_stride)
}

fn by_mut<S>(matrix: &mut Matrix<S>) -> Matrix<&mut S> {
    Matrix::strided(&mut matrix.data, matrix.rows, matrix.cols, matrix.row_stride)
}

fn weight_lengths<S: DeviceSlice<T>, T>(weights: &Weights<S>) -> Weights<usize> {
    match weights {
        Weights::Packed(packed) => Weights::Packed(lengths(packed)),
        Weights::Separate { gate, up } => Weights::Separate { gate: lengths(gate), up: lengths(up) },
    }
}

impl<X: Stored, W: Stored, O: Stored> ScaledForward<'_, X, W, O> {
    /// What [`Forward::check`] looks at.
    fn shapes(&self) -> Forward<usize, usize> {
        Forward {
            x: lengths(&self.x),
            weights: weight_lengths(&self.weights),
            gate_bias: self.gate_bias.as_ref().map(DeviceSlice::len),
            up_bias: self.up_bias.as_ref().map(DeviceSlice::len),
            z: lengths(&self.z),
            preactivations: self.preactivations.as_ref().map(|saved| match saved {
                Preactivations::Packed(saved) => Preactivations::Packed(lengths(saved)),
                Preactivations::Separate { gate, up } => {
                    Preactivations::Separate { gate: lengths(gate), up: lengths(up) }
                }
            }),
        }
    }

    /// Holds the number formats of all operands to the plan's.
    fn check_formats(&self, plan: &Plan) -> Result<(), ArgumentError> {
        let dtype = plan.spec.dtype;
        let found =
            [("x", X::FORMAT, dtype.x()), ("weights", W::FORMAT, dtype.weights()), ("z", O::FORMAT, dtype.output())];
        for (argument, found, expected) in found {
            if found != expected {
                return Err(ArgumentError::new(argument, format!("is {found}, `{dtype}` has {expected} here")));
            }
        }
        if dtype.is_scaled() {
            return Ok(());
        }
        Err(ArgumentError::new("weights", format!("`{dtype}` has no scales; use `Plan::launch`")))
    }

    /// Holds the memory of all operands to the plan's GPU.
    fn check_devices(&self, plan: &Plan) -> Result<(), ArgumentError> {
        plan.check_device("x", self.x.data.stream())?;
        plan.check_device("z", self.z.data.stream())?;
        match &self.weights {
            Weights::Packed(both) => plan.check_device("weights", both.data.stream())?,
            Weights::Separate { gate, up } => {
                plan.check_device("gate", gate.data.stream())?;
                plan.check_device("up", up.data.stream())?;
            }
        }
        match &self.weight_scales {
            WeightScales::Columns { gate, up } => {
                plan.check_device("weight_scales.gate", gate.stream())?;
                plan.check_device("weight_scales.up", up.stream())?;
            }
            WeightScales::Groups(Weights::Packed(both)) => plan.check_device("weight_scales", both.data.stream())?,
            WeightScales::Groups(Weights::Separate { gate, up }) => {
                plan.check_device("weight_scales.gate", gate.data.stream())?;
                plan.check_device("weight_scales.up", up.data.stream())?;
            }
        }
        match &self.preactivations {
            Some(Preactivations::Packed(saved)) => plan.check_device("preactivations", saved.data.stream())?,
            Some(Preactivations::Separate { gate, up }) => {
                plan.check_device("preactivations.gate", gate.data.stream())?;
                plan.check_device("preactivations.up", up.data.stream())?;
            }
            None => {}
        }
        for (argument, bias) in [("gate_bias", &self.gate_bias), ("up_bias", &self.up_bias)] {
            bias.as_ref().map_or(Ok(()), |bias| plan.check_device(argument, bias.stream()))?;
        }
        self.x_scales.as_ref().map_or(Ok(()), |scales| plan.check_device("x_scales", scales.stream()))
    }

    /// Holds the scales to the plan's formats; whether each token, and each column, has one of its own.
    fn check_scales(&self, spec: &ForwardSpec) -> Result<(bool, bool), ArgumentError> {
        let n = spec.n as usize;
        let x_rows = match (&self.x_scales, spec.dtype.x()) {
            (Some(scales), Format::E4m3) => is_by_row("x_scales", scales, self.x.rows)?,
            (None, Format::E4m3) => return Err(ArgumentError::new("x_scales", "is missing: x is e4m3")),
            (Some(_), format) => {
                return Err(ArgumentError::new("x_scales", format!("is given, but x is {format}")));
            }
            (None, _) => false,
        };
        let weight_rows = match (&self.weight_scales, spec.dtype.weights()) {
            (WeightScales::Columns { gate, up }, Format::E4m3) => {
                let each = is_by_row("weight_scales.gate", gate, n)?;
                if is_by_row("weight_scales.up", up, n)? != each {
                    return Err(ArgumentError::new("weight_scales.up", "has another length than `gate`"));
                }
                each
            }
            (WeightScales::Groups(groups), Format::Int4) => {
                let rows = (spec.k.div_ceil(INT4_GROUP)) as usize;
                let is_packed = spec.layout.is_packed();
                match weight_lengths(groups) {
                    Weights::Packed(packed) if is_packed => packed.check("weight_scales", rows, 2 * n, packed.data)?,
                    Weights::Separate { gate, up } if !is_packed && gate.row_stride == up.row_stride => {
                        gate.check("weight_scales.gate", rows, n, gate.data)?;
                        up.check("weight_scales.up", rows, n, up.data)?;
                    }
                    _ => {
                        let reason = "is not packed as the weights are, or gate and up differ in their row stride";
                        return Err(ArgumentError::new("weight_scales", reason));
                    }
                }
                false
            }
            (_, format) => {
                let reason = format!("is of another kind: {format} has one a column (e4m3) or one a group (int4)");
                return Err(ArgumentError::new("weight_scales", reason));
            }
        };
        Ok((x_rows, weight_rows))
    }
}

/// Whether each of `rows` rows has a scale of its own, or all have one.
fn is_by_row(argument: &'static str, scales: &CudaView<'_, f32>, rows: usize) -> Result<bool, ArgumentError> {
    match scales.len() {
        1 => Ok(false),
        len if len == rows => Ok(true),
        len => Err(ArgumentError::new(argument, format!("has {len} scales, expected 1 or {rows}"))),
    }
}

impl Plan {
    /// [`Plan::launch`] for the scaled formats; every shape is checked first. Empty M or N returns without a launch. The
    /// memory of every matrix starts, and its rows step, at multiples of 16 bytes. A CUDA graph captures it while event
    /// tracking is off, as [`Plan::launch`].
    ///
    /// # Errors
    /// [`LaunchError::Argument`] names the operand that does not fit, [`LaunchError::Order`] tells why `stream` cannot wait for
    /// one; nothing was launched then.
    pub fn launch_scaled<X: Stored, W: Stored, O: Stored>(
        &self,
        stream: &CudaStream,
        forward: ScaledForward<'_, X, W, O>,
    ) -> Result<(), LaunchError> {
        forward.check_formats(self)?;
        let offsets = forward.shapes().check(&self.spec, |&len| len, |&len| len)?;
        let (m, n) = (forward.x.rows, self.spec.n as usize);
        let (x_rows, weight_rows) = forward.check_scales(&self.spec)?;
        self.check_device("stream", stream)?;
        forward.check_devices(self)?;
        if m == 0 || n == 0 {
            return Ok(());
        }
        let (weight_bytes, output_bytes) = (size_of::<W>() as u64, size_of::<O>() as u64);
        let half_bytes = n as u64 * output_bytes;
        let ScaledForward { x, weights, gate_bias, up_bias, mut z, mut preactivations, .. } = forward;
        let mut held = Held::on(stream)?;
        let x = held.read(by_ref(&x));
        let (gate, up) = match &weights {
            Weights::Packed(packed) => (&packed.data, &packed.data),
            Weights::Separate { gate, up } => (&gate.data, &up.data),
        };
        let [gate, up] = [gate, up].map(|weights| held.address(weights));
        let x_scales = forward.x_scales.as_ref().map_or(0, |scales| held.address(scales));
        let [gate_scales, up_scales] = match &forward.weight_scales {
            WeightScales::Columns { gate, up } => {
                [gate, up].map(|scales| RawMatrix { address: held.address(scales), stride: 0 })
            }
            WeightScales::Groups(Weights::Separate { gate, up }) => [gate, up].map(|scales| held.read(by_ref(scales))),
            WeightScales::Groups(Weights::Packed(packed)) => {
                let first = held.read(by_ref(packed));
                let second = RawMatrix { address: first.address + half_bytes, ..first };
                match self.spec.gate_order {
                    GateOrder::GateFirst => [first, second],
                    GateOrder::UpFirst => [second, first],
                }
            }
        };
        let biases = [&gate_bias, &up_bias];
        let [gate_bias, up_bias] = biases.map(|bias| bias.as_ref().map_or(0, |bias| held.address(bias)));
        let z = held.written(by_mut(&mut z));
        let saved = preactivations.as_mut().map(|saved| match saved {
            Preactivations::Packed(both) => Preactivations::Packed(by_mut(both)),
            Preactivations::Separate { gate, up } => Preactivations::Separate { gate: by_mut(gate), up: by_mut(up) },
        });
        let [saved_gate, saved_up] = held.preactivations(saved, half_bytes);
        let raw = RawForward {
            m: u32::try_from(m).unwrap_or(u32::MAX),
            x: x.address,
            x_stride: x.stride,
            gate: gate + offsets.gate as u64 * weight_bytes,
            gate_stride: stride(offsets.gate_stride),
            up: up + offsets.up as u64 * weight_bytes,
            up_stride: stride(offsets.up_stride),
            gate_bias,
            up_bias,
            z: z.address,
            z_stride: z.stride,
            saved_gate: saved_gate.address,
            saved_gate_stride: saved_gate.stride,
            saved_up: saved_up.address,
            saved_up_stride: saved_up.stride,
            scales: RawScales {
                x: x_scales,
                gate: gate_scales.address,
                up: up_scales.address,
                stride: gate_scales.stride,
                x_rows,
                weight_rows,
            },
        };
        held.ordered()?;
        // SAFETY: every matrix, bias and vector of scales was held to its slice above, the borrows keep the slices alive and
        // the outputs apart, `check_device` has held them to this plan's GPU; cudarc orders their release after this
        // stream's work.
        unsafe { self.launch_raw(stream.cu_stream(), &raw) }
    }
}
