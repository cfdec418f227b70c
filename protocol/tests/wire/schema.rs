//! A decoder that knows nothing but the tables of `docs/protocol.md`: what a stranger would write from the text.

use std::{collections::BTreeMap, fs};

use crate::repository;

/// A heading and what stands below it, subsections apart.
pub(crate) struct Section {
    /// `4.12`, or nothing for a heading without a number.
    pub(crate) number: String,
    /// The heading without its number.
    pub(crate) title: String,
    /// What a link to the heading ends with.
    pub(crate) anchor: String,
    /// The text as one line of words.
    pub(crate) words: String,
    /// Its tables, row by row, the heading row first.
    pub(crate) tables: Vec<Vec<Vec<String>>>,
    /// Its fenced blocks, with what stands behind the fence.
    pub(crate) fences: Vec<(String, Vec<String>)>,
}

type FieldList = Vec<(String, String)>;

enum Type {
    Structure(FieldList),
    Enumeration(BTreeMap<u32, (String, String)>),
}

/// What the text says of a request or a reply.
pub(crate) struct Shape {
    pub(crate) fields: FieldList,
    pub(crate) has_payload: bool,
}

/// The specification.
pub(crate) struct Document {
    pub(crate) sections: Vec<Section>,
    types: BTreeMap<String, Type>,
}

/// Why bytes are not the fields that the text describes (`docs/protocol.md`, section 12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    Truncated,
    Length,
    Utf8,
    Bool,
    OptionTag,
    EnumerationTag,
    Trailing,
}

impl Flaw {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Truncated => "truncated",
            Self::Length => "length",
            Self::Utf8 => "utf-8",
            Self::Bool => "bool",
            Self::OptionTag => "option tag",
            Self::EnumerationTag => "enumeration tag",
            Self::Trailing => "trailing",
        }
    }
}

pub(crate) fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Section {
    fn new(heading: &str, body: &[&str]) -> Self {
        let (number, title) = heading
            .split_once(' ')
            .filter(|(number, _)| number.starts_with(|c: char| c.is_ascii_digit()))
            .map_or(("", heading), |(number, title)| (number.trim_end_matches('.'), title));
        let kept = heading.to_lowercase().replace(' ', "-");
        let anchor = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect();
        let mut tables: Vec<Vec<Vec<String>>> = Vec::new();
        let mut fences: Vec<(String, Vec<String>)> = Vec::new();
        let (mut in_table, mut in_fence) = (false, false);
        for line in body {
            if let Some(what) = line.strip_prefix("```") {
                in_fence = !in_fence;
                if in_fence {
                    fences.push((what.to_owned(), Vec::new()));
                }
            } else if in_fence {
                fences.last_mut().unwrap().1.push((*line).to_owned());
            } else if let Some(row) = line.strip_prefix('|') {
                if !in_table {
                    tables.push(Vec::new());
                }
                in_table = true;
                let row = row.strip_suffix('|').unwrap_or_else(|| panic!("a row without an end: {line}"));
                if !row.starts_with("---") {
                    let cells = row.split('|').map(|cell| cell.trim().replace('`', ""));
                    tables.last_mut().unwrap().push(cells.collect());
                }
            } else {
                in_table = false;
            }
        }
        for table in &tables {
            let width = table[0].len();
            assert!(table.iter().all(|row| row.len() == width), "a ragged table below {heading}");
        }
        Self {
            number: number.to_owned(),
            title: title.to_owned(),
            anchor,
            words: words(&body.join("\n")),
            tables,
            fences,
        }
    }

    /// The rows below the table whose first column has this heading.
    pub(crate) fn rows(&self, first_column: &str) -> Option<&[Vec<String>]> {
        let table = self.tables.iter().find(|table| table[0][0] == first_column)?;
        Some(&table[1..])
    }

    fn fields(&self, first_column: &str) -> Option<FieldList> {
        Some(self.rows(first_column)?.iter().map(|row| (row[0].clone(), row[1].clone())).collect())
    }
}

impl Document {
    pub(crate) fn read() -> Self {
        Self::parse(&fs::read_to_string(repository("docs/protocol.md")).unwrap())
    }

    pub(crate) fn parse(text: &str) -> Self {
        let mut sections = Vec::new();
        let (mut heading, mut body, mut in_fence) = ("", Vec::new(), false);
        for line in text.lines() {
            in_fence ^= line.starts_with("```");
            match line.split_once("# ").filter(|(marks, _)| marks.chars().all(|c| c == '#')) {
                Some((_, next)) if !in_fence => {
                    sections.push(Section::new(heading, &body));
                    (heading, body) = (next, Vec::new());
                }
                _ => body.push(line),
            }
        }
        sections.push(Section::new(heading, &body));
        let mut types = BTreeMap::new();
        for section in &sections {
            let is_type = section.number.is_empty();
            if let Some(fields) = section.fields("field").filter(|_| is_type) {
                types.insert(section.title.clone(), Type::Structure(fields));
            } else if let Some(rows) = section.rows("tag").filter(|_| is_type) {
                let variants = rows
                    .iter()
                    .map(|row| (row[0].parse().unwrap(), (row[1].clone(), row[2].clone())))
                    .collect();
                types.insert(section.title.clone(), Type::Enumeration(variants));
            }
        }
        Self { sections, types }
    }

    pub(crate) fn section(&self, number: &str) -> &Section {
        self.sections
            .iter()
            .find(|section| section.number == number)
            .unwrap_or_else(|| panic!("there is no section {number}"))
    }

    /// The section of an opcode.
    pub(crate) fn opcode(&self, name: &str) -> &Section {
        self.sections
            .iter()
            .find(|section| section.number.starts_with("4.") && section.title == name)
            .unwrap_or_else(|| panic!("{name} has no section"))
    }

    pub(crate) fn request(&self, name: &str) -> Shape {
        self.shape(self.opcode(name), "Request fields: ", "request field", "Request payload")
    }

    pub(crate) fn reply(&self, name: &str) -> Shape {
        self.shape(self.opcode(name), "Reply fields: ", "reply field", "Reply payload")
    }

    pub(crate) fn refusal(&self) -> Shape {
        Shape { fields: self.section("5.2").fields("field").unwrap(), has_payload: false }
    }

    fn shape(&self, section: &Section, sentence: &str, column: &str, payload: &str) -> Shape {
        let said = section.words.split_once(sentence).map(|(_, rest)| rest.split(". ").next().unwrap());
        let fields = match (section.fields(column), said) {
            (Some(fields), None) => fields,
            (None, Some("none")) => Vec::new(),
            (None, Some(other)) => match other.trim_end_matches('.').strip_prefix("section ") {
                Some(number) => self.section(number).fields(column).unwrap(),
                None => match self.types.get(&other.replace('`', "")) {
                    Some(Type::Structure(fields)) => fields.clone(),
                    _ => panic!("{}: what is {other}?", section.title),
                },
            },
            _ => panic!("{}: {sentence}once, please", section.title),
        };
        let payloads: Vec<_> = section.words.match_indices(payload).collect();
        assert_eq!(payloads.len(), 1, "{}: {payload} once, please", section.title);
        let (at, _) = payloads[0];
        Shape { fields, has_payload: !section.words[at + payload.len()..].starts_with(": none") }
    }

    /// The readable lines of `bytes`, decoded as the text says.
    pub(crate) fn decode(&self, fields: &[(String, String)], bytes: &[u8]) -> Result<Vec<String>, Flaw> {
        let mut reader = Reader { document: self, bytes, lines: Vec::new() };
        reader.structure("", fields)?;
        if reader.bytes.is_empty() { Ok(reader.lines) } else { Err(Flaw::Trailing) }
    }
}

struct Reader<'a> {
    document: &'a Document,
    bytes: &'a [u8],
    lines: Vec<String>,
}

impl Reader<'_> {
    fn take(&mut self, count: usize) -> Result<&[u8], Flaw> {
        let (taken, rest) = self.bytes.split_at_checked(count).ok_or(Flaw::Truncated)?;
        self.bytes = rest;
        Ok(taken)
    }

    fn integer(&mut self, width: usize) -> Result<u64, Flaw> {
        Ok(self.take(width)?.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    /// A length that cannot be, whatever the elements are, is refused before anything is done by it.
    fn length(&mut self) -> Result<usize, Flaw> {
        let length = self.integer(8)?;
        usize::try_from(length).ok().filter(|length| *length <= self.bytes.len()).ok_or(Flaw::Length)
    }

    fn say(&mut self, path: &str, value: &str) {
        self.lines.push(format!("{path} = {value}"));
    }

    fn say_bytes(&mut self, path: &str, count: usize) -> Result<(), Flaw> {
        let digits: String = self.take(count)?.iter().map(|byte| format!("{byte:02x}")).collect();
        self.say(path, if digits.is_empty() { "empty" } else { &digits });
        Ok(())
    }

    fn structure(&mut self, path: &str, fields: &[(String, String)]) -> Result<(), Flaw> {
        for (name, kind) in fields {
            let dot = if path.is_empty() { "" } else { "." };
            self.value(&format!("{path}{dot}{name}"), kind)?;
        }
        Ok(())
    }

    fn value(&mut self, path: &str, kind: &str) -> Result<(), Flaw> {
        if let Some(element) = kind.strip_prefix("vector of ") {
            let length = self.length()?;
            self.say(path, &format!("{length} elements"));
            return (0..length).try_for_each(|number| self.value(&format!("{path}[{number}]"), element));
        }
        if let Some(content) = kind.strip_prefix("option of ") {
            match self.integer(1)? {
                0 => self.say(path, "none"),
                1 => {
                    self.say(path, "some");
                    self.value(&format!("{path}.some"), content)?;
                }
                _ => return Err(Flaw::OptionTag),
            }
            return Ok(());
        }
        if let Some(count) = kind.strip_prefix("bytes[").and_then(|rest| rest.strip_suffix(']')) {
            return self.say_bytes(path, count.parse().unwrap());
        }
        match kind {
            "u8" | "u16" | "u32" | "u64" => {
                let bits: usize = kind[1..].parse().unwrap();
                let value = self.integer(bits / 8)?;
                self.say(path, &value.to_string());
            }
            "bool" => {
                let value = match self.integer(1)? {
                    0 => "false",
                    1 => "true",
                    _ => return Err(Flaw::Bool),
                };
                self.say(path, value);
            }
            "bytes" => {
                let length = self.length()?;
                self.say_bytes(path, length)?;
            }
            "string" => {
                let length = self.length()?;
                let text = str::from_utf8(self.take(length)?).map_err(|_| Flaw::Utf8)?.to_owned();
                self.say(path, &format!("{text:?}"));
            }
            name => {
                let document = self.document;
                match document.types.get(name).unwrap_or_else(|| panic!("{path}: what is {name}?")) {
                    Type::Structure(fields) => self.structure(path, fields)?,
                    Type::Enumeration(variants) => {
                        let tag = u32::try_from(self.integer(4)?).unwrap();
                        let (variant, content) = variants.get(&tag).ok_or(Flaw::EnumerationTag)?;
                        self.say(path, variant);
                        if !content.is_empty() {
                            self.value(&format!("{path}.{variant}"), content)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}
