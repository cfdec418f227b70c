//! The shipped `kmsctl` with the shipped agent: what it refuses, what it opens, what it leaves behind.
//!
//! One binary, so that the scenarios share the machine's cores; each has an agent of its own, which ends in order and without
//! a panic counted.

mod attacks;
mod files;
mod interop;
mod rewrap;
mod secrets;
mod server;
mod traffic;
mod ways;

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

use kms_envelope::{SEALED_CHUNK_LEN, STREAM_HEAD_LEN};
use kms_tests::{Agent, fresh_folder, kmsctl, process::run, wire::random};
use tempfile::TempDir;

/// Plaintext that a pipe gets only when all of it was found authentic.
const HELD: usize = 8 << 20;

/// Input of this length or more is read at several places at once, shorter input from front to back.
const AT_SEVERAL_PLACES: usize = (1 << 20) + SEALED_CHUNK_LEN;

/// Where chunk `number` of a stream begins.
fn chunk_at(number: usize) -> usize {
    STREAM_HEAD_LEN + number * SEALED_CHUNK_LEN
}

/// An agent with the key `k`, and folders for what goes into `kmsctl` and what comes out.
struct Scene {
    agent: Agent,
    /// The 32 bytes of `k`.
    kek: [u8; 32],
    folder: TempDir,
}

impl Scene {
    fn new() -> Self {
        let scene = Self { agent: Agent::start(), kek: random(), folder: fresh_folder(0o700) };
        fs::create_dir(scene.out()).unwrap();
        let kek = scene.put("kek", &scene.kek);
        let mut add = scene.kmsctl(["add", "k", "--memory", "--import"]);
        let _ = run(add.arg(&kek)).done();
        fs::remove_file(kek).unwrap();
        scene
    }

    fn kmsctl<const N: usize>(&self, words: [&str; N]) -> Command {
        kmsctl(&self.agent.socket, words)
    }

    /// A file for input.
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file for input.
    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// The folder that output goes to, and nothing else.
    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    /// The ciphertext of a stream under `k`.
    fn encrypt(&self, way: &str, plaintext: &[u8], context: &[&str]) -> Vec<u8> {
        let input = self.put("plaintext", plaintext);
        let mut command = self.kmsctl(["encrypt", "-k", "k", way]);
        run(command.args(context.iter().flat_map(|pair| ["-C", pair])).arg(input)).done()
    }
}

/// The names in a folder, in order.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A file that must not be touched.
struct Untouched {
    path: PathBuf,
    inode: u64,
}

impl Untouched {
    const CONTENT: &str = "from another day";

    fn put(path: PathBuf) -> Self {
        fs::write(&path, Self::CONTENT).unwrap();
        Self { inode: fs::metadata(&path).unwrap().ino(), path }
    }

    /// It is as it was, and alone in its folder.
    fn check(&self) {
        assert_eq!(fs::metadata(&self.path).unwrap().ino(), self.inode, "another file");
        assert_eq!(fs::read_to_string(&self.path).unwrap(), Self::CONTENT);
        let own = self.path.file_name().unwrap().to_str().unwrap();
        assert_eq!(names(self.path.parent().unwrap()), [own], "something is left beside it");
    }
}
