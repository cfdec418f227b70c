//! What sources quote from a document (`//= docs/NAME.md#section`, `//# sentence`) stands in that section, and the sections that
//! they cite are there.

use std::{collections::BTreeMap, fs, path::Path};

use crate::{
    repository,
    schema::{Document, words},
};

/// The documents, and the folders that quote them.
const DOCUMENTS: [&str; 2] = ["docs/formats.md", "docs/protocol.md"];
const FOLDERS: [&str; 3] = ["protocol", "agent/src", "client/src"];

/// Every Rust source below a folder.
pub(crate) fn sources(folder: &str) -> Vec<(String, String)> {
    fn walk(folder: &Path, found: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push((path.display().to_string(), fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let mut found = Vec::new();
    walk(&repository(folder), &mut found);
    found
}

fn documents() -> BTreeMap<&'static str, Document> {
    let read = |path| Document::parse(&fs::read_to_string(repository(path)).unwrap());
    DOCUMENTS.into_iter().map(|path| (path, read(path))).collect()
}

struct Quotation {
    place: String,
    document: String,
    anchor: String,
    sentence: String,
}

fn quotations(name: &str, source: &str) -> Vec<Quotation> {
    let mut found: Vec<Quotation> = Vec::new();
    for (at, line) in source.lines().enumerate() {
        let line = line.trim_start();
        let place = format!("{name}:{}", at + 1);
        if let Some(target) = line.strip_prefix("//= ") {
            let (document, anchor) = target.split_once('#').unwrap_or_else(|| panic!("{place}: no section"));
            let (document, anchor) = (document.to_owned(), anchor.to_owned());
            found.push(Quotation { place, document, anchor, sentence: String::new() });
        } else if let Some(text) = line.strip_prefix("//# ") {
            let last = found.last_mut().unwrap_or_else(|| panic!("{place}: nothing is named"));
            last.sentence.push_str(text);
            last.sentence.push(' ');
        }
    }
    found
}

fn check(documents: &BTreeMap<&str, Document>, quotations: &[Quotation]) -> Result<(), String> {
    for Quotation { place, document, anchor, sentence } in quotations {
        let sections = &documents.get(document.as_str()).ok_or(format!("{place}: no {document}"))?.sections;
        let section = sections.iter().find(|section| section.anchor == *anchor);
        let section = section.ok_or_else(|| format!("{place}: {document} has no section {anchor}"))?;
        let sentence = words(sentence);
        if sentence.is_empty() || !section.words.contains(&sentence) {
            return Err(format!("{place}: section {anchor} of {document} does not say: {sentence}"));
        }
    }
    Ok(())
}

#[test]
fn every_quoted_sentence_stands_in_the_document() {
    let documents = documents();
    let mut counts = BTreeMap::new();
    for (name, source) in FOLDERS.into_iter().flat_map(sources).filter(|(name, _)| !name.contains("/tests/"))
    {
        let found = quotations(&name, &source);
        check(&documents, &found).unwrap();
        for quotation in found {
            *counts.entry(quotation.document).or_insert(0) += 1;
        }
    }
    // So that a way of quoting which is no longer recognised does not pass as no quotations.
    assert!(counts["docs/formats.md"] >= 25 && counts["docs/protocol.md"] >= 15, "only {counts:?} found");
}

#[test]
fn a_changed_sentence_and_a_wrong_section_are_noticed() {
    let text = "# Top\n## 1. First part\nAn agent MUST\nrefuse.\n### 1.1 More\nOther.\n";
    let documents = BTreeMap::from([("docs/x.md", Document::parse(text))]);
    let quote = |target: &str, lines: &str| {
        check(&documents, &quotations("x.rs", &format!("    //= docs/{target}\n{lines}")))
    };
    quote("x.md#1-first-part", "//# An agent MUST\n    //# refuse.\n").unwrap();
    quote("x.md#1-first-part", "//# An agent MUST accept.\n").unwrap_err();
    quote("x.md#11-more", "//# An agent MUST refuse.\n").unwrap_err();
    quote("x.md#2-second-part", "//# An agent MUST refuse.\n").unwrap_err();
    quote("x.md#11-more", "").unwrap_err();
    quote("y.md#1-first-part", "//# An agent MUST refuse.\n").unwrap_err();
}

/// `docs/NAME.md`, section N, and sections N, M and K, wherever code or text says so.
fn cited(document: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let text = words(&text.replace("//!", " ").replace("///", " "));
    for (at, _) in text.match_indices(document) {
        let rest = &text[at + document.len()..];
        let rest = rest.trim_start_matches(['`', ',', ' ']);
        let Some(list) = rest.strip_prefix("sections ").or_else(|| rest.strip_prefix("section ")) else {
            continue;
        };
        for word in list.split([' ', ',']) {
            let word = word.trim_end_matches([')', '.', ':', ';', '`', '"']);
            match word {
                "and" | "to" | "" => {}
                word if word.starts_with(|c: char| c.is_ascii_digit()) => found.push(word.to_owned()),
                _ => break,
            }
        }
    }
    found
}

#[test]
fn every_section_that_is_cited_exists() {
    let documents = documents();
    let example = "(`docs/protocol.md`, sections 4.1, 4\n/// and 5.3).";
    assert_eq!(cited("docs/protocol.md", example), ["4.1", "4", "5.3"]);
    for (path, document) in documents {
        let exists = |number: &str| document.sections.iter().any(|section| section.number == number);
        let mut seen = 0;
        for (name, source) in FOLDERS.into_iter().flat_map(sources) {
            for number in cited(path, &source) {
                let exists = exists(&number) || name.ends_with("wire/quotes.rs");
                assert!(exists, "{name}: section {number} of {path}");
                seen += 1;
            }
        }
        assert!(seen >= 15, "only {seen} citations of {path} found");
        // The document's own references, to itself.
        for section in &document.sections {
            for rest in section.words.split("(section ").skip(1) {
                let number = rest.split([')', ',']).next().unwrap();
                assert!(exists(number), "{path} refers to section {number}");
            }
        }
    }
}
