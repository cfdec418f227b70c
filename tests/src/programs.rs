//! Where the programs under test are, and what else a test may ask of the machine.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use crate::fresh_folder;

/// The shipped program of this name: in the folder that `KMS_TEST_BIN` names, else in `release` of the target folder.
///
/// # Panics
/// When it is not there, with the command that builds it.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let folder = match env::var_os("KMS_TEST_BIN") {
        Some(folder) => PathBuf::from(folder),
        None => target_folder().join("release"),
    };
    let path = folder.join(name);
    assert!(
        path.is_file(),
        "{} is not there: build it with `cargo build --release --locked`, or set KMS_TEST_BIN to the folder of the programs",
        path.display()
    );
    path
}

fn target_folder() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    // An absolute CARGO_TARGET_DIR stays as it is.
    workspace.join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// The tools of other packages that tests call, with the Debian package that has them.
const TOOLS: &[(&str, &str)] = &[
    ("awk", "mawk"),
    ("csh", "csh"),
    ("dd", "coreutils"),
    ("dbus-daemon", "dbus-daemon"),
    ("env", "coreutils"),
    ("fish", "fish"),
    ("gcore", "gdb"),
    ("gdb", "gdb"),
    ("install", "coreutils"),
    ("loginctl", "systemd"),
    ("mkswap", "util-linux"),
    ("mount", "mount"),
    ("nsenter", "util-linux"),
    ("prlimit", "util-linux"),
    ("setpriv", "util-linux"),
    ("setsid", "util-linux"),
    ("sh", "dash"),
    ("strace", "strace"),
    ("swapoff", "mount"),
    ("swapon", "mount"),
    ("systemctl", "systemd"),
    ("systemd-analyze", "systemd"),
    ("systemd-nspawn", "systemd-container"),
    ("systemd-socket-activate", "systemd"),
    ("unshare", "util-linux"),
];

/// A command that runs a tool of the machine.
///
/// # Panics
/// When the tool is not there, with the name of its Debian package.
#[must_use]
pub fn tool(name: &str) -> Command {
    let package = TOOLS.iter().find(|(tool, _)| *tool == name).map_or("?", |(_, package)| package);
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|folder| folder.join(name)).find(|path| path.is_file());
    Command::new(found.unwrap_or_else(|| panic!("this test needs {name}: apt-get install {package}")))
}

/// # Panics
/// When this is not root: whoever must become another user, or look into a process that is not dumpable, needs that.
pub fn needs_root() {
    assert!(nix::unistd::getuid().is_root(), "this test needs root: run the tests as root (sudo tests/run)");
}

/// Makes a copy of a program that can be run at once. By a process of its own: a copy that this one writes would be open for writing
/// in every child that another thread starts meanwhile, and the kernel runs no such file ("text file busy").
///
/// # Panics
/// When it cannot be made.
pub fn copy(program: &Path, to: &Path, mode: u32) {
    let status = tool("install").arg("-m").arg(format!("{mode:o}")).args([program, to]).status().unwrap();
    assert!(status.success(), "install {}: {status}", to.display());
}

/// A copy of a program in a folder that every user can reach; taken away when dropped.
pub struct SharedCopy {
    _folder: TempDir,
    path: PathBuf,
}

impl SharedCopy {
    /// A copy with this mode.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn of(program: &Path, mode: u32) -> Self {
        let folder = fresh_folder(0o755);
        let path = folder.path().join("program");
        copy(program, &path, mode);
        Self { _folder: folder, path }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A command that runs it as this user, with the gid of the same number.
    #[must_use]
    pub fn as_user(&self, uid: u32) -> Command {
        let mut command = tool("setpriv");
        let ids = [format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".to_owned()];
        command.args(ids).arg(&self.path).current_dir("/");
        command
    }
}
