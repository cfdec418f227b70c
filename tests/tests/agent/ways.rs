//! Other ways to an agent and to its end: the words for each shell, a second `eval`, `-k`, the manual page.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::Path,
    process::{Child, Command, Stdio},
};

use kms_tests::{
    ALICE, Agent, Wire,
    agent::fresh_folder,
    process::{PATIENCE, ends_within, output, run, send_signal, wait_for},
    programs::{SharedCopy, needs_root, program, tool},
    start::{Foreground, agent_command, clean, fails, is_empty, variables},
};
use nix::sys::signal::Signal;

/// A background agent; its socket and pid.
fn background(folder: &Path, arguments: &[&str]) -> (String, i32, String) {
    let (status, stdout, stderr) = output(&mut agent_command(folder, arguments));
    assert!(status.success(), "{stderr}");
    let (socket, pid) = variables(&stdout).unwrap();
    (socket.into_os_string().into_string().unwrap(), pid, stderr)
}

fn end(pid: i32) {
    send_signal(pid, Signal::SIGTERM);
    assert!(ends_within(pid, PATIENCE));
}

fn is_alive(pid: i32) -> bool {
    !ends_within(pid, std::time::Duration::ZERO)
}

/// A folder whose name every shell would take apart, but for line ends.
const ODD: &str = "a b'c$(x)!d\"e\\\\f\\'h;`g*~#\u{e9}";

#[test]
fn each_shell_reads_what_is_printed_for_it() {
    // The commands of a user: the start, and the end.
    let shells = [
        (
            "sh",
            &["-c"][..],
            "/bin/bash",
            "-s",
            r#"eval "$("$AGENT" --memory $FLAG -a "$P")""#,
            r#"eval "$("$AGENT" -k $FLAG)""#,
        ),
        (
            "csh",
            &["-f", "-c"],
            "/bin/tcsh",
            "-c",
            "eval `$AGENT --memory $FLAG -a \"$P\"`",
            "eval `$AGENT -k $FLAG`",
        ),
        (
            "fish",
            &["--no-config", "-c"],
            "/usr/bin/fish",
            "--fish",
            r#"eval ($AGENT --memory $FLAG -a "$P")"#,
            "$AGENT -k $FLAG | source",
        ),
    ];
    let folder = fresh_folder(0o700);
    let odd = folder.path().join(ODD);
    fs::create_dir(&odd).unwrap();
    fs::set_permissions(&odd, PermissionsExt::from_mode(0o700)).unwrap();
    let socket = odd.join("s");
    for (shell, options, user, flag, start, stop) in shells {
        // By the flag whatever the user's shell is, and by that without a flag.
        for (user, flag) in [("/bin/false", flag), (user, "")] {
            let print = "printenv KMS_AUTH_SOCK; printenv KMS_AGENT_PID";
            let script = format!("{start}; {print}; {stop}; {print}").replace("$FLAG", flag);
            let mut command = clean(tool(shell), folder.path());
            command.args(options).arg(&script).env("SHELL", user).env("LC_ALL", "C.UTF-8");
            command.env("AGENT", program("kms-agent")).env("P", &socket);
            let (_, stdout, stderr) = output(&mut command);
            let lines: Vec<&str> = stdout.lines().collect();
            assert_eq!(lines.len(), 2, "{shell} {flag}: {stdout}{stderr}");
            assert_eq!(lines[0], socket.to_str().unwrap(), "{shell} {flag}");
            assert!(!is_alive(lines[1].parse().unwrap()), "{shell} {flag}");
            assert_eq!(stderr, format!("kms-agent: process {} has ended\n", lines[1]));
            assert!(is_empty(&odd));
        }
    }
    // In the foreground too.
    let agent = Foreground::start(&mut agent_command(folder.path(), &["--memory", "-D", "-s", "-a", "s"]));
    agent.unwrap().stop();
    for arguments in [&["-s", "-c"][..], &["-c", "--fish"], &["-s", "--fish"]] {
        fails(&mut agent_command(folder.path(), arguments), 64);
    }
}

#[test]
fn a_second_eval_is_about_the_agent_that_runs() {
    let folder = fresh_folder(0o700);
    let runtime = folder.path().to_str().unwrap();
    let default = |arguments: &[&str]| {
        let mut command = agent_command(folder.path(), arguments);
        let (status, stdout, stderr) = output(command.env("XDG_RUNTIME_DIR", runtime));
        assert!(status.success(), "{stderr}");
        (stdout, stderr)
    };
    let (first, stderr) = default(&["--memory"]);
    assert_eq!(stderr, "");
    let (socket, pid) = variables(&first).unwrap();
    Wire::connect(&socket).generate("kept").unwrap();
    for arguments in [&["--memory"][..], &[], &["-t", "1h"], &["-a", "kms-agent/agent.sock"]] {
        let (again, stderr) = default(arguments);
        assert_eq!(again, first, "{arguments:?}");
        let said = format!("kms-agent: an agent serves {} already: process {pid}\n", socket.display());
        assert_eq!(stderr, said);
    }
    Wire::connect(&socket).describe(kms_protocol::KeyRef::Name("kept")).unwrap();
    // A command has an agent of its own, and the one in the foreground is refused.
    let (stdout, _) = default(&["--memory", "sh", "-c", "echo $KMS_AUTH_SOCK $KMS_AGENT_PID"]);
    let (other, other_pid) = stdout.trim().split_once(' ').unwrap();
    assert!(Path::new(other) != socket && other_pid != pid.to_string(), "{stdout}");
    let mut foreground = agent_command(folder.path(), &["--memory", "-D"]);
    let stderr = fails(foreground.env("XDG_RUNTIME_DIR", runtime), 1);
    assert!(stderr.contains("an agent serves this socket already"), "{stderr}");
    // A socket of an agent that died is no live agent.
    send_signal(pid, Signal::SIGKILL);
    assert!(ends_within(pid, PATIENCE));
    assert!(socket.exists());
    let (stdout, stderr) = default(&["--memory"]);
    let (same, new) = variables(&stdout).unwrap();
    assert_eq!((same, stderr.as_str()), (socket.clone(), ""));
    assert_ne!(new, pid);
    end(new);
    // Nor is somebody who answers, but not as an agent does.
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| drop(listener.accept().unwrap()));
        let mut command = agent_command(folder.path(), &["--memory"]);
        let stderr = fails(command.env("XDG_RUNTIME_DIR", runtime), 1);
        assert!(stderr.contains("an agent serves this socket already"), "{stderr}");
    });
}

#[test]
fn the_agent_of_another_user_is_nobody_to_be_told_of() {
    needs_root();
    let agent = Agent::builder().uid(ALICE).start();
    let socket = agent.socket.to_str().unwrap();
    fails(&mut agent_command(Path::new("/"), &["--memory", "-a", socket]), 1);
    let mut command = agent_command(Path::new("/"), &["-k", "-a", socket]);
    let stderr = fails(command.env("KMS_AGENT_PID", agent.pid.to_string()), 1);
    assert!(stderr.contains("belongs to uid 1001, who is not trusted to serve"), "{stderr}");
    agent.as_owner(|| agent.connect().ping().unwrap());
}

/// Something that runs until it is told to end.
struct Sleeper(Child);

impl Sleeper {
    fn new() -> Self {
        Self(tool("sh").args(["-c", "read line"]).stdin(Stdio::piped()).spawn().unwrap())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        assert_eq!(wait_for(&mut self.0).code(), Some(1), "nobody sent it a signal");
    }
}

#[test]
fn only_the_process_that_serves_the_socket_is_ended() {
    let folder = fresh_folder(0o700);
    let (a, a_pid, _) = background(folder.path(), &["--memory", "-a", "a"]);
    let (b, b_pid, _) = background(folder.path(), &["--memory", "-a", "b"]);
    let bystander = Sleeper::new();
    let bystander_pid = bystander.0.id().to_string();
    let mut gone = tool("sh").args(["-c", "exit"]).spawn().unwrap();
    wait_for(&mut gone);
    let (a_name, b_name, gone) = (a_pid.to_string(), b_pid.to_string(), gone.id().to_string());
    let mute = UnixListener::bind(folder.path().join("mute")).unwrap();
    let own = std::process::id().to_string();

    let kill = |socket: &str, pid: Option<&str>| {
        let mut command = agent_command(folder.path(), &["-k"]);
        command.env("KMS_AUTH_SOCK", socket);
        if let Some(pid) = pid {
            command.env("KMS_AGENT_PID", pid);
        }
        command
    };
    for (socket, pid, said) in [
        (a.as_str(), None, "KMS_AGENT_PID is not set"),
        (&a, Some(""), "KMS_AGENT_PID is not the number of a process"),
        (&a, Some("one"), "KMS_AGENT_PID is not the number of a process"),
        (&a, Some("-1"), "KMS_AGENT_PID is not the number of a process"),
        (&a, Some("0"), "KMS_AGENT_PID is not the number of a process"),
        (&a, Some("99999999999"), "KMS_AGENT_PID is not the number of a process"),
        (&a, Some(&gone), "there is no process"),
        (&a, Some(&b_name), "is served by process"),
        (&b, Some(&a_name), "is served by process"),
        (&a, Some(&bystander_pid), "is served by process"),
        ("none", Some(&bystander_pid), "cannot look at"),
        ("none", Some(&a_name), "none"),
    ] {
        let stderr = fails(&mut kill(socket, pid), 1);
        assert!(stderr.starts_with("kms-agent: error: no agent was ended: "), "{stderr}");
        assert!(stderr.contains(said) || socket == "none", "{pid:?}: {stderr}");
        assert!(is_alive(a_pid) && is_alive(b_pid));
    }
    // Whoever serves must say hello, even if it has the number that is named.
    std::thread::scope(|scope| {
        scope.spawn(|| drop(mute.accept().unwrap()));
        let stderr = fails(&mut kill("mute", Some(&own)), 1);
        assert!(stderr.contains("closed the connection before its hello"), "{stderr}");
    });
    // The named socket goes before the variable.
    let mut command = kill(&a, Some(&b_name));
    let (status, stdout, stderr) = output(command.args(["-a", &b]));
    assert!(status.success(), "{stderr}");
    assert_eq!(stdout, "unset KMS_AUTH_SOCK; unset KMS_AGENT_PID;\n");
    assert_eq!(stderr, format!("kms-agent: process {b_pid} has ended\n"));
    assert!(!is_alive(b_pid) && is_alive(a_pid), "the one of the two that was meant");
    assert!(!Path::new(&b).exists());
    for (flag, words) in [("-c", "unsetenv KMS_AUTH_SOCK; "), ("--fish", "set -e KMS_AUTH_SOCK; ")] {
        let (socket, pid, _) = background(folder.path(), &["--memory", "-a", "c"]);
        let (status, stdout, _) = output(kill(&socket, Some(&pid.to_string())).arg(flag));
        assert!(status.success() && stdout.starts_with(words), "{stdout}");
    }
    end(a_pid);
    let mut arguments = agent_command(folder.path(), &["-k", "-D"]);
    fails(&mut arguments, 64);
    fails(&mut agent_command(folder.path(), &["-k", "true"]), 64);
    fails(&mut agent_command(folder.path(), &["-k", "--stdio"]), 64);
}

#[test]
fn the_agent_of_a_command_can_be_ended_by_the_command() {
    let folder = fresh_folder(0o700);
    let script = r#""$AGENT" -k >/dev/null; test ! -e "$KMS_AUTH_SOCK" && exit 9"#;
    let mut command = agent_command(folder.path(), &["--memory", "sh", "-c", script]);
    let (status, _, stderr) = output(command.env("AGENT", program("kms-agent")));
    assert_eq!(status.code(), Some(9), "{stderr}");
    assert!(is_empty(folder.path()));
}

#[test]
fn the_manual_page_has_every_flag_of_the_help() {
    let folder = fresh_folder(0o700);
    let (status, help, _) = output(&mut agent_command(folder.path(), &["--help"]));
    assert!(status.success());
    let (status, page, stderr) = output(&mut agent_command(folder.path(), &["--man"]));
    assert!(status.success() && page.starts_with(".ie"), "{stderr}{page}");
    let page = page.replace("\\-", "-").replace("\\fB", "").replace("\\fR", "");
    let flags: Vec<&str> = help
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix('-').map(|_| line.trim_start()))
        .flat_map(|line| line.split([' ', ',']).filter(|word| word.starts_with('-')))
        .collect();
    assert!(flags.len() > 12, "{flags:?}");
    for flag in flags {
        let has = |line: &str| line.starts_with(flag) || line.contains(&format!(", {flag}"));
        assert!(page.lines().any(has), "{flag} is not explained in the page");
    }
    for word in ["LISTEN_FDS", "KMS_AGENT_PID", "SIGHUP"] {
        assert!(page.contains(word), "{word} is not in the page");
    }
    fails(&mut agent_command(folder.path(), &["--man", "-D"]), 64);
    // A page that cannot be written is a failure.
    let mut full = agent_command(folder.path(), &["--man"]);
    full.stdout(fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    assert_eq!(run(&mut full).status.code(), Some(1));
}

/// Of the sockets of this process those that have a name without a file.
fn abstract_sockets(pid: i32) -> usize {
    let own: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok()?.into_os_string().into_string().ok())
        .filter_map(|target| Some(target.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    assert!(!own.is_empty());
    let table = fs::read_to_string("/proc/net/unix").unwrap();
    let found = table.lines().filter(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.get(6).is_some_and(|inode| own.iter().any(|own| own == inode))
            && fields.get(7).is_some_and(|name| name.starts_with('@'))
    });
    found.count()
}

#[test]
fn no_socket_of_the_agent_is_abstract() {
    use std::os::{linux::net::SocketAddrExt, unix::net::SocketAddr};
    let agent = Agent::start();
    let _wire = agent.connect();
    assert_eq!(abstract_sockets(agent.pid), 0);
    // The control: one of ours is found by the same look.
    let name = format!("kms-test-{}", std::process::id());
    let before = abstract_sockets(std::process::id().cast_signed());
    let _listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap();
    assert_eq!(abstract_sockets(std::process::id().cast_signed()), before + 1);
}

#[test]
fn an_agent_of_another_user_is_ended_by_that_user_alone() {
    needs_root();
    let agent = SharedCopy::of(&program("kms-agent"), 0o755);
    let folder = fresh_folder(0o755);
    let own = folder.path().join("own");
    fs::create_dir(&own).unwrap();
    std::os::unix::fs::chown(&own, Some(ALICE), Some(ALICE)).unwrap();
    let socket = own.join("s");
    let as_alice = |arguments: &[&str]| -> Command {
        let mut command = clean(agent.as_user(ALICE), Path::new("/"));
        command.args(arguments).env("KMS_AUTH_SOCK", &socket);
        command
    };
    let (status, stdout, stderr) = output(&mut as_alice(&["--memory", "-a", socket.to_str().unwrap()]));
    assert!(status.success(), "{stderr}");
    let (_, pid) = variables(&stdout).unwrap();
    let mut as_root = agent_command(folder.path(), &["-k"]);
    fails(as_root.env("KMS_AUTH_SOCK", &socket).env("KMS_AGENT_PID", pid.to_string()), 1);
    assert!(is_alive(pid));
    let (status, _, stderr) = output(as_alice(&["-k"]).env("KMS_AGENT_PID", pid.to_string()));
    assert!(status.success(), "{stderr}");
    assert!(!is_alive(pid));
}
