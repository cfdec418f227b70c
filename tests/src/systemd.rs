//! Service managers of a test's own, on a machine whose first process need not be systemd: a user manager, and a booted system.
//!
//! Each, a lane, lives in namespaces of its own (mounts, processes, and a booted one also its network), over the files of the
//! machine, which it sees but cannot change, and in a control group of its own. When a lane is dropped all of that is gone. The user
//! of both is [`ALICE`], with a home, and [`BOB`] has one beside hers.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::{
    ALICE, BOB, fresh_folder,
    process::{self, ends_within, send_signal, wait_for, wait_until},
    programs,
};

/// Where a lane finds the folder `systemd` of the clone, the built programs and the test programs.
pub const SOURCE: &str = "/run/kms-test/systemd";
/// As [`SOURCE`].
pub const PROGRAMS: &str = "/run/kms-test/bin";

/// What both lanes do first: the files of the machine, to be changed without changing them, and whatever the probes look for.
const FILES: &str = r#"
people() {
    for file in passwd group; do
        awk -F: -v a="$ALICE" -v b="$BOB" '$3 != a && $3 != b' "/etc/$file" >"$1/etc/$file.new"
    done
    for who in "alice:x:$ALICE" "bob:x:$BOB"; do
        echo "$who:${who##*:}::/home/${who%%:*}:/bin/sh" >>"$1/etc/passwd.new"
        echo "$who:" >>"$1/etc/group.new"
        # For PAM, which has the last word on whether a user may have a manager.
        echo "${who%%:*}:*:19000::::::" >>"$1/etc/shadow"
    done
    mv "$1/etc/passwd.new" "$1/etc/passwd"
    mv "$1/etc/group.new" "$1/etc/group"
    mkdir -p "$1/etc/kms-probe" "$1/usr/kms-probe" "$1/usr/lib/modules"
    chmod 1777 "$1/etc/kms-probe" "$1/usr/kms-probe"
    install -m 4755 "$BIN/kms-test-sandboxed" "$1/usr/bin/kms-test-setuid"
}
homes() {
    mount -t tmpfs -o mode=755 none "$1/home"
    mkdir "$1/home/alice" "$1/home/bob"
    echo secret >"$1/home/bob/readable"
    chmod 644 "$1/home/bob/readable"
    chmod 755 "$1/home/bob"
    chmod 700 "$1/home/alice"
    chown "$ALICE:$ALICE" "$1/home/alice"
    chown -R "$BOB:$BOB" "$1/home/bob"
}
control_group() {
    mount -t cgroup2 none /sys/fs/cgroup
    mkdir "/sys/fs/cgroup/$GROUP"
    echo $$ >"/sys/fs/cgroup/$GROUP/cgroup.procs"
}
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=755 none "$STAGE"
"#;

/// A user manager: the least of a system around it, and a journal.
const USER: &str = r#"
for folder in etc usr; do
    mkdir "$STAGE/$folder" "$STAGE/$folder.work"
    mount -t overlay none -o "lowerdir=/$folder,upperdir=$STAGE/$folder,workdir=$STAGE/$folder.work" "/$folder"
done
people ''
echo 0123456789abcdef0123456789abcdef >/etc/machine-id
control_group
chown "$ALICE:$ALICE" "/sys/fs/cgroup/$GROUP" "/sys/fs/cgroup/$GROUP/cgroup.procs" \
    "/sys/fs/cgroup/$GROUP/cgroup.threads" "/sys/fs/cgroup/$GROUP/cgroup.subtree_control"
exec unshare --pid --fork --kill-child --mount-proc -- sh -euc '
    . "$STAGE/functions"
    mount -t tmpfs -o mode=755 none /run
    # It was booted with systemd, says the first; the second is where it prepares the files of a service.
    mkdir -p /run/systemd/system /run/systemd/unit-root /run/systemd/journal /run/systemd/journald.conf.d
    mkdir -p /run/kms-test "/run/user/$ALICE"
    cp -r "$SOURCE" /run/kms-test/systemd
    cp -r "$BIN" /run/kms-test/bin
    homes ""
    mount -t tmpfs -o mode=1777 none /tmp
    chmod 700 "/run/user/$ALICE"
    chown "$ALICE:$ALICE" "/run/user/$ALICE"
    printf "[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\n" >/run/systemd/journald.conf.d/test.conf
    /lib/systemd/systemd-journald &
    journal=$!
    # The manager looks for it once.
    until [ -S /run/systemd/journal/socket ] && [ -S /run/systemd/journal/stdout ]; do sleep 0.01; done
    setpriv --reuid "$ALICE" --regid "$ALICE" --init-groups --inh-caps=-all \
        env -i HOME=/home/alice USER=alice LOGNAME=alice SHELL=/bin/sh PATH=/usr/local/bin:/usr/bin:/bin \
        "XDG_RUNTIME_DIR=/run/user/$ALICE" /lib/systemd/systemd --user --log-target=journal &
    wait $!
    kill $journal
    wait
'
"#;

/// A system that boots: PID 1, journal, logind, a bus, and a user who lingers. What else the machine would start it does not.
const SYSTEM: &str = r#"
mkdir "$STAGE/upper" "$STAGE/work" "$STAGE/root"
mount -t overlay none -o "lowerdir=/,upperdir=$STAGE/upper,workdir=$STAGE/work" "$STAGE/root"
root=$STAGE/root
people "$root"
homes "$root"
mkdir -p "$root/var/lib/systemd/linger" "$root/etc/systemd/journald.conf.d"
: >"$root/var/lib/systemd/linger/alice"
rm -f "$root/etc/machine-id"
echo 0123456789abcdef0123456789abcdef >"$root/etc/machine-id"
printf "[Journal]\nStorage=volatile\nReadKMsg=no\n" >"$root/etc/systemd/journald.conf.d/test.conf"
cat >"$root/etc/systemd/system/kms-test.target" <<UNIT
[Unit]
Requires=basic.target
Wants=dbus.socket systemd-logind.service systemd-user-sessions.service
After=basic.target
AllowIsolate=yes
UNIT
mkdir "$STAGE/bin"
cp "$BIN"/* "$STAGE/bin"
control_group
mount -t tmpfs -o mode=755 none /run
# Its own filter has no place for what the agent locks its memory and itself with, and for a look at the clock.
exec systemd-nspawn --boot --directory="$root" --register=no --keep-unit --private-network --quiet --console=pipe \
    --system-call-filter="@memlock memfd_secret landlock_create_ruleset landlock_add_rule landlock_restrict_self clock_adjtime" \
    --machine=kms-test --bind-ro="$SOURCE:/run/kms-test/systemd" \
    --bind-ro="$STAGE/bin:/run/kms-test/bin" systemd.unit=kms-test.target systemd.log_target=journal systemd.show_status=0
"#;

/// Who is told or asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manager {
    /// That of the user.
    User,
    /// That of the system.
    System,
}

/// A manager that runs, and what is around it.
pub struct Lane {
    child: Child,
    /// The first process in it, as seen from outside.
    pub leader: i32,
    group: String,
    folder: TempDir,
    over: bool,
}

impl Lane {
    /// A user manager.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn user() -> Self {
        let lane = Self::start(USER, &["awk", "mount", "nsenter", "systemctl", "systemd-analyze", "unshare"]);
        lane.wait_for_manager(Manager::User);
        lane
    }

    /// A booted system, with the manager of a user.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn system() -> Self {
        let lane =
            Self::start(SYSTEM, &["awk", "mount", "nsenter", "systemctl", "systemd-nspawn", "loginctl"]);
        lane.wait_for_manager(Manager::System);
        // What the container hides by a mount over it, a unit cannot hide once more.
        let (status, _, error) = process::output(lane.root("umount").arg("/proc/kmsg"));
        assert!(status.success(), "{error}");
        lane.wait_for_manager(Manager::User);
        lane
    }

    fn start(script: &str, tools: &[&str]) -> Self {
        programs::needs_root();
        for name in tools {
            let _ = programs::tool(name);
        }
        let folder = fresh_folder(0o755);
        let stage = folder.path().join("stage");
        let bin = folder.path().join("bin");
        fs::create_dir(&stage).unwrap();
        fs::create_dir(&bin).unwrap();
        for name in ["kms-agent", "kmsctl", "kms-test-sandboxed"] {
            programs::copy(&programs::program(name), &bin.join(name), 0o755);
        }
        fs::set_permissions(&bin, fs::Permissions::from_mode(0o755)).unwrap();
        let group = folder.path().file_name().unwrap().to_str().unwrap().to_owned();
        let whole = format!("{FILES}\nsed '/^set -eu/,$d' \"$SCRIPT\" >\"$STAGE/functions\"\n{script}");
        let path = folder.path().join("script");
        fs::write(&path, whole).unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("systemd");
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let child = programs::tool("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "unchanged", "sh"])
            .arg(&path)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("SCRIPT", &path)
            .env("STAGE", &stage)
            .env("BIN", &bin)
            .env("SOURCE", source)
            .env("GROUP", &group)
            .env("ALICE", ALICE.to_string())
            .env("BOB", BOB.to_string())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut lane = Self { child, leader: 0, group, folder, over: false };
        wait_until("the namespaces of the lane are there", || {
            if let Some(status) = lane.child.try_wait().unwrap() {
                lane.over = true;
                panic!("the lane ended, {status}:\n{}", lane.log());
            }
            lane.leader = first_in(lane.child.id().cast_signed()).unwrap_or(0);
            lane.leader != 0
        });
        lane
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    fn wait_for_manager(&self, manager: Manager) {
        wait_until("the manager has started", || {
            assert!(!ends_within(self.leader, std::time::Duration::ZERO), "the lane ended:\n{}", self.log());
            let (_, state, _) = process::output(self.systemctl(manager).arg("is-system-running"));
            ["running", "degraded"].contains(&state.trim())
        });
    }

    /// A command inside, as root.
    #[must_use]
    pub fn root(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = self.enter();
        command.args(["env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
        command.arg("HOME=/root").arg("LC_ALL=C").arg(program);
        command
    }

    /// A command inside, as this uid, with nothing else in its environment than the home, if it has one.
    #[must_use]
    pub fn as_uid(&self, uid: u32, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = self.enter();
        let id = uid.to_string();
        command.args([
            "setpriv",
            "--reuid",
            &id,
            "--regid",
            &id,
            "--clear-groups",
            "--inh-caps=-all",
            "env",
            "-i",
        ]);
        command.args(["PATH=/home/alice/.local/bin:/usr/local/bin:/usr/bin:/bin", "LC_ALL=C"]);
        if uid == ALICE {
            command.arg("HOME=/home/alice").arg(format!("XDG_RUNTIME_DIR=/run/user/{ALICE}"));
        }
        command.arg(program);
        command
    }

    /// A command inside, as the user, with the environment of a login.
    #[must_use]
    pub fn user_command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.as_uid(ALICE, program)
    }

    fn enter(&self) -> Command {
        let mut command = programs::tool("nsenter");
        command.args(["--target", &self.leader.to_string(), "--mount", "--pid", "--uts", "--ipc", "--net"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// `systemctl` to this manager.
    #[must_use]
    pub fn systemctl(&self, manager: Manager) -> Command {
        match manager {
            Manager::User => {
                let mut command = self.user_command("systemctl");
                command.arg("--user");
                command
            }
            Manager::System => self.root("systemctl"),
        }
    }

    /// `systemctl` with these words, which must succeed; gives what it printed.
    ///
    /// # Panics
    /// When it does not.
    pub fn control(&self, manager: Manager, words: &[&str]) -> String {
        let (status, out, err) = process::output(self.systemctl(manager).args(words));
        assert!(status.success(), "systemctl {words:?}: {status}\n{out}{err}{}", self.journal(manager));
        out
    }

    /// A property of a unit.
    ///
    /// # Panics
    /// When the manager does not answer.
    #[must_use]
    pub fn show(&self, manager: Manager, unit: &str, property: &str) -> String {
        self.control(manager, &["show", "--value", "-p", property, unit]).trim_end().to_owned()
    }

    /// The main process of a unit as the lane numbers it, and 0 for none.
    ///
    /// # Panics
    /// When the manager does not answer.
    #[must_use]
    pub fn main_pid(&self, manager: Manager, unit: &str) -> i32 {
        self.show(manager, unit, "MainPID").parse().unwrap()
    }

    /// The number that a process of the lane has outside.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn outside(&self, pid: i32) -> i32 {
        let space = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let ours = space(&self.leader.to_string()).unwrap();
        processes()
            .find(|candidate| {
                let inside = fs::read_to_string(format!("/proc/{candidate}/status")).is_ok_and(|status| {
                    status.lines().any(|line| {
                        line.strip_prefix("NSpid:")
                            .is_some_and(|pids| pids.split_whitespace().last() == Some(&pid.to_string()))
                    })
                });
                inside && space(&candidate.to_string()).as_ref() == Some(&ours)
            })
            .unwrap_or_else(|| panic!("no process {pid} in the lane"))
    }

    /// A path of the lane as it is reached from outside, by whoever may look into the processes of `pid`'s owner.
    #[must_use]
    pub fn path(&self, pid: i32, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{pid}/root{path}"))
    }

    /// What the journal has of the manager and its units.
    #[must_use]
    pub fn journal(&self, manager: Manager) -> String {
        let mut command = self.root("journalctl");
        command.args(["--no-pager", "--quiet", "-o", "short-monotonic"]);
        if manager == Manager::User {
            command.arg(format!("_UID={ALICE}"));
        }
        process::output(&mut command).1
    }

    /// Ends the system as an administrator would.
    ///
    /// # Panics
    /// When it does not end in order.
    pub fn power_off(mut self) {
        let _ = process::output(self.root("systemctl").args(["--no-block", "poweroff"]));
        self.ended_well();
    }

    /// Ends the user manager as a last logout would.
    ///
    /// # Panics
    /// When it does not end in order.
    pub fn exit(mut self) {
        let _ = process::output(self.systemctl(Manager::User).args(["--no-block", "exit"]));
        self.ended_well();
    }

    fn ended_well(&mut self) {
        let status: ExitStatus = wait_for(&mut self.child);
        self.over = true;
        self.remove_group();
        assert!(status.success(), "the lane ended with {status}:\n{}", self.log());
    }

    /// Takes the control groups away that the manager made; there is nobody in them any more.
    fn remove_group(&self) {
        let script = "mount --make-rprivate / && mount -t cgroup2 none /sys/fs/cgroup && cd /sys/fs/cgroup && \
                      if [ -d \"$1\" ]; then find \"$1\" -depth -type d -exec rmdir {} +; fi";
        let mut command = programs::tool("unshare");
        command.args(["--mount", "sh", "-c", script, "_", &self.group]);
        let (status, _, error) = process::output(&mut command);
        if !std::thread::panicking() {
            assert!(status.success(), "the control group of the lane stays: {error}");
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        if std::thread::panicking() {
            eprintln!("the log of the lane:\n{}", self.log());
            let mut command = self.root("journalctl");
            command.args(["--no-pager", "--quiet", "--lines", "100", "-o", "short-monotonic"]);
            eprintln!("its journal:\n{}", process::output(&mut command).1);
        }
        if self.leader != 0 && !ends_within(self.leader, std::time::Duration::ZERO) {
            send_signal(self.leader, Signal::SIGKILL);
        } else {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
        self.remove_group();
    }
}

fn processes() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// The process that this one started as the first of a process-number space.
fn first_in(parent: i32) -> Option<i32> {
    processes().find(|candidate| {
        let status = fs::read_to_string(format!("/proc/{candidate}/status")).unwrap_or_default();
        let line = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        };
        line("PPid:").is_some_and(|of| of == [parent.to_string()])
            && line("NSpid:").is_some_and(|pids| pids.len() > 1 && pids.last().is_some_and(|pid| pid == "1"))
    })
}
