//! What `perf script` prints, read.

/// One function of a stack, the innermost first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub symbol: String,
    /// The program or library it is in.
    pub file: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    pub pid: u32,
    pub frames: Vec<Frame>,
}

impl Frame {
    pub fn in_kernel(&self) -> bool {
        self.file.starts_with("[kernel") || self.file.ends_with(".ko")
    }
}

/// The output of `perf script -F pid,ip,sym,dso`: a line with a process id, a line per frame, an empty line.
pub fn parse(text: &str) -> Vec<Sample> {
    let mut samples = Vec::new();
    let mut current: Option<Sample> = None;
    for line in text.lines() {
        if line.trim().is_empty() {
            samples.extend(current.take());
        } else if let Some(sample) = &mut current {
            sample.frames.extend(frame(line));
        } else {
            current = line.trim().parse().ok().map(|pid| Sample { pid, frames: Vec::new() });
        }
    }
    samples.extend(current);
    samples
}

/// `ADDRESS SYMBOL (FILE)`; symbols of Rust have spaces and parentheses of their own.
fn frame(line: &str) -> Option<Frame> {
    let (_address, rest) = line.trim().split_once(' ')?;
    let (symbol, file) = rest.strip_suffix(')')?.rsplit_once(" (")?;
    Some(Frame { symbol: symbol.trim().to_owned(), file: file.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::{Frame, Sample, parse};

    #[test]
    fn samples_are_told_apart_and_symbols_kept_whole() {
        let text = " 7240 \n\tffffffff822010c9 tcp_sendmsg ([kernel.kallsyms])\n\t          10aba4 __send (/usr/lib/libc.so.6)\n\n\
                    7241 \n\t          691d00 <fn(u8) as core::ops::FnOnce<()>>::call_once (/bin/x)\n\t  3b [unknown] ([unknown])\n";
        let frame = |symbol: &str, file: &str| Frame { symbol: symbol.to_owned(), file: file.to_owned() };
        let wanted = [
            Sample {
                pid: 7240,
                frames: vec![
                    frame("tcp_sendmsg", "[kernel.kallsyms]"),
                    frame("__send", "/usr/lib/libc.so.6"),
                ],
            },
            Sample {
                pid: 7241,
                frames: vec![
                    frame("<fn(u8) as core::ops::FnOnce<()>>::call_once", "/bin/x"),
                    frame("[unknown]", "[unknown]"),
                ],
            },
        ];
        assert_eq!(parse(text), wanted);
        assert!(parse("").is_empty() && parse("Warning: nonsense\n\n").is_empty());
    }
}
