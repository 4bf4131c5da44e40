//! What the documents say about files is true: links lead somewhere, and every module begins with its promise.
//!
//! Facts, not taste. These tests read the whole repository; they are here because the tool is what documents are for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn repository() -> PathBuf {
    // cargo runs tests in their package's folder. The one it was built in may be another clone's, which shares our build output.
    let here = std::env::current_dir().expect("we are somewhere");
    here.parent().expect("cli/ is in the repository").to_owned()
}

/// Every file of the repository with this ending; not what git ignores, nor hidden directories.
fn files(ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories = vec![repository()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).expect("readable").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') || name == "target" {
                continue;
            }
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => directories.push(entry.path()),
                Ok(kind) if kind.is_file() && name.ends_with(ending) => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no file ends with {ending}");
    found
}

/// `[text](target)` outside code blocks and code spans.
fn links(markdown: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut in_block = false;
    for line in markdown.lines() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
            continue;
        }
        if in_block {
            continue;
        }
        let prose: String = line.split('`').step_by(2).collect::<Vec<_>>().join("·");
        for part in prose.split("](").skip(1) {
            if let Some((target, _)) = part.split_once(')') {
                found.push(target.to_owned());
            }
        }
    }
    found
}

/// The anchor GitHub makes of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    kept.chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

fn has_anchor(file: &Path, wanted: &str) -> bool {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .filter(|line| line.starts_with('#'))
        .any(|line| anchor(line.trim_start_matches('#')) == wanted)
}

#[test]
fn every_link_in_a_document_leads_somewhere() {
    let mut broken = Vec::new();
    for document in files(".md") {
        let text = fs::read_to_string(&document).expect("UTF-8");
        for link in links(&text) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (path, fragment) = link.split_once('#').unwrap_or((&link, ""));
            let target = match path {
                "" => document.clone(),
                path => document.parent().expect("a file is in a directory").join(path),
            };
            if !target.exists() || (!fragment.is_empty() && !has_anchor(&target, fragment)) {
                broken.push(format!("{}: ({link})", document.display()));
            }
        }
    }
    assert!(broken.is_empty(), "broken links:\n{}", broken.join("\n"));
}

#[test]
fn every_module_begins_with_its_promise() {
    let silent: Vec<String> = files(".rs")
        .iter()
        .filter(|file| file.components().any(|part| part.as_os_str() == "src"))
        .filter(|file| !fs::read_to_string(file).expect("UTF-8").starts_with("//!"))
        .map(|file| file.display().to_string())
        .collect();
    assert!(silent.is_empty(), "these do not begin with //! and what they are:\n{}", silent.join("\n"));
}

#[test]
fn a_link_is_found_where_a_reader_would_click_it() {
    let text = "see [a](x.md) and [b](y.md#part), `[c](no)`\n```\n[d](no)\n```\n| [e](z/) |";
    assert_eq!(links(text), ["x.md", "y.md#part", "z/"]);
    assert_eq!(anchor(" What it is not yet"), "what-it-is-not-yet");
    assert_eq!(anchor(" `evolute dev`"), "evolute-dev");
}

/// `make mutants` would find that out after three quarters of an hour.
#[test]
fn every_mutant_fits_the_code() {
    let fits = |patch: &PathBuf| {
        let mut check = Command::new("git");
        check.args(["apply", "--check", "--recount"]).arg(patch).current_dir(repository());
        check.output().expect("git runs").status.success()
    };
    let stale: Vec<_> = files(".patch").into_iter().filter(|patch| !fits(patch)).collect();
    assert!(stale.is_empty(), "these do not apply any more: {stale:?}");
}
