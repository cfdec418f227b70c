//! 1 GiB by `kmsctl`, `age`, `openssl` and `cat`.

use std::{
    env, fs,
    io::{Read, Write},
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use super::{Outcome, Server, connect, programs, spread};

/// A whole file, by each tool that is there, to a fresh file and to nowhere.
pub(crate) fn run(size: usize) -> Outcome<()> {
    let folder = tempfile::Builder::new()
        .prefix("kms-bench-")
        .tempdir_in(env::var_os("KMS_BENCH_DIR").map_or_else(env::temp_dir, PathBuf::from))?;
    let plain = folder.path().join("plain");
    let mut random = fs::File::open("/dev/urandom")?.take(1 << 20);
    let mut block = Vec::new();
    random.read_to_end(&mut block)?;
    let mut file = fs::File::create(&plain)?;
    for number in 0..size >> 20 {
        block[..8].copy_from_slice(&number.to_le_bytes());
        file.write_all(&block)?;
    }
    file.sync_all()?;
    drop(file);
    let bin = programs()?;
    let agent_path = folder.path().join("agent.sock");
    let mut command = Command::new(bin.join("kms-agent"));
    command.args(["--memory", "-D", "-a"]).arg(&agent_path).stdout(Stdio::null()).stderr(Stdio::null());
    let _agent = Server(command.spawn()?);
    connect(&agent_path)?;
    let sh = |script: &str| -> Outcome<Duration> {
        let start = Instant::now();
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(script)
            .current_dir(folder.path())
            .env("KMS_AUTH_SOCK", &agent_path)
            .env("BIN", &bin);
        if !command.stdout(Stdio::null()).stderr(Stdio::null()).status()?.success() {
            return Err(format!("failed: {script}").into());
        }
        Ok(start.elapsed())
    };
    sh("$BIN/kmsctl add --memory bench")?;
    let mut scripts = vec![
        ("cat", "cat plain > OUT", "cat copy > OUT"),
        (
            "kmsctl (local)",
            "$BIN/kmsctl encrypt -k bench < plain > OUT",
            "$BIN/kmsctl decrypt -k bench < sealed.kms > OUT",
        ),
        (
            "kmsctl -o, synced",
            "$BIN/kmsctl encrypt -k bench -o OUT plain",
            "$BIN/kmsctl decrypt -k bench -o OUT sealed.kms",
        ),
        (
            "kmsctl --remote",
            "$BIN/kmsctl encrypt --remote -k bench < plain > OUT",
            "$BIN/kmsctl decrypt --remote -k bench < sealed.kms > OUT",
        ),
    ];
    sh("cp plain copy && $BIN/kmsctl encrypt -k bench < plain > sealed.kms")?;
    let age = sh("age-keygen -o age.key && age -e -i age.key -o sealed.age plain").is_ok();
    if age {
        scripts.push(("age", "age -e -i age.key < plain > OUT", "age -d -i age.key < sealed.age > OUT"));
    }
    let openssl =
        sh("openssl enc -aes-256-ctr -K $(printf %064d 1) -iv $(printf %032d 1) -in plain -out sealed.ctr")
            .is_ok();
    if openssl {
        let (encrypt, decrypt) = (
            "openssl enc -aes-256-ctr -K $(printf %064d 1) -iv $(printf %032d 1) < plain > OUT",
            "openssl enc -d -aes-256-ctr -K $(printf %064d 1) -iv $(printf %032d 1) < sealed.ctr > OUT",
        );
        scripts.push(("openssl aes-256-ctr", encrypt, decrypt));
    }
    for (target, out) in [("a fresh file", "out"), ("/dev/null", "/dev/null")] {
        println!("{} MiB from the page cache to {target}, GB/s: median (least to most) of 5", size >> 20);
        let mut rates = vec![(Vec::new(), Vec::new()); scripts.len()];
        for _ in 0..5 {
            for ((_, encrypt, decrypt), (encrypts, decrypts)) in scripts.iter().zip(&mut rates) {
                for (script, rates) in [(encrypt, encrypts), (decrypt, decrypts)] {
                    if script.contains("-o OUT") && out == "/dev/null" {
                        continue;
                    }
                    sh("rm -f out")?;
                    rates.push(size as f64 / sh(&script.replace("OUT", out))?.as_secs_f64() / 1e9);
                }
            }
        }
        sh("rm -f out")?;
        for ((name, ..), (encrypts, decrypts)) in scripts.iter().zip(&mut rates) {
            if encrypts.is_empty() {
                continue;
            }
            let ((e, e_low, e_high), (d, d_low, d_high)) = (spread(encrypts), spread(decrypts));
            println!(
                "  {name:<20} encrypt {e:5.2} ({e_low:.2} to {e_high:.2})  decrypt {d:5.2} ({d_low:.2} to {d_high:.2})"
            );
        }
    }
    if !age {
        println!("age: not measured, it is not installed (Debian package age)");
    }
    if !openssl {
        println!("openssl: not measured, it is not installed (Debian package openssl)");
    }
    Ok(())
}
