//! Every sentence that the code quotes (`//= docs/formats.md#section`, `//# sentence`) stands in that section of the document.

#![expect(clippy::panic, reason = "a panic is how a test fails")]

use std::{collections::BTreeMap, fs, path::Path};

const DOCUMENT: &str = "docs/formats.md";

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The anchor that a heading gets when the document is rendered.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase().replace(' ', "-");
    kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect()
}

/// Text of each section by anchor, subsections apart, as one line of words.
fn sections(document: &str) -> BTreeMap<String, String> {
    let mut sections = BTreeMap::new();
    let mut current = String::new();
    for line in document.lines() {
        if let Some((_, heading)) = line.split_once("# ").filter(|(marks, _)| marks.chars().all(|c| c == '#'))
        {
            current = anchor(heading);
            assert!(sections.insert(current.clone(), String::new()).is_none(), "{current} is there twice");
        } else if let Some(text) = sections.get_mut(&current) {
            text.push_str(line);
            text.push('\n');
        }
    }
    sections.into_iter().map(|(name, text)| (name, words(&text))).collect()
}

/// `(file:line, anchor, sentence)` of every quotation in one source.
fn quotations(name: &str, source: &str) -> Vec<(String, String, String)> {
    let mut found: Vec<(String, String, String)> = Vec::new();
    for (number, line) in source.lines().enumerate() {
        let line = line.trim_start();
        let place = format!("{name}:{}", number + 1);
        if let Some(target) = line.strip_prefix("//= ") {
            let (document, anchor) = target.split_once('#').unwrap_or_else(|| panic!("{place}: no section"));
            assert_eq!(document, DOCUMENT, "{place}");
            found.push((place, anchor.to_owned(), String::new()));
        } else if let Some(text) = line.strip_prefix("//# ") {
            let (_, _, sentence) = found.last_mut().unwrap_or_else(|| panic!("{place}: no target"));
            sentence.push(' ');
            sentence.push_str(text);
        }
    }
    found
}

fn check(sections: &BTreeMap<String, String>, quotations: &[(String, String, String)]) -> Result<(), String> {
    for (place, anchor, sentence) in quotations {
        let section =
            sections.get(anchor).ok_or_else(|| format!("{place}: {DOCUMENT} has no section {anchor}"))?;
        let sentence = words(sentence);
        if sentence.is_empty() || !section.contains(&sentence) {
            return Err(format!("{place}: section {anchor} does not say: {sentence}"));
        }
    }
    Ok(())
}

#[test]
fn every_quoted_sentence_stands_in_the_document() {
    let sections = sections(&fs::read_to_string(root().join(DOCUMENT)).unwrap());
    let mut all = Vec::new();
    for entry in fs::read_dir(root().join("protocol/envelope/src")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "rs") {
            all.extend(quotations(
                path.file_name().unwrap().to_str().unwrap(),
                &fs::read_to_string(&path).unwrap(),
            ));
        }
    }
    // So that a quotation style which is no longer recognised does not pass as no quotations.
    assert!(all.len() >= 25, "only {} quotations found", all.len());
    check(&sections, &all).unwrap();
}

#[test]
fn a_changed_sentence_and_a_wrong_section_are_noticed() {
    let sections = sections("# Top\n## 1. First part\nA decoder MUST\nrefuse.\n### 1.1 More\nOther.\n");
    let quote = |anchor: &str, lines: &str| {
        check(&sections, &quotations("x.rs", &format!("    //= {DOCUMENT}#{anchor}\n{lines}")))
    };
    quote("1-first-part", "//# A decoder MUST\n//# refuse.\n").unwrap();
    quote("1-first-part", "//# A decoder MUST accept.\n").unwrap_err();
    quote("11-more", "//# A decoder MUST refuse.\n").unwrap_err();
    quote("2-second-part", "//# A decoder MUST refuse.\n").unwrap_err();
    quote("11-more", "").unwrap_err();
}
