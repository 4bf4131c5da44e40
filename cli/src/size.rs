//! Sizes as people write and read them. Always binary: `10G` is 10 × 2³⁰ bytes, as in every disk tool.

use std::str::FromStr;

use evolute_protocol::geometry::{VOLUME_BYTES_MAX, VOLUME_BYTES_MIN};

const UNITS: [(char, u64); 4] = [('T', 1 << 40), ('G', 1 << 30), ('M', 1 << 20), ('K', 1 << 10)];

/// Why a text is no size. The message says how to write it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NotASize {
    #[error("\"{0}\" is not a size; write a whole number with K, M, G or T, as in 10G")]
    Malformed(String),
    #[error("\"{0}\" is a decimal unit; sizes here are binary, write {1} for 2^{2} bytes each")]
    Decimal(String, String, u32),
    #[error("\"{0}\" is larger than any number of bytes")]
    TooLarge(String),
    #[error("a volume is a multiple of 1M, from 1M to 64T; {0} is not, {1} is")]
    NotAVolume(String, String),
}

/// A number of bytes: `4096`, `64K`, `10G`, `10GiB`.
pub fn parse(text: &str) -> Result<u64, NotASize> {
    let malformed = || NotASize::Malformed(text.to_owned());
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(malformed());
    }
    let mut letters = unit.chars();
    let scale = match letters.next().map(|letter| letter.to_ascii_uppercase()) {
        None | Some('B') if unit.len() <= 1 => 1,
        Some(letter) => {
            let (letter, scale) =
                UNITS.iter().copied().find(|(known, _)| *known == letter).ok_or_else(malformed)?;
            match letters.as_str().to_ascii_lowercase().as_str() {
                "" | "ib" => scale,
                "b" => {
                    let power = scale.trailing_zeros();
                    return Err(NotASize::Decimal(text.to_owned(), format!("{number}{letter}"), power));
                }
                _ => return Err(malformed()),
            }
        }
        None => return Err(malformed()),
    };
    // Only digits: the one way to fail is to be too large.
    let number: u64 = number.parse().map_err(|_| NotASize::TooLarge(text.to_owned()))?;
    number.checked_mul(scale).ok_or_else(|| NotASize::TooLarge(text.to_owned()))
}

/// The size of a volume: checked here, so that a slip is named before anything is asked of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumeSize(pub u64);

impl VolumeSize {
    /// The smallest volume that holds this many bytes.
    pub fn holding(bytes: u64) -> Result<Self, NotASize> {
        let size = bytes
            .max(VOLUME_BYTES_MIN)
            .checked_next_multiple_of(VOLUME_BYTES_MIN)
            .ok_or_else(|| NotASize::TooLarge(bytes.to_string()))?;
        Self::try_from(size)
    }
}

impl TryFrom<u64> for VolumeSize {
    type Error = NotASize;

    fn try_from(bytes: u64) -> Result<Self, NotASize> {
        if (VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&bytes) && bytes.is_multiple_of(VOLUME_BYTES_MIN) {
            return Ok(Self(bytes));
        }
        let nearest = bytes.clamp(VOLUME_BYTES_MIN, VOLUME_BYTES_MAX).next_multiple_of(VOLUME_BYTES_MIN);
        Err(NotASize::NotAVolume(format!("{bytes} bytes"), shortest(nearest)))
    }
}

impl FromStr for VolumeSize {
    type Err = NotASize;

    fn from_str(text: &str) -> Result<Self, NotASize> {
        Self::try_from(parse(text)?)
    }
}

/// The largest unit that says it exactly, in the form [`parse`] reads: `10G`, `1536M`.
pub fn shortest(bytes: u64) -> String {
    for (letter, scale) in UNITS {
        if bytes >= scale && bytes.is_multiple_of(scale) {
            return format!("{}{letter}", bytes / scale);
        }
    }
    bytes.to_string()
}

/// For a table: three digits are enough for a person.
pub fn human(bytes: u64) -> String {
    for (letter, scale) in UNITS {
        if bytes >= scale {
            return if bytes.is_multiple_of(scale) {
                format!("{} {letter}iB", bytes / scale)
            } else {
                format!("{:.1} {letter}iB", bytes as f64 / scale as f64)
            };
        }
    }
    format!("{bytes} B")
}

/// For one volume: the readable and the exact.
pub fn both(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", human(bytes))
}

#[cfg(test)]
mod tests {
    use super::{NotASize, VolumeSize, human, parse, shortest};

    #[test]
    fn sizes_are_binary_and_anything_unclear_is_refused() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("64K", 64 << 10),
            ("64k", 64 << 10),
            ("10G", 10 << 30),
            ("10GiB", 10 << 30),
            ("3mib", 3 << 20),
            ("64T", 64 << 40),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1", "1.5G", "10 G", "10X", "10Gi", "10Gb1", "0x10", "１"] {
            assert!(matches!(parse(text), Err(NotASize::Malformed(_))), "{text}: {:?}", parse(text));
        }
        assert!(matches!(parse("10GB"), Err(NotASize::Decimal(_, better, 30)) if better == "10G"));
        for text in ["99999999999999999999", "18446744073709551615K"] {
            assert!(matches!(parse(text), Err(NotASize::TooLarge(_))), "{text}");
        }
    }

    #[test]
    fn a_size_that_no_volume_can_have_is_answered_with_one_that_it_can() {
        assert_eq!("10G".parse(), Ok(VolumeSize(10 << 30)));
        for (text, better) in [("0", "1M"), ("1000000", "1M"), ("1048577", "2M"), ("65T", "64T")] {
            assert!(
                matches!(text.parse::<VolumeSize>(), Err(NotASize::NotAVolume(_, b)) if b == better),
                "{text}: {:?}",
                text.parse::<VolumeSize>()
            );
        }
        assert_eq!(VolumeSize::holding(0), Ok(VolumeSize(1 << 20)));
        assert_eq!(VolumeSize::holding((5 << 20) + 1), Ok(VolumeSize(6 << 20)));
        assert!(VolumeSize::holding(u64::MAX).is_err());
    }

    #[test]
    fn the_shortest_form_reads_back_as_the_same_number() {
        for bytes in [0, 1, 1023, 1024, 1536 << 20, 10 << 30, 64 << 40, (1 << 30) + 1] {
            assert_eq!(parse(&shortest(bytes)), Ok(bytes));
        }
        assert_eq!((human(10 << 30).as_str(), human(1536 << 20).as_str()), ("10 GiB", "1.5 GiB"));
    }
}
