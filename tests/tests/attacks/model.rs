//! The threat model names tests: each of them must exist.

use std::{collections::HashSet, fs, path::Path};

fn folder(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join(name)
}

/// The names of all test functions in a file.
fn tests_in(path: &Path) -> HashSet<String> {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (mut tests, mut is_test) = (HashSet::new(), false);
    for line in text.lines().map(str::trim) {
        if line == "#[test]" {
            is_test = true;
        } else if let Some(name) = line.strip_prefix("fn ").and_then(|rest| rest.split_once('(')) {
            if is_test {
                tests.insert(name.0.to_owned());
            }
            is_test = false;
        }
    }
    tests
}

#[test]
fn every_test_that_the_threat_model_names_exists() {
    let text = fs::read_to_string(folder("docs/threat-model.md")).unwrap();
    // Such as `attacks/cores.rs: a_core_that_root_takes_has_no_key`.
    let named: Vec<(&str, &str)> =
        text.split('`').skip(1).step_by(2).filter_map(|code| code.split_once(".rs: ")).collect();
    assert!(named.len() >= 30, "{named:?}");
    for (file, test) in &named {
        let tests = tests_in(&folder("tests/tests").join(format!("{file}.rs")));
        assert!(tests.contains(*test), "{file}.rs has no test {test}: {tests:?}");
    }
    // Whatever is done here is in the model.
    for entry in fs::read_dir(folder("tests/tests/attacks")).unwrap() {
        let path = entry.unwrap().path();
        let file = format!("attacks/{}", path.file_stem().unwrap().to_str().unwrap());
        for test in tests_in(&path) {
            let known = file == "attacks/model" || named.contains(&(file.as_str(), test.as_str()));
            assert!(known, "docs/threat-model.md does not name {file}.rs: {test}");
        }
    }
}
