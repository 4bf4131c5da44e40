//! Is a chunkserver told of by an address that only its own machine reaches?

use std::net::{SocketAddr, ToSocketAddrs};

/// A control plane that is not called by loopback, if `told` is loopback. Waits for names to be looked up.
pub fn mds_elsewhere<'a>(told: &str, mds: &'a [String]) -> Option<&'a str> {
    if !is_loopback(told)? {
        return None;
    }
    mds.iter().map(String::as_str).find(|&mds| is_loopback(mds) == Some(false))
}

/// None: nobody knows the name.
fn is_loopback(address: &str) -> Option<bool> {
    let found: Vec<SocketAddr> = address.to_socket_addrs().ok()?.collect();
    (!found.is_empty()).then(|| found.iter().all(|at| at.ip().to_canonical().is_loopback()))
}

#[cfg(test)]
mod tests {
    use super::mds_elsewhere;

    #[test]
    fn loopback_is_no_address_for_a_control_plane_elsewhere() {
        let elsewhere = |told, mds: &[&str]| {
            let mds: Vec<String> = mds.iter().map(|&mds| mds.to_owned()).collect();
            mds_elsewhere(told, &mds).map(str::to_owned)
        };
        for told in ["127.0.0.1:7710", "[::1]:7710", "127.1.2.3:1"] {
            assert_eq!(
                elsewhere(told, &["127.0.0.1:7700", "10.0.0.1:7700"]).as_deref(),
                Some("10.0.0.1:7700")
            );
            assert_eq!(elsewhere(told, &["127.0.0.1:7700", "[::1]:7700"]), None);
        }
        assert_eq!(elsewhere("10.0.0.5:7710", &["10.0.0.1:7700"]), None);
    }
}
