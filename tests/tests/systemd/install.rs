//! `systemd/install` without any manager: what it puts down, what it leaves alone, what it takes away.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use kms_tests::{ALICE, fresh_folder, process::output, programs};
use tempfile::TempDir;

/// A home of a user's, and programs that he can read.
struct Home {
    home: TempDir,
    bin: TempDir,
}

impl Home {
    fn new() -> Self {
        programs::needs_root();
        let (home, bin) = (fresh_folder(0o700), fresh_folder(0o755));
        chown(home.path(), Some(ALICE), Some(ALICE)).unwrap();
        for name in ["kms-agent", "kmsctl"] {
            programs::copy(&programs::program(name), &bin.path().join(name), 0o755);
        }
        // The clone may lie where the user cannot read.
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("systemd");
        let copied = Command::new("cp").arg("-r").arg(source).arg(bin.path()).status().unwrap();
        assert!(copied.success());
        Self { home, bin }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = self.as_user();
        command.arg(self.bin.path().join("systemd/install")).arg("--bin").arg(self.bin.path()).args(words);
        command
    }

    /// The user, with his home in the environment, and nothing else.
    fn as_user(&self) -> Command {
        let mut command = programs::tool("setpriv");
        let ids = [format!("--reuid={ALICE}"), format!("--regid={ALICE}"), "--clear-groups".to_owned()];
        command.args(ids).arg("env").arg("-i").arg(format!("HOME={}", self.home.path().display()));
        command.arg("PATH=/usr/bin:/bin").current_dir("/");
        command
    }

    fn install(&self, words: &[&str]) -> String {
        let (status, out, error) = output(&mut self.command(words));
        assert!(status.success() && error.is_empty(), "{status}: {error}");
        out
    }

    fn refused(&self, words: &[&str]) -> String {
        let (status, out, error) = output(&mut self.command(words));
        assert_eq!((status.code(), out.as_str()), (Some(1), ""), "{error}");
        error
    }

    fn path(&self, path: &str) -> PathBuf {
        self.home.path().join(path)
    }

    /// Everything in the home: what it is, and of files the mode and the bytes.
    fn everything(&self) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        fn look(folder: &Path, all: &mut BTreeMap<PathBuf, (u32, Vec<u8>)>) {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let metadata = fs::symlink_metadata(&path).unwrap();
                let bytes = if metadata.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
                all.insert(path.clone(), (metadata.permissions().mode(), bytes));
                if metadata.is_dir() {
                    look(&path, all);
                }
            }
        }
        let mut all = BTreeMap::new();
        look(self.home.path(), &mut all);
        all
    }
}

#[test]
fn what_is_installed_is_what_is_removed() {
    let home = Home::new();
    // A home that has been lived in.
    let before = [".config/systemd/user/other.service", ".local/bin/other", ".local/share/man/man1/other.1"];
    for path in before {
        fs::create_dir_all(home.path(path).parent().unwrap()).unwrap();
        fs::write(home.path(path), "other").unwrap();
    }
    for folder in [
        ".config",
        ".config/systemd",
        ".config/systemd/user",
        ".local",
        ".local/bin",
        ".local/share",
        ".local/share/man",
    ] {
        chown(home.path(folder), Some(ALICE), Some(ALICE)).unwrap();
    }
    chown(home.path(".local/share/man/man1"), Some(ALICE), Some(ALICE)).unwrap();
    let empty = home.everything();
    let said = home.install(&[]);
    let full = home.everything();
    for path in [
        ".local/bin/kms-agent",
        ".local/bin/kmsctl",
        ".config/systemd/user/kms-agent.service",
        ".config/systemd/user/kms-agent.socket",
        ".config/systemd/user/kms-agent.service.d/own-program.conf",
        ".config/environment.d/60-kms-agent.conf",
        ".local/share/man/man1/kms-agent.1",
        ".local/share/man/man1/kmsctl.1",
        ".local/share/man/man1/kmsctl-add.1",
        ".local/share/bash-completion/completions/kmsctl",
        ".local/share/fish/vendor_completions.d/kmsctl.fish",
        ".local/share/zsh/site-functions/_kmsctl",
    ] {
        let (mode, bytes) = &full[&home.path(path)];
        assert!(!bytes.is_empty(), "{path}");
        assert_eq!(mode & 0o777, if path.starts_with(".local/bin") { 0o755 } else { 0o644 }, "{path}");
        assert!(said.contains(&format!("installed {}\n", home.path(path).display())), "{path}: {said}");
    }
    assert!(said.contains("Next: systemctl --user enable --now kms-agent.socket\n"), "{said}");
    // Again: nothing changes, and it says so.
    assert!(home.install(&[]).starts_with("everything was installed already\n"));
    assert_eq!(home.everything(), full);
    let said = home.install(&["--remove"]);
    assert!(said.ends_with("done\n"), "{said}");
    assert_eq!(home.everything(), empty);
    assert!(home.install(&["--remove"]).starts_with("nothing is installed"));
}

#[test]
fn what_somebody_else_put_there_stays() {
    let home = Home::new();
    fs::create_dir_all(home.path(".local/bin")).unwrap();
    for folder in [".local", ".local/bin"] {
        chown(home.path(folder), Some(ALICE), Some(ALICE)).unwrap();
    }
    let program = home.path(".local/bin/kmsctl");
    // A file, and a symlink to one, in the place of a program: nothing at all is put down.
    for link in [false, true] {
        if link {
            symlink("/bin/true", &program).unwrap();
        } else {
            fs::write(&program, "mine").unwrap();
        }
        let before = home.everything();
        let error = home.refused(&[]);
        assert!(
            error.starts_with(&format!("systemd/install: error: {} is there", program.display())),
            "{error}"
        );
        assert!(error.contains("\nsystemd/install: hint: "), "{error}");
        assert_eq!(home.everything(), before);
        fs::remove_file(&program).unwrap();
    }
    // The same bytes, by a symlink or with another mode, are his as well.
    for link in [false, true] {
        let same = home.bin.path().join("kmsctl");
        if link {
            symlink(same, &program).unwrap()
        } else {
            programs::copy(&same, &program, 0o700)
        }
        let before = home.everything();
        assert!(home.refused(&[]).contains(" is there, and is not as this installed it"));
        assert_eq!(home.everything(), before);
        fs::remove_file(&program).unwrap();
    }
    // A unit that was changed is neither replaced nor removed.
    home.install(&[]);
    let unit = home.path(".config/systemd/user/kms-agent.service");
    fs::write(&unit, "[Service]\nExecStart=/bin/true\n").unwrap();
    let error = home.refused(&[]);
    assert!(error.contains("kms-agent.service is there"), "{error}");
    let said = home.install(&["--remove"]);
    assert!(said.contains(&format!("left {}: it is not as it was installed\n", unit.display())), "{said}");
    assert!(unit.is_file() && !program.exists());
}

#[test]
fn a_running_program_is_replaced_and_an_older_one_is_upgraded() {
    let home = Home::new();
    home.install(&[]);
    let program = home.path(".local/bin/kms-agent");
    let folder = fresh_folder(0o700);
    let mut running = Command::new(&program)
        .args(["--memory", "-D", "-a"])
        .arg(folder.path().join("agent.sock"))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let newer = home.bin.path().join("kms-agent");
    let mut bytes = fs::read(&newer).unwrap();
    bytes.extend_from_slice(b"newer");
    fs::write(&newer, &bytes).unwrap();
    let said = home.install(&[]);
    assert_eq!(said.lines().filter(|line| line.starts_with("installed ")).count(), 1, "{said}");
    assert_eq!(fs::read(&program).unwrap(), bytes);
    let left = fs::read_dir(program.parent().unwrap()).unwrap().count();
    assert_eq!(left, 2, "something lies beside the programs");
    running.kill().unwrap();
    running.wait().unwrap();
    home.install(&["--remove"]);
    assert_eq!(home.everything(), BTreeMap::new());
}

/// What cannot be done ends it, with a list from which it can be gone on with, or taken back.
#[test]
fn a_folder_that_cannot_be_written_to_is_no_success() {
    let home = Home::new();
    let programs = home.path(".local/bin");
    fs::create_dir_all(&programs).unwrap();
    let give = |path: &Path, owner: u32| chown(path, Some(owner), Some(owner)).unwrap();
    give(&home.path(".local"), ALICE);
    let (status, out, error) = output(&mut home.command(&[]));
    assert!(!status.success() && out.is_empty(), "{status}: {out}");
    assert!(error.contains("Permission denied"), "{error}");
    give(&programs, ALICE);
    home.install(&[]);
    give(&programs, 0);
    let (status, out, error) = output(&mut home.command(&["--remove"]));
    assert!(!status.success() && !out.contains("done"), "{status}: {out}");
    assert!(error.contains(" cannot be removed\n"), "{error}");
    give(&programs, ALICE);
    home.install(&["--remove"]);
    let left: Vec<_> = home.everything().into_keys().collect();
    assert_eq!(left, [home.path(".local"), programs]);
}

/// Ended between a file and its name, by a `mv` that ends its caller, it leaves no file that nobody knows of.
#[test]
fn an_install_that_is_interrupted_can_be_removed() {
    let home = Home::new();
    let path = fresh_folder(0o755);
    let script =
        "#!/bin/sh\ncase $* in *kms-agent.socket) kill -TERM $PPID; exit 1 ;; esac\nexec /bin/mv \"$@\"\n";
    fs::write(path.path().join("mv"), script).unwrap();
    fs::set_permissions(path.path().join("mv"), fs::Permissions::from_mode(0o755)).unwrap();
    let set = format!("PATH={}:/usr/bin:/bin", path.path().display());
    let mut command = home.as_user();
    command.arg(set).arg(home.bin.path().join("systemd/install")).arg("--bin").arg(home.bin.path());
    let (status, out, _) = output(&mut command);
    assert!(!status.success() && out.contains("installed ") && !out.contains("kms-agent.socket"), "{out}");
    home.install(&["--remove"]);
    assert_eq!(home.everything(), BTreeMap::new());
}

/// What a shell may have in its environment, and how it is called, makes no difference.
#[test]
fn the_environment_of_the_caller_makes_no_difference() {
    let home = Home::new();
    // Where `cd` prints where it went, where folders are to be for their owner alone, where others may write to them.
    for set in ["CDPATH=.", "XDG_CONFIG_HOME=relative", "XDG_DATA_HOME=relative"] {
        for umask in ["077", "0"] {
            let line = format!("umask {umask} && exec sh systemd/install --bin .");
            let mut command = home.as_user();
            command.args([set, "sh", "-c", &line]).current_dir(home.bin.path());
            let (status, out, error) = output(&mut command);
            assert!(status.success() && error.is_empty(), "{set} {umask}: {error}\n{out}");
            let all = home.everything();
            let config = home.path(".config/systemd/user");
            assert_eq!(all[&config].0 & 0o777, if umask == "0" { 0o755 } else { 0o700 });
            assert_eq!(all[&config.join("kms-agent.service")].0 & 0o777, 0o644);
            home.install(&["--remove"]);
            assert_eq!(home.everything(), BTreeMap::new());
        }
    }
}

#[test]
fn bad_calls_are_refused_by_name() {
    let home = Home::new();
    let (status, _, error) = output(&mut home.command(&["--everything"]));
    assert_eq!(
        (status.code(), error.as_str()),
        (Some(64), "usage: systemd/install [--system] [--remove] [--bin DIR]\n")
    );
    assert_eq!(home.refused(&["--system"]), "systemd/install: error: --system needs root\n");
    assert!(home.refused(&["--bin", "/nonexistent"]).contains("/nonexistent/kms-agent is not there"));
    chown(home.home.path(), Some(0), Some(0)).unwrap();
    fs::set_permissions(home.home.path(), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(home.refused(&[]).contains(" is not yours"));
    assert_eq!(home.everything(), BTreeMap::new());
}
