//! Text with marked parts that a program may replace.

/// A generated part: its name, and what goes between its markers.
pub type Section = (&'static str, String);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotOurs {
    #[error("there is no section {name} to generate; there are: {known}")]
    Unknown { name: String, known: String },
    #[error("\"{begin}\" is not followed by \"{end}\"")]
    Open { begin: String, end: String },
}

const BEGIN: &str = "<!-- generated: ";
const CLOSE: &str = " -->";

fn begin(name: &str) -> String {
    format!("{BEGIN}{name}{CLOSE}")
}

fn end(name: &str) -> String {
    format!("<!-- end of {name}{CLOSE}")
}

/// A document with nothing but empty sections.
pub fn skeleton(names: &[&str]) -> String {
    let section = |name: &&str| format!("{}\n{}\n", begin(name), end(name));
    names.iter().map(section).collect::<Vec<_>>().join("\n")
}

/// The document with the content of its sections replaced. A section it has no markers for is left out.
pub fn filled(document: &str, sections: &[Section]) -> Result<String, NotOurs> {
    let mut text = String::new();
    let mut rest = document;
    while let Some(at) = rest.find(BEGIN) {
        let after = &rest[at + BEGIN.len()..];
        let name = after.split_once(CLOSE).map_or(after, |(name, _)| name);
        let Some((name, content)) = sections.iter().find(|(known, _)| *known == name) else {
            let known: Vec<&str> = sections.iter().map(|(name, _)| *name).collect();
            let name = name.lines().next().unwrap_or_default().to_owned();
            return Err(NotOurs::Unknown { name, known: known.join(" ") });
        };
        let (begin, end) = (begin(name), end(name));
        let Some(length) = after.find(&end) else { return Err(NotOurs::Open { begin, end }) };
        text.push_str(&rest[..at]);
        // Markdown needs the empty lines, or it takes a table for a part of the comment.
        text.push_str(&format!("{begin}\n\n{}\n\n{end}", content.trim()));
        rest = &after[length + end.len()..];
    }
    text.push_str(rest);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::{NotOurs, filled, skeleton};

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let document =
            "a\n<!-- generated: x -->\nold\n<!-- end of x -->\nb\n<!-- generated: y --><!-- end of y -->";
        let sections = [("x", "new\n".to_owned()), ("y", "too".to_owned()), ("z", "nowhere".to_owned())];
        let once = filled(document, &sections).expect("marked");
        assert_eq!(
            once,
            "a\n<!-- generated: x -->\n\nnew\n\n<!-- end of x -->\nb\n<!-- generated: y -->\n\ntoo\n\n<!-- end of y -->"
        );
        assert_eq!(filled(&once, &sections).expect("marked"), once, "again is the same");
        assert!(filled(&skeleton(&["x", "z"]), &sections).expect("marked").contains("nowhere"));
    }

    #[test]
    fn a_marker_nobody_fills_or_nobody_closes_is_an_error() {
        let sections = [("x", String::new())];
        let unknown = filled("<!-- generated: goal -->", &sections);
        assert_eq!(unknown, Err(NotOurs::Unknown { name: "goal".into(), known: "x".into() }));
        assert!(matches!(filled("<!-- generated: x -->\nold", &sections), Err(NotOurs::Open { .. })));
        assert!(matches!(filled("<!-- generated: x", &sections), Err(NotOurs::Open { .. })));
    }
}
