//! Each directive of the units' sandboxes, tried from inside by a probe in the agent's place.
//!
//! Three kinds of services run it: one with the whole sandbox, as shipped, where everything is refused that is not the agent's work;
//! one without any, where all of the same is possible, so that an attempt which would fail anyway shows nothing; and one for each
//! directive alone, which refuses what it is there to refuse.

use std::{
    collections::BTreeSet,
    fs,
    io::Read,
    path::Path,
    process::{Child, Stdio},
};

use kms_tests::{
    ALICE, fresh_folder,
    process::{output, wait_for},
    systemd::{Lane, Manager, PROGRAMS},
};

/// What is refused, and by which directives of the unit; those in the first list are there for both.
type Row = (&'static str, &'static [&'static str], &'static [&'static str]);

/// In a user manager mounts need the first; who is in a user namespace of his own can gain nothing by a setuid program.
const USER_ROWS: &[Row] = &[
    ("abstract-socket", &["PrivateUsers"], &["PrivateNetwork"]),
    ("capabilities", &["PrivateUsers"], &["CapabilityBoundingSet"]),
    ("chown", &["SystemCallErrorNumber"], &["SystemCallFilter"]),
    ("clock", &["PrivateUsers"], &["ProtectClock"]),
    ("control-group", &["PrivateUsers"], &["ProtectControlGroups"]),
    ("devices", &["PrivateUsers"], &["PrivateDevices"]),
    ("hostname", &["PrivateUsers"], &["ProtectHostname"]),
    ("inet-socket", &[], &["RestrictAddressFamilies"]),
    ("kernel-log", &["PrivateUsers"], &["ProtectKernelLogs"]),
    ("kernel-symbols", &["PrivateUsers"], &["ProtectKernelTunables"]),
    ("modules", &["PrivateUsers"], &["ProtectKernelModules"]),
    ("mount", &["SystemCallErrorNumber"], &["SystemCallFilter"]),
    ("namespace", &[], &["RestrictNamespaces"]),
    ("open-to-others", &[], &["UMask"]),
    ("other-architecture", &[], &["SystemCallArchitectures"]),
    ("personality", &[], &["LockPersonality"]),
    ("priority", &["SystemCallErrorNumber"], &["SystemCallFilter"]),
    ("read-home-of-another", &["PrivateUsers"], &["ProtectHome"]),
    ("read-tmp", &["PrivateUsers"], &["PrivateTmp"]),
    ("realtime", &[], &["RestrictRealtime"]),
    ("set-setuid-bit", &[], &["RestrictSUIDSGID"]),
    ("setuid-program", &[], &["NoNewPrivileges"]),
    ("setuid-program", &[], &["PrivateUsers"]),
    ("trace", &["SystemCallErrorNumber"], &["SystemCallFilter"]),
    ("write-and-run", &[], &["MemoryDenyWriteExecute"]),
    ("write-etc", &["PrivateUsers"], &["ProtectSystem"]),
    ("write-home", &["PrivateUsers"], &["ProtectHome", "BindReadOnlyPaths"]),
    ("write-usr", &["PrivateUsers"], &["ProtectSystem"]),
];

/// The agent's work, which the whole sandbox must leave: `ReadWritePaths`, `BindReadOnlyPaths`, `SystemCallFilter`.
const USER_WORK: &[&str] =
    &["landlock", "read-configuration", "seccomp", "secret-memory", "system-bus", "write-state"];

/// What a user manager of systemd 252 cannot hide.
const USER_TRUTH: &[&str] = &["machine-in-proc", "process-1"];

/// Each alone is tried by root, who is refused nothing else; where that would be no trial, by the unit's user.
const SYSTEM_ROWS: &[Row] = &[
    ("abstract-socket", &[], &["PrivateNetwork"]),
    ("capabilities", &[], &["CapabilityBoundingSet"]),
    ("chown", &["SystemCallErrorNumber"], &["SystemCallFilter"]),
    ("clock", &[], &["ProtectClock"]),
    ("control-group", &[], &["ProtectControlGroups"]),
    ("devices", &[], &["PrivateDevices"]),
    ("hostname", &[], &["ProtectHostname"]),
    ("inet-socket", &[], &["RestrictAddressFamilies"]),
    ("kernel-log", &[], &["ProtectKernelLogs"]),
    ("kernel-symbols", &[], &["ProtectKernelTunables"]),
    ("modules", &[], &["ProtectKernelModules"]),
    ("mount", &["SystemCallErrorNumber"], &["SystemCallFilter"]),
    ("namespace", &[], &["RestrictNamespaces"]),
    ("open-to-others", &[], &["UMask"]),
    ("other-architecture", &[], &["SystemCallArchitectures"]),
    ("personality", &[], &["LockPersonality"]),
    ("priority", &["SystemCallErrorNumber"], &["SystemCallFilter"]),
    ("process-1", &["User"], &["ProtectProc"]),
    ("read-home-of-another", &[], &["ProtectHome"]),
    ("read-tmp", &[], &["PrivateTmp"]),
    ("realtime", &[], &["RestrictRealtime"]),
    ("set-setuid-bit", &[], &["RestrictSUIDSGID"]),
    ("setuid-program", &["User"], &["NoNewPrivileges"]),
    ("shared-memory", &[], &["PrivateIPC"]),
    ("trace", &["SystemCallErrorNumber"], &["SystemCallFilter"]),
    ("write-and-run", &[], &["MemoryDenyWriteExecute"]),
    ("write-etc", &[], &["ProtectSystem"]),
    ("write-home", &[], &["ProtectHome"]),
    ("write-usr", &[], &["ProtectSystem"]),
];

const SYSTEM_WORK: &[&str] = &[
    "landlock",
    "read-system-configuration",
    "seccomp",
    "secret-memory",
    "system-bus",
    "write-system-state",
];

/// A unit file as shipped.
pub(crate) fn shipped(manager: Manager) -> String {
    let kind = if manager == Manager::User { "user" } else { "system" };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("systemd");
    fs::read_to_string(folder.join(kind).join("kms-agent.service")).unwrap()
}

/// The lines of the unit's section of the service that stand for these keys.
fn lines<'a>(unit: &'a str, keys: &[&str]) -> Vec<&'a str> {
    let found: Vec<_> =
        unit.lines().filter(|line| keys.iter().any(|key| key_of(line) == Some(*key))).collect();
    let named: BTreeSet<_> = found.iter().filter_map(|line| key_of(line)).collect();
    assert_eq!(named.len(), keys.len(), "the unit has not all of {keys:?}");
    found
}

pub(crate) fn key_of(line: &str) -> Option<&str> {
    line.split_once('=')
        .map(|(key, _)| key)
        .filter(|key| key.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

/// The keys below the empty line that begins the sandbox.
pub(crate) fn sandbox_keys(unit: &str) -> BTreeSet<&str> {
    let service = unit.split_once("[Service]").unwrap().1.split_once("\n[Install]").unwrap().0;
    service.split_once("\n\n").unwrap().1.lines().filter_map(key_of).collect()
}

/// Serves what the attempts try to reach, outside of their sandbox.
struct Listener(Child);

impl Listener {
    fn start(lane: &Lane, name: &str, path: &str, shares: bool) -> Self {
        let mut command = lane.root("env");
        if shares {
            command.arg("KMS_PROBE_SHARES=1");
        }
        command.arg(format!("{PROGRAMS}/kms-test-sandboxed")).args(["listen", name, path]);
        let mut child = command.stdin(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
        let mut said = [0; 10];
        child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
        assert_eq!(&said, b"listening\n");
        Self(child)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        wait_for(&mut self.0);
    }
}

/// The services with the probe: their names, what they are told, and where their words go.
struct Probes<'a> {
    lane: &'a Lane,
    manager: Manager,
    environment: String,
    names: Vec<String>,
}

impl Probes<'_> {
    fn add(&mut self, directives: &[&str], attempts: &str) {
        let (units, out) = match self.manager {
            Manager::User => ("/run/systemd/user", format!("/run/user/{ALICE}")),
            Manager::System => ("/run/systemd/system", "/run".to_owned()),
        };
        let name = format!("kms-probe-{}", self.names.len());
        let text = format!(
            "[Service]\nType=oneshot\nExecStart={PROGRAMS}/kms-test-sandboxed {attempts}\n\
             Environment={}\nStandardOutput=truncate:{out}/{name}\n{}\n",
            self.environment,
            directives.join("\n")
        );
        let path = self.lane.path(self.lane.leader, &format!("{units}/{name}.service"));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self.names.push(name);
    }

    /// Runs them all; gives what each said, in order.
    fn run(&self) -> Vec<String> {
        self.lane.control(self.manager, &["daemon-reload"]);
        let (_, _, error) = output(self.lane.systemctl(self.manager).arg("start").args(&self.names));
        let out =
            if self.manager == Manager::User { format!("/run/user/{ALICE}") } else { "/run".to_owned() };
        let said = self.names.iter().map(|name| {
            let result = self.lane.show(self.manager, &format!("{name}.service"), "Result");
            assert_eq!(result, "success", "{name}: {error}\n{}", self.lane.journal(self.manager));
            fs::read_to_string(self.lane.path(self.lane.leader, &format!("{out}/{name}"))).unwrap()
        });
        said.collect()
    }
}

fn assert_all(said: &str, attempts: &[&str], done: bool, what: &str) {
    assert_eq!(said.lines().count(), attempts.len(), "{said}");
    let wrong: Vec<_> = said.lines().filter(|line| line.ends_with(": done") != done).collect();
    assert!(wrong.is_empty(), "{what}: {wrong:#?}");
}

/// Those of the user's unit, whose agent has run before.
pub(crate) fn of_the_user(lane: &Lane) {
    // The configuration may be a symlink, as it is for whoever keeps such files elsewhere.
    let prepare = "mkdir -p -m 700 ~/dotfiles ~/.local/state/kms-agent && echo '# mine' >~/dotfiles/kms.toml && \
                   ln -sf ~/dotfiles/kms.toml ~/.config/kms-agent/config.toml && echo shared >/tmp/kms-probe-shared";
    crate::done(lane.user_command("sh").args(["-euc", prepare]));
    crate::done(lane.root("mkdir").args(["-p", "/run/dbus"]));
    let name = name_of_a_socket();
    let _listener = Listener::start(lane, &name, "/run/dbus/system_bus_socket", false);
    let scene = Scene {
        lane,
        manager: Manager::User,
        rows: USER_ROWS,
        besides: &["UMask"],
        // Work of the agent, tried as such.
        without_row: &["ReadWritePaths"],
        left: &[USER_WORK, USER_TRUTH].concat(),
    };
    scene.play(&name);
}

/// Those of the system's unit, whose agent has run before.
pub(crate) fn of_the_system(lane: &Lane) {
    crate::done(lane.root("sh").args([
        "-euc",
        "echo shared >/tmp/kms-probe-shared; : >/dev/kms-probe; chmod 644 /tmp/kms-probe-shared",
    ]));
    let name = name_of_a_socket();
    let _listener = Listener::start(lane, &name, "/run/kms-probe-listener", true);
    let scene = Scene {
        lane,
        manager: Manager::System,
        rows: SYSTEM_ROWS,
        besides: &["UMask", "User", "StateDirectory", "StateDirectoryMode"],
        // The first takes BPF, which a container has not, and behind PrivateNetwork= there is no network; the second finds nothing
        // behind PrivateIPC=.
        without_row: &["IPAddressDeny", "RemoveIPC"],
        left: SYSTEM_WORK,
    };
    scene.play(&name);
}

/// One that is free, since a folder has the same name.
fn name_of_a_socket() -> String {
    fresh_folder(0o700).path().to_str().unwrap().to_owned()
}

/// What is tried of a unit.
struct Scene<'a> {
    lane: &'a Lane,
    manager: Manager,
    rows: &'a [Row],
    /// What of the unit, outside of its sandbox, stands in the service with the whole of it.
    besides: &'a [&'a str],
    /// Directives that no row has.
    without_row: &'a [&'a str],
    /// What must be possible inside.
    left: &'a [&'a str],
}

impl Scene<'_> {
    fn play(&self, socket: &str) {
        let unit = shipped(self.manager);
        let sandbox = sandbox_keys(&unit);
        let mut covered: BTreeSet<_> = self.without_row.iter().copied().collect();
        covered.extend(self.rows.iter().flat_map(|(_, both, keys)| both.iter().chain(*keys)).copied());
        assert!(sandbox.is_subset(&covered), "not tried: {:?}", sandbox.difference(&covered));

        let mut attempts: Vec<_> = self.rows.iter().map(|(attempt, ..)| *attempt).collect();
        attempts.dedup();
        let all = attempts.join(" ");
        let mut probes = Probes {
            lane: self.lane,
            manager: self.manager,
            environment: format!("KMS_PROBE_ABSTRACT={socket}"),
            names: Vec::new(),
        };
        let whole = lines(&unit, &sandbox.iter().chain(self.besides).copied().collect::<Vec<_>>());
        probes.add(&whole, &all);
        probes.add(&whole, &self.left.join(" "));
        probes.add(&[], &all);
        for (attempt, both, keys) in self.rows {
            probes.add(&lines(&unit, &[*both, *keys].concat()), attempt);
            probes.add(&lines(&unit, both), attempt);
        }
        let said = probes.run();
        assert_all(&said[0], &attempts, false, "possible in the sandbox");
        assert_all(&said[1], self.left, true, "refused in the sandbox");
        assert_all(&said[2], &attempts, true, "refused without a sandbox");
        for ((attempt, _, keys), said) in self.rows.iter().zip(said[3..].chunks(2)) {
            assert_all(&said[0], &[attempt], false, &format!("possible with {keys:?} alone"));
            assert_all(&said[1], &[attempt], true, &format!("refused without {keys:?}"));
        }
    }
}
