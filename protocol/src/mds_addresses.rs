//! The addresses of the control plane, as people give them to every program: HOST:PORT, several separated by commas.

use std::net::Ipv6Addr;

/// This cannot be the address of an MDS.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAnAddress {
    #[error("no address of a control plane is given: HOST:PORT[,HOST:PORT], as in 127.0.0.1:7700")]
    Nothing,
    #[error("{0:?} is not an address of a control plane: HOST:PORT[,HOST:PORT], as in 127.0.0.1:7700")]
    This(String),
}

/// Each address checked. What is empty between two commas is left out.
pub fn mds_addresses(given: &[impl AsRef<str>]) -> Result<Vec<String>, NotAnAddress> {
    let words = given.iter().flat_map(|given| given.as_ref().split(','));
    let addresses: Vec<String> =
        words.map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect();
    if addresses.is_empty() {
        return Err(NotAnAddress::Nothing);
    }
    match addresses.iter().find(|address| !is_address(address)) {
        Some(bad) => Err(NotAnAddress::This(bad.clone())),
        None => Ok(addresses),
    }
}

fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let is_host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(inside) => inside.parse::<Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)),
    };
    is_host && port.bytes().all(|digit| digit.is_ascii_digit()) && matches!(port.parse::<u16>(), Ok(1..))
}

#[cfg(test)]
mod tests {
    use super::mds_addresses;

    #[test]
    fn an_address_that_cannot_be_one_is_named() {
        for bad in [
            "host",
            "host:",
            ":7700",
            "host:0",
            "host:70000",
            "host:+1",
            "http://host:7700",
            "a b:1",
            "::1:7700",
            "[::1]",
            "[host]:1",
            "u@host:1",
            "host:1/x",
        ] {
            let error = mds_addresses(&["127.0.0.1:7700", bad]).expect_err(bad).to_string();
            assert!(error.contains(bad), "{bad}: {error}");
        }
        for none in [&["", " "][..], &[","], &[]] {
            let error = mds_addresses(none).expect_err("none").to_string();
            assert!(error.contains("no address"), "{error}");
        }
    }

    #[test]
    fn a_list_is_taken_as_people_write_it() {
        assert_eq!(
            mds_addresses(&[" 10.0.0.1:7700, [::1]:7700,", "mds-1.example:1"]).expect("a list"),
            ["10.0.0.1:7700", "[::1]:7700", "mds-1.example:1"]
        );
    }
}
