//! The GPU architectures kernels are generated for, as data.

use std::fmt;

/// What a kernel may count on when it is compiled for one real architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ArchSpec {
    /// The name NVRTC takes, e.g. `sm_90a`.
    pub name: &'static str,
    /// Compute capability.
    pub compute_capability: (u32, u32),
    /// Shared memory that one block may opt in to.
    pub smem_per_block: u32,
    /// Threads that one multiprocessor holds at a time.
    pub threads_per_sm: u32,
    /// 32-bit registers of one multiprocessor.
    pub registers_per_sm: u32,
    /// `cp.async`, bf16 and tf32 `mma.sync`: compute capability 8.0 and later.
    pub has_cp_async: bool,
    /// Tensor maps and `mbarrier` (TMA): compute capability 9.0 and later.
    pub has_tma: bool,
    /// `wgmma`, of compute capability 9.0 only.
    pub has_wgmma: bool,
}

const fn spec(name: &'static str, (major, minor): (u32, u32), smem_kib: u32, threads_per_sm: u32) -> ArchSpec {
    ArchSpec {
        name,
        compute_capability: (major, minor),
        smem_per_block: smem_kib * 1024,
        threads_per_sm,
        registers_per_sm: 65536,
        has_cp_async: major >= 8,
        has_tma: major >= 9,
        has_wgmma: major == 9,
    }
}

/// Hopper, of whose multiprocessor the families on `wgmma` make the most.
pub(crate) const HOPPER: ArchSpec = spec("sm_90a", (9, 0), 227, 2048);

/// Every known architecture. Shared memory per block and threads per multiprocessor: CUDA C++ Programming Guide, "Technical
/// Specifications per Compute Capability".
pub const ARCHES: [ArchSpec; 11] = [
    spec("sm_70", (7, 0), 96, 2048),
    spec("sm_75", (7, 5), 64, 1024),
    spec("sm_80", (8, 0), 163, 2048),
    spec("sm_86", (8, 6), 99, 1536),
    spec("sm_87", (8, 7), 163, 1536),
    spec("sm_89", (8, 9), 99, 1536),
    HOPPER,
    spec("sm_100a", (10, 0), 227, 2048),
    spec("sm_103a", (10, 3), 227, 2048),
    spec("sm_120", (12, 0), 99, 1536),
    spec("sm_121", (12, 1), 99, 1536),
];

/// An architecture that is not in [`ARCHES`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is no architecture known here; known are {}", known_names())]
pub struct UnknownArch {
    /// The name or compute capability asked for.
    pub name: String,
}

fn known_names() -> String {
    ARCHES.map(|arch| arch.name).join(", ")
}

/// The architecture NVRTC calls `name`.
///
/// # Errors
/// [`UnknownArch`] with the names that exist.
pub fn by_name(name: &str) -> Result<&'static ArchSpec, UnknownArch> {
    ARCHES.iter().find(|arch| arch.name == name).ok_or_else(|| UnknownArch { name: name.into() })
}

/// The architecture of a GPU of this compute capability.
///
/// # Errors
/// [`UnknownArch`] for a capability older or newer than the table.
pub fn by_compute_capability(major: u32, minor: u32) -> Result<&'static ArchSpec, UnknownArch> {
    ARCHES
        .iter()
        .find(|arch| arch.compute_capability == (major, minor))
        .ok_or_else(|| UnknownArch { name: format!("compute capability {major}.{minor}") })
}

impl fmt::Display for ArchSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name)
    }
}
