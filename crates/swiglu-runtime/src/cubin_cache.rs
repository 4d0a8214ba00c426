//! Content-addressed CUBINs on disk: one file per source, architecture, compiler and flags.

use crate::nvrtc::{CompileError, Cubin, FLAGS, Nvrtc, Resources};
use std::io::Write;
use std::path::{Path, PathBuf};
use swiglu_kernels::{ArchSpec, KernelSource};

/// A folder of compiled kernels; safe to share between processes.
#[derive(Debug, Clone)]
pub struct CubinCache {
    folder: PathBuf,
}

impl CubinCache {
    /// A cache in `folder`, which is made when the first kernel is stored.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The CUBIN of `source`, compiled now if it is not here. A cache that cannot be read or written costs
    /// time, never a result.
    ///
    /// # Errors
    /// What [`Nvrtc::compile`] reports.
    pub fn get_or_compile(
        &self,
        nvrtc: &Nvrtc,
        source: &KernelSource,
        arch: &'static ArchSpec,
    ) -> Result<Cubin, CompileError> {
        let path = self.path(nvrtc, source, arch);
        if let Some(cubin) = read(&path) {
            return Ok(cubin);
        }
        let cubin = nvrtc.compile(source, arch)?;
        if let Err(error) = write(&path, &cubin) {
            tracing::warn!(path = %path.display(), %error, "compiled kernel could not be cached");
        }
        Ok(cubin)
    }

    fn path(&self, nvrtc: &Nvrtc, source: &KernelSource, arch: &ArchSpec) -> PathBuf {
        let key = format!("{}\n{}\n{}\n{}", source.digest, arch.name, nvrtc.version_string(), FLAGS.join(" "));
        let digest = blake3::hash(key.as_bytes()).to_hex();
        self.folder.join(&digest[..2]).join(format!("{digest}.cubin"))
    }
}

/// File format: 32 bytes BLAKE3 of the rest, 4 bytes little-endian length of the JSON report, report, image.
fn read(path: &Path) -> Option<Cubin> {
    let bytes = std::fs::read(path).ok()?;
    let (digest, rest) = bytes.split_at_checked(32)?;
    if blake3::hash(rest).as_bytes() != digest {
        tracing::warn!(path = %path.display(), "damaged compiled kernel; compiling it again");
        return None;
    }
    let (length, rest) = rest.split_at_checked(4)?;
    let length = u32::from_le_bytes(length.try_into().ok()?) as usize;
    let (report, image) = rest.split_at_checked(length)?;
    let resources: Resources = serde_json::from_slice(report).ok()?;
    Some(Cubin { image: image.to_vec(), resources })
}

/// Temporary file, fsync, rename: a reader sees the whole file or none.
fn write(path: &Path, cubin: &Cubin) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let report = serde_json::to_vec(&cubin.resources)?;
    let length = u32::try_from(report.len()).map_err(std::io::Error::other)?;
    let rest = [&length.to_le_bytes()[..], &report, &cubin.image].concat();
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(blake3::hash(&rest).as_bytes())?;
    file.write_all(&rest)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ab/abc.cubin");
        let resources = Resources { registers: 168, spill_bytes: 0, stack_bytes: 8, wgmma_serialized: false };
        let cubin = Cubin { image: (0..=255).collect(), resources };
        write(&path, &cubin).unwrap();
        assert_eq!(read(&path), Some(cubin));
        let intact = std::fs::read(&path).unwrap();
        for position in 0..intact.len() {
            let mut bytes = intact.clone();
            bytes[position] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(read(&path), None, "bit flip at {position}");
            std::fs::write(&path, &intact[..position]).unwrap();
            assert_eq!(read(&path), None, "truncation to {position}");
        }
    }
}
