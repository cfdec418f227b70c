//! From fork to the first answer, memory of its own while idle, and size of the program: `kms-agent` beside `ssh-agent`.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use super::{Outcome, Server, connect, greet, programs, spread};

/// Starts of each.
const STARTS: usize = 101;

/// A question of the agent protocol of OpenSSH, `SSH_AGENTC_REQUEST_IDENTITIES`, and its answer.
fn list_of_ssh(path: &Path) -> Outcome<UnixStream> {
    let mut stream = connect(path)?;
    stream.write_all(&[0, 0, 0, 1, 11])?;
    stream.read_exact(&mut [0; 9])?;
    Ok(stream)
}

/// Resident memory in MiB, and what of it is no file's.
fn memory(server: &Server) -> Outcome<(f64, f64)> {
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid()))?;
    let number = |name: &str| -> Outcome<f64> {
        let line = status.lines().find(|line| line.starts_with(name)).ok_or("no such line")?;
        Ok(line.split_whitespace().nth(1).ok_or("no number")?.parse::<f64>()? / 1024.0)
    };
    let all = number("VmRSS:")?;
    Ok((all, all - number("RssFile:")?))
}

/// What was measured of one program.
#[derive(Default)]
struct Measured {
    times: Vec<f64>,
    resident: Vec<f64>,
    own: Vec<f64>,
}

pub(crate) fn run() -> Outcome<()> {
    let programs: [(&str, PathBuf, &[&str]); 2] = [
        ("kms-agent --memory -D", programs()?.join("kms-agent"), &["--memory", "-D", "-a"]),
        ("ssh-agent -D", PathBuf::from("/usr/bin/ssh-agent"), &["-D", "-a"]),
    ];
    let folder = tempfile::tempdir()?;
    let mut measured = [Measured::default(), Measured::default()];
    for round in 0..=STARTS {
        for (which, ((_, program, words), measured)) in programs.iter().zip(&mut measured).enumerate() {
            let path = folder.path().join(format!("{which}-{round}"));
            let mut command = Command::new(program);
            command.args(*words).arg(&path).stdout(Stdio::null()).stderr(Stdio::null());
            let start = Instant::now();
            let server = Server(command.spawn()?);
            let stream = if which == 0 { greet(&path)? } else { list_of_ssh(&path)? };
            let time = start.elapsed();
            // The first start of each reads the program from the disk.
            if round > 0 {
                measured.times.push(time.as_secs_f64() * 1e3);
                let (resident, own) = memory(&server)?;
                measured.resident.push(resident);
                measured.own.push(own);
            }
            drop(stream);
        }
    }
    println!(
        "from fork to the first answer; resident memory, and what of it is no file's; size of the program"
    );
    for ((name, program, _), measured) in programs.iter().zip(&mut measured) {
        let (median, least, most) = spread(&mut measured.times);
        let ((resident, ..), (own, ..)) = (spread(&mut measured.resident), spread(&mut measured.own));
        let size = fs::metadata(program)?.len() as f64 / 1048576.0;
        println!(
            "  {name:<22} {median:.2} ms ({least:.2} to {most:.2}), {resident:.2} MiB, {own:.2} MiB, {size:.1} MiB"
        );
    }
    Ok(())
}
