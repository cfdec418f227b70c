//! The attacker of the same machine, and the victim that shows what the attacks are worth.
//!
//! `probe attack PID ADDRESS FD` tries every way into a process that the kernel decides by "may I trace it", and prints one line
//! for each: its name, a tab, `ok` or the name of the error. `probe victim PAGES` is a process without any protection: fills so
//! many pages with [`kms_tests::canary::page`] of what stands on the first line of its stdin, prints its own pid, the address of
//! the first page and a descriptor that it has open, and stays until its stdin ends. `probe core FOLDER PID` is a `core_pattern`: keeps the core of a
//! process for which there is a file `want.PID` in the folder, and of no other.

use std::{
    env, fs,
    fs::{File, OpenOptions},
    io::{self, BufRead, IoSlice, IoSliceMut, Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
};

use kms_tests::{canary, sys};
use nix::{
    errno::Errno,
    sys::{
        ptrace,
        uio::{RemoteIoVec, process_vm_readv, process_vm_writev},
        wait::waitpid,
    },
    unistd::Pid,
};

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["attack", pid, address, descriptor] => {
            let victim = Victim {
                pid: pid.parse().unwrap(),
                address: address.parse().unwrap(),
                descriptor: descriptor.parse().unwrap(),
            };
            for (name, attempt) in ATTEMPTS {
                let outcome = match attempt(&victim) {
                    Ok(()) => "ok".to_owned(),
                    Err(error) => error
                        .raw_os_error()
                        .map_or(error.to_string(), |n| format!("{:?}", Errno::from_raw(n))),
                };
                println!("{name}\t{outcome}");
            }
        }
        ["victim", pages] => {
            let mut secret = String::new();
            io::stdin().lock().read_line(&mut secret).unwrap();
            let pages: Vec<u8> = canary::page(secret.trim_end())
                .into_iter()
                .cycle()
                .take(pages.parse::<usize>().unwrap() * 4096)
                .collect();
            let open = File::open("/dev/null").unwrap();
            println!("{} {} {}", std::process::id(), pages.as_ptr() as usize, open.as_raw_fd());
            io::stdin().read_to_end(&mut Vec::new()).unwrap();
            assert_ne!(std::hint::black_box(&pages)[..8], [0; 8]);
        }
        ["core", folder, pid] => {
            let folder = Path::new(folder);
            if folder.join(format!("want.{pid}")).exists() {
                // Renamed when it is whole.
                let partial = folder.join(format!("partial.{pid}"));
                io::copy(&mut io::stdin(), &mut File::create(&partial).unwrap()).unwrap();
                fs::rename(partial, folder.join(format!("core.{pid}"))).unwrap();
            }
        }
        _ => panic!("probe attack PID ADDRESS FD | probe victim PAGES | probe core FOLDER PID"),
    }
}

struct Victim {
    pid: i32,
    /// Of a byte that can be read and written.
    address: usize,
    /// One that it has open.
    descriptor: i32,
}

impl Victim {
    fn file(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.pid).into()
    }

    fn read(&self, name: &str) -> io::Result<()> {
        File::open(self.file(name))?.read(&mut [0; 64]).map(|_| ())
    }

    fn link(&self, name: &str) -> io::Result<()> {
        fs::read_link(self.file(name)).map(|_| ())
    }

    fn list(&self, name: &str) -> io::Result<()> {
        fs::read_dir(self.file(name))?.next().map_or(Ok(()), |entry| entry.map(|_| ()))
    }

    fn traced(&self, begin: fn(Pid) -> nix::Result<()>, stops: bool) -> io::Result<()> {
        let pid = Pid::from_raw(self.pid);
        begin(pid)?;
        if !stops {
            ptrace::interrupt(pid)?;
        }
        waitpid(pid, None)?;
        Ok(ptrace::detach(pid, None)?)
    }

    fn process(&self) -> io::Result<std::os::fd::OwnedFd> {
        sys::pidfd_open(self.pid).ok_or_else(io::Error::last_os_error)
    }
}

type Attempt = fn(&Victim) -> io::Result<()>;

const ATTEMPTS: &[(&str, Attempt)] = &[
    ("ptrace attach", |victim| victim.traced(ptrace::attach, true)),
    ("ptrace seize", |victim| victim.traced(|pid| ptrace::seize(pid, ptrace::Options::empty()), false)),
    ("mem, read", |victim| File::open(victim.file("mem"))?.read_exact_at(&mut [0; 8], victim.address as u64)),
    ("mem, write", |victim| {
        let file = OpenOptions::new().read(true).write(true).open(victim.file("mem"))?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, victim.address as u64)?;
        file.write_all_at(&byte, victim.address as u64)
    }),
    ("process_vm_readv", |victim| {
        let there = [RemoteIoVec { base: victim.address, len: 1 }];
        Ok(process_vm_readv(Pid::from_raw(victim.pid), &mut [IoSliceMut::new(&mut [0])], &there)
            .map(|_| ())?)
    }),
    ("process_vm_writev", |victim| {
        let (pid, there) = (Pid::from_raw(victim.pid), [RemoteIoVec { base: victim.address, len: 1 }]);
        let mut byte = [0];
        // What cannot be read is overwritten, if the kernel lets that happen.
        let _ = process_vm_readv(pid, &mut [IoSliceMut::new(&mut byte)], &there);
        Ok(process_vm_writev(pid, &[IoSlice::new(&byte)], &there).map(|_| ())?)
    }),
    ("pidfd_getfd", |victim| sys::pidfd_getfd(victim.process()?.as_fd(), victim.descriptor).map(|_| ())),
    ("kcmp", |victim| sys::kcmp_files(victim.pid).map(|_| ())),
    ("perf_event_open", |victim| sys::perf_event_open(victim.pid).map(|_| ())),
    ("move_pages", |victim| sys::page_node(victim.pid, victim.address as u64).map(|_| ())),
    ("get_robust_list", |victim| sys::robust_list(victim.pid).map(|_| ())),
    ("maps", |victim| victim.read("maps")),
    ("smaps", |victim| victim.read("smaps")),
    ("smaps_rollup", |victim| victim.read("smaps_rollup")),
    ("numa_maps", |victim| victim.read("numa_maps")),
    ("pagemap", |victim| victim.read("pagemap")),
    ("environ", |victim| victim.read("environ")),
    ("auxv", |victim| victim.read("auxv")),
    ("syscall", |victim| victim.read("syscall")),
    ("personality", |victim| victim.read("personality")),
    ("io", |victim| victim.read("io")),
    ("wchan", |victim| {
        // Anybody may read it; who may not know finds a zero.
        let told = fs::read_to_string(victim.file("wchan"))? != "0";
        told.then_some(()).ok_or_else(|| Errno::EPERM.into())
    }),
    ("start of the stack, in stat", |victim| {
        let stat = fs::read_to_string(victim.file("stat"))?;
        let told = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(25).unwrap() != "0";
        told.then_some(()).ok_or_else(|| Errno::EPERM.into())
    }),
    ("exe", |victim| victim.link("exe")),
    ("cwd", |victim| victim.link("cwd")),
    ("root", |victim| victim.link("root")),
    ("ns", |victim| victim.link("ns/mnt")),
    ("fd, listed", |victim| victim.list("fd")),
    ("fd, its target", |victim| victim.link(&format!("fd/{}", victim.descriptor))),
    ("fd, opened again", |victim| File::open(victim.file(&format!("fd/{}", victim.descriptor))).map(|_| ())),
    ("fdinfo", |victim| victim.read(&format!("fdinfo/{}", victim.descriptor))),
    ("map_files", |victim| victim.list("map_files")),
    ("clear_refs, write", |victim| {
        OpenOptions::new().write(true).open(victim.file("clear_refs"))?.write_all(b"1")
    }),
    ("coredump_filter, write", |victim| {
        OpenOptions::new().write(true).open(victim.file("coredump_filter"))?.write_all(b"0x33")
    }),
    ("oom_score_adj, write", |victim| {
        OpenOptions::new().write(true).open(victim.file("oom_score_adj"))?.write_all(b"0")
    }),
];
