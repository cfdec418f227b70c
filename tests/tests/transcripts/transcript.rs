//! One transcript: what is typed, and exactly what comes back.
//!
//! A line that begins with `$ ` is typed into `sh` and `# ` is prose. Then come standard output as it is, standard error behind
//! `! `, and the exit status behind `? ` unless it is 0. What differs from run to run has a name in brackets.

use std::{fs, path::PathBuf, process::Command};

use kms_tests::{
    process::output,
    programs::{program, tool},
};

use crate::stages::Stage;

/// Names and facts whose value is another one in each run, or on each machine.
const FACTS: [&str; 10] = [
    "connections",
    "descriptor-limit",
    "frame-pool",
    "landlock",
    "memory-lock-limit",
    "pid",
    "requests",
    "secret-memory",
    "uid",
    "uptime-ms",
];

/// A command with its answer.
pub(crate) struct Step {
    pub(crate) command: String,
    answer: String,
}

impl Step {
    /// The lines of standard error, as they must be.
    pub(crate) fn stderr(&self) -> impl Iterator<Item = &str> {
        self.answer.lines().filter_map(|line| line.strip_prefix("! "))
    }

    pub(crate) fn status(&self) -> u8 {
        let status = self.answer.lines().find_map(|line| line.strip_prefix("? "));
        status.map_or(0, |status| status.parse().unwrap())
    }
}

pub(crate) struct Transcript {
    pub(crate) path: PathBuf,
    text: String,
}

impl Transcript {
    /// Every transcript of one folder.
    pub(crate) fn all(stage: &str) -> Vec<Self> {
        let folder = crate::repository(&format!("tests/transcripts/{stage}"));
        let mut all: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| Self { text: fs::read_to_string(&path).unwrap(), path })
            .collect();
        all.sort_by(|a, b| a.path.cmp(&b.path));
        assert!(!all.is_empty(), "no transcript in {stage}");
        all
    }

    pub(crate) fn steps(&self) -> Vec<Step> {
        let mut steps: Vec<Step> = Vec::new();
        for line in self.text.lines() {
            match (line.strip_prefix("$ "), steps.last_mut()) {
                (Some(command), _) => {
                    steps.push(Step { command: command.to_owned(), answer: String::new() });
                }
                (None, Some(step)) if !line.starts_with("# ") => step.answer += &format!("{line}\n"),
                _ => {}
            }
        }
        steps
    }

    /// Types every line again. Gives the transcript of that when it is another one.
    pub(crate) fn differs(&self, stage: &Stage) -> Option<String> {
        let mut again = String::new();
        let mut typed = false;
        for line in self.text.lines() {
            if let Some(command) = line.strip_prefix("$ ") {
                typed = true;
                again += &format!("{line}\n{}\n", run(command, stage));
            } else if line.starts_with("# ") || !typed {
                again += &format!("{line}\n");
            }
        }
        let again = format!("{}\n", again.trim_end());
        (again != self.text).then_some(again)
    }
}

fn run(command: &str, stage: &Stage) -> String {
    let programs = fs::canonicalize(program("kmsctl").parent().unwrap()).unwrap();
    let path = std::env::join_paths([programs, "/usr/bin".into(), "/bin".into()]).unwrap();
    let mut shell = tool("sh");
    shell.args(["-c", command]).current_dir(stage.folder()).env_clear().env("PATH", path);
    shell.env("LC_ALL", "C").env("HOME", stage.folder()).envs(stage.environment());
    answer(&mut shell, stage)
}

fn answer(shell: &mut Command, stage: &Stage) -> String {
    let (status, stdout, stderr) = output(shell);
    for text in [&stdout, &stderr] {
        assert!(text.is_empty() || text.ends_with('\n'), "the output ends within a line: {text}");
    }
    let mut answer = named(&stdout, stage);
    let marked =
        answer.lines().find(|line| ["$ ", "# ", "! ", "? "].iter().any(|mark| line.starts_with(mark)));
    assert_eq!(marked, None, "the output could be taken for something else");
    for line in named(&stderr, stage).lines() {
        answer += &format!("! {line}\n");
    }
    match status.code() {
        Some(0) => {}
        Some(code) => answer += &format!("? {code}\n"),
        None => panic!("{shell:?}: {status}"),
    }
    answer
}

/// The text with what differs from run to run replaced by its name.
fn named(text: &str, stage: &Stage) -> String {
    let mut text = text.to_owned();
    for (value, name) in stage.names() {
        text = text.replace(&value, name);
    }
    if let Some((before, behind)) = text.split_once("asks to wait ") {
        let unit = behind.trim_start_matches(|c: char| c.is_ascii_digit());
        text = format!("{before}asks to wait [SECONDS]{unit}");
    }
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | ':');
    let (mut named, mut rest, mut fact) = (String::new(), text.as_str(), None);
    while let Some(start) = rest.find(|c: char| c.is_ascii_alphanumeric()) {
        let (before, behind) = rest.split_at(start);
        let (word, behind) = behind.split_at(behind.find(|c| !is_word(c)).unwrap_or(behind.len()));
        // The value of a fact stands in the next column, or behind the colon of JSON.
        let is_value = before.starts_with("  ") || before.starts_with("\":");
        let hex = word.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        named += before;
        named += &match fact.take().filter(|_| is_value) {
            Some(fact) => format!("[{}]", str::to_uppercase(fact)),
            None if hex && word.len() == 32 => "[ID]".to_owned(),
            None if hex && word.len() == 16 => "[CHECK VALUE]".to_owned(),
            None if word.len() == 20 && word.starts_with("20") && word.ends_with('Z') => "[TIME]".to_owned(),
            None => word.to_owned(),
        };
        fact = FACTS.into_iter().find(|fact| *fact == word);
        rest = behind;
    }
    named + rest
}
