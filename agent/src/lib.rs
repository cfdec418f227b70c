//! kms-agent: ssh-agent for data keys.
//!
//! Owns the order of the start: not dumpable, arguments, configuration, background, monitor (the last fork), socket,
//! Landlock, threads with locked stacks, secret memory, seccomp, ready. See `docs/architecture.md`. No secret exists before the last fork, and no
//! request is read before the sandbox is closed.

mod activation;
mod args;
pub mod audit;
pub mod authorize;
pub mod config;
pub mod constraints;
pub mod core;
pub mod crypto;
mod error;
mod folder;
pub mod keyring;
mod launch;
mod log;
mod manual;
mod monitor;
mod process;
mod pump;
pub mod reply;
mod running;
mod sandbox;
mod server;
mod service;
mod shell;
mod socket;
mod sys;

use std::{
    convert::Infallible,
    io::{self, stdin, stdout},
    ops::ControlFlow::{Break, Continue},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use kms_secret_memory::{Policy, spawn_locked};
use nix::{
    errno::Errno,
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        socket::{setsockopt, sockopt},
        stat::{Mode, umask},
    },
    unistd::{Pid, dup2_stderr, pipe},
};

use crate::{
    args::Args,
    audit::{LogAudit, Reason},
    config::{Config, ConfigFile, Sandbox},
    core::Core,
    crypto::KernelRandom,
    error::StartError,
    keyring::Keyring,
    launch::{Launched, Ready},
    log::{Log, level},
    monitor::{Monitor, MonitorEvent},
    process::Protection,
    sandbox::{Allowed, SandboxError},
    server::{Server, Source, Wake, now},
    service::Service,
    socket::AgentSocket,
};

/// Requests are handled on a stack of so many bytes, all of them locked.
const SERVER_STACK_LEN: usize = 256 * 1024;

/// The whole program.
#[must_use]
pub fn main() -> ExitCode {
    // Before anything else: no debugger, no core, no look into /proc by others of the same uid.
    let protected =
        prctl::set_dumpable(false).map_err(|source| StartError::Protect { what: "PR_SET_DUMPABLE", source });
    let args = match Args::read() {
        Ok(args) => args,
        Err(exit) => return exit,
    };
    match protected.and_then(|()| start(&args)) {
        Ok(exit) => exit,
        Err(error) => {
            error.report();
            ExitCode::FAILURE
        }
    }
}

fn start(args: &Args) -> Result<ExitCode, StartError> {
    if args.end {
        return launch::end(args);
    }
    let file = args.config_file();
    let config = file.read()?;
    let place = if args.stdio { None } else { Some(socket::Place::choose(args)?) };
    let launched = launch::launch(args, place.as_ref()).and_then(|launched| match launched {
        Launched::Parent(exit) => Ok(Break(exit)),
        Launched::Agent { ready, until } => Ok(Continue((Prepared::new(args, config, until)?, ready))),
    });
    match launched {
        Ok(Break(exit)) => Ok(exit),
        Ok(Continue((prepared, ready))) => match serve(args, file, prepared, place, ready)? {},
        Err(error) => {
            // From here on it would go with the socket.
            place.iter().for_each(socket::Place::abandon);
            Err(error)
        }
    }
}

/// Limits what the process can do and what can be done to it, once it is the process that stays.
fn protect() -> Result<(), StartError> {
    let failed = |what| move |source| StartError::Protect { what, source };
    prctl::set_dumpable(false).map_err(failed("PR_SET_DUMPABLE"))?;
    prctl::set_no_new_privs().map_err(failed("PR_SET_NO_NEW_PRIVS"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(failed("RLIMIT_CORE"))?;
    let (_, descriptors) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed("RLIMIT_NOFILE"))?;
    setrlimit(Resource::RLIMIT_NOFILE, descriptors, descriptors).map_err(failed("RLIMIT_NOFILE"))?;
    umask(Mode::from_bits_truncate(0o077));
    sys::share_heap();
    // A monitor that has ended is waited for by nobody.
    sys::ignore_signals(&[Signal::SIGCHLD]).map_err(StartError::Runtime)?;
    sys::default_faults().map_err(StartError::Runtime)
}

/// What comes before the socket.
struct Prepared {
    uid: u32,
    config: Config,
    monitor: Monitor,
    log: Log,
    until: Option<OwnedFd>,
    service: Option<Service>,
}

impl Prepared {
    fn new(args: &Args, config: Config, until: Option<Pid>) -> Result<Self, StartError> {
        protect()?;
        let uid = process::own_uid()?;
        let mut monitor = Monitor::start()?;
        monitor.watch_at_start(config.lock_on)?;
        let log = Log::start(level(args.is_read_along(), &config));
        // Opened while the parent is certainly there, since it waits for readiness.
        let until = until.map(sys::pidfd_open).transpose().map_err(StartError::Command)?;
        let service =
            if args.foreground { Service::of_environment().map_err(StartError::Service)? } else { None };
        Ok(Self { uid, config, monitor, log, until, service })
    }
}

/// Does in this order what needs more rights than the agent keeps, and leaves the rest to a thread whose stack is locked.
fn serve(
    args: &Args,
    file: ConfigFile,
    prepared: Prepared,
    place: Option<socket::Place>,
    ready: Ready,
) -> Result<Infallible, StartError> {
    let Prepared { uid, config, monitor, log, until, service } = prepared;
    // Before the socket, which an end by a signal would leave behind, and before any other thread.
    let runtime = |errno: Errno| StartError::Runtime(errno.into());
    let wanted: SigSet =
        [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1].into_iter().collect();
    wanted.thread_block().map_err(runtime)?;
    let signals =
        SignalFd::with_flags(&wanted, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(runtime)?;
    let socket = place.map(AgentSocket::bind).transpose()?;
    let (stdio, peer, until) = match socket {
        Some(_) => (None, None, until),
        None => {
            let (stdio, peer, over) = Stdio::new().map_err(StartError::Stdio)?;
            (Some(stdio), Some(peer), Some(over))
        }
    };
    let mut protection = Protection::read()?;
    let allowed: Vec<Allowed> = file
        .folders()
        .into_iter()
        .map(Allowed::to_read)
        .chain(socket.iter().flat_map(AgentSocket::to_remove))
        .collect();
    protection.landlock(within(config.sandbox, sandbox::restrict_files(&allowed))?);

    let command_line = CommandLine {
        memory_only: args.memory,
        lifetime: args.lifetime,
        is_read_along: args.is_read_along(),
        file,
    };
    let memory = config.secret_memory;
    let pump_failed = Arc::new(AtomicBool::new(false));
    let has_pump_failed = Arc::clone(&pump_failed);
    let work = move |stack| {
        protection.stacks(stack);
        let agent = Agent {
            uid,
            command_line,
            config,
            socket,
            peer,
            signals,
            until,
            monitor,
            service,
            log,
            protection,
        };
        // A panic outside every request was told by the hook.
        let ended = catch_unwind(AssertUnwindSafe(|| agent.run(ready))).unwrap_or(Err(StartError::Panicked));
        sys::exit(match ended {
            // That was reported there.
            Ok(()) => i32::from(has_pump_failed.load(Ordering::Acquire)),
            Err(error) => {
                error.report();
                1
            }
        })
    };
    spawn_locked("agent", SERVER_STACK_LEN, memory, work)?;
    if let Some(stdio) = stdio {
        stdio.serve(memory, &pump_failed);
    }
    loop {
        thread::park();
    }
}

/// Standard input and output, with what the server takes for a connection of theirs.
struct Stdio {
    peer: UnixStream,
    over: OwnedFd,
}

impl Stdio {
    /// With the server's end of the connection, and what can be read when it is over.
    fn new() -> io::Result<(Self, UnixStream, OwnedFd)> {
        let (peer, served) = UnixStream::pair()?;
        // Before anything is sent there, as on a listener.
        setsockopt(&served, sockopt::PassCred, &true)?;
        let (until, over) = pipe()?;
        Ok((Self { peer, over }, served, until))
    }

    /// Serves until either side is gone.
    fn serve(self, memory: Policy, failed: &AtomicBool) {
        let Self { peer, over } = self;
        if let Err(error) = pump::pump(stdin().as_fd(), stdout().as_fd(), &peer, memory) {
            error.report();
            failed.store(true, Ordering::Release);
        }
        // Which the server hears, and ends.
        drop(over);
    }
}

/// Takes a part of the sandbox as the configuration wants it: it must be there, or its absence is logged.
fn within<T>(wanted: Sandbox, part: Result<T, SandboxError>) -> Result<Option<T>, StartError> {
    match part {
        Ok(part) => Ok(Some(part)),
        Err(error) if wanted == Sandbox::Preferred => {
            tracing::warn!(%error, "a part of the sandbox is missing");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// What a configuration that is read again does not change.
struct CommandLine {
    memory_only: bool,
    lifetime: Option<Duration>,
    is_read_along: bool,
    file: ConfigFile,
}

impl CommandLine {
    fn limits(&self, config: &Config) -> config::Limits {
        config::Limits { memory_only: self.memory_only, lifetime: self.lifetime, ..config.limits.clone() }
    }
}

/// All that the thread which serves is given.
struct Agent {
    uid: u32,
    command_line: CommandLine,
    config: Config,
    socket: Option<AgentSocket>,
    /// Who is on stdin and stdout, where there is no socket.
    peer: Option<UnixStream>,
    signals: SignalFd,
    until: Option<OwnedFd>,
    monitor: Monitor,
    service: Option<Service>,
    log: Log,
    protection: Protection,
}

impl Agent {
    /// Takes secret memory, closes the sandbox and serves until the end.
    fn run(mut self, ready: Ready) -> Result<(), StartError> {
        let memory = self.config.secret_memory;
        let mut random = KernelRandom;
        let keyring = Keyring::new(memory, &mut random)?;
        if let Some(backing) = keyring.backing() {
            tracing::info!(%backing, "keys are shielded");
        }
        let limits = self.command_line.limits(&self.config);
        let core = Core::new(self.uid, keyring, limits, random, LogAudit, now());
        let listener = self.socket.as_ref().map(AgentSocket::listener).transpose()?;
        let mut server = Server::new(core, listener, memory)?;
        if let Some(peer) = self.peer.take() {
            server.admit(peer);
        }
        server.wake_by(&self.signals, Source::Signals).map_err(StartError::Runtime)?;
        if let Some(command) = &self.until {
            server.wake_by(command, Source::Command).map_err(StartError::Runtime)?;
        }
        if let Some(events) = self.monitor.descriptor() {
            server.wake_by(events, Source::Monitor).map_err(StartError::Runtime)?;
        }
        if let Some(beat) = self.service.as_ref().and_then(Service::beat) {
            server.beat_every(beat);
        }
        // From here on nothing fails but this and what a reader of ours does.
        let stderr = ready.leave_terminal()?;
        let filtered = within(self.config.sandbox, sandbox::restrict_calls(self.socket.is_none()));
        if let (Err(_), Some(stderr)) = (&filtered, &stderr) {
            dup2_stderr(stderr).map_err(|errno| StartError::Background(errno.into()))?;
        }
        drop(stderr);
        let filtered = filtered?;
        self.protection.seccomp(filtered.is_some());
        self.show(&mut server);

        match &self.socket {
            Some(socket) => tracing::info!(socket = %socket.path().display(), "ready"),
            None => tracing::info!("ready for the peer on stdin and stdout"),
        }
        match &mut self.service {
            // Nobody evaluates what goes to the journal.
            Some(service) => service.ready(&server.core().summary()),
            None => ready.tell()?,
        }
        self.serve(&mut server)?;
        tracing::info!("ending");
        if let Some(service) = &self.service {
            service.stopping();
        }
        // The server, and with it every connection and every buffer, is wiped before the socket is taken away.
        Ok(())
    }

    fn serve(&mut self, server: &mut Server<KernelRandom, LogAudit>) -> Result<(), StartError> {
        loop {
            match server.serve().map_err(StartError::Runtime)? {
                Wake::Readable(Source::Command) => return Ok(()),
                Wake::Readable(Source::Monitor) => self.attend_monitor(server)?,
                Wake::Readable(Source::Signals) => {
                    let signal =
                        self.signals.read_signal().map_err(|errno| StartError::Runtime(errno.into()))?;
                    match signal.and_then(|signal| Signal::try_from(signal.ssi_signo.cast_signed()).ok()) {
                        Some(Signal::SIGHUP) => self.reload(server),
                        Some(Signal::SIGUSR1) => {
                            server.core().forget(Reason::Signal, now());
                        }
                        Some(_) => return Ok(()),
                        None => {}
                    }
                }
                Wake::Beat => self.service.iter().for_each(Service::alive),
            }
            if let Some(service) = &mut self.service {
                service.status(&server.core().summary());
            }
        }
    }

    /// Has `status` show what only the process knows.
    fn show(&self, server: &mut Server<KernelRandom, LogAudit>) {
        server.core().show(self.protection.facts(self.monitor.watched()));
    }

    /// Does what the monitor tells. An error is the end of the agent: what it was to lock on would pass unseen.
    fn attend_monitor(&mut self, server: &mut Server<KernelRandom, LogAudit>) -> Result<(), StartError> {
        while let Some(event) = self.monitor.event() {
            match event {
                MonitorEvent::Lock(reason) => {
                    server.core().forget(reason, now());
                    // A monitor that is gone tells so itself.
                    let _ = self.monitor.done(reason);
                }
                MonitorEvent::Watching(on) => {
                    tracing::info!(%on, "keys are forgotten on it");
                    self.show(server);
                }
                MonitorEvent::Refused(error) => tracing::error!(%error, "what is locked on stays as it was"),
                MonitorEvent::Ended if self.monitor.watched().is_empty() => {
                    tracing::warn!("the monitor has ended");
                }
                MonitorEvent::Ended => {
                    server.core().forget(Reason::MonitorEnded, now());
                    return Err(StartError::Unwatched { on: self.monitor.watched() });
                }
            }
        }
        Ok(())
    }

    /// Reads the configuration again; a bad file leaves the old one in force.
    fn reload(&mut self, server: &mut Server<KernelRandom, LogAudit>) {
        match self.command_line.file.read() {
            Ok(config) => {
                server.core().set_limits(self.command_line.limits(&config));
                self.log.set_level(level(self.command_line.is_read_along, &config));
                // The answer comes as an event.
                if let Err(error) = self.monitor.watch(config.lock_on) {
                    tracing::error!(%error, "what is locked on stays as it was");
                }
                tracing::info!("read the configuration again");
            }
            Err(error) => tracing::error!(%error, "the old configuration stays in force"),
        }
    }
}
