//! Runs a command and says on stderr what it used: peak memory in KiB, then processor time and time in microseconds.
//!
//! A process of its own, because the kernel counts the memory of whoever starts a program as that program's, and because what
//! children used is known of all of them together.

use std::{
    env,
    process::{Command, ExitCode},
    time::Instant,
};

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike,
};

fn main() -> ExitCode {
    let words: Vec<_> = env::args_os().skip(1).collect();
    let start = Instant::now();
    let status = Command::new(&words[0]).args(&words[1..]).status().unwrap();
    let wall = start.elapsed().as_micros();
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    let processor = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    eprintln!("used {} {processor} {wall}", usage.max_rss());
    ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(255))
}
