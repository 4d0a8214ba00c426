//! Slices of device memory as addresses, in the order of a launch's stream.

use crate::operands::{Matrix, Preactivations};
use crate::plan::LaunchError;
use crate::step::RawMatrix;
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};

/// More slices than most launches have: their list grows no further.
const MOST: usize = 16;

/// The slices of one launch. The stream waits for what was launched on them before; when this is dropped, behind the launch, their own
/// streams can wait for it.
pub(crate) struct Held<'a> {
    stream: &'a CudaStream,
    guards: Vec<SyncOnDrop<'a>>,
}

impl<'a> Held<'a> {
    /// None yet, for a launch on `stream`, whose context becomes current.
    ///
    /// # Errors
    /// [`LaunchError::Context`]
    pub(crate) fn on(stream: &'a CudaStream) -> Result<Self, LaunchError> {
        stream.context().bind_to_thread().map_err(LaunchError::Context)?;
        Ok(Self { stream, guards: Vec::with_capacity(MOST) })
    }

    /// Where a slice that is read lies.
    pub(crate) fn address<T, S: DevicePtr<T> + ?Sized>(&mut self, slice: &'a S) -> u64 {
        let (address, guard) = slice.device_ptr(self.stream);
        self.guards.push(guard);
        address
    }

    /// Where a slice that is written lies.
    pub(crate) fn address_mut<T, O: DevicePtrMut<T> + ?Sized>(&mut self, slice: &'a mut O) -> u64 {
        let (address, guard) = slice.device_ptr_mut(self.stream);
        self.guards.push(guard);
        address
    }

    /// A matrix that is read.
    pub(crate) fn read<T, S: DevicePtr<T> + ?Sized>(&mut self, matrix: Matrix<&'a S>) -> RawMatrix {
        RawMatrix { stride: stride(matrix.row_stride), address: self.address(matrix.data) }
    }

    /// A matrix that is written.
    pub(crate) fn written<T, O: DevicePtrMut<T> + ?Sized>(&mut self, matrix: Matrix<&'a mut O>) -> RawMatrix {
        RawMatrix { stride: stride(matrix.row_stride), address: self.address_mut(matrix.data) }
    }

    /// The pre-activations of gate and up, `half_bytes` apart where they are packed.
    pub(crate) fn preactivations<T, O: DevicePtrMut<T> + ?Sized>(
        &mut self,
        saved: Option<Preactivations<&'a mut O>>,
        half_bytes: u64,
    ) -> [RawMatrix; 2] {
        match saved {
            Some(Preactivations::Packed(both)) => {
                let gate = self.written(both);
                [gate, RawMatrix { address: gate.address + half_bytes, ..gate }]
            }
            Some(Preactivations::Separate { gate, up }) => [self.written(gate), self.written(up)],
            None => [RawMatrix::default(); 2],
        }
    }

    /// Whether the stream does wait for all of them: cudarc keeps a refusal in the context and returns the address.
    ///
    /// # Errors
    /// [`LaunchError::Order`]
    pub(crate) fn ordered(&mut self) -> Result<(), LaunchError> {
        let context = self.stream.context();
        context.check_err().map_err(|error| {
            // Nothing will be launched; what the guards report is this failure once more.
            self.guards.clear();
            let _ = context.check_err();
            LaunchError::Order(error)
        })
    }
}

/// A row stride as launches take it.
pub(crate) fn stride(elements: usize) -> i64 {
    i64::try_from(elements).unwrap_or(i64::MAX)
}
