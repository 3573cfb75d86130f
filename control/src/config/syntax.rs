//! Text to keys: what the TOML parser and serde refuse, in an operator's words.

use toml::de::Error;

use super::{
    file::File,
    finding::{Report, Span},
};

/// The keys of `text`. The first thing that is no TOML, no key of ours or of the wrong type is
/// reported and nothing returned: what follows it cannot be trusted to mean what it says.
pub fn parse(text: &str, report: &mut Report) -> Option<File> {
    match toml::from_str(text) {
        Ok(file) => Some(file),
        Err(error) => {
            let (message, remedy) = explain(&error);
            report.error(place(&error, text), message, remedy);
            None
        }
    }
}

/// Where it is. What is missing at the end of the text is pointed at by its last character, for a
/// mark needs something to stand under.
fn place(error: &Error, text: &str) -> Span {
    let span = error.span().unwrap_or(0..0);
    if span.start < text.len() {
        return span;
    }
    let last = text.trim_end().char_indices().next_back();
    last.map_or(0..0, |(start, character)| start..start + character.len_utf8())
}

/// What is wrong, and what would be right. serde tells both in one English sentence.
fn explain(error: &Error) -> (String, String) {
    let message = error.message();
    if message == "duplicate key" {
        return ("this key is given twice".to_owned(), "keep one of them".to_owned());
    }
    // An enum is a table to serde, too.
    if message == "wanted string or table" {
        return ("wrong type".to_owned(), "expected a string".to_owned());
    }
    let Some((wrong, expected)) = message.split_once(", expected ") else {
        return (message.to_owned(), "not valid here".to_owned());
    };
    for (serde_says, we_say) in
        [("unknown field ", "unknown key"), ("unknown variant ", "unknown value")]
    {
        if let Some(unknown) = wrong.strip_prefix(serde_says) {
            return (format!("{we_say} {unknown}"), nearest(unknown.trim_matches('`'), expected));
        }
    }
    let expected = match expected {
        "i64" => "a whole number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        other => other,
    };
    (wrong.replace(" as i128", ""), format!("expected {expected}"))
}

/// The one of the names in backquotes that was likely meant, or all of them.
fn nearest(written: &str, expected: &str) -> String {
    let best = names(expected)
        .map(|name| (strsim::jaro_winkler(written, name), name))
        .max_by(|(a, _), (b, _)| a.total_cmp(b));
    match best {
        Some((likeness, name)) if likeness > 0.8 => format!("did you mean `{name}`?"),
        _ => format!("expected {expected}"),
    }
}

/// The names in backquotes.
fn names(expected: &str) -> impl Iterator<Item = &str> {
    expected.split('`').skip(1).step_by(2)
}
