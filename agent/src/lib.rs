//! kms-agent: ssh-agent for data keys.
//!
//! Owns the order of the start: not dumpable, arguments, configuration, background, monitor (the last fork), socket, secret
//! memory, runtime, ready. See `docs/architecture.md`. No secret exists before the last fork.

mod args;
pub mod audit;
pub mod authorize;
pub mod config;
pub mod constraints;
pub mod core;
pub mod crypto;
mod error;
pub mod keyring;
mod launch;
mod monitor;
pub mod reply;
mod server;
mod socket;
mod sys;

use std::{os::fd::OwnedFd, process::ExitCode};

use nix::{
    errno::Errno,
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        stat::{Mode, umask},
    },
    unistd::{Pid, getuid},
};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{layer::SubscriberExt, reload, util::SubscriberInitExt};

use crate::{
    args::Args,
    audit::LogAudit,
    config::Config,
    core::Core,
    crypto::KernelRandom,
    error::StartError,
    keyring::Keyring,
    launch::{Launched, Ready},
    monitor::{Monitor, MonitorEvent},
    server::{Server, Wake, now},
    socket::AgentSocket,
};

/// How the level of the log is changed while the agent runs.
type LogLevel = reload::Handle<LevelFilter, tracing_subscriber::Registry>;

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
    let config = args.config()?;
    let place = socket::Place::choose(args.socket.as_deref(), !args.command.is_empty())?;
    match launch::launch(args, &place)? {
        Launched::Parent(exit) => Ok(exit),
        Launched::Agent { ready, until } => {
            let served = serve(args, config, place, ready, until);
            served.map(|()| ExitCode::SUCCESS)
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
    Ok(())
}

/// In the foreground a person or a service manager reads along; elsewhere only what needs somebody is said.
fn log_level(args: &Args, config: &Config) -> LevelFilter {
    config.log.unwrap_or(if args.foreground { LevelFilter::INFO } else { LevelFilter::WARN })
}

fn start_log(level: LevelFilter) -> LogLevel {
    let (filter, handle) = reload::Layer::new(level);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    // Only a second subscriber could make this fail, and there is none.
    let _ = tracing_subscriber::registry().with(filter).with(lines).try_init();
    // The text of a panic may hold what a peer sent; its place does not.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(|location| (location.file(), location.line()));
        tracing::error!(?place, "a request panicked; its connection is closed");
    }));
    handle
}

fn serve(
    args: &Args,
    config: Config,
    place: socket::Place,
    ready: Ready,
    until: Option<Pid>,
) -> Result<(), StartError> {
    protect()?;
    let mut monitor = Monitor::start()?;
    monitor.watch_at_start(config.lock_on)?;
    let log = start_log(log_level(args, &config));
    // Opened while the parent is certainly there, since it waits for readiness.
    let until = until.map(sys::pidfd_open).transpose().map_err(StartError::Command)?;
    let socket = AgentSocket::bind(place)?;
    let mut random = KernelRandom;
    let keyring = Keyring::new(config.secret_memory, &mut random)?;
    if let Some(backing) = keyring.backing() {
        tracing::info!(%backing, "keys are shielded");
    }
    let mut limits = config.limits;
    (limits.memory_only, limits.lifetime) = (args.memory, args.lifetime);
    let core = Core::new(getuid().as_raw(), keyring, limits, random, LogAudit, now());
    let server = Server::new(core, socket.listener()?, config.secret_memory)?;
    // The server, and with it every connection and every buffer, is wiped before the socket is taken away.
    run(args, server, monitor, &socket, ready, until, &log)
}

fn run(
    args: &Args,
    mut server: Server<KernelRandom, LogAudit>,
    mut monitor: Monitor,
    socket: &AgentSocket,
    ready: Ready,
    until: Option<OwnedFd>,
    log: &LogLevel,
) -> Result<(), StartError> {
    let runtime = |errno: Errno| StartError::Runtime(errno.into());
    // Before any other thread is started, so that none takes a signal.
    let wanted: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    wanted.thread_block().map_err(runtime)?;
    let signals =
        SignalFd::with_flags(&wanted, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(runtime)?;
    server.wake_by(&signals, Wake::Signal).map_err(StartError::Runtime)?;
    if let Some(command) = &until {
        server.wake_by(command, Wake::CommandEnded).map_err(StartError::Runtime)?;
    }
    if let Some(events) = monitor.descriptor() {
        server.wake_by(events, Wake::Monitor).map_err(StartError::Runtime)?;
    }
    tracing::info!(socket = %socket.path().display(), "ready");
    ready.tell()?;
    loop {
        match server.serve().map_err(StartError::Runtime)? {
            Wake::CommandEnded => break,
            Wake::Monitor => attend_monitor(&mut monitor, &mut server)?,
            Wake::Signal => match signals.read_signal().map_err(runtime)? {
                Some(signal) if signal.ssi_signo == Signal::SIGHUP as u32 => {
                    reload_configuration(args, &mut server, &mut monitor, log);
                }
                Some(_) => break,
                None => {}
            },
        }
    }
    tracing::info!("ending");
    Ok(())
}

/// Does what the monitor tells. An error is the end of the agent: what it was to lock on would pass unseen.
fn attend_monitor(
    monitor: &mut Monitor,
    server: &mut Server<KernelRandom, LogAudit>,
) -> Result<(), StartError> {
    let gone = |on| StartError::Unwatched { on };
    while let Some(event) = monitor.event() {
        match event {
            MonitorEvent::Lock(reason) => {
                server.core().forget(reason);
                monitor.done(reason).map_err(|_| gone(monitor.watched()))?;
            }
            MonitorEvent::Watching(on) => tracing::info!(%on, "keys are forgotten on it"),
            MonitorEvent::Refused(error) => tracing::error!(%error, "what is locked on stays as it was"),
            MonitorEvent::Ended if monitor.watched().is_empty() => tracing::warn!("the monitor has ended"),
            MonitorEvent::Ended => return Err(gone(monitor.watched())),
        }
    }
    Ok(())
}

/// Reads the configuration again; a bad file leaves the old one in force.
fn reload_configuration(
    args: &Args,
    server: &mut Server<KernelRandom, LogAudit>,
    monitor: &mut Monitor,
    log: &LogLevel,
) {
    match args.config() {
        Ok(config) => {
            let level = log_level(args, &config);
            let core = server.core();
            let (memory_only, lifetime) = (core.limits().memory_only, core.limits().lifetime);
            core.set_limits(config::Limits { memory_only, lifetime, ..config.limits });
            if let Err(error) = log.reload(level) {
                tracing::warn!(%error, "the level of the log stays");
            }
            if config.lock_on != monitor.watched() || !config.lock_on.is_empty() {
                // The answer comes as an event.
                if let Err(error) = monitor.watch(config.lock_on) {
                    tracing::error!(%error, "what is locked on stays as it was");
                }
            }
            tracing::info!("read the configuration again");
        }
        Err(error) => tracing::error!(%error, "the old configuration stays in force"),
    }
}
