//! Memory for each idle connection and each key, and what many keys cost a request.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::Instant,
};

use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::Pid,
};

use super::{
    Outcome, ROUNDS, Server, add_request, ask, encrypt_request, greet, pin, spread, start_agent,
    wait_readable,
};

/// Lone requests of one round.
const SINGLES: usize = 10_000;

/// A line of `/proc/PID/status`, in bytes.
fn bytes(server: &Server, name: &str) -> Outcome<f64> {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid()))?;
    let line = status.lines().find(|line| line.starts_with(name)).ok_or("no such line")?;
    Ok(line.split_whitespace().nth(1).ok_or("no number")?.parse::<f64>()? * 1024.0)
}

/// The median of lone requests, in microseconds.
fn p50(stream: &mut UnixStream, request: &[u8], answer: &mut [u8]) -> Outcome<f64> {
    let mut times = Vec::with_capacity(SINGLES);
    for _ in 0..SINGLES {
        let start = Instant::now();
        stream.write_all(request)?;
        wait_readable(stream)?;
        stream.read_exact(answer)?;
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times[SINGLES / 2].as_secs_f64() * 1e6)
}

pub(crate) fn run() -> Outcome<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    println!("idle connections, each of which has said hello; resident memory of the agent");
    for count in [1000, 5000] {
        let folder = tempfile::tempdir()?;
        let (agent, _stream, path) = start_agent(folder.path(), "[limits]\nconnections_per_uid = 6000\n")?;
        let before = bytes(&agent, "VmRSS")?;
        let mut idle = Vec::new();
        for _ in 0..count {
            idle.push(greet(&path)?);
        }
        let each = (bytes(&agent, "VmRSS")? - before) / f64::from(count);
        println!("  {count:>6}: {each:.0} bytes each");
    }
    println!(
        "keys in memory, each with a name of 16 bytes; p50 of a 32-byte encrypt under one of them, one core"
    );
    let mut candidates = Vec::new();
    for count in [10u32, 100_000] {
        let folder = tempfile::tempdir()?;
        let (agent, mut stream, _) = start_agent(folder.path(), "")?;
        let (resident, locked) = (bytes(&agent, "VmRSS")?, bytes(&agent, "VmLck")?);
        for first in (0..count).step_by(100) {
            let last = count.min(first + 100);
            let mut requests = Vec::new();
            for number in first..last {
                requests.extend(add_request(u128::from(number) + 2, &format!("key-{number:012}"))?);
            }
            stream.write_all(&requests)?;
            // Every reply to `add` is as long as the next.
            let mut replies = vec![0; ADDED_LEN * usize::try_from(last - first)?];
            stream.read_exact(&mut replies)?;
        }
        let (resident, locked) = (bytes(&agent, "VmRSS")? - resident, bytes(&agent, "VmLck")? - locked);
        let total = bytes(&agent, "VmRSS")?;
        println!(
            "  {count:>6}: {:.0} bytes each, {:.1} MiB resident in all, {:.0} KiB more locked",
            resident / f64::from(count),
            total / 1048576.0,
            locked / 1024.0
        );
        candidates.push((count, folder, agent, stream, Vec::new()));
    }
    let request = encrypt_request(32)?;
    pin(Pid::from_raw(0), 0)?;
    for round in 0..=ROUNDS {
        for (_, _, agent, stream, times) in &mut candidates {
            pin(agent.pid(), 0)?;
            let mut answer = ask(stream, &request)?;
            let time = p50(stream, &request, &mut answer)?;
            if round > 0 {
                times.push(time);
            }
        }
    }
    for (count, _, _, _, times) in &mut candidates {
        let (median, least, most) = spread(times);
        println!("  {count:>6}: p50 {median:.2} us ({least:.2} to {most:.2})");
    }
    Ok(())
}

/// Length of a reply to `add`: head, id, version, check value, created.
const ADDED_LEN: usize = 16 + 16 + 4 + 8 + 1;
