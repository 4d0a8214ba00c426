//! Where things are looked for. The environment is read here and nowhere else.

use std::path::PathBuf;

/// Places the runtime and the tuner look in; `None` means the default.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// libnvrtc itself, or the folder it lies in. Default: see [`crate::library::nvrtc`].
    pub nvrtc: Option<PathBuf>,
    /// Tuning database. Default: `$XDG_DATA_HOME/swiglu-tune`.
    pub db: Option<PathBuf>,
    /// Compiled kernels. Default: `$XDG_CACHE_HOME/swiglu-tune/cubin`.
    pub cubin_cache: Option<PathBuf>,
}

impl Options {
    /// Reads `SWIGLU_NVRTC`, `SWIGLU_DB` and `SWIGLU_CUBIN_CACHE`.
    pub fn from_env() -> Self {
        let path = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self { nvrtc: path("SWIGLU_NVRTC"), db: path("SWIGLU_DB"), cubin_cache: path("SWIGLU_CUBIN_CACHE") }
    }

    /// The tuning database's folder, if there is a home to put it in.
    pub fn db_dir(&self) -> Option<PathBuf> {
        self.db.clone().or_else(|| swiglu_db::default_dir().ok())
    }

    /// The folder of compiled kernels; a temporary one where there is no home.
    pub fn cubin_dir(&self) -> PathBuf {
        use etcetera::BaseStrategy;
        self.cubin_cache.clone().unwrap_or_else(|| {
            let cache = etcetera::choose_base_strategy().map(|base| base.cache_dir());
            cache.unwrap_or_else(|_| std::env::temp_dir()).join("swiglu-tune").join("cubin")
        })
    }
}
