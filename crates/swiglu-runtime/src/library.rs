//! Finds and loads the NVIDIA libraries before cudarc touches them, because cudarc panics when one is missing or lacks a
//! function.
//!
//! Contract: a library is only loaded, never called here; the handles of accepted ones live as long as the process.
#![allow(unsafe_code, reason = "loading a shared library runs its initialisers")]

use cudarc::{cublaslt, driver, nvrtc};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

/// A library that is not there, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{library} was not found ({looked_in}{}); {fix}", told(.incomplete))]
pub struct MissingLibrary {
    /// What it is, e.g. "the NVIDIA driver (libcuda.so.1)".
    pub library: &'static str,
    /// Where it was looked for.
    pub looked_in: String,
    /// What has its name and is not it.
    pub incomplete: Vec<Incomplete>,
    /// What to install or set.
    pub fix: &'static str,
}

/// A file that has the name of a library, but not its functions.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` has no function `{symbol}`: it is not NVIDIA's, or too old", file.display())]
pub struct Incomplete {
    /// The file, or the name that the loader path has it under.
    pub file: PathBuf,
    /// The first function that it lacks.
    pub symbol: &'static str,
}

fn told(incomplete: &[Incomplete]) -> String {
    incomplete.iter().map(|file| format!("; {file}")).collect()
}

/// What a library must have.
struct Needed {
    /// Functions that are called, of each version and use some: a library that has them all has the others too.
    symbols: &'static [&'static str],
    bindings: Bindings,
}

/// How cudarc finds a library.
#[derive(Clone, Copy)]
struct Bindings {
    /// The name that it tries first.
    name: &'static str,
    /// Whether it finds one.
    is_present: fn() -> bool,
    /// Whether the one it finds has a function. Asked only where there is one.
    has: fn(&str) -> bool,
}

macro_rules! bindings {
    ($library:ident, $name:literal) => {
        Bindings {
            name: $name,
            // SAFETY: only opens what is loaded already, or the loader's own.
            is_present: || unsafe { $library::sys::is_culib_present() },
            // SAFETY: there is one, so this does not panic; the address is looked up and not used.
            has: |symbol| unsafe { $library::sys::culib().get::<*const c_void>(symbol.as_bytes()) }.is_ok(),
        }
    };
}

const DRIVER: Needed = Needed {
    symbols: &[
        "cuInit",
        "cuGetErrorName",
        "cuGetErrorString",
        "cuDriverGetVersion",
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDeviceGetName",
        "cuDeviceGetAttribute",
        "cuDeviceTotalMem_v2",
        "cuDevicePrimaryCtxRetain",
        "cuDevicePrimaryCtxRelease_v2",
        "cuCtxGetCurrent",
        "cuCtxSetCurrent",
        "cuCtxGetDevice",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuModuleUnload",
        "cuFuncSetAttribute",
        "cuLaunchKernelEx",
        "cuTensorMapEncodeTiled",
        "cuMemAllocAsync",
        "cuMemAllocFromPoolAsync",
        "cuMemFreeAsync",
        "cuMemPoolCreate",
        "cuMemPoolSetAttribute",
        "cuMemsetD2D8Async",
        "cuStreamSynchronize",
    ],
    bindings: bindings!(driver, "libcuda.so"),
};

const NVRTC: Needed = Needed {
    symbols: &[
        "nvrtcVersion",
        "nvrtcGetNumSupportedArchs",
        "nvrtcGetSupportedArchs",
        "nvrtcCreateProgram",
        "nvrtcCompileProgram",
        "nvrtcDestroyProgram",
        "nvrtcGetProgramLogSize",
        "nvrtcGetProgramLog",
        "nvrtcGetCUBINSize",
        "nvrtcGetCUBIN",
    ],
    bindings: bindings!(nvrtc, "libnvrtc.so"),
};

const CUBLASLT: Needed = Needed {
    symbols: &[
        "cublasLtCreate",
        "cublasLtDestroy",
        "cublasLtMatmul",
        "cublasLtMatmulAlgoGetHeuristic",
        "cublasLtMatmulDescCreate",
        "cublasLtMatmulDescDestroy",
        "cublasLtMatmulDescSetAttribute",
        "cublasLtMatmulPreferenceCreate",
        "cublasLtMatmulPreferenceDestroy",
        "cublasLtMatmulPreferenceSetAttribute",
        "cublasLtMatrixLayoutCreate",
        "cublasLtMatrixLayoutDestroy",
    ],
    bindings: bindings!(cublaslt, "libcublasLt.so"),
};

/// A search for one library, with what had its name and was not it.
struct Search {
    needed: Needed,
    incomplete: Vec<Incomplete>,
}

impl Search {
    fn new(needed: Needed) -> Self {
        Self { needed, incomplete: Vec::new() }
    }

    /// Loads a file for the rest of the process if it has every function; true when that worked.
    fn load(&mut self, file: &Path) -> bool {
        let Some(library) = open(file) else { return false };
        // SAFETY: the address is looked up and not used.
        let lacks = |symbol: &&&str| unsafe { library.get::<*const c_void>(**symbol) }.is_err();
        if let Some(symbol) = self.needed.symbols.iter().find(lacks) {
            self.refuse(file, symbol);
            return false;
        }
        std::mem::forget(library);
        self.bindings_agree()
    }

    /// Whether what cudarc finds by its own names, which may be another file, has every function too.
    fn bindings_agree(&mut self) -> bool {
        let Bindings { name, is_present, has } = self.needed.bindings;
        if !is_present() {
            return true;
        }
        let Some(symbol) = self.needed.symbols.iter().find(|symbol| !has(symbol)) else { return true };
        self.refuse(Path::new(name), symbol);
        false
    }

    fn refuse(&mut self, file: &Path, symbol: &'static str) {
        let incomplete = Incomplete { file: file.to_path_buf(), symbol };
        if !self.incomplete.contains(&incomplete) {
            self.incomplete.push(incomplete);
        }
    }
}

fn open(file: &Path) -> Option<Library> {
    // SAFETY: only NVIDIA's own libraries are named here; their initialisers have no preconditions.
    unsafe { Library::open(Some(file), RTLD_NOW | RTLD_GLOBAL) }.ok()
}

/// Loads the driver library.
///
/// # Errors
/// [`MissingLibrary`] when there is none.
pub fn driver() -> Result<(), MissingLibrary> {
    static FOUND: OnceLock<Result<(), MissingLibrary>> = OnceLock::new();
    FOUND.get_or_init(find_driver).clone()
}

fn find_driver() -> Result<(), MissingLibrary> {
    let mut search = Search::new(DRIVER);
    if ["libcuda.so.1", "libcuda.so"].iter().any(|name| search.load(Path::new(name))) {
        return Ok(());
    }
    Err(MissingLibrary {
        library: "the NVIDIA driver (libcuda.so.1)",
        looked_in: "loader path".into(),
        incomplete: search.incomplete,
        fix: "install the NVIDIA driver, or run on the CPU",
    })
}

/// Loads NVRTC and tells where it was found. Looked in, in this order: `explicit` (a file or a folder), an
/// installed toolkit, the pip wheels of the active Python, the loader path.
/// The builtins library of the same folder is loaded first, because the wheel's libnvrtc does not find it itself.
///
/// # Errors
/// [`MissingLibrary`] when there is none; an `explicit` place without one is an error, not a reason to go on. Once one is
/// loaded, `explicit` has no effect: a process has one NVRTC.
pub fn nvrtc(explicit: Option<&Path>) -> Result<PathBuf, MissingLibrary> {
    static FOUND: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    // Once loaded it stays; what was not found may be installed since, or asked for elsewhere.
    if let Some(path) = found.as_ref() {
        return Ok(path.clone());
    }
    let path = find_nvrtc(explicit)?;
    *found = Some(path.clone());
    Ok(path)
}

fn find_nvrtc(explicit: Option<&Path>) -> Result<PathBuf, MissingLibrary> {
    let mut search = Search::new(NVRTC);
    let folders = match explicit {
        Some(path) if path.is_file() => {
            let found = load_nvrtc(&mut search, path).then(|| path.to_path_buf());
            return found.ok_or_else(|| missing_nvrtc(explicit, &[], search));
        }
        Some(folder) => wheel_folders(folder),
        None => library_folders(),
    };
    let mut files = folders.iter().flat_map(|folder| versions_in(folder, "libnvrtc.so."));
    let names = ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"].map(PathBuf::from);
    let found = match files.find(|path| load_nvrtc(&mut search, path)) {
        None if explicit.is_none() => names.into_iter().find(|name| search.load(name)),
        found => found,
    };
    found.ok_or_else(|| missing_nvrtc(explicit, &folders, search))
}

/// Loads cuBLASLt, which is optional, and tells where it was found: a toolkit, the pip wheels, the loader path.
///
/// # Errors
/// [`MissingLibrary`] when there is none.
pub fn cublaslt() -> Result<PathBuf, MissingLibrary> {
    static FOUND: OnceLock<Result<PathBuf, MissingLibrary>> = OnceLock::new();
    FOUND.get_or_init(find_cublaslt).clone()
}

fn find_cublaslt() -> Result<PathBuf, MissingLibrary> {
    let mut search = Search::new(CUBLASLT);
    let files = library_folders().into_iter().flat_map(|folder| versions_in(&folder, "libcublasLt.so."));
    let names = ["libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12"].map(PathBuf::from);
    // One of a version that the bindings do not know by name would be none to them, and a panic.
    let is_known = CUBLASLT.bindings.is_present;
    files.chain(names).find(|path| search.load(path) && is_known()).ok_or(MissingLibrary {
        library: "cuBLASLt (libcublasLt.so)",
        looked_in: "toolkits, pip wheels, loader path".into(),
        incomplete: search.incomplete,
        fix: "run `pip install nvidia-cublas`, or go without it",
    })
}

fn missing_nvrtc(explicit: Option<&Path>, folders: &[PathBuf], search: Search) -> MissingLibrary {
    let listed = folders.iter().map(|folder| folder.display().to_string());
    MissingLibrary {
        library: "NVRTC (libnvrtc.so)",
        looked_in: match explicit {
            Some(place) => format!("{}, as was asked", place.display()),
            None => listed.chain(["loader path".to_owned()]).collect::<Vec<_>>().join(", "),
        },
        incomplete: search.incomplete,
        fix: "run `pip install nvidia-cuda-nvrtc`, or set SWIGLU_NVRTC to libnvrtc or its folder",
    }
}

/// Loads builtins, then NVRTC.
fn load_nvrtc(search: &mut Search, path: &Path) -> bool {
    if let Some(folder) = path.parent() {
        for builtins in files_starting_with(folder, "libnvrtc-builtins.so") {
            std::mem::forget(open(&builtins));
        }
    }
    search.load(path)
}

/// Versions of a library in one folder, the newest first.
fn versions_in(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut found = files_starting_with(folder, prefix);
    found.sort();
    found.reverse();
    found
}

fn files_starting_with(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = folder.read_dir() else { return Vec::new() };
    let files = entries.flatten().map(|entry| entry.path());
    let named = files.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)));
    named.collect()
}

/// Folders of toolkits and wheels, most explicit first.
fn library_folders() -> Vec<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable);
    let toolkits = toolkits.chain([PathBuf::from("/usr/local/cuda")]);
    let mut folders: Vec<PathBuf> = toolkits.flat_map(|root| [root.join("lib64"), root.join("lib")]).collect();
    folders.extend(variable("VIRTUAL_ENV").iter().flat_map(|root| site_packages(root)));
    folders.extend(python_site_packages().iter().flat_map(|site| wheel_folders(site)));
    folders.retain(|folder| folder.is_dir());
    folders
}

/// `lib/python3.*/site-packages` of a virtual environment, as wheel folders.
fn site_packages(root: &Path) -> Vec<PathBuf> {
    let pythons = files_starting_with(&root.join("lib"), "python3");
    pythons.iter().flat_map(|python| wheel_folders(&python.join("site-packages"))).collect()
}

/// Where NVIDIA's wheels put their libraries, below a site-packages folder; and the folder itself.
fn wheel_folders(site: &Path) -> Vec<PathBuf> {
    let below = ["", "nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "nvidia/cublas/lib"].map(|part| site.join(part));
    below.into_iter().filter(|folder| folder.is_dir()).collect()
}

/// The site-packages folders of the `python3` on the path; none when there is no Python.
fn python_site_packages() -> Vec<PathBuf> {
    let script = "import site; print('\\n'.join(site.getsitepackages() + [site.getusersitepackages()]))";
    let output = std::process::Command::new("python3").args(["-c", script]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_explicit_place_without_nvrtc_is_an_error_that_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let error = find_nvrtc(Some(folder.path())).unwrap_err();
        assert!(error.to_string().contains("pip install nvidia-cuda-nvrtc"), "{error}");
        let nowhere = find_nvrtc(Some(Path::new("/nowhere"))).unwrap_err().to_string();
        assert!(nowhere.contains("/nowhere") && !nowhere.contains("loader path"), "{nowhere}");
        let file = folder.path().join("libnvrtc.so.13");
        std::fs::write(&file, "not a library").unwrap();
        assert!(find_nvrtc(Some(&file)).is_err());
    }

    /// A library that has these functions and no others, where the C++ compiler of the emulation is.
    fn stub(file: &Path, functions: &[&str]) {
        let text = file.with_extension("cpp");
        let lines: String =
            functions.iter().map(|name| format!("extern \"C\" int {name}() {{ return 0; }}\n")).collect();
        std::fs::write(&text, lines).unwrap();
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let compiled =
            std::process::Command::new(compiler).args(["-shared", "-fPIC", "-o"]).args([file, &text]).output();
        assert!(compiled.unwrap().status.success(), "a C++ compiler is needed, `apt install g++`");
    }

    #[test]
    fn a_file_without_every_function_is_no_library_and_the_first_that_lacks_is_named() {
        let folder = tempfile::tempdir().unwrap();
        for needed in [DRIVER, NVRTC, CUBLASLT] {
            let symbols = needed.symbols;
            for count in [0, 1, symbols.len() - 1] {
                let file = folder.path().join(format!("lib{}{count}.so", symbols[0]));
                stub(&file, &symbols[..count]);
                let mut search = Search::new(Needed { ..needed });
                assert!(!search.load(&file), "{}", symbols[0]);
                assert_eq!(search.incomplete, [Incomplete { file, symbol: symbols[count] }]);
            }
        }
        let file = folder.path().join("libnvrtc.so.13");
        stub(&file, &["nvrtcVersion"]);
        for place in [&file, folder.path()] {
            let error = find_nvrtc(Some(place)).unwrap_err();
            let incomplete = [Incomplete { file: file.clone(), symbol: "nvrtcGetNumSupportedArchs" }];
            assert_eq!(error.incomplete, incomplete);
            let text = error.to_string();
            assert!(text.contains("`nvrtcGetNumSupportedArchs`") && text.contains("libnvrtc.so.13"), "{text}");
        }
    }
}
