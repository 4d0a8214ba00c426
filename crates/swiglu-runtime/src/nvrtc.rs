//! CUDA source to CUBIN, and what the compiler says about it.
//!
//! Contract: [`library::nvrtc`] has loaded NVRTC before any function here is called;
//! a program handle never outlives the function that made it.
#![allow(unsafe_code, reason = "calls into NVRTC; cudarc's safe layer yields PTX only and drops the log")]

use crate::library::{self, MissingLibrary};
use cudarc::nvrtc::{result, sys};
use serde::{Deserialize, Serialize};
use std::ffi::CString;
use std::path::{Path, PathBuf};
use swiglu_kernels::{ArchSpec, KernelSource};

/// What ptxas reports about one kernel, from `--ptxas-options=-v`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Registers a thread.
    pub registers: u32,
    /// Bytes spilled to local memory: stores and loads.
    pub spill_bytes: u32,
    /// Bytes of stack frame.
    pub stack_bytes: u32,
    /// Whether ptxas gave up overlapping `wgmma` (its warnings C7510 to C7520): several times slower.
    #[serde(default)]
    pub wgmma_serialized: bool,
}

impl Resources {
    /// Why a kernel that uses this much is not worth launching, if it is not.
    pub fn objection(&self) -> Option<String> {
        if self.spill_bytes > SPILL_BUDGET_BYTES {
            return Some(format!("{} bytes spilled", self.spill_bytes));
        }
        self.wgmma_serialized.then(|| "ptxas serialised wgmma".into())
    }
}

/// A loadable image for one real architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cubin {
    /// The ELF image.
    pub image: Vec<u8>,
    /// The compiler's report on its entry.
    pub resources: Resources,
}

/// Why there is no CUBIN.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// NVRTC itself is missing.
    #[error(transparent)]
    Missing(#[from] MissingLibrary),
    /// This NVRTC cannot compile for the architecture.
    #[error(
        "NVRTC {version} (`{}`) does not support {arch}; install {wheel}, or set SWIGLU_NVRTC to another libnvrtc or its folder",
        path.display()
    )]
    UnsupportedArch {
        /// Where it was found.
        path: PathBuf,
        /// Its version.
        version: String,
        /// The architecture.
        arch: &'static str,
        /// A wheel that does.
        wheel: &'static str,
    },
    /// The source was refused.
    #[error("NVRTC rejected `{kernel}` for {arch}:\n{log}")]
    Rejected {
        /// Name of the kernel.
        kernel: &'static str,
        /// The architecture.
        arch: &'static str,
        /// The compiler's own words.
        log: String,
    },
    /// NVRTC failed for another reason.
    #[error("NVRTC failed to {act}: {reason}")]
    Nvrtc {
        /// What was being done.
        act: &'static str,
        /// Its error code.
        reason: String,
    },
}

/// A loaded NVRTC.
#[derive(Debug, Clone)]
pub struct Nvrtc {
    /// Where it was found.
    pub path: PathBuf,
    /// Major and minor version.
    pub version: (i32, i32),
    /// Compute capabilities it compiles for, e.g. 90.
    pub supported: Vec<i32>,
}

/// Bytes a kernel may spill and still be raced: a few values outside of the main loop, which the race prices. A spill
/// inside a main loop is larger, and costs more than any other tile shape would.
pub const SPILL_BUDGET_BYTES: u32 = 64;

/// Flags of every compilation; part of the CUBIN cache's key.
pub const FLAGS: [&str; 3] = ["--std=c++17", "-default-device", "--ptxas-options=-v"];

impl Nvrtc {
    /// Finds and loads NVRTC; `explicit` as in [`library::nvrtc`].
    ///
    /// # Errors
    /// [`CompileError::Missing`] with what to install.
    pub fn load(explicit: Option<&Path>) -> Result<Self, CompileError> {
        let path = library::nvrtc(explicit)?;
        // SAFETY: only opens what is loaded already, or the loader's own.
        if !unsafe { sys::is_culib_present() } {
            let reason = format!("`{}` is loaded, but not under a name that these CUDA bindings know", path.display());
            return Err(CompileError::Nvrtc { act: "be called", reason });
        }
        let failed = |act| move |error: result::NvrtcError| CompileError::Nvrtc { act, reason: format!("{error:?}") };
        let (mut major, mut minor, mut count) = (0, 0, 0);
        // SAFETY: both pointers are to live integers.
        unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result().map_err(failed("tell its version"))?;
        // The bindings look for it by name, and another one may be nearer.
        if asked_major(&path).is_some_and(|asked| asked != major) {
            let reason =
                format!("version {major}.{minor} is in the way of `{}`; take it off the loader path", path.display());
            return Err(CompileError::Nvrtc { act: "be called", reason });
        }
        // SAFETY: the pointer is to a live integer.
        unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut count) }.result().map_err(failed("list architectures"))?;
        let mut supported = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: the array has as many elements as NVRTC said it writes.
        unsafe { sys::nvrtcGetSupportedArchs(supported.as_mut_ptr()) }
            .result()
            .map_err(failed("list architectures"))?;
        Ok(Self { path, version: (major, minor), supported })
    }

    /// `13.0`, say.
    pub fn version_string(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    /// Whether it compiles for `arch`.
    ///
    /// # Errors
    /// [`CompileError::UnsupportedArch`] with a wheel that does.
    pub fn check_arch(&self, arch: &'static ArchSpec) -> Result<(), CompileError> {
        let (major, minor) = arch.compute_capability;
        if self.supported.iter().any(|&number| u32::try_from(number) == Ok(major * 10 + minor)) {
            return Ok(());
        }
        let wheel =
            if major < 8 && minor < 5 { "nvidia-cuda-nvrtc-cu12 (CUDA 12)" } else { "nvidia-cuda-nvrtc (CUDA 13)" };
        let path = self.path.clone();
        Err(CompileError::UnsupportedArch { path, version: self.version_string(), arch: arch.name, wheel })
    }

    /// Compiles for one real architecture. Thread-safe.
    ///
    /// # Errors
    /// [`CompileError::Rejected`] with the log, or why NVRTC could not try.
    pub fn compile(&self, source: &KernelSource, arch: &'static ArchSpec) -> Result<Cubin, CompileError> {
        self.check_arch(arch)?;
        let failed = |act| move |error: result::NvrtcError| CompileError::Nvrtc { act, reason: format!("{error:?}") };
        let text = CString::new(source.text.as_str())
            .map_err(|_| CompileError::Nvrtc { act: "read the source", reason: "it holds a NUL byte".into() })?;
        let program = Program(result::create_program(&text, None).map_err(failed("create a program"))?);
        let flags: Vec<String> =
            std::iter::once(format!("--gpu-architecture={}", arch.name)).chain(FLAGS.map(String::from)).collect();
        // SAFETY: the handle is live until `program` drops.
        let outcome = unsafe { result::compile_program(program.0, &flags) };
        let log = program.log();
        outcome.map_err(|error| refused(&error, source.name, arch.name, &log))?;
        let image = program.cubin().map_err(failed("return the CUBIN"))?;
        Ok(Cubin { image, resources: parse_log(&log, source.entry) })
    }
}

/// The source is at fault, or NVRTC had no memory, or does not take a flag.
fn refused(error: &result::NvrtcError, kernel: &'static str, arch: &'static str, log: &str) -> CompileError {
    if error.0 == sys::nvrtcResult::NVRTC_ERROR_COMPILATION {
        return CompileError::Rejected { kernel, arch, log: log.into() };
    }
    let reason = format!("{error:?} of `{kernel}` for {arch}\n{log}");
    CompileError::Nvrtc { act: "compile", reason: reason.trim_end().into() }
}

/// The major version that a file's name tells: 13 of `libnvrtc.so.13`.
fn asked_major(path: &Path) -> Option<i32> {
    let name = path.file_name()?.to_str()?;
    name.split_once(".so.")?.1.split('.').next()?.parse().ok()
}

/// A program handle, destroyed on drop.
struct Program(sys::nvrtcProgram);

impl Program {
    fn log(&self) -> String {
        // SAFETY: the handle is live.
        let bytes = unsafe { result::get_program_log(self.0) }.unwrap_or_default();
        let bytes: Vec<u8> =
            bytes.into_iter().map(|byte| byte.to_ne_bytes()[0]).take_while(|&byte| byte != 0).collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }

    fn cubin(&self) -> Result<Vec<u8>, result::NvrtcError> {
        let mut size = 0;
        // SAFETY: the handle is live, the pointer is to a live integer.
        unsafe { sys::nvrtcGetCUBINSize(self.0, &raw mut size) }.result()?;
        let mut image = vec![0u8; size];
        // SAFETY: the buffer has as many bytes as NVRTC said it writes.
        unsafe { sys::nvrtcGetCUBIN(self.0, image.as_mut_ptr().cast()) }.result()?;
        Ok(image)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the handle was made by `create_program` and is destroyed once. Nothing can be done on failure.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// Reads the report on `entry` out of ptxas's log.
fn parse_log(log: &str, entry: &str) -> Resources {
    let mut resources = Resources { wgmma_serialized: log.contains("(C75"), ..Resources::default() };
    let mut here = false;
    for line in log.lines() {
        if line.contains("Compiling entry function") || line.contains("Function properties for") {
            here = line.contains(entry);
        }
        if !here {
            continue;
        }
        if let Some(bytes) = number_before(line, " bytes stack frame") {
            resources.stack_bytes = bytes;
        }
        for kind in [" bytes spill stores", " bytes spill loads"] {
            resources.spill_bytes += number_before(line, kind).unwrap_or(0);
        }
        if let Some(registers) = number_before(line, " registers") {
            resources.registers = registers;
        }
    }
    resources
}

fn number_before(line: &str, what: &str) -> Option<u32> {
    let head = &line[..line.find(what)?];
    head.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_of_the_right_entry_is_read() {
        let log = "ptxas info    : Compiling entry function 'other' for 'sm_90a'\n\
                   ptxas info    : Function properties for other\n\
                   ptxas         .     64 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads\n\
                   ptxas info    : Used 10 registers, used 0 barriers\n\
                   ptxas info    : Compiling entry function 'swiglu_forward' for 'sm_90a'\n\
                   ptxas info    : Function properties for swiglu_forward\n\
                   ptxas         .     16 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n\
                   ptxas info    : Used 224 registers, used 1 barriers";
        let expected = Resources { registers: 224, spill_bytes: 16, stack_bytes: 16, wgmma_serialized: false };
        assert_eq!(parse_log(log, "swiglu_forward"), expected);
    }

    #[test]
    fn only_a_source_at_fault_is_rejected() {
        let refused = |status, log| refused(&result::NvrtcError(status), "simt", "sm_90a", log);
        match refused(sys::nvrtcResult::NVRTC_ERROR_COMPILATION, "error: expected a `;`") {
            CompileError::Rejected { kernel: "simt", arch: "sm_90a", log } => assert!(log.contains("expected")),
            other => panic!("{other}"),
        }
        let memory = refused(sys::nvrtcResult::NVRTC_ERROR_OUT_OF_MEMORY, "").to_string();
        assert!(memory.contains("OUT_OF_MEMORY") && memory.contains("simt") && memory.contains("sm_90a"), "{memory}");
        let option = refused(sys::nvrtcResult::NVRTC_ERROR_INVALID_OPTION, "unknown --flag").to_string();
        assert!(option.contains("INVALID_OPTION") && option.contains("unknown --flag"), "{option}");
    }

    #[test]
    fn an_architecture_that_this_nvrtc_does_not_know_names_its_file_and_the_way_to_another() {
        let nvrtc = Nvrtc { path: "/opt/libnvrtc.so.13".into(), version: (13, 0), supported: vec![75, 80] };
        let error = nvrtc.check_arch(swiglu_kernels::arch::by_name("sm_90a").unwrap()).unwrap_err().to_string();
        for part in ["13.0", "/opt/libnvrtc.so.13", "sm_90a", "SWIGLU_NVRTC"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
}
