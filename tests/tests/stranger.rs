//! A client and a decoder in Python, by somebody who had `docs/protocol.md`, `docs/formats.md` and the vectors and nothing else.
//! That they go on working is what says that the texts are enough.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use kms_tests::{AgentBuilder, process::output, programs::program};

/// The scripts, with the Python that has the package for AES-GCM.
fn script(name: &str) -> Command {
    let python = PathBuf::from(env::var_os("KMS_TEST_PYTHON").unwrap_or_else(|| "python3".into()));
    let mut command = Command::new(python);
    // No byte code beside the sources.
    command.arg("-B").arg(workspace().join("tests/interop").join(name));
    command
}

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn passes(command: &mut Command) -> String {
    let (status, stdout, stderr) = output(command);
    assert!(status.success(), "{command:?}: {status}\n{stdout}{stderr}");
    stdout + &stderr
}

#[test]
fn a_parent_speaks_with_its_agent_over_pipes() {
    passes(script("child_agent.py").arg(program("kms-agent")));
}

/// Under this name `tests/run` leaves out what needs a package of Python that is not there.
mod interop {
    use super::*;

    #[test]
    fn they_agree_with_every_vector() {
        let said = passes(script("check_vectors.py").arg(workspace().join("tests/vectors")));
        // Without the package the ciphertexts would be left out.
        assert!(
            !said.contains("skipped"),
            "tests/run makes a Python that has the package `cryptography`\n{said}"
        );
        for folder in ["formats", "protocol"] {
            let files = workspace().join("tests/vectors").join(folder).read_dir().unwrap().count();
            let told: usize = said
                .lines()
                .filter_map(|line| {
                    line.strip_prefix(folder)?.strip_prefix(": ")?.split(' ').next()?.parse::<usize>().ok()
                })
                .sum();
            assert!(told >= files, "{told} of {files} vectors in {folder}\n{said}");
        }
    }

    #[test]
    fn they_drive_the_agent_through_every_operation() {
        let agent = AgentBuilder::default().start();
        passes(script("drive_agent.py").arg(&agent.socket));
        drop(agent);
    }
}
