//! Secrets and terminals: what must not be shown on one, and what a person says on one.

use std::{
    fs::{self, File},
    io::{Read, Write},
    process::{Command, Stdio},
};

use kms_tests::{
    kmsctl::prepare,
    process::run,
    programs::{program, tool},
};
use nix::pty::{OpenptyResult, openpty};

use super::Scene;

/// All that a terminal was shown, when nobody has its other end any more.
fn shown(terminal: OpenptyResult) -> Vec<u8> {
    let OpenptyResult { master, slave } = terminal;
    drop(slave);
    let (mut shown, mut buffer) = (Vec::new(), [0; 4096]);
    let mut master = File::from(master);
    while let Ok(count @ 1..) = master.read(&mut buffer) {
        shown.extend_from_slice(&buffer[..count]);
    }
    shown
}

/// A scene with the exportable key `out`, and a wrapped key.
fn scene() -> Scene {
    let scene = Scene::new();
    let _ = run(&mut scene.kmsctl(["add", "out", "--exportable"])).done();
    let key = scene.put("plain", b"0123456789abcdef");
    let _ = run(scene.kmsctl(["wrap", "-k", "k", "-o"]).arg(scene.path("wrapped")).arg(key)).done();
    scene
}

#[test]
fn a_plain_key_never_goes_to_a_terminal() {
    let scene = scene();
    let wrapped = scene.path("wrapped");
    let wrapped = wrapped.to_str().unwrap();
    let other = scene.path("other");
    let other = other.to_str().unwrap();
    for words in [
        &["export", "out", "--confirm", "out"][..],
        &["unwrap", "-k", "k", wrapped],
        &["random", "32"],
        &["datakey", "-k", "k", "--wrapped", other],
        &["datakey", "-k", "k", "--hex", "--wrapped", other],
    ] {
        for output in [None, Some("-"), Some("the name of the terminal")] {
            if words[0] == "datakey" && output.is_some() {
                continue;
            }
            let terminal = openpty(None, None).unwrap();
            let name = nix::unistd::ttyname(&terminal.slave).unwrap();
            let mut command = scene.kmsctl(["-q"]);
            command.args(words);
            match output {
                Some("-") => _ = command.args(["-o", "-"]).stdout(terminal.slave.try_clone().unwrap()),
                Some(_) => _ = command.arg("-o").arg(name),
                None => _ = command.stdout(terminal.slave.try_clone().unwrap()),
            }
            let ran = run(&mut command);
            drop(command);
            assert_eq!(ran.message(64), "a secret does not go to a terminal", "{words:?} {output:?}");
            assert_eq!(shown(terminal), b"", "{words:?} {output:?}");
        }
    }
    assert!(!scene.path("other").exists(), "a data key was made for nobody");
    // Digits that were asked for are text, and so is JSON.
    let terminal = openpty(None, None).unwrap();
    let mut command = scene.kmsctl(["unwrap", "-k", "k", "--hex", wrapped]);
    let _ = run(command.stdout(terminal.slave.try_clone().unwrap())).done();
    drop(command);
    assert_eq!(shown(terminal), b"30313233343536373839616263646566\r\n");
}

#[test]
fn an_export_needs_a_yes_on_the_terminal() {
    let scene = scene();
    for (answer, exported) in [("yes\n", true), ("no\n", false), ("y\n", false), ("\n", false)] {
        let OpenptyResult { master, slave } = openpty(None, None).unwrap();
        // Its own session, with this terminal and nothing else to ask on.
        let mut command: Command = tool("setsid");
        command.args(["--ctty", "--wait"]).arg(program("kmsctl"));
        prepare(&mut command, &scene.agent.socket, ["export", "out", "-o"]);
        command.arg(scene.out().join("key")).stdin(Stdio::from(slave));
        let mut child = command.spawn().unwrap();
        drop(command);
        // Nobody else has the other end: when it ends without asking, so does reading.
        let mut master = File::from(master);
        let mut asked = String::new();
        while !asked.contains("Type yes to go on: ") {
            let mut buffer = [0; 256];
            let count = master.read(&mut buffer).unwrap();
            asked += std::str::from_utf8(&buffer[..count]).unwrap();
        }
        assert!(asked.contains("The key out leaves the agent"), "{asked}");
        master.write_all(answer.as_bytes()).unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(if exported { 0 } else { 1 }), "{answer:?}");
        assert_eq!(fs::read(scene.out().join("key")).map(|key| key.len()).ok(), exported.then_some(32));
        let _ = fs::remove_file(scene.out().join("key"));
    }
}
