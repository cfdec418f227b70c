//! What a user of `kmsctl` sees: the files in `tests/transcripts/`, typed again and compared to the byte.
//!
//! Not `trycmd`: it merges the two outputs of a session of several commands, knows no redirection, and cannot start an agent for
//! each file. What this release can answer is read from `docs/protocol.md`, section 3, and each answer must have a transcript.

mod proxy;
mod stages;
mod transcript;

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    thread,
};

use kms_protocol::Status;

use crate::{
    stages::STAGES,
    transcript::{Step, Transcript},
};

/// Set to have the transcripts written as they are now, for a look at the difference.
const WRITE: &str = "KMS_WRITE_TRANSCRIPTS";

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join(path)
}

#[test]
fn every_transcript_is_what_happens() {
    let failed: Vec<String> = thread::scope(|scope| {
        let stages = STAGES.map(|(name, stage)| {
            scope.spawn(move || {
                let differ = |transcript: Transcript| {
                    let now = transcript.differs(&stage())?;
                    if env::var_os(WRITE).is_some() {
                        fs::write(&transcript.path, &now).unwrap();
                    }
                    Some(format!("{} is now:\n{now}", transcript.path.display()))
                };
                Transcript::all(name).into_iter().filter_map(differ).collect::<Vec<_>>()
            })
        });
        stages.into_iter().flat_map(|stage| stage.join().unwrap()).collect()
    });
    assert!(failed.is_empty(), "{}\n{WRITE}=1 writes them", failed.join("\n"));
}

#[test]
fn every_folder_of_transcripts_has_its_stage() {
    let folders: BTreeSet<_> = fs::read_dir(repository("tests/transcripts"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(folders, STAGES.iter().map(|(name, _)| (*name).to_owned()).collect());
}

/// What every transcript asserts.
fn steps() -> Vec<Step> {
    let transcripts = STAGES.iter().flat_map(|(stage, _)| Transcript::all(stage));
    transcripts.flat_map(|transcript| transcript.steps()).collect()
}

#[test]
fn every_error_has_a_hint() {
    for step in steps() {
        let lines = |start: &str| step.stderr().filter(|line| line.starts_with(start)).count();
        assert_eq!(lines("kmsctl: error: "), lines("kmsctl: hint: "), "{}", step.command);
    }
}

/// A row of the table of statuses.
struct Row {
    status: Status,
    message: String,
    hint: String,
    exit_code: u8,
    sent: bool,
}

fn table() -> Vec<Row> {
    let document = fs::read_to_string(repository("docs/protocol.md")).unwrap();
    let section = document.split("\n## ").find(|section| section.starts_with("3. Statuses")).unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    rows.filter_map(|row| {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let status = Status::from_code(cells[0].parse().ok()?).unwrap();
        let [_, name, message, hint, exit_code, sent] = cells.try_into().unwrap();
        assert_eq!(name.trim_matches('`'), status.name());
        Some(Row {
            status,
            message: message.to_owned(),
            hint: hint.to_owned(),
            exit_code: exit_code.parse().unwrap(),
            sent: sent == "yes",
        })
    })
    .collect()
}

impl Row {
    /// Whether `kmsctl` says in this step what the table says.
    fn is_shown_by(&self, step: &Step) -> bool {
        let error = format!("kmsctl: error: {}", self.message);
        let said = |line: &str| match line.strip_prefix(&error) {
            Some(rest) => rest.is_empty() || rest.starts_with(", and asks to wait "),
            None => false,
        };
        let hint = format!("kmsctl: hint: {}", self.hint);
        let refusal =
            self.status == Status::Ok || (step.stderr().any(said) && step.stderr().any(|line| line == hint));
        refusal && step.status() == self.exit_code && step.command.contains("kmsctl ")
    }
}

#[test]
fn every_status_that_this_release_sends_has_a_transcript() {
    let (table, steps) = (table(), steps());
    assert_eq!(table.iter().map(|row| row.status).collect::<Vec<_>>(), Status::ALL);
    for row in table {
        let shown = steps.iter().any(|step| row.is_shown_by(step));
        assert_eq!(shown, row.sent, "{} in docs/protocol.md and in tests/transcripts", row.status.name());
    }
}

fn source_below(path: &Path) -> String {
    match fs::read_dir(path) {
        Ok(entries) => entries.map(|entry| source_below(&entry.unwrap().path())).collect(),
        Err(_) => fs::read_to_string(path).unwrap(),
    }
}

/// That no transcript shows them does not prove that nothing makes them, so the agent's source is read.
#[test]
fn a_reserved_status_is_made_nowhere_in_the_agent() {
    let source = source_below(&repository("agent/src"));
    // What could make one that is not named.
    for way in ["Status::from_code", "Status::ALL", "Status::*", "Status::{", "Status as ", "transmute"] {
        assert!(!source.contains(way), "{way}");
    }
    for row in table() {
        let name = format!("Status::{:?}", row.status);
        let made = source.match_indices(&name).any(|(at, _)| {
            !source[at + name.len()..].starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        });
        assert_eq!(made, row.sent, "{name}");
    }
}
