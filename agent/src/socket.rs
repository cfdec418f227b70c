//! The place of the socket: folder, lock, stale sockets, clean-up.
//!
//! Owns what is made in the file system, and nothing that systemd made. The folder is 0700 in the call that makes it, the umask is set before `bind`,
//! and nothing that is not our own dead socket is ever taken away.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

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
    activation,
    args::Args,
    error::{ActivationProblem, SocketProblem, StartError},
    folder::Folder,
    sandbox::Allowed,
};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// Where the socket is to be, or is, with a folder that is fit for it.
#[derive(Debug)]
pub(crate) struct Place {
    path: PathBuf,
    /// The folder was made for this agent alone and goes with it.
    fresh_folder: bool,
    /// The socket that systemd has bound there.
    given: Option<OwnedFd>,
}

impl Place {
    /// The one of systemd, the named one, else the user's, else (or for a command of its own) a fresh folder.
    pub(crate) fn choose(args: &Args) -> Result<Self, StartError> {
        // Elsewhere the variables are for the command, or for nobody.
        let given = if args.foreground { activation::take()? } else { None };
        match (given, &args.socket) {
            (Some(_), Some(_)) => Err(ActivationProblem::Named.into()),
            (Some((path, socket)), None) => Ok(Self { given: Some(socket), ..Self::at(&path)? }),
            (None, Some(path)) => Self::at(path),
            (None, None) => match runtime_folder() {
                Some(runtime) if args.command.is_empty() => Self::of_user(&runtime),
                _ => Self::fresh(),
            },
        }
    }

    /// A path in a folder that nobody else can write to.
    fn at(path: &Path) -> Result<Self, StartError> {
        let folder = || {
            let path = std::path::absolute(path).map_err(SocketProblem::WorkingFolder)?;
            let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(SocketProblem::NoName);
            };
            if path.as_os_str().as_bytes().iter().any(u8::is_ascii_control) {
                return Err(SocketProblem::ControlCharacter);
            }
            let folder = Folder::find(folder)?;
            folder.is_private()?;
            Ok(folder.path().join(name))
        };
        match folder() {
            Ok(path) => Ok(Self { path, fresh_folder: false, given: None }),
            Err(problem) => Err(at(path, problem)),
        }
    }

    fn of_user(runtime: &Path) -> Result<Self, StartError> {
        let runtime = Folder::find(runtime)
            .and_then(|folder| folder.is_private().map(|()| folder))
            .map_err(|problem| at(runtime, problem))?;
        let folder = runtime.path().join("kms-agent");
        match DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(at(&folder, error.into())),
        }
        Self::at(&folder.join("agent.sock"))
    }

    fn fresh() -> Result<Self, StartError> {
        let temporary = std::path::absolute(std::env::temp_dir()).unwrap_or_else(|_| "/tmp".into());
        let failed = |problem| at(&temporary, problem);
        let folder = Folder::find(&temporary).map_err(failed)?;
        folder.keeps_names().map_err(failed)?;
        let folder = tempfile::Builder::new()
            .prefix("kms-agent-")
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir_in(folder.path())
            .map_err(|error| failed(error.into()))?
            .keep();
        Ok(Self { fresh_folder: true, ..Self::at(&folder.join("agent.sock"))? })
    }

    /// Where a client finds it: the way there leads through no symlink.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The descriptor that systemd handed over.
    pub(crate) fn given(&self) -> Option<BorrowedFd<'_>> {
        self.given.as_ref().map(AsFd::as_fd)
    }

    /// Takes away what was made for an agent that did not come to be.
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

/// The named one, which is the end of the search whatever it is, or the usual one of a session if it is ours.
fn runtime_folder() -> Option<PathBuf> {
    let named = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
    named.or_else(|| {
        let usual = PathBuf::from(format!("/run/user/{}", getuid()));
        fs::metadata(&usual)
            .is_ok_and(|found| found.is_dir() && found.uid() == getuid().as_raw())
            .then_some(usual)
    })
}

/// The listening socket.
pub(crate) struct AgentSocket {
    place: Place,
    listener: UnixListener,
    /// Of a socket that is ours and not systemd's.
    lock: Option<Lock>,
}

/// What makes a socket the only one. Held as long as the socket is: who cannot get it is not the one to take a stale socket
/// away.
struct Lock {
    path: PathBuf,
    _held: File,
}

impl AgentSocket {
    /// Binds and listens, unless systemd has done so. A stale socket is taken over only while holding the lock, when it is
    /// ours and nobody answers.
    pub(crate) fn bind(mut place: Place) -> Result<Self, StartError> {
        if let Some(given) = place.given.take() {
            return Ok(Self { place, listener: given.into(), lock: None });
        }
        match Self::try_bind(&place.path) {
            Ok((lock, listener)) => Ok(Self { place, listener, lock: Some(lock) }),
            Err(problem) => {
                place.abandon();
                Err(at(&place.path, problem))
            }
        }
    }

    fn try_bind(path: &Path) -> Result<(Lock, UnixListener), SocketProblem> {
        let address = UnixAddr::new(path).map_err(|_| SocketProblem::TooLong)?;
        let mut lock_name = path.as_os_str().to_owned();
        lock_name.push(".lock");
        let lock_path = PathBuf::from(lock_name);
        let held = take_lock(&lock_path)?;
        match Self::listen(path, &address) {
            Ok(listener) => Ok((Lock { path: lock_path, _held: held }, listener)),
            Err(problem) => {
                // The lock is still held, so the file is ours alone.
                let _ = fs::remove_file(&lock_path);
                Err(problem)
            }
        }
    }

    fn listen(path: &Path, address: &UnixAddr) -> Result<UnixListener, SocketProblem> {
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
        // Systemd's socket is systemd's to take away.
        let Some(folder) = self.place.path.parent().filter(|_| self.lock.is_some()) else {
            return Vec::new();
        };
        let parent = folder.parent().filter(|_| self.place.fresh_folder);
        let files = Allowed::to_remove_files(folder.to_owned());
        [files]
            .into_iter()
            .chain(parent.map(|parent| Allowed::to_remove_folders(parent.to_owned())))
            .collect()
    }

    /// The listener, which does not block.
    pub(crate) fn listener(&self) -> Result<UnixListener, StartError> {
        self.listener.try_clone().map_err(StartError::Runtime)
    }
}

impl Drop for AgentSocket {
    fn drop(&mut self) {
        // The lock is still held, so what lies there is ours. What cannot be removed is taken over by the next agent.
        if let Some(lock) = &self.lock {
            let _ = fs::remove_file(&self.place.path);
            let _ = fs::remove_file(&lock.path);
            self.place.abandon();
        }
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
        let found = file.metadata()?;
        if !found.is_file() || found.uid() != getuid().as_raw() {
            return Err(SocketProblem::Foreign);
        }
        file.try_lock().map_err(|_| SocketProblem::Served)?;
        match fs::symlink_metadata(path) {
            Ok(named) if named.ino() == found.ino() => return Ok(file),
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
