//! A second implementation of the formats opens what ours made, and the other way round.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use kms_envelope::EncryptionContext;
use kms_protocol::KeyRef;
use kms_tests::{
    kmsctl::WAYS,
    process::{output, run, run_with_input},
    wire::random_bytes,
};

use super::Scene;

/// A Python that has the package.
fn python() -> &'static Path {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(|| {
        let python = PathBuf::from(env::var_os("KMS_TEST_PYTHON").unwrap_or_else(|| "python3".into()));
        let import = "from cryptography.cobblestone import Cobblestone256Decryptor";
        let (status, _, stderr) = output(Command::new(&python).args(["-c", import]));
        assert!(
            status.success(),
            "this test needs the package `cryptography` 50 from PyPI: tests/run makes a virtual environment with it; or name \
             a Python that has it with KMS_TEST_PYTHON ({} has not: {})",
            python.display(),
            stderr.lines().last().unwrap_or_default()
        );
        python
    })
}

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn cobblestone(command: &str) -> Command {
    let mut python = Command::new(python());
    python.arg(workspace().join("tests/interop/cobblestone.py")).arg(command);
    python.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    python
}

/// The second implementation, with the key of a scene.
struct Other<'a> {
    scene: &'a Scene,
    key_id: [u8; 16],
}

impl<'a> Other<'a> {
    fn new(scene: &'a Scene) -> Self {
        let key_id = scene.agent.connect().describe(KeyRef::Name("k")).unwrap().key.id;
        Self { scene, key_id }
    }

    fn run(&self, command: &str, context: &[&str], input: &[u8]) -> Vec<u8> {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let mut python = cobblestone(command);
        python.args(["--kek", &hex(&self.scene.kek), "--key-id", &hex(&self.key_id), "--version", "1"]);
        python.args(context.iter().flat_map(|pair| ["--context", pair]));
        let ran = run_with_input(&mut python, input);
        assert!(ran.status.success(), "{command}: {}", ran.stderr);
        ran.stdout
    }

    /// What `kmsctl decrypt` makes of it.
    fn ours(&self, way: &str, context: &[&str], ciphertext: &[u8]) -> Vec<u8> {
        let input = self.scene.put("theirs", ciphertext);
        let mut decrypt = self.scene.kmsctl(["decrypt", "-k", "k", way]);
        run(decrypt.args(context.iter().flat_map(|pair| ["-C", pair])).arg(input)).done()
    }
}

const SIZES: [usize; 6] = [0, 1, 16_383, 16_384, 16_385, 5 << 20];

/// None; and two whose order on the command line is not the canonical one.
const CONTEXTS: [&[&str]; 2] = [&[], &["table=people", "row=é"]];

#[test]
fn another_implementation_opens_our_streams() {
    let scene = Scene::new();
    let other = Other::new(&scene);
    for size in SIZES {
        let plaintext = random_bytes(size);
        for context in CONTEXTS {
            for way in WAYS {
                let stream = scene.encrypt(way, &plaintext, context);
                let opened = other.run("open-stream", context, &stream);
                assert!(opened == plaintext, "{way}, {size} bytes, {context:?}");
            }
        }
    }
}

#[test]
fn we_open_the_streams_of_another_implementation() {
    let scene = Scene::new();
    let other = Other::new(&scene);
    for size in SIZES {
        let plaintext = random_bytes(size);
        for context in CONTEXTS {
            let stream = other.run("seal-stream", context, &plaintext);
            for way in WAYS {
                assert!(other.ours(way, context, &stream) == plaintext, "{way}, {size} bytes, {context:?}");
            }
        }
    }
}

#[test]
fn messages_go_both_ways_too() {
    let scene = Scene::new();
    let other = Other::new(&scene);
    for size in [0, 1, 16_383, 16_384, 16_385, 65_536] {
        let plaintext = random_bytes(size);
        for context in CONTEXTS {
            let pairs = context.iter().map(|pair| pair.split_once('=').unwrap());
            let pairs = pairs.map(|(key, value)| (key.as_bytes(), value.as_bytes()));
            let canonical = EncryptionContext::from_pairs(pairs).unwrap();
            let canonical = canonical.as_ref().as_bytes();
            let message = scene.agent.connect().encrypt("k", canonical, &plaintext).unwrap();
            assert!(other.run("open-message", context, &message) == plaintext, "{size} bytes, {context:?}");
            let message = other.run("seal-message", context, &plaintext);
            assert!(other.ours("--local", context, &message) == plaintext, "{size} bytes, {context:?}");
            assert!(scene.agent.connect().decrypt("k", canonical, &message).unwrap() == plaintext);
        }
    }
}

#[test]
fn another_implementation_agrees_with_every_vector() {
    let ran = run(cobblestone("vectors").arg(workspace().join("tests/vectors/formats")));
    assert!(ran.status.success(), "{}", ran.stderr);
    let said = String::from_utf8(ran.stdout).unwrap();
    let files = workspace().join("tests/vectors/formats").read_dir().unwrap();
    let count = files
        .filter(|file| file.as_ref().unwrap().path().extension().is_some_and(|end| end == "txt"))
        .count();
    assert_eq!(said, format!("{count} of {count} vectors\n"));
}
