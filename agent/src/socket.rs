//! The place of the socket: folder, lock, stale sockets, clean-up.
//!
//! Owns what is made in the file system. The folder is 0700 in the call that makes it, the umask is set before `bind`,
//! and nothing that is not our own dead socket is ever taken away.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
};

use etcetera::BaseStrategy;
use nix::{
    sys::{
        socket::{
            AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, setsockopt, socket, sockopt,
        },
        stat::{Mode, umask},
    },
    unistd::getuid,
};

use crate::{
    error::{SocketProblem, StartError},
    sandbox::Allowed,
};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// Where the socket is to be, with a folder that is fit for it.
#[derive(Debug)]
pub(crate) struct Place {
    path: PathBuf,
    /// The folder was made for this agent alone and goes with it.
    fresh_folder: bool,
}

impl Place {
    /// The named place, else the user's, else (or for a command of its own) a fresh folder.
    pub(crate) fn choose(named: Option<&Path>, fresh: bool) -> Result<Self, StartError> {
        if let Some(path) = named {
            // Absolute, since the agent leaves its working directory.
            let path = std::path::absolute(path).map_err(|error| at(path, error.into()))?;
            let folder = path.parent().ok_or_else(|| at(&path, SocketProblem::NoFolder))?;
            check_folder(folder).map_err(|problem| at(&path, problem))?;
            return Ok(Self { path, fresh_folder: false });
        }
        match runtime_folder() {
            Some(runtime) if !fresh => {
                let folder = runtime.join("kms-agent");
                match DirBuilder::new().mode(0o700).create(&folder) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(error) => return Err(at(&folder, error.into())),
                }
                check_folder(&folder).map_err(|problem| at(&folder, problem))?;
                Ok(Self { path: folder.join("agent.sock"), fresh_folder: false })
            }
            _ => {
                let folder = tempfile::Builder::new()
                    .prefix("kms-agent-")
                    .permissions(fs::Permissions::from_mode(0o700))
                    .tempdir()
                    .map_err(|error| at(&std::env::temp_dir(), error.into()))?
                    .keep();
                Ok(Self { path: folder.join("agent.sock"), fresh_folder: true })
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes away the folder that was made, when no agent came to be in it.
    pub(crate) fn abandon(&self) {
        if self.fresh_folder
            && let Some(folder) = self.path.parent()
        {
            let _ = fs::remove_dir(folder);
        }
    }
}

fn at(path: &Path, problem: SocketProblem) -> StartError {
    StartError::Socket { path: path.to_owned(), problem }
}

/// `$XDG_RUNTIME_DIR`, or `/run/user/UID` if that is ours.
fn runtime_folder() -> Option<PathBuf> {
    let named = etcetera::base_strategy::Xdg::new().ok().and_then(|folders| folders.runtime_dir());
    let usual = || Some(PathBuf::from(format!("/run/user/{}", getuid())));
    named.or_else(usual).filter(|folder| check_folder(folder).is_ok())
}

/// A folder of ours or of root's that nobody else can write to.
fn check_folder(folder: &Path) -> Result<(), SocketProblem> {
    let metadata = fs::metadata(folder)?;
    if !metadata.is_dir() {
        return Err(SocketProblem::NotAFolder);
    }
    if metadata.uid() != getuid().as_raw() && metadata.uid() != 0 {
        return Err(SocketProblem::FolderOwner);
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(SocketProblem::FolderOpen);
    }
    Ok(())
}

/// The listening socket, and the lock that makes it the only one.
pub(crate) struct AgentSocket {
    place: Place,
    lock_path: PathBuf,
    listener: std::os::unix::net::UnixListener,
    /// Held as long as the socket is: who cannot get it is not the one to take a stale socket away.
    _lock: File,
}

impl AgentSocket {
    /// Binds and listens. A stale socket is taken over only while holding the lock, when it is ours and nobody answers.
    pub(crate) fn bind(place: Place) -> Result<Self, StartError> {
        match Self::try_bind(&place) {
            Ok((lock_path, lock, listener)) => Ok(Self { place, lock_path, listener, _lock: lock }),
            Err(problem) => {
                place.abandon();
                Err(at(&place.path, problem))
            }
        }
    }

    #[allow(clippy::type_complexity)]
    fn try_bind(place: &Place) -> Result<(PathBuf, File, std::os::unix::net::UnixListener), SocketProblem> {
        let path = place.path.as_path();
        let address = UnixAddr::new(path).map_err(|_| SocketProblem::TooLong)?;
        let mut lock_name = path.as_os_str().to_owned();
        lock_name.push(".lock");
        let lock_path = PathBuf::from(lock_name);
        let lock = take_lock(&lock_path)?;
        match Self::listen(path, &address) {
            Ok(listener) => Ok((lock_path, lock, listener)),
            Err(problem) => {
                // The lock is still held, so the file is ours alone.
                let _ = fs::remove_file(&lock_path);
                Err(problem)
            }
        }
    }

    fn listen(path: &Path, address: &UnixAddr) -> Result<std::os::unix::net::UnixListener, SocketProblem> {
        remove_stale(path)?;
        let fd = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )
        .map_err(io::Error::from)?;
        // Before `listen`, so that the sender of what waits in the backlog is known too.
        setsockopt(&fd, sockopt::PassCred, &true).map_err(io::Error::from)?;
        let old_mask = umask(Mode::from_bits_truncate(0o177));
        let bound = bind(fd.as_raw_fd(), address);
        umask(old_mask);
        bound.map_err(io::Error::from)?;
        let backlog = Backlog::new(BACKLOG).map_err(io::Error::from)?;
        listen(&fd, backlog).map_err(io::Error::from)?;
        Ok(fd.into())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.place.path
    }

    /// What taking it away needs.
    pub(crate) fn to_remove(&self) -> Vec<Allowed> {
        let Some(folder) = self.place.path.parent() else { return Vec::new() };
        let parent = folder.parent().filter(|_| self.place.fresh_folder);
        let files = Allowed::to_remove_files(folder.to_owned());
        [files]
            .into_iter()
            .chain(parent.map(|parent| Allowed::to_remove_folders(parent.to_owned())))
            .collect()
    }

    /// The listener, which does not block.
    pub(crate) fn listener(&self) -> Result<std::os::unix::net::UnixListener, StartError> {
        self.listener.try_clone().map_err(StartError::Runtime)
    }
}

impl Drop for AgentSocket {
    fn drop(&mut self) {
        // The lock is still held, so what lies there is ours. What cannot be removed is taken over by the next agent.
        let _ = fs::remove_file(&self.place.path);
        let _ = fs::remove_file(&self.lock_path);
        self.place.abandon();
    }
}

/// Locks the file, and makes sure that it is still the one with that name.
fn take_lock(path: &Path) -> Result<File, SocketProblem> {
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)?;
        file.try_lock().map_err(|_| SocketProblem::Served)?;
        match fs::symlink_metadata(path) {
            Ok(named) if named.ino() == file.metadata()?.ino() => return Ok(file),
            // The agent that held it before took it away between the two calls.
            _ => {}
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), SocketProblem> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if !metadata.file_type().is_socket() || metadata.uid() != getuid().as_raw() {
        return Err(SocketProblem::Foreign);
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(fs::remove_file(path)?),
        Ok(_) | Err(_) => Err(SocketProblem::Served),
    }
}
