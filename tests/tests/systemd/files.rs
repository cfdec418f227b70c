//! The unit files by themselves: what `systemd-analyze` says of them, and that the two forms of the user's unit belong together.

use std::{collections::BTreeSet, fs, os::unix::fs::symlink, path::PathBuf};

use kms_tests::{fresh_folder, process::output, programs};

use crate::sandbox::{key_of, sandbox_keys, shipped};
use kms_tests::systemd::Manager;

fn folder(manager: Manager) -> PathBuf {
    let kind = if manager == Manager::User { "user" } else { "system" };
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("systemd").join(kind)
}

/// Of ten; one decimal.
#[test]
fn the_units_expose_little() {
    for (manager, most) in [(Manager::User, 15), (Manager::System, 6)] {
        let unit = folder(manager).join("kms-agent.service");
        let mut command = programs::tool("systemd-analyze");
        command.args(["security", "--offline=true", &format!("--threshold={most}")]).arg(&unit);
        let (status, out, error) = output(&mut command);
        assert!(status.success(), "{}: {out}{error}", unit.display());
    }
}

/// In place, with the programs and manual pages that they name.
#[test]
fn the_units_are_understood_whole() {
    for manager in [Manager::User, Manager::System] {
        let place = fresh_folder(0o755);
        let (bin, man) = (place.path().join("bin"), place.path().join("man/man1"));
        fs::create_dir(&bin).unwrap();
        fs::create_dir_all(&man).unwrap();
        symlink(programs::program("kms-agent"), bin.join("kms-agent")).unwrap();
        let (status, page, error) =
            output(std::process::Command::new(programs::program("kms-agent")).arg("--man"));
        assert!(status.success(), "{error}");
        fs::write(man.join("kms-agent.1"), page).unwrap();
        // The path of the program, which need not be there, becomes one that is.
        let program = format!("={} -D", bin.join("kms-agent").display());
        let text = shipped(manager).replace("=/usr/local/bin/kms-agent -D", &program);
        assert!(text.contains(&program));
        fs::write(place.path().join("kms-agent.service"), text).unwrap();
        fs::copy(folder(manager).join("kms-agent.socket"), place.path().join("kms-agent.socket")).unwrap();
        let verify = |units: &[&str]| {
            let mut command = programs::tool("systemd-analyze");
            if manager == Manager::User {
                command.arg("--user");
            }
            command
                .args(["verify", "--recursive-errors=yes"])
                .args(units.iter().map(|unit| place.path().join(unit)));
            command.env("XDG_RUNTIME_DIR", place.path()).env("MANPATH", place.path().join("man"));
            output(&mut command)
        };
        let (status, out, error) = verify(&["kms-agent.service", "kms-agent.socket"]);
        assert_eq!((status.code(), out + &error), (Some(0), String::new()));
        // The control: what it does not understand it does not let pass.
        fs::write(
            place.path().join("kms-other.service"),
            format!("{}ProtectEverything=yes\n", shipped(manager)),
        )
        .unwrap();
        let (status, _, error) = verify(&["kms-other.service"]);
        assert!(!status.success() && error.contains("ProtectEverything"), "{error}");
    }
}

/// Where the program is the user's own, whatever takes a user namespace is off, and nothing else is.
#[test]
fn the_unit_for_a_program_of_the_users_own_takes_no_namespace() {
    // Filters of system calls, and what every process may do to itself.
    let without = |key: &&str| {
        key.starts_with("Restrict")
            || key.starts_with("SystemCall")
            || ["LockPersonality", "MemoryDenyWriteExecute", "NoNewPrivileges"].contains(key)
    };
    let unit = shipped(Manager::User);
    let needing: BTreeSet<_> = sandbox_keys(&unit).into_iter().filter(|key| !without(key)).collect();
    let text = fs::read_to_string(folder(Manager::User).join("own-program.conf")).unwrap();
    let lines: Vec<_> = text.lines().filter(|line| key_of(line).is_some()).collect();
    let off: BTreeSet<_> =
        lines.iter().filter_map(|line| key_of(line)).filter(|key| *key != "ExecStart").collect();
    assert_eq!(off, needing);
    for line in lines.iter().filter(|line| !line.starts_with("ExecStart=")) {
        assert!(line.ends_with("=no") || line.ends_with('=') || line.ends_with("=~"), "{line}");
    }
}
