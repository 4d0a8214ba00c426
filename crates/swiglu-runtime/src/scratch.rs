//! Device memory in the order of a stream.
#![allow(unsafe_code, reason = "allocates and frees in the order of the caller's stream")]

use cudarc::driver::{DriverError, sys};

/// Device memory for the work that is launched while it is held: allocated before that, freed behind it. Graphs capture both.
pub(crate) struct Scratch {
    /// A multiple of 256; 0 of no bytes.
    pub(crate) address: u64,
    stream: sys::CUstream,
}

impl Scratch {
    /// `stream` is live, and stays so while this is.
    pub(crate) fn new(stream: sys::CUstream, bytes: u64) -> Result<Self, DriverError> {
        let mut address = 0;
        if bytes > 0 {
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            // SAFETY: the caller's stream is live.
            unsafe { sys::cuMemAllocAsync(&raw mut address, bytes, stream) }.result()?;
        }
        Ok(Self { address, stream })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.address != 0 {
            // SAFETY: allocated by `new` on this stream, which is live while a launch returns. Nothing can be done on failure.
            let _ = unsafe { sys::cuMemFreeAsync(self.address, self.stream) };
        }
    }
}
