//! Which address a request comes from.

use std::net::{IpAddr, SocketAddr};

use actix_web::HttpRequest;
use ipnet::IpNet;

const FORWARDED_FOR: &str = "x-forwarded-for";

/// The address that answers for a request: the peer's, or behind a trusted proxy the one that the proxy names. None
/// where a trusted proxy asks for itself, or names something that is no address: nobody else is to pay for it.
///
/// What a client writes into the header by itself stands left of what the first trusted proxy adds, and is never
/// reached.
pub(super) fn source(http: &HttpRequest, trusted: &[IpNet]) -> Option<IpAddr> {
    let peer = http.peer_addr()?.ip().to_canonical();
    if !is_trusted(peer, trusted) {
        return Some(peer);
    }
    let headers: Vec<_> = http.headers().get_all(FORWARDED_FOR).collect();
    for header in headers.into_iter().rev() {
        for hop in header.to_str().ok()?.rsplit(',') {
            let hop = address(hop.trim())?;
            if !is_trusted(hop, trusted) {
                return Some(hop);
            }
        }
    }
    None
}

fn is_trusted(ip: IpAddr, trusted: &[IpNet]) -> bool {
    trusted.iter().any(|network| network.contains(&ip))
}

/// Some proxies name the port as well.
fn address(text: &str) -> Option<IpAddr> {
    let ip = text.parse::<IpAddr>().or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()));
    ip.ok().map(|ip| ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;
    use proptest::prelude::*;

    use super::*;

    fn source_of(peer: &str, forwarded_for: &[&str]) -> Option<String> {
        let trusted: Vec<IpNet> = ["10.0.0.0/8", "fd00::/8"].map(|network| network.parse().unwrap()).into();
        let mut request = TestRequest::default().peer_addr(SocketAddr::new(peer.parse().unwrap(), 7));
        for value in forwarded_for {
            request = request.append_header((FORWARDED_FOR, *value));
        }
        source(&request.to_http_request(), &trusted).map(|ip| ip.to_string())
    }

    #[test]
    fn only_a_trusted_proxy_may_say_for_whom_it_asks() {
        let table: &[(&str, &[&str], Option<&str>)] = &[
            ("203.0.113.1", &[], Some("203.0.113.1")),
            ("203.0.113.1", &["198.51.100.1"], Some("203.0.113.1")),
            ("::ffff:203.0.113.1", &[], Some("203.0.113.1")),
            ("127.0.0.1", &["198.51.100.1"], Some("127.0.0.1")),
            ("10.0.0.1", &["198.51.100.1"], Some("198.51.100.1")),
            ("::ffff:10.0.0.1", &["198.51.100.1"], Some("198.51.100.1")),
            ("fd00::1", &["2001:db8::1"], Some("2001:db8::1")),
            // A chain of proxies, in one header or in several.
            ("10.0.0.1", &["198.51.100.1, 10.0.0.2,fd00::2"], Some("198.51.100.1")),
            ("10.0.0.1", &["198.51.100.1", "10.0.0.2"], Some("198.51.100.1")),
            ("10.0.0.1", &["198.51.100.1", "198.51.100.2", "10.0.0.2"], Some("198.51.100.2")),
            // With a port.
            ("10.0.0.1", &["198.51.100.1:4711"], Some("198.51.100.1")),
            ("10.0.0.1", &["[2001:db8::1]:4711"], Some("2001:db8::1")),
            ("10.0.0.1", &["::ffff:198.51.100.1"], Some("198.51.100.1")),
            // The proxy itself.
            ("10.0.0.1", &[], None),
            ("10.0.0.1", &["10.0.0.2"], None),
            ("10.0.0.1", &[""], None),
            ("10.0.0.1", &["unknown"], None),
            ("10.0.0.1", &["198.51.100.1, unknown"], None),
            ("10.0.0.1", &["198.51.100.1,"], None),
        ];
        for (peer, forwarded_for, expected) in table {
            assert_eq!(source_of(peer, forwarded_for).as_deref(), *expected, "{peer} {forwarded_for:?}");
        }
    }

    proptest! {
        #[test]
        fn what_a_client_writes_in_front_changes_nothing(forged in "[ -~]{0,40}", other in "[ -~]{0,40}") {
            let honest = Some("198.51.100.1".to_owned());
            prop_assert_eq!(source_of("10.0.0.1", &[&other, &format!("{forged},198.51.100.1, 10.0.0.9")]), honest.clone());
            prop_assert_eq!(source_of("198.51.100.1", &[&forged]), honest);
        }
    }
}
