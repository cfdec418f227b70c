//! The service manager that has started the agent, where there is one.
//!
//! Owns the socket that it listens on, opened before the sandbox, and what it is told: readiness, a line of status, that the loop
//! goes round, the end. It is never waited for.

use std::{
    env, io,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

use sd_notify::NotifyState;

pub(crate) struct Service {
    socket: UnixDatagram,
    said: String,
}

impl Service {
    /// The one that `NOTIFY_SOCKET` names, sd_notify(3).
    pub(crate) fn of_environment() -> io::Result<Option<Self>> {
        let Some(name) = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Ok(None);
        };
        let address = match name.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&name)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        socket.set_nonblocking(true)?;
        Ok(Some(Self { socket, said: String::new() }))
    }

    /// How often it wants to hear that the loop goes round, so that one lost message is none.
    pub(crate) fn beat(&self) -> Option<Duration> {
        sd_notify::watchdog_enabled().map(|time| time / 3)
    }

    /// Clients can connect.
    pub(crate) fn ready(&mut self, status: &str) {
        status.clone_into(&mut self.said);
        self.tell(&[NotifyState::Ready, NotifyState::Status(status)]);
    }

    /// The loop goes round.
    pub(crate) fn alive(&self) {
        self.tell(&[NotifyState::Watchdog]);
    }

    /// A line for a person, if it is another one than before.
    pub(crate) fn status(&mut self, status: &str) {
        if self.said != status {
            status.clone_into(&mut self.said);
            self.tell(&[NotifyState::Status(status)]);
        }
    }

    /// The end begins.
    pub(crate) fn stopping(&self) {
        self.tell(&[NotifyState::Stopping]);
    }

    fn tell(&self, states: &[NotifyState<'_>]) {
        let lines: Vec<String> = states.iter().map(ToString::to_string).collect();
        if let Err(error) = self.socket.send(lines.join("\n").as_bytes()) {
            tracing::warn!(%error, "the service manager cannot be told");
        }
    }
}
