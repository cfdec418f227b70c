//! The shipped agent under test: how it is started, reached, and held to what must be so when it ends.

use std::{
    env,
    ffi::OsString,
    fs::{self, Permissions},
    io::Read,
    os::{
        fd::AsFd,
        unix::{
            fs::{PermissionsExt, chown},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
    unistd::geteuid,
};
use tempfile::TempDir;

use crate::{
    as_uid,
    process::{PATIENCE, ends_within, send_signal, wait_for, wait_until},
    programs,
    wire::Wire,
};

/// A folder of this test's own under the temporary folder, of this mode; taken away when dropped.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn fresh_folder(mode: u32) -> TempDir {
    // Short, since the path of a socket is.
    let folder = tempfile::Builder::new().prefix("kms-t").tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(mode)).unwrap();
    folder
}

/// How an agent is to be started.
#[derive(Default)]
pub struct AgentBuilder {
    uid: Option<u32>,
    keystore_wanted: bool,
    reachable: bool,
    config: Option<String>,
    memory_lock: Option<u64>,
    core_limit: bool,
    program_mode: Option<u32>,
    through: Vec<OsString>,
    strace: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    arguments: Vec<OsString>,
}

impl AgentBuilder {
    /// Under another uid, through setpriv, with a copy of the program that it can read.
    #[must_use]
    pub fn uid(mut self, uid: u32) -> Self {
        self.uid = Some(uid);
        self
    }

    /// Without `--memory`.
    #[must_use]
    pub fn without_memory_flag(mut self) -> Self {
        self.keystore_wanted = true;
        self
    }

    /// The modes of file system let anybody connect: socket 0666, its folder 0711.
    #[must_use]
    pub fn reachable_by_others(mut self) -> Self {
        self.reachable = true;
        self
    }

    /// With this `config.toml`.
    #[must_use]
    pub fn config(mut self, text: &str) -> Self {
        self.config = Some(text.to_owned());
        self
    }

    /// With this `RLIMIT_MEMLOCK`, in bytes.
    #[must_use]
    pub fn memory_lock(mut self, bytes: u64) -> Self {
        self.memory_lock = Some(bytes);
        self
    }

    /// With no limit to the size of a core when it starts.
    #[must_use]
    pub fn with_cores(mut self) -> Self {
        self.core_limit = true;
        self
    }

    /// With this mode of the program, which is root's, for an agent of another uid.
    #[must_use]
    pub fn program_mode(mut self, mode: u32) -> Self {
        self.program_mode = Some(mode);
        self
    }

    /// Through this program, which becomes the agent: the process stays the same, and so does its pid.
    ///
    /// # Panics
    /// When the program is not there.
    #[must_use]
    pub fn through(mut self, tool: &str, arguments: &[&str]) -> Self {
        self.through = vec![programs::tool(tool).get_program().into()];
        self.through.extend(arguments.iter().map(OsString::from));
        self
    }

    /// Under strace with these arguments.
    #[must_use]
    pub fn strace(mut self, arguments: &[&str]) -> Self {
        self.strace = arguments.iter().map(OsString::from).collect();
        self
    }

    /// With this in its environment, which is else empty but for `PATH`, `HOME` and `TMPDIR`.
    #[must_use]
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// With these arguments besides those that every agent gets.
    #[must_use]
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments = arguments.iter().map(OsString::from).collect();
        self
    }

    /// Starts it and waits until it is ready.
    ///
    /// # Panics
    /// When it does not come to be.
    #[must_use]
    pub fn start(self) -> Agent {
        self.try_start().unwrap_or_else(|ended| panic!("no agent: {}\n{}", ended.status, ended.log))
    }

    /// Starts it and waits until it is ready or has given up.
    ///
    /// # Errors
    /// How it ended.
    ///
    /// # Panics
    /// When it does neither.
    pub fn try_start(self) -> Result<Agent, Ended> {
        let program = programs::program("kms-agent");
        let open = if self.uid.is_some() || self.reachable { 0o711 } else { 0o700 };
        let folder = fresh_folder(open);
        let run = folder.path().join("run");
        fs::create_dir(&run).unwrap();
        fs::set_permissions(&run, Permissions::from_mode(if self.reachable { 0o711 } else { 0o700 }))
            .unwrap();
        let config = folder.path().join("config.toml");
        fs::write(&config, self.config.as_deref().unwrap_or_default()).unwrap();
        fs::set_permissions(&config, Permissions::from_mode(0o644)).unwrap();
        let program = match self.uid {
            Some(uid) => {
                programs::needs_root();
                chown(&run, Some(uid), Some(uid)).unwrap();
                let copy = folder.path().join("kms-agent");
                programs::copy(&program, &copy, self.program_mode.unwrap_or(0o755));
                copy
            }
            None => program,
        };
        let log = folder.path().join("log");
        let socket = run.join("agent.sock");

        let mut words: Vec<OsString> = Vec::new();
        if let Some(bytes) = self.memory_lock {
            words.extend([
                programs::tool("prlimit").get_program().into(),
                format!("--memlock={bytes}").into(),
            ]);
        }
        if self.core_limit {
            words.extend([programs::tool("prlimit").get_program().into(), "--core=unlimited".into()]);
        }
        if let Some(uid) = self.uid {
            let ids = [format!("--reuid={uid}"), format!("--regid={uid}"), "--clear-groups".to_owned()];
            words.push(programs::tool("setpriv").get_program().into());
            words.extend(ids.map(OsString::from));
        }
        words.extend(self.through);
        if !self.strace.is_empty() {
            words.push(programs::tool("strace").get_program().into());
            words.extend(["-f", "-o", "/dev/null"].map(OsString::from));
            words.extend(self.strace);
        }
        words.push(program.into());
        if !self.keystore_wanted {
            words.push("--memory".into());
        }
        words.extend(["-D".into(), "-a".into(), socket.clone().into()]);
        words.extend(["--config".into(), config.clone().into()]);
        words.extend(self.arguments);

        let (first, rest) = words.split_first().unwrap();
        let mut child = Command::new(first)
            .args(rest)
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .env("HOME", folder.path())
            .env("TMPDIR", folder.path())
            .envs(self.environment)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(fs::OpenOptions::new().create(true).append(true).open(&log).unwrap())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let mut agent =
            Agent { child, pid: 0, stdout, said: String::new(), folder, socket, uid: self.uid, over: false };
        match agent.read_pid() {
            Some(pid) => agent.pid = pid,
            None => {
                agent.over = true;
                let status = wait_for(&mut agent.child);
                return Err(Ended { status, stdout: std::mem::take(&mut agent.said), log: agent.log() });
            }
        }
        if self.reachable {
            fs::set_permissions(&agent.socket, Permissions::from_mode(0o666)).unwrap();
        }
        Ok(agent)
    }
}

/// What is left of an agent that has ended.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// All that it wrote to stdout.
    pub stdout: String,
    /// All that it wrote to stderr.
    pub log: String,
}

/// A running agent. Dropped without a word it is stopped as by [`Agent::stop`], with all that is asserted there; while a
/// test fails it is killed and its log printed.
pub struct Agent {
    child: Child,
    /// The process of the agent itself, also behind strace.
    pub pid: i32,
    stdout: ChildStdout,
    said: String,
    folder: TempDir,
    /// Where it listens.
    pub socket: PathBuf,
    uid: Option<u32>,
    over: bool,
}

impl Agent {
    /// How to start one.
    #[must_use]
    pub fn builder() -> AgentBuilder {
        AgentBuilder::default()
    }

    /// One with nothing special about it.
    ///
    /// # Panics
    /// When it does not come to be.
    #[must_use]
    pub fn start() -> Self {
        Self::builder().start()
    }

    /// Reads what it prints when clients can connect; nothing when it ends instead.
    fn read_pid(&mut self) -> Option<i32> {
        loop {
            let line = self.said.split_once("KMS_AGENT_PID=").and_then(|(_, rest)| rest.split_once(';'));
            if let Some((pid, _)) = line {
                return Some(pid.parse().unwrap());
            }
            let patience = PollTimeout::try_from(PATIENCE).unwrap();
            let ready = poll(&mut [PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN)], patience);
            assert_eq!(ready, Ok(1), "the agent is not ready:\n{}", self.log());
            let mut bytes = [0; 4096];
            match self.stdout.read(&mut bytes).unwrap() {
                0 => return None,
                count => self.said.push_str(std::str::from_utf8(&bytes[..count]).unwrap()),
            }
        }
    }

    /// The uid that it runs under.
    #[must_use]
    pub fn uid(&self) -> u32 {
        self.uid.unwrap_or_else(|| geteuid().as_raw())
    }

    /// The folder that is this agent's alone.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.folder.path().join("config.toml")
    }

    /// All that it wrote to stderr so far.
    #[must_use]
    pub fn log(&self) -> String {
        let bytes = fs::read(self.folder.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// As [`Agent::log`], as bytes.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn log_bytes(&self) -> Vec<u8> {
        fs::read(self.folder.path().join("log")).unwrap()
    }

    /// A connection of the calling thread that has said hello.
    ///
    /// # Panics
    /// When the agent does not welcome it.
    #[must_use]
    pub fn connect(&self) -> Wire {
        Wire::connect(&self.socket)
    }

    /// A connection of the calling thread that has said nothing.
    ///
    /// # Panics
    /// When nobody listens.
    #[must_use]
    pub fn mute(&self) -> Wire {
        Wire::mute(&self.socket)
    }

    /// Runs `work` as the user whom this agent serves.
    pub fn as_owner<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match self.uid {
            Some(uid) => as_uid(uid, work),
            None => work(),
        }
    }

    /// Ends it with SIGKILL; socket and lock file stay behind. Its folder stays until this is dropped.
    pub fn kill(&mut self) {
        self.over = true;
        send_signal(self.pid, Signal::SIGKILL);
        wait_for(&mut self.child);
    }

    /// Waits until it ends by itself.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn wait(mut self) -> Ended {
        self.over = true;
        let status = wait_for(&mut self.child);
        self.stdout.read_to_string(&mut self.said).unwrap();
        Ended { status, stdout: std::mem::take(&mut self.said), log: self.log() }
    }

    /// Ends it with SIGTERM.
    ///
    /// # Panics
    /// When a panic was caught in it before, when it ends with another status than 0, or leaves anything in its folder.
    #[must_use]
    pub fn stop(mut self) -> Ended {
        self.end()
    }

    fn end(&mut self) -> Ended {
        self.over = true;
        let socket = &self.socket;
        let ask = || {
            // A test may have used up every connection, and the agent may not have seen the end of them yet.
            wait_until("the agent answers before it is stopped", || {
                UnixStream::connect(socket).is_ok_and(|stream| {
                    let mut wire = Wire::over(stream);
                    wire.send(&crate::wire::frame(
                        kms_protocol::Opcode::Hello,
                        1,
                        &kms_protocol::Hello { version: kms_protocol::PROTOCOL_VERSION },
                        &[],
                    ))
                    .is_ok()
                        && wire.receive().is_some()
                        && wire.fact("panics") == "0"
                })
            });
        };
        match self.uid {
            Some(uid) => as_uid(uid, ask),
            None => ask(),
        }
        send_signal(self.pid, Signal::SIGTERM);
        let status = wait_for(&mut self.child);
        self.stdout.read_to_string(&mut self.said).unwrap();
        let ended = Ended { status, stdout: std::mem::take(&mut self.said), log: self.log() };
        assert_eq!(ended.status.code(), Some(0), "{}", ended.log);
        let left: Vec<_> = fs::read_dir(self.socket.parent().unwrap()).unwrap().collect();
        assert!(left.is_empty(), "left behind: {left:?}");
        ended
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        if std::thread::panicking() {
            let mut log = self.log();
            log.truncate(log.floor_char_boundary(20_000));
            eprintln!("the log of the agent:\n{log}");
            if self.pid != 0 && !ends_within(self.pid, std::time::Duration::ZERO) {
                send_signal(self.pid, Signal::SIGKILL);
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        } else {
            self.end();
        }
    }
}
