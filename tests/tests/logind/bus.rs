//! A message bus of the test's own, a logind on it that does what the test says, and strangers.

use std::{
    collections::HashMap,
    fs,
    future::poll_fn,
    io::{BufRead, BufReader, PipeReader, pipe},
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    pin::Pin,
    process::{Child, Stdio},
    sync::{Arc, Mutex},
};

use futures_core::Stream;
use kms_tests::{
    agent::fresh_folder,
    process::{send_signal, wait_for, wait_until},
    programs::tool,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use zbus::{
    Connection, DynamicType, Message, MessageStream, ObjectPath, Variant, connection, message::Type,
    names::OwnedUniqueName,
};

pub(crate) const LOGIND: &str = "org.freedesktop.login1";
pub(crate) const MANAGER: &str = "org.freedesktop.login1.Manager";
pub(crate) const MANAGER_PATH: &str = "/org/freedesktop/login1";
pub(crate) const SESSION: &str = "org.freedesktop.login1.Session";
pub(crate) const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// As a session bus, where everybody may do everything: what is not believed there is not believed on the system bus.
const CONFIGURATION: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path=SOCKET</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
  </policy>
</busconfig>
"#;

/// A dbus-daemon.
pub(crate) struct Bus {
    daemon: Child,
    folder: TempDir,
}

impl Bus {
    pub(crate) fn start() -> Self {
        let folder = fresh_folder(0o711);
        let configuration = folder.path().join("bus.conf");
        let socket = folder.path().join("bus");
        fs::write(&configuration, CONFIGURATION.replace("SOCKET", socket.to_str().unwrap())).unwrap();
        let mut daemon = tool("dbus-daemon")
            .arg(format!("--config-file={}", configuration.display()))
            .args(["--nofork", "--nopidfile", "--print-address"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // It complains about limits that it does not need.
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("unix:path="), "no bus: {line}");
        Self { daemon, folder }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("bus")
    }

    pub(crate) fn address(&self) -> String {
        format!("unix:path={}", self.socket().display())
    }

    pub(crate) fn kill(&mut self) {
        send_signal(self.daemon.id().cast_signed(), Signal::SIGKILL);
        wait_for(&mut self.daemon);
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// A connection of somebody.
pub(crate) struct Somebody {
    runtime: Runtime,
    connection: Connection,
}

impl Somebody {
    pub(crate) fn on(bus: &Bus) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let address = bus.address();
        let connection = runtime
            .block_on(connection::Builder::address(address.as_str()).build())
            .expect("a connection to the bus");
        Self { runtime, connection }
    }

    /// Sends a signal to everybody, or to one; it has passed the bus when this comes back.
    pub(crate) fn signal(
        &self,
        to: Option<&OwnedUniqueName>,
        path: &str,
        interface: &str,
        member: &str,
        body: &(impl serde::Serialize + DynamicType),
    ) {
        self.runtime.block_on(async {
            self.connection
                .emit_signal(to.map(|to| to.as_ref()), path, interface, member, body)
                .await
                .unwrap();
            let bus = Some("org.freedesktop.DBus");
            self.connection.call_method(bus, "/org/freedesktop/DBus", bus, "GetId", &()).await.unwrap();
        });
    }
}

/// What a fake logind was asked for, and what it answers.
#[derive(Default)]
struct Asked {
    /// Each session's user.
    sessions: HashMap<String, u32>,
    locked_hint: bool,
    grants_nothing: bool,
    /// Each inhibitor's words, and the end of its pipe that tells when it is let go.
    inhibitors: Vec<(Vec<String>, PipeReader)>,
    /// Paths and names of the properties that were asked for.
    properties: Vec<(String, String)>,
    /// Who asked last.
    caller: Option<OwnedUniqueName>,
}

/// A logind.
pub(crate) struct Logind {
    somebody: Somebody,
    asked: Arc<Mutex<Asked>>,
}

impl Logind {
    pub(crate) fn on(bus: &Bus) -> Self {
        let somebody = Somebody::on(bus);
        let asked = Arc::<Mutex<Asked>>::default();
        let (connection, state) = (somebody.connection.clone(), Arc::clone(&asked));
        let mut calls = MessageStream::from(&connection);
        somebody.runtime.spawn(async move {
            while let Some(Ok(call)) = poll_fn(|context| Pin::new(&mut calls).poll_next(context)).await {
                if call.message_type() == Type::MethodCall {
                    answer(&connection, &call, &state).await;
                }
            }
        });
        somebody.runtime.block_on(somebody.connection.request_name(LOGIND)).unwrap();
        Self { somebody, asked }
    }

    /// Grants no inhibitor, or does again.
    pub(crate) fn grant(&self, grants: bool) {
        self.asked.lock().unwrap().grants_nothing = !grants;
    }

    /// Makes a session of this user.
    pub(crate) fn session(&self, name: &str, uid: u32) -> String {
        let path = format!("{MANAGER_PATH}/session/{name}");
        self.asked.lock().unwrap().sessions.insert(path.clone(), uid);
        path
    }

    pub(crate) fn signal(
        &self,
        path: &str,
        interface: &str,
        member: &str,
        body: &(impl serde::Serialize + DynamicType),
    ) {
        self.somebody.signal(None, path, interface, member, body);
    }

    /// `loginctl lock-session`.
    pub(crate) fn lock(&self, session: &str) {
        self.signal(session, SESSION, "Lock", &());
    }

    /// What a screen lock brings about.
    pub(crate) fn locked_hint(&self, session: &str, locked: bool) {
        let changed =
            HashMap::from([("LockedHint", Variant::from(locked)), ("IdleHint", Variant::from(true))]);
        self.signal(session, PROPERTIES, "PropertiesChanged", &(SESSION, changed, Vec::<&str>::new()));
    }

    /// The same as other implementations may tell it: the value has to be asked for.
    pub(crate) fn locked_hint_unnamed(&self, session: &str, locked: bool) {
        self.asked.lock().unwrap().locked_hint = locked;
        let changed = HashMap::<&str, Variant<'_>>::new();
        self.signal(session, PROPERTIES, "PropertiesChanged", &(SESSION, changed, vec!["LockedHint"]));
    }

    /// Before sleep, and after it.
    pub(crate) fn prepare_for_sleep(&self, start: bool) {
        self.signal(MANAGER_PATH, MANAGER, "PrepareForSleep", &start);
    }

    /// Waits until a signal that was sent before this call has been dealt with: all are dealt with in order, and this one makes the
    /// agent ask something.
    pub(crate) fn settle(&self) {
        let stranger = self.session("settle", 4_000_000);
        let before = self.questions(&stranger);
        self.lock(&stranger);
        wait_until("the lock of another user's session is looked at", || self.questions(&stranger) > before);
    }

    /// How often a property of the session was asked for.
    pub(crate) fn questions(&self, session: &str) -> usize {
        self.asked.lock().unwrap().properties.iter().filter(|(path, _)| path == session).count()
    }

    /// Who asked last.
    pub(crate) fn caller(&self) -> OwnedUniqueName {
        self.asked.lock().unwrap().caller.clone().unwrap()
    }

    /// How many inhibitors were taken so far.
    pub(crate) fn inhibitors(&self) -> usize {
        self.asked.lock().unwrap().inhibitors.len()
    }

    /// What was said when the inhibitor was taken.
    pub(crate) fn inhibitor_words(&self, number: usize) -> Vec<String> {
        self.asked.lock().unwrap().inhibitors[number].0.clone()
    }

    /// Whether the inhibitor is held.
    pub(crate) fn holds(&self, number: usize) -> bool {
        let asked = self.asked.lock().unwrap();
        let mut ends = [PollFd::new(asked.inhibitors[number].1.as_fd(), PollFlags::POLLIN)];
        poll(&mut ends, PollTimeout::ZERO).unwrap() == 0
    }

    pub(crate) fn wait_until_let_go(&self, number: usize) {
        wait_until("the inhibitor is let go", || !self.holds(number));
    }
}

async fn answer(connection: &Connection, call: &Message, asked: &Mutex<Asked>) {
    let header = call.header();
    asked.lock().unwrap().caller = header.sender().map(|sender| sender.to_owned().into());
    let path = header.path().map(ObjectPath::to_string).unwrap();
    match (header.interface().unwrap().as_str(), header.member().unwrap().as_str()) {
        ("org.freedesktop.DBus.Peer", "Ping") => connection.reply(&header, &()).await.unwrap(),
        (MANAGER, "Inhibit") if asked.lock().unwrap().grants_nothing => {
            connection.reply_error(&header, "org.freedesktop.DBus.Error.AccessDenied", &"no").await.unwrap();
        }
        (MANAGER, "Inhibit") => {
            let (what, who, why, mode): (String, String, String, String) = call.body().deserialize().unwrap();
            let (told, held) = pipe().unwrap();
            asked.lock().unwrap().inhibitors.push((vec![what, who, why, mode], told));
            connection.reply(&header, &zbus::OwnedFd::from(OwnedFd::from(held))).await.unwrap();
        }
        (PROPERTIES, "Get") => {
            let (interface, name): (String, String) = call.body().deserialize().unwrap();
            assert_eq!(interface, SESSION);
            let (user, hint) = {
                let mut asked = asked.lock().unwrap();
                asked.properties.push((path.clone(), name.clone()));
                (asked.sessions.get(&path).copied(), asked.locked_hint)
            };
            match (user, name.as_str()) {
                (Some(uid), "User") => {
                    let user = ObjectPath::try_from(format!("{MANAGER_PATH}/user/_{uid}")).unwrap();
                    connection.reply(&header, &Variant::from((uid, user))).await.unwrap();
                }
                (Some(_), "LockedHint") => connection.reply(&header, &Variant::from(hint)).await.unwrap(),
                _ => connection
                    .reply_error(&header, "org.freedesktop.DBus.Error.UnknownObject", &"no such session")
                    .await
                    .unwrap(),
            }
        }
        other => panic!("logind was asked for {other:?}"),
    }
}
