//! Where things are looked for. The environment is read here, but for installed toolkits (`library.rs`).

use std::path::PathBuf;
use swiglu_db::Layer;

/// Places the runtime and the tuner look in; `None` means the default.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// libnvrtc itself, or the folder it lies in. Default: see [`crate::library::nvrtc`].
    pub nvrtc: Option<PathBuf>,
    /// Tuning database. Default: `$XDG_DATA_HOME/swiglu-tune`.
    pub db: Option<PathBuf>,
    /// Tuned records that go before all others: a tuning database or the file of an exported table.
    pub overriding: Option<PathBuf>,
    /// Tuned records for all users of the site, likewise. Default: `/etc/swiglu-tune`.
    pub site: Option<PathBuf>,
    /// Compiled kernels. Default: `$XDG_CACHE_HOME/swiglu-tune/cubin`, without a home nowhere.
    pub cubin_cache: Option<PathBuf>,
}

impl Options {
    /// Reads `SWIGLU_NVRTC`, `SWIGLU_DB`, `SWIGLU_OVERRIDE`, `SWIGLU_SITE_DB` and `SWIGLU_CUBIN_CACHE`.
    pub fn from_env() -> Self {
        let path = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self {
            nvrtc: path("SWIGLU_NVRTC"),
            db: path("SWIGLU_DB"),
            overriding: path("SWIGLU_OVERRIDE"),
            site: path("SWIGLU_SITE_DB"),
            cubin_cache: path("SWIGLU_CUBIN_CACHE"),
        }
    }

    /// Where tuned records are looked for, highest first; the shipped tables come after them.
    pub fn layers(&self) -> Vec<(Layer, PathBuf)> {
        let site = self.site.clone().unwrap_or_else(|| "/etc/swiglu-tune".into());
        let overriding = self.overriding.clone().map(|path| (Layer::Override, path));
        // Without a home there is no user layer.
        let user = self.db_dir().map(|path| (Layer::User, path));
        overriding.into_iter().chain(user).chain([(Layer::Site, site)]).collect()
    }

    /// The tuning database's folder, if there is a home to put it in.
    pub fn db_dir(&self) -> Option<PathBuf> {
        self.db.clone().or_else(|| swiglu_db::default_dir().ok())
    }

    /// The folder of compiled kernels, if there is a home to put it in: in a folder for all users anyone could lay kernels.
    pub fn cubin_dir(&self) -> Option<PathBuf> {
        use etcetera::BaseStrategy;
        self.cubin_cache.clone().or_else(|| {
            let base = etcetera::choose_base_strategy().ok()?;
            Some(base.cache_dir().join("swiglu-tune").join("cubin"))
        })
    }
}
