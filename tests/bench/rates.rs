//! How many 64-byte encrypts a second: pipelined and in batches, beside the same work in one process and beside the floor.

use std::{
    fs,
    hint::black_box,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Instant,
};

use kms_envelope::{
    ContextRef, ExpandKey, Header, KeyId, KeyVersion, Purpose, SALT_LEN, message_len, seal_message,
};
use kms_protocol::{NoFields, Opcode, push_frame};
use nix::unistd::Pid;

use super::{
    ECHO_LEN, EMPTY_CONTEXT, Outcome, ROUNDS, ask, encrypt_request, greet, pin, pipelined,
    plot::{Line, plot},
    spread, start_agent, start_echo,
};

/// How many are under way, or in one batch.
const SIZES: [usize; 8] = [2, 8, 32, 64, 128, 256, 1000, 4000];
const PLAINTEXT_LEN: usize = 64;
/// Operations of one point in one round; fewer where each waits for another core.
const COUNT: usize = 30_000;

fn count_for(size: usize) -> usize {
    COUNT.min(size * 2000)
}

/// Salts that are drawn at once, as the agent does.
const SALTS: usize = 16;

/// The same work without an agent, on one core.
fn in_process() -> Outcome<f64> {
    let key = ExpandKey::new(&[7; 32]);
    let key_version = KeyVersion::new(1).ok_or("no version")?;
    let header = Header { purpose: Purpose::Message, key_id: KeyId::from_bytes([1; 16]), key_version };
    let context = ContextRef::parse(&EMPTY_CONTEXT)?;
    let plaintext = [0x55; PLAINTEXT_LEN];
    let mut out = vec![0; message_len(PLAINTEXT_LEN)];
    let mut kernel = fs::File::open("/dev/urandom")?;
    let mut salts = [[0; SALT_LEN]; SALTS];
    let start = Instant::now();
    for _ in 0..COUNT / SALTS {
        kernel.read_exact(salts.as_flattened_mut())?;
        for salt in &salts {
            seal_message(&key, &header, context, salt, black_box(&plaintext), &mut out)?;
            black_box(&out);
        }
    }
    Ok((COUNT / SALTS * SALTS) as f64 / start.elapsed().as_secs_f64())
}

/// Operations a second in batches, one after the other.
fn batched(stream: &mut UnixStream, batch: &[u8], answer_len: usize, items: usize) -> Outcome<f64> {
    let mut answer = vec![0; answer_len];
    let batches = count_for(items).div_ceil(items);
    let start = Instant::now();
    for _ in 0..batches {
        stream.write_all(batch)?;
        stream.read_exact(&mut answer)?;
    }
    Ok((batches * items) as f64 / start.elapsed().as_secs_f64())
}

/// Median, least and most of a point.
type Point = (f64, f64, f64);

fn points(rates: &mut [Vec<f64>]) -> Vec<Point> {
    rates.iter_mut().map(|rates| spread(rates)).collect()
}

pub(crate) fn run(folder: Option<&Path>) -> Outcome<()> {
    let place = tempfile::tempdir()?;
    let (echo, mut echo_stream) = start_echo(place.path(), "echo.sock")?;
    let (agent, mut stream, path) = start_agent(place.path(), "")?;
    let mut batch_stream = greet(&path)?;
    let request = encrypt_request(PLAINTEXT_LEN)?;
    let answer_len = ask(&mut stream, &request)?.len();
    let mut batches = Vec::new();
    for items in SIZES {
        let mut batch = Vec::new();
        push_frame(&mut batch, Opcode::Batch.code(), 9, &NoFields {}, &request.repeat(items))?;
        let answer_len = ask(&mut batch_stream, &batch)?.len();
        batches.push((batch, answer_len));
    }
    pin(Pid::from_raw(0), 0)?;
    pin(agent.pid(), 1)?;
    pin(echo.pid(), 1)?;
    let mut floor = vec![Vec::new(); SIZES.len()];
    let (mut singly, mut batchwise, mut alone) = (floor.clone(), floor.clone(), vec![Vec::new()]);
    for round in 0..=ROUNDS {
        let note = |rates: &mut Vec<f64>, rate: f64| {
            // The first round warms up.
            if round > 0 {
                rates.push(rate);
            }
        };
        note(&mut alone[0], in_process()?);
        for (at, size) in SIZES.into_iter().enumerate() {
            // What a socket holds in both directions, so that nobody has to read and write at a time.
            if size <= 256 {
                let echoed = [0x55; ECHO_LEN];
                note(&mut floor[at], pipelined(&mut echo_stream, &echoed, ECHO_LEN, size, count_for(size))?);
                note(&mut singly[at], pipelined(&mut stream, &request, answer_len, size, count_for(size))?);
            }
            let (batch, answer_len) = &batches[at];
            note(&mut batchwise[at], batched(&mut batch_stream, batch, *answer_len, size)?);
        }
    }
    let alone = points(&mut alone)[0];
    let sizes = SIZES.iter().filter(|size| **size <= 256).count();
    let (floor, singly) = (points(&mut floor[..sizes]), points(&mut singly[..sizes]));
    let batchwise = points(&mut batchwise);
    println!("64-byte encrypts, client and agent on a core each; k/s: median (least to most) of {ROUNDS}");
    println!(
        "  in one process, no agent: {:.0} ({:.0} to {:.0})",
        alone.0 / 1e3,
        alone.1 / 1e3,
        alone.2 / 1e3
    );
    let mut table = String::from("what,size,median,least,most\n");
    let mut row = |what: &str, size: usize, (median, least, most): Point| {
        table += &format!("{what},{size},{median:.0},{least:.0},{most:.0}\n");
        let (median, least, most) = (median / 1e3, least / 1e3, most / 1e3);
        println!(
            "  {what:<10} {size:>5} {median:8.0} ({least:.0} to {most:.0})  {:5.2} x in one process",
            median * 1e3 / alone.0
        );
    };
    row("process", 1, alone);
    for (at, size) in SIZES.into_iter().enumerate() {
        if at < sizes {
            row("echo", size, floor[at]);
            row("pipelined", size, singly[at]);
        }
        row("batched", size, batchwise[at]);
    }
    if let Some(folder) = folder {
        let line = |points: &[Point]| {
            SIZES.iter().zip(points).map(|(size, point)| (*size as f64, point.0 / 1e3)).collect()
        };
        let lines = [
            Line { name: "echo of 64 bytes, pipelined", color: "#999999", points: line(&floor) },
            Line { name: "in one process", color: "#d55e00", points: line(&[alone; SIZES.len()]) },
            Line { name: "in a batch", color: "#009e73", points: line(&batchwise) },
            Line { name: "pipelined", color: "#0072b2", points: line(&singly) },
        ];
        fs::write(folder.join("rates.csv"), table)?;
        fs::write(
            folder.join("rates.svg"),
            plot(
                "64-byte encrypts, thousands a second",
                "under way on one connection, or in one batch",
                &lines,
            ),
        )?;
    }
    Ok(())
}
