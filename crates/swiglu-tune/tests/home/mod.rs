//! A place of its own for every test of the command line.
#![allow(dead_code, reason = "no test file uses all of it")]

use assert_cmd::Command;
use assert_cmd::assert::Assert;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A shipped table, as text to import.
pub(crate) const SHIPPED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tuning-db/nvidia-h200.toml");

/// How many records it has.
pub(crate) fn shipped_count() -> usize {
    fs::read_to_string(SHIPPED).unwrap().lines().filter(|line| *line == "[[record]]").count()
}

/// A home folder that goes when it is dropped.
pub(crate) struct Home(TempDir);

impl Home {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn db(&self) -> PathBuf {
        self.path().join("db")
    }

    /// `swiglu-tune` with every place it may write to inside the home.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::cargo_bin("swiglu-tune").unwrap();
        command
            .env("HOME", self.path())
            .env("XDG_DATA_HOME", self.path().join("data"))
            .env("XDG_CACHE_HOME", self.path().join("cache"))
            .env("SWIGLU_DB", self.db())
            .env("SWIGLU_SITE_DB", self.path().join("site"))
            .env("SWIGLU_CUBIN_CACHE", self.path().join("cubin"));
        command
    }

    pub(crate) fn tune(&self, args: &[&str]) -> Assert {
        self.command().args(args).assert()
    }

    /// Tunes a shape small enough for a debug build.
    pub(crate) fn tune_cpu(&self, m: &str) -> Assert {
        let shapes = self.shapes(m);
        self.tune(&["--gpu", "cpu", "--quiet", "--shapes", &shapes])
    }

    pub(crate) fn shapes(&self, m: &str) -> String {
        self.write("shapes.toml", &format!("[[shape]]\nn = 48\nk = 32\nm = {m}\n"))
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> String {
        let path = self.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    pub(crate) fn stdout(&self, args: &[&str]) -> String {
        String::from_utf8(self.tune(args).success().get_output().stdout.clone()).unwrap()
    }
}
