//! Finds and loads the NVIDIA libraries before cudarc touches them, because cudarc panics when one is missing.
//!
//! Contract: a library is only loaded, never called here; the handles live as long as the process.
#![allow(unsafe_code, reason = "loading a shared library runs its initialisers")]

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

/// A library that is not there, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{library} was not found ({looked_in}); {fix}")]
pub struct MissingLibrary {
    /// What it is, e.g. "the NVIDIA driver (libcuda.so.1)".
    pub library: &'static str,
    /// Where it was looked for.
    pub looked_in: String,
    /// What to install or set.
    pub fix: &'static str,
}

/// Loads a library for the rest of the process; true when that worked.
fn load(path: &Path) -> bool {
    // SAFETY: only NVIDIA's own libraries are named here; their initialisers have no preconditions.
    match unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) } {
        Ok(library) => {
            std::mem::forget(library);
            true
        }
        Err(_) => false,
    }
}

/// Loads the driver library.
///
/// # Errors
/// [`MissingLibrary`] when there is none.
pub fn driver() -> Result<(), MissingLibrary> {
    static FOUND: OnceLock<bool> = OnceLock::new();
    let found = *FOUND.get_or_init(|| ["libcuda.so.1", "libcuda.so"].iter().any(|name| load(Path::new(name))));
    if found {
        return Ok(());
    }
    Err(MissingLibrary {
        library: "the NVIDIA driver (libcuda.so.1)",
        looked_in: "loader path".into(),
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
    let folders = match explicit {
        Some(path) if path.is_file() => return load_nvrtc(path).ok_or_else(|| missing_nvrtc(explicit, &[])),
        Some(folder) => wheel_folders(folder),
        None => library_folders(),
    };
    let found =
        folders.iter().flat_map(|folder| versions_in(folder, "libnvrtc.so.")).find_map(|path| load_nvrtc(&path));
    let by_name =
        || ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"].map(Path::new).into_iter().find(|name| load(name));
    let found = found.or_else(|| explicit.is_none().then(by_name).flatten().map(Path::to_path_buf));
    found.ok_or_else(|| missing_nvrtc(explicit, &folders))
}

/// Loads cuBLASLt, which is optional, and tells where it was found: a toolkit, the pip wheels, the loader path.
///
/// # Errors
/// [`MissingLibrary`] when there is none.
pub fn cublaslt() -> Result<PathBuf, MissingLibrary> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    let find = || {
        let folders = library_folders();
        let found = folders.iter().flat_map(|folder| versions_in(folder, "libcublasLt.so.")).find(|path| load(path));
        let names = ["libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12"].map(PathBuf::from);
        found.or_else(|| names.into_iter().find(|name| load(name)))
    };
    FOUND.get_or_init(find).clone().ok_or(MissingLibrary {
        library: "cuBLASLt (libcublasLt.so)",
        looked_in: "toolkits, pip wheels, loader path".into(),
        fix: "run `pip install nvidia-cublas`, or go without it",
    })
}

fn missing_nvrtc(explicit: Option<&Path>, folders: &[PathBuf]) -> MissingLibrary {
    let listed = folders.iter().map(|folder| folder.display().to_string());
    MissingLibrary {
        library: "NVRTC (libnvrtc.so)",
        looked_in: match explicit {
            Some(place) => format!("{}, as was asked", place.display()),
            None => listed.chain(["loader path".to_owned()]).collect::<Vec<_>>().join(", "),
        },
        fix: "run `pip install nvidia-cuda-nvrtc`, or set SWIGLU_NVRTC to libnvrtc or its folder",
    }
}

/// Loads builtins, then NVRTC.
fn load_nvrtc(path: &Path) -> Option<PathBuf> {
    if let Some(folder) = path.parent() {
        for builtins in files_starting_with(folder, "libnvrtc-builtins.so") {
            load(&builtins);
        }
    }
    load(path).then(|| path.to_path_buf())
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
}
