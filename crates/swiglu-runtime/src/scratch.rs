//! Device memory in the order of a stream, from a pool of our own for each GPU.
//!
//! The driver's default pool gives everything back at each synchronisation, so that the next launch maps its memory again. Ours
//! keeps a part.
#![allow(unsafe_code, reason = "makes pools, allocates and frees in the order of the caller's stream")]

use crate::gpu::Gpu;
use cudarc::driver::{DriverError, sys};
use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

/// What a pool keeps at most: parts of two weights of 4096 x 14336 in fp32, say; of a small GPU one part in 64.
const KEPT_BYTES: u64 = 512 << 20;
const KEPT_PART: u64 = 64;

/// Drivers of CUDA 11.2 and later have memory pools.
const POOLS_SINCE: i32 = 11_020;

/// The pools of this process by their GPU, for its whole life: they belong to the device, not to a context.
static POOLS: RwLock<BTreeMap<sys::CUdevice, Pool>> = RwLock::new(BTreeMap::new());

struct Pool(sys::CUmemoryPool);

// SAFETY: a handle that the driver takes from any thread.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

/// `CUmemPoolProps`, whose bindings differ from one version to the next in what is 0 here.
#[repr(C)]
struct PoolProperties {
    allocation: sys::CUmemAllocationType,
    handles: u32,
    location: sys::CUmemLocationType,
    device: sys::CUdevice,
    security: u64,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<PoolProperties>() == size_of::<sys::CUmemPoolProps>());

/// Makes the pool of a GPU, once; not while a graph is captured. Where the driver has none, memory comes from its default pool.
pub(crate) fn make_pool(gpu: &Gpu) {
    let device = gpu.context.cu_device();
    let mut pools = POOLS.write().unwrap_or_else(PoisonError::into_inner);
    if gpu.driver_version < POOLS_SINCE || pools.contains_key(&device) {
        return;
    }
    match new_pool(device) {
        Ok(pool) => drop(pools.insert(device, Pool(pool))),
        Err(error) => tracing::debug!(%error, "no memory pool of our own"),
    }
}

fn new_pool(device: sys::CUdevice) -> Result<sys::CUmemoryPool, DriverError> {
    let properties = PoolProperties {
        allocation: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        handles: 0,
        location: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
        device,
        security: 0,
        reserved: [0; 8],
    };
    let (mut pool, mut total) = (std::ptr::null_mut(), 0);
    // SAFETY: the pointer is to a live integer.
    unsafe { sys::cuDeviceTotalMem_v2(&raw mut total, device) }.result()?;
    // SAFETY: the pointers are to live variables, and the properties have the driver's layout.
    unsafe { sys::cuMemPoolCreate(&raw mut pool, (&raw const properties).cast()) }.result()?;
    let mut kept = KEPT_BYTES.min(total as u64 / KEPT_PART);
    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a u64. Refused, the pool keeps nothing, as the default one.
    let _ = unsafe { sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut kept).cast()) };
    Ok(pool)
}

/// Device memory for the work that is launched while it is held: allocated before that, freed behind it. Graphs capture both.
pub(crate) struct Scratch {
    /// A multiple of 256; 0 of no bytes.
    pub(crate) address: u64,
    stream: sys::CUstream,
}

impl Scratch {
    /// `stream` is live, and stays so while this is; its context is current.
    pub(crate) fn new(stream: sys::CUstream, bytes: u64) -> Result<Self, DriverError> {
        let mut address = 0;
        if bytes > 0 {
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            let mut device = 0;
            // SAFETY: the pointer is to a live integer.
            unsafe { sys::cuCtxGetDevice(&raw mut device) }.result()?;
            let pool = POOLS.read().unwrap_or_else(PoisonError::into_inner).get(&device).map(|pool| pool.0);
            let allocated = match pool {
                // SAFETY: the caller's stream is live, and pools are never destroyed.
                Some(pool) => unsafe { sys::cuMemAllocFromPoolAsync(&raw mut address, bytes, pool, stream) },
                // SAFETY: the caller's stream is live.
                None => unsafe { sys::cuMemAllocAsync(&raw mut address, bytes, stream) },
            };
            allocated.result()?;
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
