//! What logind tells, as long as there is something to watch.
//!
//! Owns the connection to the system bus (`DBUS_SYSTEM_BUS_ADDRESS`, else the usual place), the inhibitor that delays sleep
//! until the agent has acknowledged, and who is believed: signals count from the connection that answers as
//! `org.freedesktop.login1`, and changes of that from the bus itself. A match rule alone is not enough, since anybody may
//! send a signal to one connection, and the bus delivers it unasked. What the bus is, is up to whoever starts the agent; a
//! false one can make the agent forget, or keep, and nothing else.

use std::{
    collections::HashMap,
    future::poll_fn,
    io::{self, ErrorKind},
    os::fd::OwnedFd,
    pin::Pin,
    time::Duration,
};

use futures_core::Stream;
use nix::unistd::getuid;
use serde::Serialize;
use tokio::{
    io::Interest,
    net::UnixStream,
    runtime,
    time::{Instant, sleep_until, timeout},
};
use zbus::{
    Connection, DynamicType, MatchRule, Message, MessageStream, ObjectPath, OwnedObjectPath, OwnedVariant,
    Variant, connection, fdo, match_rule, message::Type, names::OwnedUniqueName,
};

use super::{Cause, Order, Report, WatchError, receive, report};
use crate::config::LockOn;

const LOGIND: &str = "org.freedesktop.login1";
const LOGIND_PATH: &str = "/org/freedesktop/login1";
const MANAGER: &str = "org.freedesktop.login1.Manager";
const SESSION: &str = "org.freedesktop.login1.Session";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
const BUS: &str = "org.freedesktop.DBus";

/// An answer of the bus or of logind comes within this time.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// A logind that is restarted is back within this time.
const RESTART_PATIENCE: Duration = Duration::from_secs(10);

/// Watches until nothing is to be watched any more, or could not be from the beginning; an error is the end of the monitor.
pub(super) fn watch(socket: &OwnedFd, on: LockOn) -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    runtime.block_on(async {
        // Not a stream, but a socket that can be waited for in the same way.
        let orders = UnixStream::from_std(socket.try_clone()?.into())?;
        match Watch::begin(on).await {
            Ok(mut watch) => {
                report(socket, Report::Watching(on))?;
                watch.go_on(&orders).await
            }
            Err(error) => report(socket, Report::Refused(error)),
        }
    })
}

/// The agent's next order; none once it is gone.
async fn next_order(orders: &UnixStream) -> io::Result<Option<Order>> {
    loop {
        orders.readable().await?;
        let received = orders.try_io(Interest::READABLE, || Ok(receive(orders, Order::from_bytes)?));
        match received {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            received => return received,
        }
    }
}

async fn listen(connection: &Connection, rule: match_rule::Builder<'_>) -> zbus::Result<MessageStream> {
    MessageStream::for_match_rule(rule.msg_type(Type::Signal).build()?, connection, None).await
}

async fn next_message(stream: &mut MessageStream) -> io::Result<Message> {
    match poll_fn(|context| Pin::new(&mut *stream).poll_next(context)).await {
        Some(Ok(message)) => Ok(message),
        Some(Err(_)) | None => Err(ErrorKind::ConnectionAborted.into()),
    }
}

/// What a signal means.
enum Meaning {
    SessionLocked,
    /// The machine is about to sleep.
    Sleep,
    /// It has slept, or does not sleep after all.
    Awake,
    Nothing,
}

struct Watch {
    connection: Connection,
    /// Who is `org.freedesktop.login1`.
    owners: MessageStream,
    on: LockOn,
    /// Nothing while it is being restarted, since then.
    logind: Result<Logind, Instant>,
    /// The machine is about to sleep.
    asleep: bool,
    /// Words that it is about to sleep that the agent has not answered.
    unanswered: u32,
}

/// One run of logind.
struct Logind {
    connection: Connection,
    name: OwnedUniqueName,
    signals: MessageStream,
    /// While it is open, sleep waits.
    inhibitor: Option<OwnedFd>,
}

impl Watch {
    async fn begin(on: LockOn) -> Result<Self, WatchError> {
        let connecting = connection::Builder::system().method_timeout(ANSWER_PATIENCE).build();
        let connection = match timeout(ANSWER_PATIENCE, connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(_)) | Err(_) => return Err(WatchError::NoBus),
        };
        // Before anything is asked, so that no change is missed.
        let rule = MatchRule::builder().sender(BUS).interface(BUS).member("NameOwnerChanged").add_arg(LOGIND);
        let owners = listen(&connection, rule).await.map_err(|_| WatchError::NoBus)?;
        let logind = Ok(Logind::find(&connection, on).await?);
        Ok(Self { connection, owners, on, logind, asleep: false, unanswered: 0 })
    }

    /// Passes on what happens until there is nothing to watch any more.
    async fn go_on(&mut self, orders: &UnixStream) -> io::Result<()> {
        loop {
            let signal = async {
                match &mut self.logind {
                    Ok(logind) => next_message(&mut logind.signals).await,
                    Err(gone) => {
                        sleep_until(gone.checked_add(RESTART_PATIENCE).unwrap_or(*gone)).await;
                        Err(ErrorKind::TimedOut.into())
                    }
                }
            };
            tokio::select! {
                order = next_order(orders) => match order? {
                    // The agent is gone.
                    None => return Err(ErrorKind::BrokenPipe.into()),
                    Some(Order::Watch(on)) if on.is_empty() => return report(orders, Report::Watching(on)),
                    Some(Order::Watch(on)) => report(orders, match self.change(on).await {
                        Ok(()) => Report::Watching(on),
                        Err(error) => Report::Refused(error),
                    })?,
                    Some(Order::Done) => self.done(),
                },
                owner = next_message(&mut self.owners) => {
                    if owner?.header().sender().is_some_and(|sender| *sender == BUS) {
                        self.find_again().await;
                    }
                }
                message = signal => self.heard(&message?, orders).await?,
            }
        }
    }

    /// Watches something else from now on; on an error what it did before.
    async fn change(&mut self, on: LockOn) -> Result<(), WatchError> {
        let logind = self.logind.as_mut().map_err(|_| WatchError::NoLogind)?;
        match on.sleep {
            false => logind.inhibitor = None,
            true if logind.inhibitor.is_none() && !self.asleep => {
                logind.inhibitor = Some(logind.inhibit().await?)
            }
            true => {}
        }
        self.on = on;
        Ok(())
    }

    /// The agent has forgotten its keys.
    fn done(&mut self) {
        self.unanswered = self.unanswered.saturating_sub(1);
        // An answer that comes after the sleep that it is about does not cost the next one its delay.
        if self.unanswered == 0
            && self.asleep
            && let Ok(logind) = &mut self.logind
        {
            logind.inhibitor = None;
        }
    }

    /// `org.freedesktop.login1` went, or came.
    async fn find_again(&mut self) {
        self.asleep = false;
        self.logind = match Logind::find(&self.connection, self.on).await {
            Ok(logind) => Ok(logind),
            // There will be another change when it is back.
            Err(_) => Err(self.logind.as_ref().err().copied().unwrap_or_else(Instant::now)),
        };
    }

    async fn heard(&mut self, message: &Message, orders: &UnixStream) -> io::Result<()> {
        let Ok(logind) = &mut self.logind else { return Ok(()) };
        match logind.meaning(message, self.on).await {
            Meaning::SessionLocked => report(orders, Report::Lock(Cause::SessionLocked)),
            Meaning::Sleep => {
                self.asleep = true;
                self.unanswered = self.unanswered.saturating_add(1);
                report(orders, Report::Lock(Cause::Sleep))
            }
            Meaning::Awake => {
                self.asleep = false;
                if logind.inhibitor.is_none() {
                    // Without it the next sleep would come before the keys are gone.
                    let inhibitor = logind.inhibit().await;
                    logind.inhibitor = Some(inhibitor.map_err(|_| ErrorKind::PermissionDenied)?);
                }
                Ok(())
            }
            Meaning::Nothing => Ok(()),
        }
    }
}

impl Logind {
    /// Who answers as logind, and what it says from now on.
    async fn find(connection: &Connection, on: LockOn) -> Result<Self, WatchError> {
        let answer = connection
            .call_method(Some(LOGIND), LOGIND_PATH, Some("org.freedesktop.DBus.Peer"), "Ping", &())
            .await
            .map_err(|_| WatchError::NoLogind)?;
        let name = answer.header().sender().ok_or(WatchError::NoLogind)?.to_owned();
        let rule = MatchRule::builder().sender(name.as_ref()).path_namespace(LOGIND_PATH);
        let signals = listen(connection, rule).await.map_err(|_| WatchError::NoLogind)?;
        let mut found = Self { connection: connection.clone(), name: name.into(), signals, inhibitor: None };
        if on.sleep {
            found.inhibitor = Some(found.inhibit().await?);
        }
        Ok(found)
    }

    async fn call(
        &self,
        path: &ObjectPath<'_>,
        interface: &str,
        method: &str,
        body: &(impl Serialize + DynamicType),
    ) -> zbus::Result<Message> {
        self.connection.call_method(Some(self.name.as_ref()), path, Some(interface), method, body).await
    }

    async fn inhibit(&self) -> Result<OwnedFd, WatchError> {
        let why = ("sleep", "kms-agent", "wipes keys from memory", "delay");
        let path = ObjectPath::try_from(LOGIND_PATH).map_err(|_| WatchError::NoInhibitor)?;
        let answer = self.call(&path, MANAGER, "Inhibit", &why).await.map_err(|_| WatchError::NoInhibitor)?;
        let inhibitor: zbus::OwnedFd = answer.body().deserialize().map_err(|_| WatchError::NoInhibitor)?;
        Ok(inhibitor.into())
    }

    async fn meaning(&self, message: &Message, on: LockOn) -> Meaning {
        let header = message.header();
        let (Some(path), Some(interface), Some(member)) =
            (header.path(), header.interface(), header.member())
        else {
            return Meaning::Nothing;
        };
        let locked = match (interface.as_str(), member.as_str()) {
            (MANAGER, "PrepareForSleep") if on.sleep && path.as_str() == LOGIND_PATH => {
                // What cannot be read is taken for the worse.
                return if message.body().deserialize().unwrap_or(true) {
                    Meaning::Sleep
                } else {
                    Meaning::Awake
                };
            }
            (SESSION, "Lock") if on.session => true,
            (PROPERTIES, "PropertiesChanged") if on.session => self.says_locked(message, path).await,
            _ => false,
        };
        if locked && self.is_ours(path).await { Meaning::SessionLocked } else { Meaning::Nothing }
    }

    /// Whether the change of a session's properties is that it is locked now.
    async fn says_locked(&self, message: &Message, path: &ObjectPath<'_>) -> bool {
        let body = message.body();
        let Ok((interface, changed, unnamed)) =
            body.deserialize::<(&str, HashMap<&str, Variant<'_>>, Vec<&str>)>()
        else {
            return false;
        };
        if interface != SESSION {
            return false;
        }
        match changed.get("LockedHint") {
            Some(hint) => *hint == Variant::Bool(true),
            None if unnamed.contains(&"LockedHint") => match self.property(path, "LockedHint").await {
                Ok(hint) => bool::try_from(hint).unwrap_or(true),
                Err(_) => true,
            },
            None => false,
        }
    }

    /// Whether the session is one of this user's. Another user cannot make the agent forget by a session that has ended; whatever
    /// else keeps logind from telling is taken for a yes.
    async fn is_ours(&self, session: &ObjectPath<'_>) -> bool {
        match self.property(session, "User").await {
            Ok(user) => match <(u32, OwnedObjectPath)>::try_from(user) {
                Ok((uid, _)) => uid == getuid().as_raw(),
                Err(_) => true,
            },
            Err(zbus::Error::FDO(error)) => !matches!(*error, fdo::Error::UnknownObject(_)),
            Err(_) => true,
        }
    }

    async fn property(&self, session: &ObjectPath<'_>, name: &str) -> zbus::Result<OwnedVariant> {
        self.call(session, PROPERTIES, "Get", &(SESSION, name)).await?.body().deserialize()
    }
}
