//! The agent on stdin and stdout of its parent: one peer, no socket.

use std::{
    fs,
    io::{Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
};

use kms_protocol::{Hello, KeyRef, NoFields, Opcode, PROTOCOL_VERSION, Status};
use kms_tests::{
    Reply, Wire,
    agent::fresh_folder,
    process::{PATIENCE, ends_within, send_signal, status_number, wait_for, wait_until},
    start::{agent_command, fails, is_empty, output_of},
    wire::{NO_CONTEXT, add_frame, frame, split_replies, use_frame},
};
use nix::sys::signal::Signal;

/// An agent with pipes, and what it has said to stderr at its end.
struct Piped(Child);

impl Piped {
    fn start(folder: &Path) -> Self {
        let mut command = agent_command(folder, &["--memory", "--stdio"]);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        Self(child.unwrap())
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// Ends the requests; all that comes until the agent closes its end.
    fn finish(mut self) -> (ExitStatus, Vec<Reply>, String) {
        drop(self.0.stdin.take());
        let (mut stdout, mut stderr) = (self.0.stdout.take().unwrap(), self.0.stderr.take().unwrap());
        let replies = thread::spawn(move || {
            let mut bytes = Vec::new();
            stdout.read_to_end(&mut bytes).map(|_| bytes)
        });
        let status = wait_for(&mut self.0);
        let mut log = String::new();
        stderr.read_to_string(&mut log).unwrap();
        let bytes = replies.join().unwrap().unwrap();
        // Nothing but whole frames: no message of the agent is among them.
        (status, split_replies(&bytes), log)
    }
}

impl Drop for Piped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn hello() -> Vec<u8> {
    frame(Opcode::Hello, 1, &Hello { version: PROTOCOL_VERSION }, &[])
}

fn ping(request_id: u32) -> Vec<u8> {
    frame(Opcode::Ping, request_id, &NoFields {}, &[])
}

#[test]
fn what_was_asked_before_the_end_of_stdin_is_answered() {
    let folder = fresh_folder(0o700);
    let mut agent = Piped::start(folder.path());
    agent.send(&[hello(), add_frame(2, [7; 16], "a", Some(&[1; 32]))].concat());
    // More than a buffer of the pump, all of it before anything is read.
    agent.send(&(3..3003).flat_map(ping).collect::<Vec<_>>());
    let (status, replies, stderr) = agent.finish();
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert_eq!(replies.len(), 3002);
    for (reply, id) in replies.iter().zip(1..) {
        assert_eq!((reply.status, reply.request_id), (Status::Ok, id));
    }
    assert!(stderr.contains("ready for the peer on stdin and stdout"), "{stderr}");
    // Without a request too.
    assert_eq!(Piped::start(folder.path()).finish().0.code(), Some(0));
    // A request that is no frame ends it, as on every connection.
    let mut agent = Piped::start(folder.path());
    agent.send(&[0xff; 64]);
    assert!(ends_within(agent.0.id().cast_signed(), PATIENCE));
    assert!(is_empty(folder.path()));
}

#[test]
fn replies_that_nobody_reads_stop_the_requests_and_nothing_else() {
    let folder = fresh_folder(0o700);
    let mut agent = Piped::start(folder.path());
    let pid = agent.0.id().cast_signed();
    let mut stdin = agent.0.stdin.take().unwrap();
    // 12 MiB in each direction, which fit no pipe, socket or buffer on the way.
    const ASKED: u32 = 200;
    let writer = thread::spawn(move || {
        stdin.write_all(&[hello(), add_frame(1, [7; 16], "a", None)].concat()).unwrap();
        for id in 2..2 + ASKED {
            stdin
                .write_all(&use_frame(Opcode::Encrypt, id, KeyRef::Name("a"), NO_CONTEXT, &[7; 60_000]))
                .unwrap();
        }
    });
    // It comes to rest with everything full, and does not turn round and round.
    let rests = || {
        fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(|task| {
            let stat = fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
            stat.rsplit_once(") ").unwrap().1.starts_with('S')
        })
    };
    let mut looks = 0;
    wait_until("the agent waits for its peer", || {
        looks = if rests() { looks + 1 } else { 0 };
        looks == 100
    });
    assert!(!writer.is_finished());
    assert!(status_number(pid, "VmRSS") < 32 * 1024, "it holds little of what was asked");
    let (status, replies, stderr) = agent.finish();
    writer.join().unwrap();
    assert_eq!(status.code(), Some(0), "{stderr}");
    assert_eq!(replies.len(), 2 + ASKED as usize);
    for (reply, id) in replies.iter().skip(2).zip(2..) {
        assert_eq!((reply.status, reply.request_id), (Status::Ok, id));
        assert!(reply.payload.len() > 60_000);
    }
}

/// One socket for both directions: with credentials, and ended in either way.
#[test]
fn a_socket_for_both_is_a_connection_like_every_other() {
    let folder = fresh_folder(0o700);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs = OwnedFd::from(theirs);
    let mut command = agent_command(folder.path(), &["--memory", "--stdio"]);
    command.stdin(theirs.try_clone().unwrap()).stdout(theirs).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    // The command holds descriptors of their end.
    drop(command);
    let mut wire = Wire::over(ours);
    wire.hello();
    wire.generate("a").unwrap();
    let sealed = wire.encrypt("a", NO_CONTEXT, b"plain").unwrap();
    assert_eq!(wire.decrypt("a", NO_CONTEXT, &sealed).unwrap(), b"plain");
    assert_eq!(wire.fact("pid"), child.id().to_string());
    assert_eq!(wire.fact("connections"), "1");
    // Nothing listens, and nothing is in the file system.
    let sockets: Vec<String> = fs::read_dir(format!("/proc/{}/fd", child.id()))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok()?.into_os_string().into_string().ok())
        .filter_map(|target| Some(target.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let table = fs::read_to_string("/proc/net/unix").unwrap();
    let mut own = 0;
    for line in table.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if sockets.iter().any(|inode| fields.get(6) == Some(&inode.as_str())) {
            own += 1;
            assert_eq!((fields[3], fields.len()), ("00000000", 7), "it listens, or has a name: {line}");
        }
    }
    assert!(own >= 3, "{table}");
    assert!(is_empty(folder.path()));
    drop(wire);
    assert_eq!(wait_for(&mut child).code(), Some(0));
}

#[test]
fn it_ends_with_its_parent_and_at_a_signal() {
    let folder = fresh_folder(0o700);
    // Nobody is there to read, while stdin stays open: a pipe without a reader.
    let mut agent = Piped::start(folder.path());
    agent.send(&hello());
    let mut head = [0; 4];
    agent.0.stdout.as_mut().unwrap().read_exact(&mut head).unwrap();
    drop(agent.0.stdout.take());
    assert_eq!(wait_for(&mut agent.0).code(), Some(0));
    // A parent that is killed takes both with it.
    let mut sh = Command::new("/bin/sh");
    sh.args(["-c", r#"exec "$AGENT" --memory --stdio"#])
        .env("AGENT", kms_tests::programs::program("kms-agent"));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs = OwnedFd::from(theirs);
    sh.stdin(theirs.try_clone().unwrap()).stdout(theirs).stderr(Stdio::null()).current_dir(folder.path());
    let mut child = sh.spawn().unwrap();
    drop(sh);
    let mut wire = Wire::over(ours);
    wire.hello();
    send_signal(child.id().cast_signed(), Signal::SIGTERM);
    assert_eq!(wait_for(&mut child).code(), Some(0));
    assert!(wire.is_closed());
}

#[test]
fn what_cannot_be_read_or_written_is_told_by_its_status_too() {
    let folder = fresh_folder(0o700);
    let write_only = fs::File::create(folder.path().join("file")).unwrap();
    let mut command = agent_command(folder.path(), &["--memory", "--stdio"]);
    let (status, _, stderr) = output_of(command.stdin(write_only));
    assert_eq!(status.code(), Some(1), "{stderr}");
    let told = "kms-agent: error: cannot serve standard input and output: Bad file descriptor (os error 9)\n";
    assert_eq!(stderr.matches(told).count(), 1, "{stderr}");
}

#[test]
fn there_is_no_second_way_beside_it() {
    let folder = fresh_folder(0o700);
    for other in [&["-D"][..], &["-a", "s"], &["-k"], &["true"]] {
        let stderr = fails(agent_command(folder.path(), &["--memory", "--stdio"]).args(other), 64);
        assert!(stderr.contains("kms-agent: hint: "), "{stderr}");
    }
    let stderr = fails(&mut agent_command(folder.path(), &["--memory", "--stdio", "--config", "none"]), 1);
    assert!(stderr.contains("cannot read the configuration /") && stderr.contains("/none: "), "{stderr}");
    assert!(is_empty(folder.path()));
}
