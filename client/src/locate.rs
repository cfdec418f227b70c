//! Where the agent's socket is, and who may serve it (`docs/protocol.md`, "Finding the agent").
//!
//! Owns the search order and the rule of trust. It looks at paths only; who really serves is checked on the open connection,
//! because a path can change after it was looked at.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Component, Path, PathBuf},
};

use nix::unistd::geteuid;

use crate::error::Error;

/// The socket of the system-wide agent.
const SYSTEM_SOCKET: &str = "/run/kms-agent/agent.sock";

/// Below the directory for the user's sockets.
const USER_SOCKET: &str = "kms-agent/agent.sock";

/// Symlinks that one path may lead through, as in the kernel.
const LINKS_MAX: usize = 40;

/// What the search depends on.
pub(crate) struct Surroundings {
    /// `KMS_AUTH_SOCK`.
    pub(crate) auth_sock: Option<OsString>,
    /// `XDG_RUNTIME_DIR`.
    pub(crate) runtime_dir: Option<OsString>,
    /// Our effective uid.
    pub(crate) uid: u32,
}

impl Surroundings {
    /// Those of this process.
    pub(crate) fn of_process() -> Self {
        Self {
            auth_sock: std::env::var_os("KMS_AUTH_SOCK"),
            runtime_dir: std::env::var_os("XDG_RUNTIME_DIR"),
            uid: geteuid().as_raw(),
        }
    }
}

/// The one socket that is tried. A socket that is named or there is the end of the search, whatever it does: another agent
/// would mean other keys.
///
/// # Errors
/// [`Error::NoAgent`].
pub(crate) fn find(named: Option<&Path>, surroundings: &Surroundings) -> Result<PathBuf, Error> {
    if let Some(named) = named {
        return Ok(named.to_owned());
    }
    if let Some(named) = surroundings.auth_sock.as_ref().filter(|named| !named.is_empty()) {
        return Ok(PathBuf::from(named));
    }
    let runtime_dir = surroundings.runtime_dir.as_ref().map(PathBuf::from).filter(|path| path.is_absolute());
    let runtime_dir = runtime_dir.or_else(|| {
        let path = PathBuf::from(format!("/run/user/{}", surroundings.uid));
        fs::metadata(&path).is_ok_and(|meta| meta.is_dir() && meta.uid() == surroundings.uid).then_some(path)
    });
    let user = runtime_dir.map(|path| path.join(USER_SOCKET));
    user.into_iter().chain([PathBuf::from(SYSTEM_SOCKET)]).find(|path| is_there(path)).ok_or(Error::NoAgent)
}

/// A path that cannot be looked at counts as there.
fn is_there(path: &Path) -> bool {
    match fs::symlink_metadata(path) {
        Ok(_) => true,
        Err(error) => !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory),
    }
}

/// Who may serve a socket.
#[derive(Debug)]
pub(crate) struct Trust {
    own: u32,
    named: Option<u32>,
    /// The owner of the socket's directory, when only root could have put it there.
    placed: Option<u32>,
}

impl Trust {
    /// Looks at the socket and at every directory and symlink on the way to it.
    ///
    /// # Errors
    /// What is there is not a socket, or socket or directory belong to somebody who is not trusted.
    pub(crate) fn examine(socket: &Path, own: u32, named: Option<u32>) -> Result<Self, Error> {
        let way = walk(socket).map_err(|source| Error::Connect { socket: socket.to_owned(), source })?;
        let placed = way.only_root.then_some(way.directory_owner);
        let trust = Self { own, named, placed };
        if !way.is_socket {
            return Err(Error::NotASocket { socket: socket.to_owned() });
        }
        if !trust.allows(way.directory_owner) {
            return Err(Error::UntrustedPlace { path: way.directory, owner: way.directory_owner });
        }
        if way.directory_is_open {
            return Err(Error::WritableDirectory { path: way.directory });
        }
        if !trust.allows(way.socket_owner) {
            return Err(Error::UntrustedPlace { path: socket.to_owned(), owner: way.socket_owner });
        }
        Ok(trust)
    }

    /// Whether this uid may serve: our own, root, the named one, or whoever root gave the directory to.
    pub(crate) fn allows(&self, uid: u32) -> bool {
        uid == self.own || uid == 0 || self.named == Some(uid) || self.placed == Some(uid)
    }
}

/// What lies on the way to a socket.
struct Way {
    is_socket: bool,
    socket_owner: u32,
    directory: PathBuf,
    directory_owner: u32,
    /// Writable by everybody, and not sticky.
    directory_is_open: bool,
    /// Everything before the directory, symlinks included, is root's and not writable by others.
    only_root: bool,
}

fn walk(socket: &Path) -> io::Result<Way> {
    let mut todo: Vec<OsString> = Vec::new();
    push_components(&mut todo, &std::path::absolute(socket)?);
    let mut here = PathBuf::from("/");
    let mut here_meta = fs::symlink_metadata(&here)?;
    let mut only_root = true;
    let mut links = 0_usize;
    while let Some(name) = todo.pop() {
        if name == ".." {
            here.pop();
            here_meta = fs::symlink_metadata(&here)?;
            continue;
        }
        let next = here.join(&name);
        let meta = fs::symlink_metadata(&next)?;
        if meta.is_symlink() {
            links = links.saturating_add(1);
            if links > LINKS_MAX {
                return Err(nix::errno::Errno::ELOOP.into());
            }
            // Who may put a symlink into a directory decides where the way leads, so this directory is on the way too.
            only_root = only_root && is_roots(&here_meta);
            let target = fs::read_link(&next)?;
            if target.is_absolute() {
                here = PathBuf::from("/");
                here_meta = fs::symlink_metadata(&here)?;
            }
            push_components(&mut todo, &target);
        } else if todo.is_empty() {
            return Ok(Way {
                is_socket: meta.file_type().is_socket(),
                socket_owner: meta.uid(),
                directory_owner: here_meta.uid(),
                directory_is_open: here_meta.mode() & 0o1002 == 0o002,
                directory: here,
                only_root,
            });
        } else {
            only_root = only_root && is_roots(&here_meta);
            here = next;
            here_meta = meta;
        }
    }
    // A path without a last name, as `/`.
    Ok(Way {
        is_socket: false,
        socket_owner: here_meta.uid(),
        directory_owner: here_meta.uid(),
        directory_is_open: false,
        directory: here,
        only_root: false,
    })
}

/// Puts the names of `path` on top of the stack, the first one uppermost.
fn push_components(todo: &mut Vec<OsString>, path: &Path) {
    for component in path.components().rev() {
        match component {
            Component::Normal(name) => todo.push(name.to_owned()),
            Component::ParentDir => todo.push("..".into()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
}

fn is_roots(meta: &fs::Metadata) -> bool {
    meta.uid() == 0 && meta.mode() & 0o022 == 0
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::PermissionsExt, fs::symlink, net::UnixListener};

    use super::*;

    fn surroundings(auth_sock: Option<&str>, runtime_dir: Option<&Path>) -> Surroundings {
        Surroundings {
            auth_sock: auth_sock.map(Into::into),
            runtime_dir: runtime_dir.map(Into::into),
            uid: geteuid().as_raw(),
        }
    }

    #[test]
    fn the_first_socket_that_is_named_or_there_is_the_one() {
        let dir = tempfile::tempdir().unwrap();
        let named = Path::new("/named");
        assert_eq!(find(Some(named), &surroundings(Some("/other"), None)).unwrap(), named);
        assert_eq!(find(None, &surroundings(Some("/other"), Some(dir.path()))).unwrap(), Path::new("/other"));
        fs::create_dir(dir.path().join("kms-agent")).unwrap();
        let socket = dir.path().join(USER_SOCKET);
        // A file that is there is the choice, even if it is no socket and nobody answers.
        fs::write(&socket, "").unwrap();
        assert_eq!(find(None, &surroundings(Some(""), Some(dir.path()))).unwrap(), socket);
        if !Path::new(SYSTEM_SOCKET).exists() {
            fs::remove_file(&socket).unwrap();
            assert!(matches!(find(None, &surroundings(None, Some(dir.path()))), Err(Error::NoAgent)));
            assert!(matches!(
                find(None, &surroundings(None, Some(Path::new("relative")))),
                Err(Error::NoAgent)
            ));
        }
    }

    #[test]
    fn a_place_that_everybody_can_change_is_refused_and_a_file_is_not_a_socket() {
        let own = geteuid().as_raw();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        let trust = Trust::examine(&socket, own, None).unwrap();
        assert!(trust.allows(own) && trust.allows(0) && !trust.allows(12345));
        fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
        assert!(matches!(Trust::examine(&socket, own, None), Err(Error::WritableDirectory { .. })));
        fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o700)).unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(matches!(Trust::examine(&dir.path().join("file"), own, None), Err(Error::NotASocket { .. })));
        assert!(matches!(Trust::examine(Path::new("/"), own, None), Err(Error::NotASocket { .. })));
        assert!(matches!(Trust::examine(&dir.path().join("no"), own, None), Err(Error::Connect { .. })));
        symlink("loop", dir.path().join("loop")).unwrap();
        assert!(matches!(Trust::examine(&dir.path().join("loop"), own, None), Err(Error::Connect { .. })));
    }

    #[test]
    fn a_socket_of_another_owner_is_refused_unless_that_owner_is_named() {
        // Only the uid that we call our own is changed, so this needs no second user.
        let owner = geteuid().as_raw();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        if owner != 0 {
            let refused = Trust::examine(&socket, owner + 1, None);
            assert!(matches!(refused, Err(Error::UntrustedPlace { owner: seen, .. }) if seen == owner));
        }
        let trust = Trust::examine(&socket, owner + 1, Some(owner)).unwrap();
        assert!(trust.allows(owner) && !trust.allows(owner + 2));
    }

    #[test]
    fn the_owner_of_the_directory_serves_only_where_root_put_it() {
        if !geteuid().is_root() {
            return;
        }
        let chown = |path: &Path, uid: u32| nix::unistd::chown(path, Some(uid.into()), None).unwrap();
        // Not below the temporary directory, which is writable by everybody.
        let root = tempfile::tempdir_in("/var/lib").unwrap();
        fs::set_permissions(root.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let dir = root.path().join("agent");
        fs::create_dir(&dir).unwrap();
        chown(&dir, 4321);
        let socket = dir.join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        chown(&socket, 4321);
        assert!(Trust::examine(&socket, 1234, None).unwrap().allows(4321));

        // A symlink in a place of somebody else leads there just as well, but root did not put it there.
        let elsewhere = tempfile::tempdir().unwrap();
        let link = elsewhere.path().join("link");
        symlink(&dir, &link).unwrap();
        assert!(matches!(
            Trust::examine(&link.join("s"), 1234, None),
            Err(Error::UntrustedPlace { owner: 4321, .. })
        ));
        let open = root.path().join("open");
        fs::create_dir(&open).unwrap();
        symlink(&dir, open.join("link")).unwrap();
        assert!(Trust::examine(&open.join("link/s"), 1234, None).unwrap().allows(4321));
        fs::set_permissions(&open, PermissionsExt::from_mode(0o1777)).unwrap();
        assert!(Trust::examine(&open.join("link/s"), 1234, None).is_err());
        // One of root's own makes no difference.
        symlink(&dir, root.path().join("link")).unwrap();
        assert!(Trust::examine(&root.path().join("link/s"), 1234, None).unwrap().allows(4321));

        fs::set_permissions(root.path(), PermissionsExt::from_mode(0o775)).unwrap();
        assert!(Trust::examine(&socket, 1234, None).is_err());
    }
}
