//! Settings of the whole machine, one test at a time: cores and swap. A process of its own puts them back, also when the test is killed.

use std::{
    env,
    fs::{self, File},
    process::{Child, Stdio},
};

use kms_tests::{
    process::wait_for,
    programs::{needs_root, tool},
};

const CORE_PATTERN: &str = "/proc/sys/kernel/core_pattern";
const SUID_DUMPABLE: &str = "/proc/sys/fs/suid_dumpable";

/// Has the machine's settings to itself. Dropped, it puts back what was changed.
pub(crate) struct Machine {
    /// Waits for the end of its stdin, which is ours, and then puts the settings back. The lock is its stdout, so that nobody else
    /// has it before that is done.
    restorer: Child,
}

impl Machine {
    /// Waits for every other test that has it. `script` is what puts the settings back.
    fn take(lock: File, script: &str, arguments: &[&str]) -> Self {
        let mut restorer = tool("setsid");
        restorer.arg(tool("sh").get_program()).args(["-c", &format!("cat; {script}"), "sh"]).args(arguments);
        let restorer = restorer.stdin(Stdio::piped()).stdout(lock).spawn().unwrap();
        Self { restorer }
    }

    /// The lock of all tests on this machine: the temporary folder itself, so that nothing stays behind.
    fn lock() -> File {
        needs_root();
        let lock = File::open(env::temp_dir()).unwrap();
        lock.lock().unwrap();
        lock
    }

    /// To change where cores go.
    pub(crate) fn for_cores() -> Self {
        let lock = Self::lock();
        let [pattern, dumpable] = [CORE_PATTERN, SUID_DUMPABLE].map(|path| fs::read_to_string(path).unwrap());
        let script = format!("printf %s \"$1\" > {CORE_PATTERN}; printf %s \"$2\" > {SUID_DUMPABLE}");
        Self::take(lock, &script, &[pattern.trim_end(), dumpable.trim_end()])
    }

    /// Sends the cores of the machine there.
    pub(crate) fn set_cores(&self, pattern: &str, suid_dumpable: &str) {
        assert!(pattern.len() < 128, "{pattern}");
        // In this order: with the second setting a pattern that is no path and no pipe is refused.
        fs::write(CORE_PATTERN, pattern).unwrap();
        fs::write(SUID_DUMPABLE, suid_dumpable).unwrap();
        assert_eq!(fs::read_to_string(CORE_PATTERN).unwrap().trim_end(), pattern);
    }

    /// To swap to this file and from this control group, both of which go afterwards.
    pub(crate) fn for_swap(file: &str, group: &str) -> Self {
        let script = "swapoff \"$1\"; rm -f \"$1\"; \
            while read -r pid; do kill -9 \"$pid\"; done < \"$2/cgroup.procs\"; \
            until rmdir \"$2\" 2>/dev/null || [ ! -d \"$2\" ]; do :; done";
        Self::take(Self::lock(), script, &[file, group])
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.restorer.stdin.take());
        wait_for(&mut self.restorer);
    }
}
