//! Who may serve: a server that is not trusted gets not one byte, whatever was to be sent to it.

use std::{
    fs::{self, Permissions},
    io::{self, Read},
    os::unix::{
        fs::{PermissionsExt, chown},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use kms_envelope::{CONTEXT_LEN_MAX, CONTEXT_PAIRS_MAX, MESSAGE_MAX};
use kms_protocol::{FRAME_MAX, Frame, NoFields, Opcode, PROTOCOL_VERSION, Status, Welcome, push_frame};
use kms_tests::{
    ALICE, Agent, BOB, as_uid, fresh_folder,
    kmsctl::prepare,
    process::{PATIENCE, Ran, run, run_with_input},
    programs::{SharedCopy, needs_root, program},
};
use nix::unistd::geteuid;
use tempfile::TempDir;

const ROOT: u32 = 0;

/// Somebody listens here.
struct Place {
    _folder: TempDir,
    socket: PathBuf,
    listener: UnixListener,
}

impl Place {
    /// A directory with its owner and mode, a socket with its owner, and who listens.
    fn new(directory: (u32, u32), socket_owner: u32, listener: u32) -> Self {
        let folder = fresh_folder(0o755);
        let run = folder.path().join("run");
        fs::create_dir(&run).unwrap();
        fs::set_permissions(&run, Permissions::from_mode(0o777)).unwrap();
        let socket = run.join("agent.sock");
        let listener = as_uid(listener, || UnixListener::bind(&socket).unwrap());
        listener.set_nonblocking(true).unwrap();
        fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
        chown(&socket, Some(socket_owner), None).unwrap();
        chown(&run, Some(directory.0), None).unwrap();
        fs::set_permissions(&run, Permissions::from_mode(directory.1)).unwrap();
        Self { _folder: folder, socket, listener }
    }

    /// How a client that has ended since was met: whether it connected, and all that it sent.
    fn heard(&self) -> Option<Vec<u8>> {
        let mut stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Err(error) => panic!("{error}"),
        };
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        Some(bytes)
    }
}

/// `kmsctl` under either uid, with files that it may read.
struct Caller {
    uid: u32,
    program: SharedCopy,
    folder: TempDir,
}

impl Caller {
    fn new(uid: u32) -> Self {
        needs_root();
        let folder = fresh_folder(0o755);
        fs::write(folder.path().join("key"), [7; 32]).unwrap();
        fs::write(folder.path().join("plaintext"), "a secret").unwrap();
        fs::create_dir(folder.path().join("out")).unwrap();
        chown(folder.path().join("out"), Some(uid), Some(uid)).unwrap();
        Self { uid, program: SharedCopy::of(&program("kmsctl"), 0o755), folder }
    }

    fn command(&self, socket: &Path, words: &[&str]) -> Command {
        let mut command = self.program.as_user(self.uid);
        prepare(&mut command, socket, words);
        command.current_dir(self.folder.path());
        command
    }

    /// Commands that would send keys, plaintext or a passphrase, and some that would not.
    fn all(&self, socket: &Path, more: &[&str]) -> Vec<Ran> {
        let commands: [&[&str]; 7] = [
            &["ping"],
            &["status"],
            &["add", "new", "--memory", "--import", "key"],
            &["encrypt", "-k", "k", "--remote", "-o", "out/file", "plaintext"],
            &["encrypt", "-k", "k", "-o", "out/file", "plaintext"],
            &["unlock", "--passphrase-file", "-"],
            &["lock", "--passphrase-file", "-"],
        ];
        let rans = commands.map(|words| {
            run_with_input(&mut self.command(socket, &[words, more].concat()), b"the passphrase\n")
        });
        assert_eq!(super::names(&self.folder.path().join("out")), [""; 0]);
        rans.into()
    }
}

const SERVER: &str = "who is not trusted to serve";

#[test]
fn a_server_of_another_user_gets_not_one_byte() {
    for client in [ROOT, BOB] {
        let caller = Caller::new(client);
        // What it is refused for, and whether that is seen before it connects.
        let cases = [
            (
                Place::new((ALICE, 0o755), ALICE, ALICE),
                format!("/run belongs to uid {ALICE}, {SERVER}"),
                true,
            ),
            (
                Place::new((ROOT, 0o1777), ALICE, ALICE),
                format!("/agent.sock belongs to uid {ALICE}, {SERVER}"),
                true,
            ),
            (Place::new((client, 0o755), ROOT, ALICE), format!("runs as uid {ALICE}, {SERVER}"), false),
            (Place::new((client, 0o755), client, ALICE), format!("runs as uid {ALICE}, {SERVER}"), false),
            (Place::new((ROOT, 0o777), ROOT, ROOT), "can be changed by everybody".to_owned(), true),
            (Place::new((client, 0o777), client, client), "can be changed by everybody".to_owned(), true),
        ];
        for (place, why, before) in cases {
            for ran in caller.all(&place.socket, &[]) {
                let message = ran.refusal(2);
                assert!(message.contains(&why), "{message}");
                assert!(ran.stderr.contains("\nkmsctl: hint: "), "{}", ran.stderr);
                let expected = if before { None } else { Some(Vec::new()) };
                assert_eq!(place.heard(), expected, "uid {client}: {message}");
            }
            assert_eq!(place.heard(), None);
        }
    }
}

/// Answers one client as an agent would, under this uid, and gives the requests that came.
fn serve(place: &Place, uid: u32) -> Vec<Opcode> {
    as_uid(uid, || {
        place.listener.set_nonblocking(false).unwrap();
        let (stream, _) = place.listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let (mut received, mut asked) = (Vec::new(), Vec::new());
        loop {
            while let Some(frame) = Frame::parse(&received, FRAME_MAX).unwrap() {
                let opcode = Opcode::from_code(frame.head.code).unwrap();
                let (mut reply, id, len) = (Vec::new(), frame.head.request_id, frame.frame_len());
                match opcode {
                    Opcode::Hello => push_frame(&mut reply, Status::Ok.code(), id, &welcome(), &[]).unwrap(),
                    _ => push_frame(&mut reply, Status::Ok.code(), id, &NoFields {}, &[]).unwrap(),
                }
                received.drain(..len);
                asked.push(opcode);
                io::Write::write_all(&mut &stream, &reply).unwrap();
            }
            let mut piece = [0; 4096];
            match (&stream).read(&mut piece) {
                // What was not read at the other end makes an error of its end.
                Ok(0) => return asked,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return asked,
                Ok(count) => received.extend_from_slice(&piece[..count]),
                Err(error) => panic!("{error}"),
            }
        }
    })
}

fn welcome() -> Welcome {
    Welcome {
        version: PROTOCOL_VERSION,
        frame_max: FRAME_MAX as u32,
        message_max: MESSAGE_MAX as u32,
        context_max: CONTEXT_LEN_MAX as u32,
        context_pairs_max: CONTEXT_PAIRS_MAX as u32,
        in_flight_max: 16,
        page_rows_max: 16,
        remote_streams_max: 16,
        opcodes: vec![Opcode::Hello.code(), Opcode::Ping.code()],
        constraints: Vec::new(),
        features: 0,
    }
}

/// Runs a client while `uid` answers it.
fn answered(command: &mut Command, place: &Place, uid: u32) -> (Ran, Vec<Opcode>) {
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(place, uid));
        let ran = run(command.stdin(Stdio::null()));
        (ran, server.join().unwrap())
    })
}

#[test]
fn the_user_that_is_named_may_serve_and_no_other() {
    assert_eq!(geteuid().as_raw(), ROOT);
    for client in [ROOT, BOB] {
        let caller = Caller::new(client);
        let named = ALICE.to_string();
        for place in [
            Place::new((ALICE, 0o755), ALICE, ALICE),
            Place::new((ROOT, 0o1777), ALICE, ALICE),
            Place::new((client, 0o755), client, ALICE),
        ] {
            let mut ping = caller.command(&place.socket, &["ping", "--server-uid", &named]);
            let (ran, asked) = answered(&mut ping, &place, ALICE);
            assert_eq!(
                String::from_utf8(ran.done()).unwrap(),
                format!("the agent at {}, uid {ALICE}, is there\n", place.socket.display())
            );
            assert_eq!(asked, [Opcode::Hello, Opcode::Ping]);
        }
        // Naming a user says nothing about a place that everybody can change, nor about another user.
        let open = Place::new((ALICE, 0o777), ALICE, ALICE);
        for ran in caller.all(&open.socket, &["--server-uid", &named]) {
            assert!(ran.refusal(2).contains("can be changed by everybody"), "{}", ran.stderr);
            assert_eq!(open.heard(), None);
        }
        let other = Place::new((ALICE, 0o755), ALICE, ALICE);
        for ran in caller.all(&other.socket, &["--server-uid", "4321"]) {
            assert!(ran.refusal(2).contains(SERVER), "{}", ran.stderr);
            assert_eq!(other.heard(), None);
        }
    }
}

/// As behind a socket that somebody else has made: who listened is trusted, who answers is not.
#[test]
fn who_answers_for_a_trusted_listener_is_judged_before_any_request() {
    for client in [ROOT, BOB] {
        let caller = Caller::new(client);
        let place = Place::new((client, 0o755), client, client);
        for words in [&["ping"][..], &["encrypt", "-k", "k", "--remote", "-o", "out/file", "plaintext"]] {
            let (ran, asked) = answered(&mut caller.command(&place.socket, words), &place, ALICE);
            assert!(ran.refusal(2).contains(&format!("runs as uid {ALICE}, {SERVER}")), "{}", ran.stderr);
            assert_eq!(asked, [Opcode::Hello]);
        }
        assert_eq!(super::names(&caller.folder.path().join("out")), [""; 0]);
        // The control: the same answers from a trusted user.
        let (ran, asked) = answered(&mut caller.command(&place.socket, &["ping"]), &place, client);
        let _ = ran.done();
        assert_eq!(asked, [Opcode::Hello, Opcode::Ping]);
    }
}

#[test]
fn the_agent_of_another_user_is_not_even_called() {
    let agent = Agent::builder().uid(ALICE).reachable_by_others().start();
    for client in [ROOT, BOB] {
        let caller = Caller::new(client);
        for ran in caller.all(&agent.socket, &[]) {
            assert!(ran.refusal(2).contains(SERVER), "{}", ran.stderr);
        }
        let refused = format!("refused a connection of another uid uid={client}");
        assert!(!agent.log().contains(&refused), "it was called");
        // Named, it is; and says by itself whom it serves.
        for ran in caller.all(&agent.socket, &["--server-uid", &ALICE.to_string()]) {
            assert!(ran.refusal(2).contains("closed the connection before its hello"), "{}", ran.stderr);
        }
        assert!(agent.log().contains(&refused));
    }
    let own = Caller::new(ALICE);
    let _ = run(&mut own.command(&agent.socket, &["ping"])).done();
    agent.as_owner(|| assert_eq!(agent.connect().fact("connections"), "1"));
}
