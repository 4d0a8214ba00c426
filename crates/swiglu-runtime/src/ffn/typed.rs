//! The FFN on device slices: every shape is checked, every address vouched for.
#![allow(unsafe_code, reason = "vouches for the addresses of checked slices")]

use super::operands::{FfnBackward, FfnForward, FfnWeights};
use super::{FfnPlan, Gradients, RawFfn, RawFfnBackward, RawWeights};
use crate::addresses::Held;
use crate::operands::{ArgumentError, Element};
use crate::plan::LaunchError;
use crate::step::RawMatrix;
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use swiglu_kernels::DType;

impl FfnPlan {
    /// The forward on `stream`; every shape is checked first. Empty M returns without a launch. A CUDA graph captures it while
    /// event tracking is off, as [`Plan::launch`](crate::Plan::launch).
    ///
    /// # Errors
    /// [`LaunchError::Argument`] names the operand that does not fit, [`LaunchError::Order`] tells why `stream` cannot wait for
    /// one; nothing was launched then.
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
        let mut held = Held::on(stream)?;
        let args = RawFfn {
            m,
            x: held.read(forward.x),
            weights: raw_weights(&forward.weights, &mut held),
            y: held.written(forward.y),
            saved: forward.saved.map_or(0, |saved| held.address_mut(saved)),
            workspace: held.address_mut(forward.workspace),
        };
        held.ordered()?;
        // SAFETY: `check` has held every matrix to its slice, the borrows keep the slices alive and the outputs apart,
        // `check_device` has held them to this plan's GPU; cudarc orders their release after this stream's work.
        unsafe { self.forward_raw(stream.cu_stream(), &args) }
    }

    /// The backward on `stream`; every shape is checked first. The gradients of weights and biases have elements of the
    /// spec's number format, `f32` where they are added to. Captured as the forward.
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
        let mut held = Held::on(stream)?;
        let (mut weight_grads, mut bias_grads) = ([RawMatrix::default(); 3], [0; 3]);
        if let Some(gradients) = backward.gradients {
            weight_grads = [gradients.gate, gradients.up, gradients.down].map(|matrix| held.written(matrix));
            if let Some(biases) = gradients.biases {
                bias_grads = biases.map(|vector| held.address_mut(vector));
            }
        }
        let args = RawFfnBackward {
            m,
            x: held.read(backward.x),
            weights: raw_weights(&backward.weights, &mut held),
            dy: held.read(backward.dy),
            dx: held.written(backward.dx),
            weight_grads,
            bias_grads,
            saved: backward.saved.map_or(0, |saved| held.address_mut(saved)),
            workspace: backward.workspace.map_or(0, |workspace| held.address_mut(workspace)),
        };
        held.ordered()?;
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

fn raw_weights<'a, T, S: DevicePtr<T> + ?Sized>(weights: &FfnWeights<&'a S>, held: &mut Held<'a>) -> RawWeights {
    RawWeights {
        gate: held.read(weights.gate),
        up: held.read(weights.up),
        down: held.read(weights.down),
        gate_bias: weights.gate_bias.map_or(0, |bias| held.address(bias)),
        up_bias: weights.up_bias.map_or(0, |bias| held.address(bias)),
        down_bias: weights.down_bias.map_or(0, |bias| held.address(bias)),
    }
}
