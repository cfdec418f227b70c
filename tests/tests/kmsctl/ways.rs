//! Local and remote streams are one format: what the one made the other opens. And the way to an agent that is not there yet.

use std::{fs, os::unix::fs::symlink, time::Duration};

use kms_tests::{
    Agent,
    kmsctl::{WAYS, kmsctl},
    process::{ends_within, run, run_with_input, wait_for, wait_until},
    wire::random_bytes,
};

use super::Scene;

#[test]
fn what_one_way_encrypted_the_other_decrypts() {
    let scene = Scene::new();
    let sizes = [0, 1, 16_383, 16_384, 16_385, 262_143, 262_144, 262_145, 1 << 20, (5 << 20) + 7, 12 << 20];
    for size in sizes {
        let plaintext = random_bytes(size);
        for (sealed, opened) in [(WAYS[0], WAYS[1]), (WAYS[1], WAYS[0])] {
            for context in [&[][..], &["table=people", "row="]] {
                let stream = scene.encrypt(sealed, &plaintext, context);
                assert_eq!(stream.len(), 188 + size + 16 * (size / 16_384 + 1), "{sealed} {size}");
                let pairs: Vec<_> = context.iter().flat_map(|pair| ["-C", pair]).collect();
                let decrypt = || {
                    let mut command = scene.kmsctl(["decrypt", "-k", "k", opened]);
                    command.args(&pairs);
                    command
                };
                let input = scene.put("ciphertext", &stream);
                assert!(run(decrypt().arg(&input)).done() == plaintext, "{opened} {size}");
                assert!(run_with_input(&mut decrypt(), &stream).done() == plaintext, "{opened} {size}");
                let output = scene.out().join("plain");
                let _ = run(decrypt().arg("-o").arg(&output).arg(&input)).done();
                assert!(fs::read(output).unwrap() == plaintext, "{opened} {size}");
            }
        }
    }
}

#[test]
fn input_from_a_pipe_gives_a_stream_of_the_same_form() {
    let scene = Scene::new();
    for size in [0, 1, 16_384, (3 << 20) + 1] {
        let plaintext = random_bytes(size);
        for (sealed, opened) in [(WAYS[0], WAYS[1]), (WAYS[1], WAYS[0])] {
            let mut encrypt = scene.kmsctl(["encrypt", "-k", "k", sealed, "-"]);
            let stream = run_with_input(&mut encrypt, &plaintext).done();
            let mut decrypt = scene.kmsctl(["decrypt", "--any-key", opened]);
            let ran = run_with_input(&mut decrypt, &stream);
            assert!(ran.stderr.starts_with("kmsctl: note: the key is k, id "), "{}", ran.stderr);
            assert!(ran.stdout == plaintext);
        }
    }
}

#[test]
fn who_waits_for_an_unlocked_agent_waits_over_the_end_of_a_locked_one() {
    let mut scene = Scene::new();
    let socket = scene.path("socket");
    symlink(&scene.agent.socket, &socket).unwrap();
    let _ = run_with_input(&mut scene.kmsctl(["lock", "--passphrase-file", "-"]), b"passphrase");
    let mut child = kmsctl(&socket, ["wait", "--unlocked"]).spawn().unwrap();
    wait_until("it has asked", || {
        let status = run(&mut scene.kmsctl(["status", "--json"])).stdout;
        String::from_utf8(status).unwrap().contains("\"connections\":\"2\"")
    });
    scene.agent.kill();
    // Longer than one request is repeated.
    assert!(!ends_within(child.id().cast_signed(), Duration::from_secs(6)));
    let next = Agent::start();
    fs::remove_file(&socket).unwrap();
    symlink(&next.socket, &socket).unwrap();
    assert!(wait_for(&mut child).success());
}
