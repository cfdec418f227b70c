//! The vectors of `docs/formats.md`, section 15: each file has exactly the outcome that it names.

mod support;

use std::{collections::BTreeSet, fs, path::Path};

use support::Vector;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors/formats");

/// Checks every file of a folder: how many, and which outcomes were met.
fn check(folder: &Path) -> Result<(usize, BTreeSet<String>), String> {
    let mut outcomes = BTreeSet::new();
    let mut count = 0;
    let mut total = 0;
    for entry in fs::read_dir(folder).map_err(|e| e.to_string())? {
        let path = entry.map_err(|e| e.to_string())?.path();
        let name = path.display();
        let text = fs::read_to_string(&path).map_err(|e| format!("{name}: {e}"))?;
        if text.len() > 8 * 1024 {
            return Err(format!("{name}: over 8 KiB"));
        }
        total += text.len();
        let vector = Vector::parse(&text).map_err(|e| format!("{name}: {e}"))?;
        let outcome = vector.run().map_err(|e| format!("{name}: {e}"))?;
        let expected = vector.expected()?;
        if outcome != expected {
            return Err(format!("{name}: expected {expected}, was {outcome}"));
        }
        outcomes.insert(outcome);
        count += 1;
    }
    if count == 0 {
        return Err(format!("{}: no vectors", folder.display()));
    }
    if total > 200_000 {
        return Err(format!("{}: over 200 kB", folder.display()));
    }
    Ok((count, outcomes))
}

#[test]
fn every_vector_has_the_outcome_that_it_names() {
    let (count, outcomes) = check(Path::new(FOLDER)).unwrap();
    // Every outcome of section 11 is met, and none goes missing with a lost file.
    let all = [
        "invalid-ciphertext",
        "malformed: context duplicate key",
        "malformed: context empty key",
        "malformed: context not sorted",
        "malformed: context too long",
        "malformed: context too many pairs",
        "malformed: context trailing bytes",
        "malformed: context truncated",
        "malformed: header length",
        "malformed: key version",
        "malformed: magic",
        "malformed: purpose",
        "success",
        "too-large",
        "unsupported: flags",
        "unsupported: format",
        "unsupported: purpose",
        "unsupported: suite",
    ];
    assert_eq!(outcomes, all.into_iter().map(String::from).collect());
    assert_eq!(count, COUNT);
}

/// Raised by hand when vectors are added.
const COUNT: usize = 178;

#[test]
fn a_folder_or_file_that_is_not_right_is_refused() {
    let good = fs::read_to_string(Path::new(FOLDER).join("message-success.txt")).unwrap();
    let run = |text: &str| Vector::parse(text).and_then(|v| v.run());
    assert_eq!(run(&good).as_deref(), Ok("success"));
    run(&format!("{good}comment: x\n")).unwrap_err();
    run(&format!("{good}no field\n")).unwrap_err();
    run(&format!("{good}kek: 00\n")).unwrap_err();
    run(&format!("{good}edit: none\n")).unwrap_err();
    run(&format!("{good}why: x\n")).unwrap_err();
    run(&good.replace("61747461636b", "61747461636c")).unwrap_err();
    run(&good.replace("operation: open-message", "operation: open-massage")).unwrap_err();
    run(&good.replace("version: 7", "version: 8")).unwrap_err();
    run(good.split_once('\n').unwrap().1).unwrap_err();
    run("").unwrap_err();

    let folder = std::env::temp_dir().join(format!("kms-envelope-vectors-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    let empty = check(&folder);
    fs::write(folder.join("wrong.txt"), good.replace("expect: success", "expect: malformed: magic")).unwrap();
    let wrong = check(&folder);
    fs::remove_dir_all(&folder).unwrap();
    assert!(empty.unwrap_err().contains("no vectors"));
    assert!(wrong.unwrap_err().contains("was success"));
}
