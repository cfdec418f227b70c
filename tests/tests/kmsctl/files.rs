//! What `kmsctl` writes to: files that are whole or not there, devices, terminals, full disks.

use std::{
    fs::{self, File, Permissions},
    io::Read,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, symlink},
        process::ExitStatusExt,
    },
    path::Path,
    process::{Child, Command, Stdio},
};

use kms_tests::{
    kmsctl::{WAYS, prepare},
    on_small_disk,
    process::{Ran, run, send_signal, wait_for, wait_until},
    programs::{program, tool},
    wire::random_bytes,
};
use nix::{pty::openpty, sys::signal::Signal};

use super::{Scene, Untouched, names};

/// Each command that makes a file of a file, with an input for it: name, way, input.
fn makers(scene: &Scene, plaintext: &[u8]) -> Vec<[String; 3]> {
    let input = scene.put("in", plaintext);
    let ciphertext = scene.put("in.kms", &scene.encrypt("--local", plaintext, &[]));
    let mut makers = Vec::new();
    for way in WAYS {
        for (name, input) in [("encrypt", &input), ("decrypt", &ciphertext)] {
            makers.push([name.to_owned(), way.to_owned(), input.to_str().unwrap().to_owned()]);
        }
    }
    makers
}

fn command(scene: &Scene, name: &str, way: &str) -> Command {
    scene.kmsctl([name, "-k", "k", way])
}

/// Starts it with a pipe as stdin that has given half of the input, and waits until there is a half-written file.
fn half_done(scene: &Scene, mut command: Command, input: &[u8]) -> Child {
    let before = names(&scene.out());
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let pipe = child.stdin.as_mut().unwrap();
    std::io::Write::write_all(pipe, &input[..input.len() / 2]).unwrap();
    wait_until("there is a half-written file", || {
        let new: Vec<_> = names(&scene.out()).into_iter().filter(|name| !before.contains(name)).collect();
        new.iter().any(|name| fs::metadata(scene.out().join(name)).is_ok_and(|meta| meta.len() > 0))
    });
    child
}

#[test]
fn a_file_is_its_owners_alone_and_appears_when_it_is_whole() {
    let scene = Scene::new();
    let target = scene.out().join("file");
    for [name, way, input] in makers(&scene, &random_bytes(2 << 20)) {
        let input = fs::read(input).unwrap();
        for existing in [false, true] {
            let untouched = existing.then(|| Untouched::put(target.clone()));
            if existing {
                fs::set_permissions(&target, Permissions::from_mode(0o666)).unwrap();
            }
            // The umask would let everybody read it.
            let mut command = tool("sh");
            command.args(["-c", "umask 0; exec \"$0\" \"$@\""]).arg(program("kmsctl"));
            prepare(&mut command, &scene.agent.socket, [&name, "-k", "k", &way, "-o"]);
            command.arg(&target);
            let mut child = half_done(&scene, command, &input);
            let beside: Vec<_> = names(&scene.out()).into_iter().filter(|name| name != "file").collect();
            assert_eq!(beside.len(), 1, "{beside:?}");
            let half = fs::metadata(scene.out().join(&beside[0])).unwrap();
            assert_eq!(half.mode() & 0o7777, 0o600, "a half-written file is nobody else's either");
            match &untouched {
                Some(file) => assert_eq!(fs::metadata(&file.path).unwrap().ino(), file.inode),
                None => assert!(!target.exists()),
            }
            let mut pipe = child.stdin.take().unwrap();
            std::io::Write::write_all(&mut pipe, &input[input.len() / 2..]).unwrap();
            drop(pipe);
            assert!(wait_for(&mut child).success());
            let whole = fs::metadata(&target).unwrap();
            assert_eq!((whole.ino(), whole.mode() & 0o7777), (half.ino(), 0o600), "{name} {way}");
            assert_eq!(names(&scene.out()), ["file"]);
            fs::remove_file(&target).unwrap();
        }
    }
}

#[test]
fn a_symlink_is_followed_and_stays() {
    let scene = Scene::new();
    let plaintext = random_bytes(1000);
    for elsewhere in ["old", "new"] {
        for [name, way, input] in makers(&scene, &plaintext) {
            let link = scene.out().join("link");
            symlink(format!("../{elsewhere}"), &link).unwrap();
            let target = scene.path(elsewhere);
            if elsewhere == "old" {
                fs::write(&target, "old").unwrap();
            }
            let _ = run(command(&scene, &name, &way).arg("-o").arg(&link).arg(&input)).done();
            assert_eq!(fs::read_link(&link).unwrap(), Path::new("..").join(elsewhere));
            let meta = fs::symlink_metadata(&target).unwrap();
            assert!(meta.is_file() && meta.mode() & 0o7777 == 0o600);
            assert_eq!(fs::read(&target).unwrap() == plaintext, name == "decrypt");
            assert_eq!(names(&scene.out()), ["link"]);
            fs::remove_file(link).unwrap();
            fs::remove_file(target).unwrap();
        }
    }
    assert_eq!(names(scene.folder.path()), ["in", "in.kms", "out", "plaintext"]);
}

#[test]
fn a_signal_in_the_middle_leaves_no_file() {
    let scene = Scene::new();
    let plaintext = random_bytes(4 << 20);
    for [name, way, input] in makers(&scene, &plaintext) {
        let input = fs::read(input).unwrap();
        for (signal, existing) in [
            (Signal::SIGINT, false),
            (Signal::SIGTERM, true),
            (Signal::SIGHUP, false),
            (Signal::SIGQUIT, false),
        ] {
            let target = scene.out().join("file");
            let untouched = existing.then(|| Untouched::put(target.clone()));
            // Whoever runs the tests in the background may ignore some of them, and children inherit that.
            let mut command = tool("env");
            command.arg("--default-signal=INT,TERM,HUP,QUIT").arg(program("kmsctl"));
            prepare(&mut command, &scene.agent.socket, [&name, "-k", "k", &way, "-o"]);
            let mut child = half_done(
                &scene,
                {
                    command.arg(&target);
                    command
                },
                &input,
            );
            send_signal(child.id().cast_signed(), signal);
            assert_eq!(wait_for(&mut child).signal(), Some(signal as i32), "{name} {way}");
            match untouched {
                Some(file) => {
                    file.check();
                    fs::remove_file(file.path).unwrap();
                }
                None => assert_eq!(names(&scene.out()), [""; 0], "{name} {way}"),
            }
        }
    }
}

#[test]
fn a_signal_that_is_ignored_ends_nothing_and_takes_no_file() {
    let scene = Scene::new();
    for [name, way, input] in makers(&scene, &random_bytes(4 << 20)) {
        let input = fs::read(input).unwrap();
        for ends in [false, true] {
            // As under `nohup`.
            let mut command = tool("env");
            command.args(["--default-signal=TERM", "--ignore-signal=INT,HUP"]).arg(program("kmsctl"));
            prepare(&mut command, &scene.agent.socket, [&name, "-k", "k", &way, "-o"]);
            command.arg(scene.out().join("file"));
            let mut child = half_done(&scene, command, &input);
            let pid = child.id().cast_signed();
            send_signal(pid, Signal::SIGHUP);
            send_signal(pid, Signal::SIGINT);
            if ends {
                send_signal(pid, Signal::SIGTERM);
                assert_eq!(wait_for(&mut child).signal(), Some(Signal::SIGTERM as i32), "{name} {way}");
                assert_eq!(names(&scene.out()), [""; 0], "{name} {way}");
                continue;
            }
            let mut pipe = child.stdin.take().unwrap();
            std::io::Write::write_all(&mut pipe, &input[input.len() / 2..]).unwrap();
            drop(pipe);
            assert!(wait_for(&mut child).success(), "{name} {way}");
            assert_eq!(names(&scene.out()), ["file"], "{name} {way}");
            fs::remove_file(scene.out().join("file")).unwrap();
        }
    }
}

#[test]
fn a_signal_at_the_moment_in_which_a_file_is_made_leaves_none() {
    let scene = Scene::new();
    for [name, way, input] in makers(&scene, b"plaintext") {
        // Every file is open for a while before the program knows of it. The tracer is not the parent, so that the child that we
        // have is kmsctl itself.
        let mut command = tool("strace");
        command.args(["-D", "-f", "-o", "/dev/null", "-e", "trace=openat"]);
        command.args(["-e", "inject=openat:delay_exit=20000"]);
        command.arg(tool("env").get_program()).arg("--default-signal=TERM");
        command.arg(program("kmsctl"));
        prepare(&mut command, &scene.agent.socket, [&name, "-k", "k", &way, "-o"]);
        let mut child = command.arg(scene.out().join("file")).arg(input).spawn().unwrap();
        wait_until("there is a file", || !names(&scene.out()).is_empty());
        send_signal(child.id().cast_signed(), Signal::SIGTERM);
        assert_eq!(wait_for(&mut child).signal(), Some(Signal::SIGTERM as i32), "{name} {way}");
        assert_eq!(names(&scene.out()), [""; 0], "{name} {way}");
    }
}

#[test]
fn a_full_disk_leaves_no_file_and_no_harm() {
    let scene = Scene::new();
    let makers = makers(&scene, &random_bytes(4 << 20));
    let out = scene.out();
    on_small_disk(&out, 2 << 20, || {
        let no_space = |ran: &Ran| {
            let message = ran.refusal(1).to_owned();
            assert!(message.to_lowercase().contains("no space left"), "{message}");
        };
        for [name, way, input] in &makers {
            let target = out.join("file");
            no_space(&run(command(&scene, name, way).arg("-o").arg(&target).arg(input)));
            assert_eq!(names(&out), [""; 0], "{name} {way}");
            let untouched = Untouched::put(target);
            no_space(&run(command(&scene, name, way).arg("-o").arg(&untouched.path).arg(input)));
            untouched.check();
            fs::remove_file(untouched.path).unwrap();
        }
        // The control: what fits is written.
        let small = scene.put("small", b"small");
        let _ = run(command(&scene, "encrypt", "--local").arg("-o").arg(out.join("file")).arg(small)).done();
        assert_eq!(names(&out), ["file"]);
    });
    assert_eq!(names(&out), [""; 0], "that disk is gone");
    for [name, way, input] in &makers {
        let ran = run(command(&scene, name, way).args(["-o", "/dev/full"]).arg(input));
        assert!(ran.refusal(1).contains("cannot write the output"), "{}", ran.stderr);
        let full = File::options().write(true).open("/dev/full").unwrap();
        let ran = run(command(&scene, name, way).arg(input).stdout(full));
        assert!(ran.message(1).contains("cannot write the output"), "{}", ran.stderr);
    }
}

#[test]
fn a_file_can_be_replaced_by_its_own_ciphertext_and_back() {
    let scene = Scene::new();
    for size in [0, 1000, 3 << 20] {
        for way in WAYS {
            let plaintext = random_bytes(size);
            let file = scene.out().join("file");
            fs::write(&file, &plaintext).unwrap();
            let _ = run(command(&scene, "encrypt", way).arg("-o").arg(&file).arg(&file)).done();
            let ciphertext = fs::read(&file).unwrap();
            assert_eq!(ciphertext.len(), 188 + size + 16 * (size / 16_384 + 1));
            // What does not open is still there afterwards.
            let mut damaged = ciphertext.clone();
            *damaged.last_mut().unwrap() ^= 1;
            fs::write(&file, &damaged).unwrap();
            let _ = run(command(&scene, "decrypt", way).arg("-o").arg(&file).arg(&file)).refusal(1);
            assert!(fs::read(&file).unwrap() == damaged);
            fs::write(&file, &ciphertext).unwrap();
            let _ = run(command(&scene, "decrypt", way).arg("-o").arg(&file).arg(&file)).done();
            assert!(fs::read(&file).unwrap() == plaintext);
            assert_eq!(names(&scene.out()), ["file"]);
            fs::remove_file(file).unwrap();
        }
    }
}

#[test]
fn output_that_cannot_be_is_refused_before_anything_is_written() {
    let scene = Scene::new();
    for [name, way, input] in makers(&scene, b"plaintext") {
        let nowhere = scene.out().join("no/file");
        for target in [scene.out(), nowhere] {
            let ran = run(command(&scene, &name, &way).arg("-o").arg(&target).arg(&input));
            assert!(ran.refusal(1).starts_with("cannot write "), "{}", ran.stderr);
        }
        let missing =
            run(command(&scene, &name, &way).arg("-o").arg(scene.out().join("file")).arg("missing"));
        assert!(missing.refusal(1).starts_with("cannot open missing"), "{}", missing.stderr);
        assert_eq!(names(&scene.out()), [""; 0]);
    }
}

#[test]
fn a_terminal_gets_no_ciphertext_unasked() {
    let scene = Scene::new();
    let input = scene.put("in", b"plaintext");
    for way in WAYS {
        // What the terminal was shown, given what else is on the command line.
        let shown = |arguments: &[&str]| {
            let terminal = openpty(None, None).unwrap();
            let mut encrypt = command(&scene, "encrypt", way);
            let ran = run(encrypt.args(arguments).arg(&input).stdout(terminal.slave));
            // With it goes the other end of the terminal.
            drop(encrypt);
            let mut shown = Vec::new();
            let mut buffer = [0; 4096];
            let mut master = File::from(terminal.master);
            while let Ok(count @ 1..) = master.read(&mut buffer) {
                shown.extend_from_slice(&buffer[..count]);
            }
            (ran, shown)
        };
        let (ran, bytes) = shown(&[]);
        assert_eq!(ran.message(64), "binary data does not go to a terminal unasked");
        assert!(ran.stderr.contains("kmsctl: hint: write to a file with -o FILE"), "{}", ran.stderr);
        assert_eq!(bytes, b"");
        // The control: asked for, it goes there.
        let (ran, bytes) = shown(&["-o", "-"]);
        let _ = ran.done();
        assert!(bytes.starts_with(&[0x92, 0x6b, 0x1c]), "{bytes:?}");
    }
}
