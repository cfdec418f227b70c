//! What `docs/protocol.md` says in tables and sentences is what the code has, both ways.

use std::collections::{BTreeMap, BTreeSet};

use kms_protocol::{
    BATCH_ITEMS_MAX, BINDINGS_MAX, DATA_KEY_MAX, FRAME_HEAD_LEN, FRAME_MAX, KeyName, Opcode, PAGE_ROWS_MAX,
    PASSPHRASE_MAX, PROTOCOL_VERSION, RANDOM_MAX, REMOTE_STREAMS_MAX, Status, TOKEN_LEN, constraint,
};

use crate::{
    quotes::sources,
    schema::{Document, words},
    vectors::Vector,
};

const RESERVED: &str = "reserved";

fn number(cell: &str) -> u16 {
    u16::from_str_radix(cell.strip_prefix("0x").unwrap(), 16).unwrap()
}

#[test]
fn the_opcodes_are_those_of_the_table() {
    let document = Document::read();
    let rows = document.section("4").rows("opcode").unwrap();
    let told: Vec<_> = rows.iter().map(|row| (number(&row[0]), row[1].clone())).collect();
    let have: Vec<_> = Opcode::ALL.iter().map(|opcode| (opcode.code(), opcode.name().to_owned())).collect();
    assert_eq!(told, have);
    let sections = document
        .sections
        .iter()
        .filter(|section| section.words.contains("Statuses:") && section.number.starts_with("4."));
    let titles: Vec<_> = sections.map(|section| section.title.clone()).collect();
    assert_eq!(titles, told.into_iter().map(|(_, name)| name).collect::<Vec<_>>());
}

#[test]
fn the_table_of_requests_agrees_with_their_sections() {
    let document = Document::read();
    for row in document.section("4").rows("opcode").unwrap() {
        let [_, name, _, locked, request_fields, request_payload, reply_fields, reply_payload] =
            row.as_slice()
        else {
            panic!("{row:?}");
        };
        assert!(["yes", "no"].contains(&locked.as_str()), "{name}");
        let own = document.opcode(name).number.clone();
        let sides = [
            (document.request(name), request_fields, request_payload),
            (document.reply(name), reply_fields, reply_payload),
        ];
        for (shape, fields, payload) in sides {
            assert_eq!(shape.fields.is_empty(), fields.is_empty(), "{name}");
            assert_eq!(shape.has_payload, !payload.is_empty(), "{name}");
            assert!(fields.is_empty() || *fields == own || *fields == "5.1", "{name}: section {fields}");
        }
    }
}

#[test]
fn the_statuses_are_those_of_the_table() {
    let document = Document::read();
    let rows = document.section("3").rows("number").unwrap();
    let told: Vec<_> = rows.iter().map(|row| (row[0].clone(), row[1].clone(), row[4].clone())).collect();
    let have: Vec<_> = Status::ALL
        .iter()
        .map(|status| (status.code().to_string(), status.name().to_owned(), status.exit_code().to_string()))
        .collect();
    assert_eq!(told, have);
    let reserved: Vec<_> = rows.iter().filter(|row| row[5] == RESERVED).map(|row| &row[1]).collect();
    assert_eq!(reserved, ["disabled", "audit-unavailable"]);
    assert!(rows.iter().all(|row| row[5] == "yes" || row[5] == RESERVED));
    assert!(rows.iter().all(|row| row[2].is_empty() == (row[1] == "ok")));
}

/// The program that prints them stands in another crate, so its source is read.
#[test]
fn the_messages_and_hints_are_those_of_kmsctl() {
    let document = Document::read();
    let kmsctl: Vec<_> =
        sources("client/src/cli").into_iter().map(|(_, source)| words(&source).replace('`', "")).collect();
    for row in document.section("3").rows("number").unwrap().iter().skip(1) {
        for text in &row[2..4] {
            let quoted = format!("\"{text}\"");
            assert!(kmsctl.iter().any(|source| source.contains(&quoted)), "kmsctl does not say: {text}");
        }
    }
}

#[test]
fn requests_are_answered_with_statuses_that_are_sent() {
    let document = Document::read();
    let rows = document.section("3").rows("number").unwrap();
    let sent: BTreeSet<_> = rows.iter().filter(|row| row[5] != RESERVED).map(|row| row[1].as_str()).collect();
    let names: BTreeSet<_> = Opcode::ALL.iter().map(|opcode| opcode.name()).collect();
    for opcode in Opcode::ALL {
        let section = document.opcode(opcode.name());
        let (_, statuses) = section.words.split_once("Statuses: `ok`").unwrap();
        for (at, quoted) in statuses.split('`').enumerate().filter(|(at, _)| at % 2 == 1) {
            let is_status = sent.contains(quoted);
            assert!(is_status || names.contains(quoted) || quoted == "if_missing", "{at}: {quoted}");
        }
    }
}

#[test]
fn reserved_numbers_are_free() {
    let document = Document::read();
    let rows = document.section("9").rows("opcode").unwrap();
    let numbers: Vec<_> = rows.iter().map(|row| number(&row[0])).collect();
    assert!(numbers.is_sorted_by(|a, b| a < b));
    assert!(numbers.iter().all(|number| Opcode::from_code(*number).is_none()));
    let names: BTreeSet<_> = rows.iter().map(|row| row[1].as_str()).collect();
    assert_eq!(names.len(), rows.len());
    assert!(Opcode::ALL.iter().all(|opcode| !names.contains(opcode.name())));

    let constraints = document.sections.iter().find(|section| section.title == "Constraint").unwrap();
    let kinds = constraints.rows("kind").unwrap();
    let taken: Vec<u32> =
        kinds.iter().filter(|row| row[2] != RESERVED).map(|row| row[0].parse().unwrap()).collect();
    assert_eq!(taken, constraint::ALL);
}

#[test]
fn the_numbers_in_the_sentences_are_those_of_the_code() {
    let document = Document::read();
    let grouped = |number: usize| match number.to_string() {
        digits if digits.len() > 6 => {
            let (front, back) = digits.split_at(digits.len() - 6);
            format!("{front},{},{}", &back[..3], &back[3..])
        }
        digits if digits.len() > 3 => {
            let (front, back) = digits.split_at(digits.len() - 3);
            format!("{front},{back}")
        }
        digits => digits,
    };
    for (section, sentence) in [
        ("2", format!("A frame is a head of {FRAME_HEAD_LEN} bytes")),
        ("2.2", format!("It is {} bytes (1 MiB) unless", grouped(FRAME_MAX))),
        ("4.1", format!("1 to {} bytes of", KeyName::LEN_MAX)),
        ("4.3", format!("the client speaks: {PROTOCOL_VERSION} |")),
        ("4.6", format!("1 to {} bytes", grouped(PASSPHRASE_MAX))),
        ("4.7", format!("1 to {} bytes", grouped(PASSPHRASE_MAX))),
        ("4.14", format!("1 to {} bytes", grouped(PASSPHRASE_MAX))),
        ("4.27", format!("1 to {}; 32 for AES-256", grouped(DATA_KEY_MAX))),
        ("4.32", format!("number of bytes, 1 to {} |", grouped(RANDOM_MAX))),
        ("4.32", format!("a length over {}.", grouped(RANDOM_MAX))),
        ("4.33", format!("A connection can bind {} numbers.", grouped(BINDINGS_MAX))),
        ("4.33", format!("that would be the {}th.", grouped(BINDINGS_MAX + 1))),
        ("4.34", format!("Request payload: 1 to {} *items*", grouped(BATCH_ITEMS_MAX))),
        ("4.34", format!("more than {}, with one", grouped(BATCH_ITEMS_MAX))),
        ("7", format!("can hold {REMOTE_STREAMS_MAX} streams open; the {}th", REMOTE_STREAMS_MAX + 1)),
    ] {
        assert!(document.section(section).words.contains(&sentence), "section {section}: {sentence}");
    }
    let tokens = document.sections.iter().find(|section| section.title == "Tokens").unwrap();
    assert!(tokens.words.contains(&format!("carry {TOKEN_LEN} random bytes")));
    let example = Vector::all().into_iter().find(|vector| vector.name == "example-2-hello-reply").unwrap();
    let welcome: kms_protocol::Welcome =
        kms_protocol::decode_fields(&example.frame[FRAME_HEAD_LEN..]).unwrap();
    assert_eq!(welcome.frame_max as usize, FRAME_MAX);
    assert_eq!(welcome.page_rows_max as usize, PAGE_ROWS_MAX);
    assert_eq!(welcome.remote_streams_max as usize, REMOTE_STREAMS_MAX);
    assert_eq!(welcome.constraints, constraint::ALL);
    assert_eq!(welcome.opcodes, Opcode::ALL.iter().map(|opcode| opcode.code()).collect::<Vec<_>>());
}

/// The agent stands in another crate, so its source is read.
#[test]
fn the_facts_and_the_values_are_those_of_the_agent() {
    let document = Document::read();
    for (section, folder, call) in [("5.3", "agent/src", "fact(\""), ("5.4", "agent/src/core", " value(\"")] {
        let rows = document.section(section).rows("name").unwrap();
        let told: BTreeSet<_> = rows.iter().map(|row| row[0].clone()).collect();
        let mut given = BTreeSet::new();
        for (_, source) in sources(folder) {
            for rest in source.split(call).skip(1) {
                given.insert(rest.split('"').next().unwrap().to_owned());
            }
        }
        assert_eq!(told, given, "section {section}");
    }
}

#[test]
fn the_worked_example_is_its_vectors() {
    let document = Document::read();
    let fences = &document.section("11").fences;
    let vectors: BTreeMap<_, _> =
        Vector::all().into_iter().map(|vector| (vector.name.clone(), vector.frame)).collect();
    let examples = vectors.keys().filter(|name| name.starts_with("example-")).count();
    assert_eq!(fences.len(), examples);
    for (what, lines) in fences {
        let name = what.strip_prefix("frame ").unwrap();
        let digits = lines.iter().flat_map(|line| line.split("  ").next().unwrap().split(' '));
        let bytes: Vec<u8> = digits.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect();
        assert_eq!(Some(&bytes), vectors.get(name), "{name}");
    }
}
