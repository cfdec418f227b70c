//! What must not stay behind when a signal ends the program: half-written files, a terminal without echo, half of a change.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError, RwLock},
    thread,
};

use nix::sys::{
    signal::{SigSet, Signal, raise},
    termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr},
};

use crate::sys;

static LEFTOVERS: Mutex<Leftovers> = Mutex::new(Leftovers { files: Vec::new(), terminal: None });

/// Held by every thread that is within a change which a signal must not cut in two.
static CHANGES: RwLock<()> = RwLock::new(());

struct Leftovers {
    files: Vec<PathBuf>,
    terminal: Option<(File, Termios)>,
}

/// Starts the thread that cleans up. Without it signals end the program at once, and nothing is worse than that.
pub(super) fn watch() {
    let mut deadly = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        // Blocked, it would come all the same, and clean up in a program that goes on.
        if !sys::is_ignored(signal) {
            deadly.add(signal);
        }
    }
    if deadly.iter().next().is_none() {
        return;
    }
    let mut stop = SigSet::empty();
    stop.add(Signal::SIGTSTP);
    let mut all = deadly;
    all.extend(&stop);
    // Every thread inherits this, so that the signals reach the one that waits for them.
    if all.thread_block().is_err() {
        return;
    }
    let watching = thread::Builder::new().name("signals".into()).spawn(move || {
        let Ok(signal) = deadly.wait() else { return };
        let _no_change = CHANGES.write().unwrap_or_else(PoisonError::into_inner);
        let mut leftovers = lock();
        clean(&mut leftovers);
        // Still holding the locks: nobody may make new leftovers now. The signal's own action tells our parent what happened.
        let _ = deadly.thread_unblock();
        let _ = raise(signal);
    });
    if watching.is_err() {
        let _ = deadly.thread_unblock();
    }
    let _ = stop.thread_unblock();
}

/// Makes a file, which comes with its path, and is removed if a signal comes.
pub(super) fn remove_at_end<T>(create: impl FnOnce() -> io::Result<(T, PathBuf)>) -> io::Result<T> {
    // Behind the lock, so that a signal finds either no file yet or its name.
    let mut leftovers = lock();
    let (file, path) = create()?;
    leftovers.files.push(path);
    Ok(file)
}

/// Runs `whole` without a signal in between, after which there is nothing to remove at `path` any more.
pub(super) fn finish<T>(path: &Path, whole: impl FnOnce() -> T) -> T {
    let mut leftovers = lock();
    let done = whole();
    leftovers.files.retain(|file| file != path);
    done
}

/// Runs `change` without a signal in between; several threads can be within one.
pub(super) fn without<T>(change: impl FnOnce() -> T) -> T {
    let _change = CHANGES.read().unwrap_or_else(PoisonError::into_inner);
    change()
}

/// Runs `ask` with the terminal's echo off, from before the prompt shows. It is on again when a signal ends the program, and the
/// program cannot be suspended meanwhile: a shell that resumes it would have switched the echo on.
pub(super) fn with_terminal<T>(ask: impl FnOnce() -> T) -> T {
    let mut stop = SigSet::empty();
    stop.add(Signal::SIGTSTP);
    let blocked = stop.thread_block().is_ok();
    let terminal = File::options().read(true).write(true).open("/dev/tty").ok();
    if let Some((terminal, settings)) = terminal.and_then(|file| tcgetattr(&file).ok().map(|set| (file, set)))
    {
        let mut silent = settings.clone();
        silent.local_flags.remove(LocalFlags::ECHO | LocalFlags::ECHONL);
        // Behind the lock, so that a signal finds either nothing to restore or what was there before.
        let mut leftovers = lock();
        let _ = tcsetattr(&terminal, SetArg::TCSANOW, &silent);
        leftovers.terminal = Some((terminal, settings));
    }
    let answer = ask();
    restore(&mut lock());
    if blocked {
        let _ = stop.thread_unblock();
    }
    answer
}

/// Lets a signal that this thread sent itself end the program.
pub(super) fn give_way() {
    let mut interrupt = SigSet::empty();
    interrupt.add(Signal::SIGINT);
    let _ = interrupt.thread_unblock();
}

fn clean(leftovers: &mut Leftovers) {
    for file in leftovers.files.drain(..) {
        let _ = fs::remove_file(file);
    }
    restore(leftovers);
}

fn restore(leftovers: &mut Leftovers) {
    if let Some((terminal, settings)) = leftovers.terminal.take() {
        let _ = tcsetattr(&terminal, SetArg::TCSANOW, &settings);
    }
}

fn lock() -> MutexGuard<'static, Leftovers> {
    LEFTOVERS.lock().unwrap_or_else(PoisonError::into_inner)
}
