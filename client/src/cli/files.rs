//! Input and output: files by name, `-` for the standard streams.
//!
//! A regular file appears under its name when it is whole and on disk, or not at all. Devices and pipes are written directly.

use std::{
    cell::Cell,
    ffi::OsStr,
    fs::{self, File},
    io::{self, IsTerminal},
    os::{
        fd::AsFd,
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tempfile::NamedTempFile;

use super::{interrupt, ui::Failure};
use crate::{Error, Output};

/// Symlinks that the name of an output may lead through.
const LINKS_MAX: usize = 40;

/// `-` and nothing at all are standard input.
pub(super) fn open(name: Option<&OsStr>) -> Result<File, Failure> {
    let (file, path) = match name.filter(|name| *name != "-") {
        Some(name) if name.is_empty() => return Err(Failure::EmptyName),
        Some(name) => (File::open(name), PathBuf::from(name)),
        None => (standard_input()?, PathBuf::from("standard input")),
    };
    let failed = |source| Failure::Open { path: path.clone(), source };
    let file = file.map_err(failed)?;
    match file.metadata().map_err(failed)?.is_dir() {
        true => Err(failed(nix::errno::Errno::EISDIR.into())),
        false => Ok(file),
    }
}

fn standard_input() -> Result<io::Result<File>, Failure> {
    let file = io::stdin().as_fd().try_clone_to_owned().map(File::from);
    match &file {
        Ok(file) if was_closed(file) => Err(Failure::ClosedInput),
        _ => Ok(file),
    }
}

/// Whether this is what the runtime puts in the place of a standard input that was closed: the null device, open for writing too.
/// `</dev/null` is not. A parent that gives us the null device open for both is refused with it: whoever wants to encrypt nothing
/// can say so in another way, and whoever has lost a pipe must not get the ciphertext of nothing for it.
fn was_closed(file: &File) -> bool {
    let is_null = || {
        let (Ok(ours), Ok(null)) = (file.metadata(), fs::metadata("/dev/null")) else { return false };
        ours.file_type().is_char_device() && ours.rdev() == null.rdev()
    };
    let flags = fcntl(file, FcntlArg::F_GETFL).map(OFlag::from_bits_truncate);
    flags.is_ok_and(|flags| flags & OFlag::O_ACCMODE == OFlag::O_RDWR) && is_null()
}

/// What is written, since not everything may go to a terminal.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Only if the user insists.
    Binary,
    /// Always.
    Text,
    /// Never.
    Secret,
}

/// Where output goes, not opened yet.
pub(super) enum Destination {
    Standard,
    /// The second: not if it is a terminal.
    Named(PathBuf, bool),
}

impl Destination {
    /// `-` is standard output even if that is a terminal; nothing at all only if it is none.
    pub(super) fn new(name: Option<&OsStr>, content: Content) -> Result<Self, Failure> {
        match name {
            Some(name) if name.is_empty() => return Err(Failure::EmptyName),
            Some(name) if name != "-" => return Ok(Self::Named(name.into(), content == Content::Secret)),
            _ => {}
        }
        match content {
            Content::Secret if io::stdout().is_terminal() => Err(Failure::SecretTerminal),
            Content::Binary if name.is_none() && io::stdout().is_terminal() => Err(Failure::Terminal),
            _ => Ok(Self::Standard),
        }
    }

    /// Whether bytes will show up on a terminal, where a progress bar would be in their way.
    pub(super) fn is_terminal(&self) -> bool {
        matches!(self, Self::Standard) && io::stdout().is_terminal()
    }

    /// Opens it, lets `write` fill it, and makes it last. After a failure there is no file.
    pub(super) fn fill<T>(
        &self,
        write: impl FnOnce(Output<'static>) -> Result<T, Error>,
    ) -> Result<T, Failure> {
        let (path, no_terminal) = match self {
            Self::Standard => {
                let stdout = io::stdout().as_fd().try_clone_to_owned().map(File::from);
                let stdout =
                    stdout.map_err(|source| Failure::Create { path: "standard output".into(), source })?;
                return Ok(write(Output::to_file_in_order(stdout))?);
            }
            Self::Named(path, no_terminal) => (path, *no_terminal),
        };
        let failed = |source: io::Error| Failure::Create { path: path.clone(), source };
        let Some(target) = regular_target(path).map_err(failed)? else {
            let file = File::options().write(true).open(path).map_err(failed)?;
            if no_terminal && file.is_terminal() {
                return Err(Failure::SecretTerminal);
            }
            return Ok(write(Output::to_file_in_order(file))?);
        };
        let folder = match target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let create = || {
            let file = create_beside(folder)?;
            let path = file.path().to_owned();
            Ok((file, path))
        };
        let temporary = interrupt::remove_at_end(create).map_err(failed)?;
        let done = write(Output::to_new_file(temporary.as_file().try_clone().map_err(failed)?))?;
        persist(temporary, &target, folder).map_err(failed)?;
        Ok(done)
    }
}

/// A file beside the target, 0600 whatever the umask.
fn create_beside(folder: &Path) -> io::Result<NamedTempFile> {
    // `tempfile` adds the name of the temporary file to the kernel's error, and nobody has asked for that name.
    let kernel = Cell::new(None);
    let create = |path: &Path| {
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600);
        options.open(path).inspect_err(|error| kernel.set(error.raw_os_error()))
    };
    let created = tempfile::Builder::new().prefix(".kmsctl-").make_in(folder, create);
    created.map_err(|error| kernel.get().map_or(error, io::Error::from_raw_os_error))
}

/// Onto the disk, then under its name, then the name onto the disk.
fn persist(temporary: NamedTempFile, target: &Path, folder: &Path) -> io::Result<()> {
    temporary.as_file().sync_all()?;
    let path = temporary.path().to_owned();
    interrupt::finish(&path, || temporary.persist(target))?;
    File::open(folder)?.sync_all()
}

/// The path of the regular file that is to be made or replaced, behind every symlink; nothing where something else is written
/// directly.
fn regular_target(path: &Path) -> io::Result<Option<PathBuf>> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => return fs::canonicalize(path).map(Some),
        Ok(meta) if meta.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // There is nothing yet, but the name may be that of a symlink to where it will be.
    let mut target = path.to_owned();
    for _ in 0..LINKS_MAX {
        match fs::read_link(&target) {
            Ok(next) => target = target.parent().unwrap_or(Path::new("/")).join(next),
            Err(_) => return Ok(Some(target)),
        }
    }
    Err(nix::errno::Errno::ELOOP.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn put(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
        Destination::new(Some(path.as_os_str()), Content::Binary)?.fill(|output| output.put(bytes))
    }

    #[test]
    fn a_file_is_whole_or_not_there_and_a_symlink_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        put(&path, b"one").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        symlink("file", dir.path().join("link")).unwrap();
        put(&dir.path().join("link"), b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert!(fs::symlink_metadata(dir.path().join("link")).unwrap().is_symlink());
        // To where nothing is yet, too.
        symlink("new", dir.path().join("dangling")).unwrap();
        put(&dir.path().join("dangling"), b"three").unwrap();
        assert_eq!(fs::read(dir.path().join("new")).unwrap(), b"three");

        let failed: Result<(), _> = Destination::new(Some(path.as_os_str()), Content::Binary)
            .unwrap()
            .fill(|output| output.put(b"half").and(Err(Error::InvalidCiphertext)));
        assert!(matches!(failed, Err(Failure::Client(Error::InvalidCiphertext))));
        assert_eq!(fs::read(&path).unwrap(), b"two");
        // Nothing else is left in the folder.
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
    }

    #[test]
    fn what_is_not_a_regular_file_is_written_directly_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(put(dir.path(), b"x"), Err(Failure::Create { .. })));
        let failed = put(&dir.path().join("no/file"), b"x");
        assert!(matches!(failed, Err(Failure::Create { source, .. }) if source.raw_os_error() == Some(2)));
        put(Path::new("/dev/null"), b"x").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
        assert!(matches!(put(Path::new(""), b"x"), Err(Failure::EmptyName)));
        symlink("loop", dir.path().join("loop")).unwrap();
        assert!(put(&dir.path().join("loop"), b"x").is_err());
    }
}
