//! Words of commands that a person is told to type: as a POSIX shell takes them, whatever is in them.

use std::path::Path;

/// One word, or a part of one.
pub fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-,:+@%=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// A file, which no program takes for an option.
pub fn quoted_path(path: &Path) -> String {
    let text = path.to_string_lossy();
    if text.starts_with('-') { quoted(&format!("./{text}")) } else { quoted(&text) }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::{quoted, quoted_path};

    #[test]
    fn a_shell_takes_a_quoted_word_as_it_was() {
        for text in
            ["", "a b", "it's", "$HOME", "`id`", "a\nb", "*", "~", "a;b", "\"", "!x", "#", "\\", "a=b"]
        {
            let said =
                Command::new("sh").arg("-c").arg(format!("printf %s {}", quoted(text))).output().expect("sh");
            assert_eq!(String::from_utf8_lossy(&said.stdout), text);
        }
        assert_eq!(quoted("/srv/vm-1.raw"), "/srv/vm-1.raw");
    }

    #[test]
    fn a_file_is_never_an_option() {
        assert_eq!(quoted_path(Path::new("-rf")), "./-rf");
        assert_eq!(quoted_path(Path::new("- x")), "'./- x'");
    }
}
