//! Content-addressed CUBINs on disk: one file per source, architecture, compiler and flags.

use crate::nvrtc::{CompileError, Cubin, FLAGS, Nvrtc, Resources};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};
use std::time::{Duration, SystemTime};
use swiglu_kernels::{ArchSpec, KernelSource};

/// What a folder is cut down to when a process first stores in it: the kernels go that were not used for longest, some ten thousand
/// are kept.
const MOST_BYTES: u64 = 2 << 30;

/// How exactly a file tells when it was last used.
const USED: Duration = Duration::from_secs(24 * 60 * 60);

/// A folder of compiled kernels; safe to share between processes.
#[derive(Debug, Clone)]
pub struct CubinCache {
    folder: Option<PathBuf>,
    /// Once in the life of this cache and its clones.
    trimmed: Arc<Once>,
}

impl CubinCache {
    /// A cache in `folder`, which is made when the first kernel is stored; none without.
    pub fn new(folder: Option<PathBuf>) -> Self {
        Self { folder, trimmed: Arc::new(Once::new()) }
    }

    /// The folder.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
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
        let Some(folder) = &self.folder else { return nvrtc.compile(source, arch) };
        let path = folder.join(name(nvrtc, source, arch));
        if let Some(cubin) = read(&path) {
            mark_used(&path);
            return Ok(cubin);
        }
        let cubin = nvrtc.compile(source, arch)?;
        if let Err(error) = write(&path, &cubin) {
            tracing::warn!(path = %path.display(), %error, "compiled kernel could not be cached");
        }
        self.trimmed.call_once(|| trim(folder, MOST_BYTES));
        Ok(cubin)
    }
}

/// `ab/abcd....cubin`, by everything that decides what the kernel is.
fn name(nvrtc: &Nvrtc, source: &KernelSource, arch: &ArchSpec) -> PathBuf {
    let key = format!("{}\n{}\n{}\n{}", source.digest, arch.name, nvrtc.version_string(), FLAGS.join(" "));
    let digest = blake3::hash(key.as_bytes()).to_hex();
    Path::new(&digest[..2]).join(format!("{digest}.cubin"))
}

/// Sets a file's time to now, once a day. Where that is not allowed the folder is another's to trim.
fn mark_used(path: &Path) {
    let now = SystemTime::now();
    let used = path.metadata().and_then(|data| data.modified());
    if used.is_ok_and(|used| now.duration_since(used).is_ok_and(|since| since > USED)) {
        let _ = std::fs::File::options().write(true).open(path).and_then(|file| file.set_modified(now));
    }
}

/// Whether a file is named as [`name`] does: the folder may hold others' too.
fn is_ours(path: &Path) -> bool {
    let shelf = path.parent().and_then(Path::file_name).and_then(|shelf| shelf.to_str());
    let digest = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".cubin"));
    let is_digest = |text: &str| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    digest.zip(shelf).is_some_and(|(digest, shelf)| is_digest(digest) && digest.starts_with(shelf) && shelf.len() == 2)
}

/// Removes the kernels that were not used for longest until the others take at most `most` bytes. Another process that reads one
/// has it open.
fn trim(folder: &Path, most: u64) {
    let files = |folder: &Path| folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    let kernels = files(folder).flat_map(|shelf| files(&shelf).collect::<Vec<_>>());
    let kernels = kernels.filter(|path| is_ours(path));
    let mut kernels: Vec<(SystemTime, u64, PathBuf)> = kernels
        .filter_map(|path| {
            let data = path.metadata().ok()?;
            Some((data.modified().ok()?, data.len(), path))
        })
        .collect();
    kernels.sort_unstable();
    let mut bytes: u64 = kernels.iter().map(|(_, size, _)| size).sum();
    for (_, size, path) in kernels {
        if bytes <= most {
            return;
        }
        match std::fs::remove_file(&path) {
            Ok(()) => bytes -= size,
            Err(error) => tracing::debug!(path = %path.display(), %error, "compiled kernel could not be removed"),
        }
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

    #[test]
    fn the_kernels_that_were_not_used_for_longest_go() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let days = |days: u32| SystemTime::now() - USED * days;
        let kernel = |first: char| format!("{first}{first}/{}.cubin", String::from(first).repeat(64));
        let names = [kernel('a'), kernel('b'), kernel('c'), "cc/of-others.cubin".into(), "cc/notes.txt".into()];
        for (name, age) in names.iter().zip([3, 9, 6, 20, 20]) {
            std::fs::create_dir_all(at(name).parent().unwrap()).unwrap();
            std::fs::write(at(name), [0; 100]).unwrap();
            std::fs::File::options().write(true).open(at(name)).unwrap().set_modified(days(age)).unwrap();
        }
        let left = || names.each_ref().map(|name| at(name).exists());
        trim(folder.path(), 300);
        assert_eq!(left(), [true; 5]);
        trim(folder.path(), 299);
        assert_eq!(left(), [true, false, true, true, true]);
        mark_used(&at(&names[2]));
        trim(folder.path(), 100);
        assert_eq!(left(), [false, false, true, true, true], "what was read just now is kept");
        let used = at(&names[2]).metadata().unwrap().modified().unwrap();
        mark_used(&at(&names[2]));
        assert_eq!(at(&names[2]).metadata().unwrap().modified().unwrap(), used, "not written at each read");
        trim(&at("no-such-folder"), 0);
    }
}
