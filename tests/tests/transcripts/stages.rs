//! What is there when a transcript begins. The folder that a transcript lies in names its stage.

use std::{
    fs::{self, Permissions},
    io::{Read, Write},
    os::unix::{
        fs::{PermissionsExt, chown},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    thread,
};

use kms_protocol::Status;
use kms_tests::{
    ALICE, Agent, AgentBuilder,
    agent::fresh_folder,
    process::{Strace, wait_until},
};
use tempfile::TempDir;

use crate::proxy;

/// Where the agent of the machine would be, which no setting can hide from `kmsctl`.
const SYSTEM_SOCKET: &str = "/run/kms-agent/agent.sock";

/// The passphrase that agents are locked with here.
const PASSPHRASE: &[u8] = b"correct horse";

/// By the name of the folder.
pub(crate) const STAGES: [(&str, Build); 8] = [
    ("plain", || Stage::with(Agent::builder())),
    ("one-key-at-most", || Stage::with(Agent::builder().config("[limits]\nkeys = 1\n"))),
    ("no-store", no_store),
    ("no-random-bytes", no_random_bytes),
    ("wrong-passphrases", wrong_passphrases),
    ("changed-frames", || Stage::with(Agent::builder()).with_proxies()),
    ("agent-of-another", agent_of_another),
    ("no-agent", no_agent),
];

type Build = fn() -> Stage;

pub(crate) struct Stage {
    // In the order in which they have to end.
    _strace: Option<Strace>,
    agent: Option<Agent>,
    folder: TempDir,
}

impl Stage {
    fn with(agent: AgentBuilder) -> Self {
        Self { _strace: None, agent: Some(agent.start()), folder: fresh_folder(0o700) }
    }

    fn with_proxies(self) -> Self {
        proxy::listen(self.folder(), &self.agent().socket);
        self
    }

    fn agent(&self) -> &Agent {
        self.agent.as_ref().unwrap()
    }

    /// Where the lines are typed.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn socket(&self) -> Option<&Path> {
        self.agent.as_ref().map(|agent| agent.socket.as_path())
    }

    /// What has another value in each run, the longer names first.
    pub(crate) fn names(&self) -> Vec<(String, &'static str)> {
        let mut names = vec![(self.folder().display().to_string(), "[FOLDER]")];
        if let Some(agent) = &self.agent {
            let socket = agent.socket.display().to_string();
            names.insert(0, (format!("{socket}, uid {}", agent.uid()), "[SOCKET], uid [UID]"));
            names.insert(1, (socket, "[SOCKET]"));
            names.push((agent.folder().display().to_string(), "[FOLDER OF THE AGENT]"));
        }
        names.push((env!("CARGO_PKG_VERSION").to_owned(), "[VERSION]"));
        names
    }

    pub(crate) fn environment(&self) -> Vec<(&'static str, PathBuf)> {
        match self.socket() {
            Some(socket) => vec![("KMS_AUTH_SOCK", socket.to_owned())],
            None => vec![("XDG_RUNTIME_DIR", self.folder().to_owned())],
        }
    }
}

/// No keystore, and not started to do without.
fn no_store() -> Stage {
    Stage::with(Agent::builder().without_memory_flag()).with_proxies()
}

/// With the key `backup`, and a machine that has since run out of random bytes.
fn no_random_bytes() -> Stage {
    let mut stage = Stage::with(Agent::builder());
    stage.agent().connect().generate("backup").unwrap();
    let fail = ["-e", "trace=getrandom", "-e", "inject=getrandom:error=EIO"];
    stage._strace = Some(Strace::attach(stage.agent().pid, &fail));
    stage
}

/// Locked, and somebody has given wrong passphrases until the agent asks for several seconds.
fn wrong_passphrases() -> Stage {
    let stage = Stage::with(Agent::builder()).with_proxies();
    let mut wire = stage.agent().connect();
    assert_eq!(wire.lock(PASSPHRASE), Ok(true));
    for _ in 0..7 {
        wait_until("the agent tries the passphrase", || match wire.unlock(b"wrong") {
            Err(Status::Busy) => false,
            tried => tried == Err(Status::Denied),
        });
    }
    stage
}

/// Another user's, whom file modes let everybody reach.
fn agent_of_another() -> Stage {
    Stage::with(Agent::builder().uid(ALICE).reachable_by_others())
}

/// Nobody serves. In the folder are things that are not an agent's socket, or not a safe one.
fn no_agent() -> Stage {
    assert!(!Path::new(SYSTEM_SOCKET).exists(), "this test needs a machine without an agent for all users");
    let stage = Stage { _strace: None, agent: None, folder: fresh_folder(0o700) };
    let place = |name: &str| stage.folder().join(name);
    fs::write(place("file"), "").unwrap();
    drop(UnixListener::bind(place("dead")).unwrap());
    for (folder, mode, owner) in [("everybodys", 0o777, None), ("alices", 0o700, Some(ALICE))] {
        fs::create_dir(place(folder)).unwrap();
        drop(UnixListener::bind(place(folder).join("socket")).unwrap());
        fs::set_permissions(place(folder), Permissions::from_mode(mode)).unwrap();
        chown(place(folder), owner, owner).unwrap();
    }
    // Each ends with the test program.
    let silent = UnixListener::bind(place("silent")).unwrap();
    thread::spawn(move || {
        let mut clients = Vec::new();
        for client in silent.incoming() {
            clients.push(client);
        }
    });
    let web_server = UnixListener::bind(place("web-server")).unwrap();
    thread::spawn(move || {
        for client in web_server.incoming() {
            let mut client = client.unwrap();
            client.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
            // Not before the client has had enough: else the end of the connection could come before the answer.
            let _ = client.read_to_end(&mut Vec::new());
        }
    });
    stage
}
