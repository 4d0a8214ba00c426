//! The FFN on device slices: every shape is checked, every address vouched for.
#![allow(unsafe_code, reason = "vouches for the addresses of checked slices")]

use super::operands::{FfnBackward, FfnForward, FfnWeights};
use super::{FfnPlan, Gradients, RawFfn, RawFfnBackward, RawWeights};
use crate::operands::{ArgumentError, Element, Matrix};
use crate::plan::LaunchError;
use crate::step::RawMatrix;
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};
use swiglu_kernels::DType;

/// What keeps the slices of a launch ordered with the work of their own streams.
type Held<'a> = Vec<SyncOnDrop<'a>>;

impl FfnPlan {
    /// The forward on `stream`; every shape is checked first. Empty M returns without a launch.
    ///
    /// # Errors
    /// [`LaunchError::Argument`] names the operand that does not fit; nothing was launched then.
    pub fn forward<T, S, O>(&self, stream: &CudaStream, forward: FfnForward<&S, &mut O>) -> Result<(), LaunchError>
    where
        T: Element,
        S: DevicePtr<T> + ?Sized,
        O: DevicePtrMut<T> + ?Sized,
    {
        check_type::<T>("x", self.spec.dtype)?;
        let m = forward.check(&self.spec, size_of::<T>() as u64, |slice| slice.len(), |slice| slice.len())?;
        self.gated.check_device("stream", stream)?;
        self.gated.check_device("x", forward.x.data.stream())?;
        self.check_weights(&forward.weights)?;
        self.gated.check_device("y", forward.y.data.stream())?;
        for (argument, buffer) in [("saved", forward.saved.as_deref()), ("workspace", Some(&*forward.workspace))] {
            buffer.map_or(Ok(()), |buffer| self.gated.check_device(argument, buffer.stream()))?;
        }
        if m == 0 {
            return Ok(());
        }
        self.gated.gpu.context.bind_to_thread().map_err(LaunchError::Context)?;
        let mut held = Held::new();
        let args = RawFfn {
            m,
            x: read(forward.x, stream, &mut held),
            weights: raw_weights(&forward.weights, stream, &mut held),
            y: written(forward.y, stream, &mut held),
            saved: forward.saved.map_or(0, |saved| address_mut(saved, stream, &mut held)),
            workspace: address_mut(forward.workspace, stream, &mut held),
        };
        // SAFETY: `check` has held every matrix to its slice, the borrows keep the slices alive and the outputs apart,
        // `check_device` has held them to this plan's GPU; cudarc orders their release after this stream's work.
        unsafe { self.forward_raw(stream.cu_stream(), &args) }
    }

    /// The backward on `stream`; every shape is checked first. The gradients of weights and biases have elements of the
    /// spec's number format, `f32` where they are added to.
    ///
    /// # Errors
    /// As [`FfnPlan::forward`].
    pub fn backward<T, G, S, O, D>(
        &self,
        stream: &CudaStream,
        backward: FfnBackward<&S, &mut O, &mut D>,
    ) -> Result<(), LaunchError>
    where
        T: Element,
        G: Element,
        S: DevicePtr<T> + ?Sized,
        O: DevicePtrMut<T> + ?Sized,
        D: DevicePtrMut<G> + ?Sized,
    {
        let spec = &self.spec;
        check_type::<T>("x", spec.dtype)?;
        check_type::<G>("gradients", if spec.gradients == Gradients::Added { DType::F32 } else { spec.dtype })?;
        let len = |slice: &&S| slice.len();
        let m = backward.check(spec, size_of::<T>() as u64, len, |slice| slice.len(), |slice| slice.len())?;
        self.gated.check_device("stream", stream)?;
        self.gated.check_device("x", backward.x.data.stream())?;
        self.check_weights(&backward.weights)?;
        self.gated.check_device("dy", backward.dy.data.stream())?;
        self.gated.check_device("dx", backward.dx.data.stream())?;
        for (argument, buffer) in [("saved", backward.saved.as_deref()), ("workspace", backward.workspace.as_deref())] {
            buffer.map_or(Ok(()), |buffer| self.gated.check_device(argument, buffer.stream()))?;
        }
        if let Some(gradients) = &backward.gradients {
            for matrix in [&gradients.gate, &gradients.up, &gradients.down] {
                self.gated.check_device("gradients", matrix.data.stream())?;
            }
            for vector in gradients.biases.iter().flatten() {
                self.gated.check_device("gradients.biases", vector.stream())?;
            }
        }
        self.gated.gpu.context.bind_to_thread().map_err(LaunchError::Context)?;
        let mut held = Held::new();
        let (mut weight_grads, mut bias_grads) = ([RawMatrix::default(); 3], [0; 3]);
        if let Some(gradients) = backward.gradients {
            weight_grads =
                [gradients.gate, gradients.up, gradients.down].map(|matrix| written(matrix, stream, &mut held));
            if let Some(biases) = gradients.biases {
                bias_grads = biases.map(|vector| address_mut(vector, stream, &mut held));
            }
        }
        let args = RawFfnBackward {
            m,
            x: read(backward.x, stream, &mut held),
            weights: raw_weights(&backward.weights, stream, &mut held),
            dy: read(backward.dy, stream, &mut held),
            dx: written(backward.dx, stream, &mut held),
            weight_grads,
            bias_grads,
            saved: backward.saved.map_or(0, |saved| address_mut(saved, stream, &mut held)),
            workspace: backward.workspace.map_or(0, |workspace| address_mut(workspace, stream, &mut held)),
        };
        // SAFETY: as in `forward`.
        unsafe { self.backward_raw(stream.cu_stream(), &args) }
    }

    fn check_weights<T, S: DevicePtr<T> + ?Sized>(&self, weights: &FfnWeights<&S>) -> Result<(), ArgumentError> {
        for matrix in [&weights.gate, &weights.up, &weights.down] {
            self.gated.check_device("weights", matrix.data.stream())?;
        }
        for bias in [weights.gate_bias, weights.up_bias, weights.down_bias].into_iter().flatten() {
            self.gated.check_device("weights", bias.stream())?;
        }
        Ok(())
    }
}

fn check_type<T: Element>(argument: &'static str, dtype: DType) -> Result<(), ArgumentError> {
    if T::stores(dtype) {
        return Ok(());
    }
    Err(ArgumentError::new(argument, format!("its element type does not store `{dtype}`")))
}

fn address<'a, T, S: DevicePtr<T> + ?Sized>(slice: &'a S, stream: &'a CudaStream, held: &mut Held<'a>) -> u64 {
    let (address, sync) = slice.device_ptr(stream);
    held.push(sync);
    address
}

fn address_mut<'a, T, O: DevicePtrMut<T> + ?Sized>(
    slice: &'a mut O,
    stream: &'a CudaStream,
    held: &mut Held<'a>,
) -> u64 {
    let (address, sync) = slice.device_ptr_mut(stream);
    held.push(sync);
    address
}

fn stride<S>(matrix: &Matrix<S>) -> i64 {
    i64::try_from(matrix.row_stride).unwrap_or(i64::MAX)
}

fn read<'a, T, S: DevicePtr<T> + ?Sized>(
    matrix: Matrix<&'a S>,
    stream: &'a CudaStream,
    held: &mut Held<'a>,
) -> RawMatrix {
    RawMatrix { stride: stride(&matrix), address: address(matrix.data, stream, held) }
}

fn written<'a, T, O: DevicePtrMut<T> + ?Sized>(
    matrix: Matrix<&'a mut O>,
    stream: &'a CudaStream,
    held: &mut Held<'a>,
) -> RawMatrix {
    RawMatrix { stride: stride(&matrix), address: address_mut(matrix.data, stream, held) }
}

fn raw_weights<'a, T, S: DevicePtr<T> + ?Sized>(
    weights: &FfnWeights<&'a S>,
    stream: &'a CudaStream,
    held: &mut Held<'a>,
) -> RawWeights {
    RawWeights {
        gate: read(weights.gate, stream, held),
        up: read(weights.up, stream, held),
        down: read(weights.down, stream, held),
        gate_bias: weights.gate_bias.map_or(0, |bias| address(bias, stream, held)),
        up_bias: weights.up_bias.map_or(0, |bias| address(bias, stream, held)),
        down_bias: weights.down_bias.map_or(0, |bias| address(bias, stream, held)),
    }
}
