//! The way to a folder: whether anybody else could change where a path leads.
//!
//! Owns the walk from `/` over every component, symlinks included. Whoever can write to a directory decides what its names
//! mean, so each one must belong to root or to us and be closed to others; in a sticky one, as `/tmp`, the entry that is
//! gone through must be root's or ours. So nobody else can change the way between this look and the use of the resolved
//! path. It makes nothing and follows no symlink of anybody else.

use std::{
    ffi::OsString,
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use nix::unistd::getuid;

use crate::error::SocketProblem;

/// Symlinks that one path may lead through, as in the kernel.
const LINKS_MAX: usize = 40;

/// Group and others may write.
const OPEN: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// A folder that is where it is until root or we move it.
pub(crate) struct Folder {
    /// Absolute and free of symlinks.
    path: PathBuf,
    metadata: Metadata,
}

impl Folder {
    /// Walks there, along an absolute path.
    pub(crate) fn find(path: &Path) -> Result<Self, SocketProblem> {
        let trusted = Trusted::of_process();
        let mut todo = Vec::new();
        push_components(&mut todo, path);
        let mut here = Self::root()?;
        trusted.check(&here.path, &here.metadata)?;
        let mut links = 0_usize;
        while let Some(name) = todo.pop() {
            if name == ".." {
                // We came through it.
                here.path.pop();
                here.metadata = look(&here.path)?;
                continue;
            }
            here.keeps_names()?;
            let next = here.path.join(&name);
            let metadata = look(&next)?;
            trusted.check(&next, &metadata)?;
            if metadata.is_symlink() {
                links = links.saturating_add(1);
                if links > LINKS_MAX {
                    return Err(SocketProblem::TooManyLinks);
                }
                let target = fs::read_link(&next)
                    .map_err(|source| SocketProblem::Look { path: next.clone(), source })?;
                if target.is_absolute() {
                    here = Self::root()?;
                }
                push_components(&mut todo, &target);
            } else if metadata.is_dir() {
                here = Self { path: next, metadata };
            } else {
                return Err(SocketProblem::NotAFolder(next));
            }
        }
        Ok(here)
    }

    fn root() -> Result<Self, SocketProblem> {
        let path = PathBuf::from("/");
        let metadata = look(&path)?;
        Ok(Self { path, metadata })
    }

    /// Whether what is ours or root's in it cannot be taken away or exchanged by anybody else.
    pub(crate) fn keeps_names(&self) -> Result<(), SocketProblem> {
        if self.metadata.mode() & OPEN != 0 && self.metadata.mode() & STICKY == 0 {
            return Err(SocketProblem::Open(self.path.clone()));
        }
        Ok(())
    }

    /// Whether nobody else can make or take away anything in it, in a sticky folder neither.
    pub(crate) fn is_private(&self) -> Result<(), SocketProblem> {
        let owner = self.metadata.uid();
        if owner != getuid().as_raw() && owner != 0 {
            return Err(SocketProblem::Owner { path: self.path.clone(), owner });
        }
        if self.metadata.mode() & OPEN != 0 {
            return Err(SocketProblem::Open(self.path.clone()));
        }
        Ok(())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Who may own what is gone through.
struct Trusted {
    own: u32,
    /// Whom root looks like in a user namespace that does not have it. So does everybody else who is not mapped; there is
    /// no telling them apart from inside.
    hidden_root: Option<u32>,
}

impl Trusted {
    fn of_process() -> Self {
        Self { own: getuid().as_raw(), hidden_root: hidden_root() }
    }

    fn check(&self, path: &Path, metadata: &Metadata) -> Result<(), SocketProblem> {
        let owner = metadata.uid();
        if owner == 0 || owner == self.own || Some(owner) == self.hidden_root {
            Ok(())
        } else {
            Err(SocketProblem::Owner { path: path.to_owned(), owner })
        }
    }
}

fn hidden_root() -> Option<u32> {
    // Where there is no /proc, everybody is taken for who they seem to be.
    let map = fs::read_to_string("/proc/self/uid_map").ok()?;
    if map.split_whitespace().eq(["0", "0", "4294967295"]) {
        return None;
    }
    fs::read_to_string("/proc/sys/kernel/overflowuid").ok()?.trim().parse().ok()
}

fn look(path: &Path) -> Result<Metadata, SocketProblem> {
    fs::symlink_metadata(path).map_err(|source| SocketProblem::Look { path: path.to_owned(), source })
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
