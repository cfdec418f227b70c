//! The filter of system calls that a process is under, read back from the kernel and evaluated.

use std::collections::BTreeMap;

use crate::{programs, sys};

/// `SECCOMP_RET_ALLOW` and `SECCOMP_RET_KILL_PROCESS`.
const ALLOW: u32 = 0x7fff_0000;
const KILL_PROCESS: u32 = 0x8000_0000;

/// `AUDIT_ARCH_X86_64`, `AUDIT_ARCH_I386` and the bit that marks a number of x32.
pub const X86_64: u32 = 0xc000_003e;
/// See [`X86_64`].
pub const I386: u32 = 0x4000_0003;
/// See [`X86_64`].
pub const X32: u32 = 0x4000_0000;

/// One instruction of classic BPF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip where a comparison holds.
    pub jump_true: u8,
    /// And where it does not.
    pub jump_false: u8,
    /// Operand.
    pub operand: u32,
}

/// A filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter(Vec<Instruction>);

/// What a filter looks at, `struct seccomp_data`; unknown words may be anything.
#[derive(Clone, Copy)]
struct Words([Option<u32>; 16]);

impl Filter {
    /// The filter that every thread of the process is under: exactly one.
    ///
    /// # Panics
    /// When that is not so.
    #[must_use]
    pub fn of(pid: i32) -> Self {
        programs::needs_root();
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let threads: Vec<i32> =
            tasks.map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
        let filters: Vec<Vec<Instruction>> =
            threads.iter().map(|thread| sys::seccomp_filter(*thread)).collect();
        assert!(filters.windows(2).all(|two| two[0] == two[1]), "threads {threads:?} differ");
        Self(filters.into_iter().next().unwrap())
    }

    /// Whether a call with these arguments is allowed; every other ends the process.
    ///
    /// # Panics
    /// When there is a third answer.
    #[must_use]
    pub fn allows(&self, architecture: u32, number: u32, arguments: [u64; 6]) -> bool {
        let mut words = [Some(0); 16];
        (words[0], words[1]) = (Some(number), Some(architecture));
        for (place, argument) in arguments.into_iter().enumerate() {
            words[4 + 2 * place] = Some(argument as u32);
            words[5 + 2 * place] = Some((argument >> 32) as u32);
        }
        let [result] = self.results(&Words(words))[..] else { panic!("one answer") };
        match result {
            ALLOW => true,
            KILL_PROCESS => false,
            other => panic!("an answer of {other:#x}"),
        }
    }

    /// Whether there are arguments with which the call may be allowed.
    #[must_use]
    pub fn may_allow(&self, architecture: u32, number: u32) -> bool {
        let mut words = [None; 16];
        (words[0], words[1]) = (Some(number), Some(architecture));
        self.results(&Words(words)).contains(&ALLOW)
    }

    /// What it answers, with every choice for what is unknown.
    fn results(&self, words: &Words) -> Vec<u32> {
        let mut results = Vec::new();
        let mut todo = vec![(0, None)];
        while let Some((place, accumulator)) = todo.pop() {
            let Instruction { code, jump_true, jump_false, operand } = self.0[place];
            let jump = |taken: bool| place + 1 + usize::from(if taken { jump_true } else { jump_false });
            let mut compare = |holds: fn(u32, u32) -> bool| match accumulator {
                Some(value) => todo.push((jump(holds(value, operand)), accumulator)),
                None => todo.extend([true, false].map(|taken| (jump(taken), None))),
            };
            match code {
                0x20 => todo.push((place + 1, words.0[operand as usize / 4])),
                0x15 => compare(|value, operand| value == operand),
                0x25 => compare(|value, operand| value > operand),
                0x35 => compare(|value, operand| value >= operand),
                0x45 => compare(|value, operand| value & operand != 0),
                0x05 => todo.push((place + 1 + operand as usize, accumulator)),
                0x54 => todo.push((place + 1, accumulator.map(|value| value & operand))),
                0x06 => results.push(operand),
                other => panic!("an instruction {other:#x}"),
            }
        }
        results
    }
}

/// Numbers of the system calls of x86-64, from the header of the kernel.
///
/// # Panics
/// When it is not there, with the Debian package that has it.
#[must_use]
pub fn numbers() -> BTreeMap<String, u32> {
    let path = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h";
    let header = std::fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("{path}: {error}: apt-get install linux-libc-dev"));
    let lines = header.lines().filter_map(|line| line.strip_prefix("#define __NR_")?.split_once(' '));
    lines.map(|(name, number)| (name.to_owned(), number.trim().parse().unwrap())).collect()
}
