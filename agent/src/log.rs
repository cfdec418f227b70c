//! The log: lines on stderr, with the words of the journal where that is what reads them.
//!
//! Owns the level and the shape of a line. What is in it, secrets and words of peers never, is up to who writes it. Nobody who
//! reads it is waited for: what does not fit there is lost.

use std::{
    env, fmt,
    fs::File,
    io::{self, ErrorKind, Write},
    os::{fd::AsFd, unix::fs::MetadataExt},
    sync::Arc,
};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tracing::{Event, Level, Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    Registry,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{Format, Full, Writer},
    },
    layer::SubscriberExt,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt,
};

use crate::config::Config;

/// Where nobody reads along, only what needs somebody is said.
pub(crate) fn level(is_read_along: bool, config: &Config) -> LevelFilter {
    config.log.unwrap_or(if is_read_along { LevelFilter::INFO } else { LevelFilter::WARN })
}

/// The log of this process.
pub(crate) struct Log(reload::Handle<LevelFilter, Registry>);

impl Log {
    pub(crate) fn start(level: LevelFilter) -> Self {
        let (filter, handle) = reload::Layer::new(level);
        let watch = Impatient::watch();
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(move || Impatient { watch: watch.clone() })
            .with_ansi(false)
            .event_format(Lines { plain: Format::default(), journal: is_journal() });
        // Only a second subscriber could make this fail, and there is none.
        let _ = tracing_subscriber::registry().with(filter).with(lines).try_init();
        // The text of a panic may hold what a peer sent; its place does not.
        std::panic::set_hook(Box::new(|panic| {
            let place = panic.location().map(|location| (location.file(), location.line()));
            tracing::error!(?place, "a fault of the agent; one in a request ends its connection");
        }));
        Self(handle)
    }

    pub(crate) fn set_level(&self, level: LevelFilter) {
        if let Err(error) = self.0.reload(level) {
            tracing::warn!(%error, "the level of the log stays");
        }
    }
}

/// A pipe that has room takes so much without making us wait: `PIPE_BUF` of Linux.
const PIECE_LEN: usize = 4096;

/// Stderr, as far as it takes at once what is written: the loop must go on when whoever reads it does not. Its flags are not
/// ours alone to change.
struct Impatient {
    /// Tells whether it takes something. A file always does, and cannot be watched.
    watch: Option<Arc<Epoll>>,
}

impl Impatient {
    fn watch() -> Option<Arc<Epoll>> {
        let watch = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).ok()?;
        watch.add(io::stderr(), EpollEvent::new(EpollFlags::EPOLLOUT, 0)).ok()?;
        Some(Arc::new(watch))
    }
}

impl Write for Impatient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(watch) = &self.watch
            && watch.wait(&mut [EpollEvent::empty()], EpollTimeout::ZERO)? == 0
        {
            return Err(ErrorKind::WouldBlock.into());
        }
        io::stderr().write(bytes.get(..PIECE_LEN).unwrap_or(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether the journal reads stderr, systemd.exec(5), `JOURNAL_STREAM`.
fn is_journal() -> bool {
    let stderr = io::stderr().as_fd().try_clone_to_owned().and_then(|fd| File::from(fd).metadata());
    let Ok(stderr) = stderr else { return false };
    env::var("JOURNAL_STREAM").is_ok_and(|stream| stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}

/// Lines as they are usual; or for the journal, which has the time itself and takes the level from a prefix, sd-daemon(3).
struct Lines {
    plain: Format<Full>,
    journal: bool,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if !self.journal {
            return self.plain.format_event(context, writer, event);
        }
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(writer, "<{priority}>")?;
        let format = self.plain.clone().without_time().with_level(false).with_target(false);
        format.format_event(context, writer, event)
    }
}
