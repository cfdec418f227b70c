//! Another process at the socket, for tests that need a sender who is not the one that connected, or a setuid program.
//!
//! `peer connect PATH` connects; `peer inherited` takes the socket that is its stdin. It then prints its real and effective
//! uid, sends the bytes that its last argument gives in hexadecimal, and prints what comes back, in hexadecimal.

use std::{
    env,
    io::{Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
};

use nix::unistd::{geteuid, getuid};

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (mut stream, bytes) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["connect", path, bytes] => (UnixStream::connect(path).unwrap(), bytes),
        ["inherited", bytes] => {
            (UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap()), bytes)
        }
        _ => panic!("peer connect PATH BYTES | peer inherited BYTES"),
    };
    println!("{} {}", getuid(), geteuid());
    let bytes: Vec<u8> =
        (0..bytes.len()).step_by(2).map(|at| u8::from_str_radix(&bytes[at..at + 2], 16).unwrap()).collect();
    // A refusal may come before all is sent.
    let _ = stream.write_all(&bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply);
    println!("{}", reply.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
}
