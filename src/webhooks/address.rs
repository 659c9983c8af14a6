//! Where messages may be sent. A tenant names its endpoint, and this node connects to it: without these rules
//! it could be made to talk to whatever it can reach.

use std::{
    net::{IpAddr, SocketAddr},
    sync::LazyLock,
};

use ipnet::IpNet;
use ureq::http::{Uri, uri::Scheme};

pub const URL_BYTES_MAX: usize = 2048;

/// Everything of IPv4 that is not public.
const PRIVATE_V4: &[&str] = &[
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
];
/// What an operator may open: networks of one's own, and the machine itself. Never those by which machines are told who
/// they are (169.254.169.254 and the like), nor those of many.
const OWN: &[&str] =
    &["10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7"];
/// Of IPv6 only this is public, less what stands below: some of it leads back to addresses of IPv4.
const PUBLIC_V6: &str = "2000::/3";
const PRIVATE_V6: &[&str] = &["2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"];

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error("`{0}` is not a URL such as https://example.com/hooks")]
    NotAUrl(String),
    #[error("an endpoint's URL must begin with https://")]
    NotSecure,
    #[error("a user's name and password do not belong into an endpoint's URL")]
    Credentials,
    #[error("{0} is not a public address")]
    Private(IpAddr),
}

/// The URL of an endpoint.
#[derive(Clone, Debug)]
pub struct Target {
    pub(super) uri: Uri,
    is_secure: bool,
    allow_private: bool,
}

impl Target {
    /// `https://`, and where private addresses are allowed `http://` as well.
    pub fn parse(text: &str, allow_private: bool) -> Result<Self, TargetError> {
        let not_a_url = || TargetError::NotAUrl(text.chars().take(100).collect());
        let is_plain_text = text.len() <= URL_BYTES_MAX && text.bytes().all(|byte| byte.is_ascii_graphic());
        if !is_plain_text || text.contains('#') {
            return Err(not_a_url());
        }
        let uri: Uri = text.parse().map_err(|_| not_a_url())?;
        let is_secure = uri.scheme() == Some(&Scheme::HTTPS);
        let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else { return Err(not_a_url()) };
        if *scheme != Scheme::HTTPS && *scheme != Scheme::HTTP || authority.host().is_empty() {
            return Err(not_a_url());
        }
        if authority.as_str().contains('@') {
            return Err(TargetError::Credentials);
        }
        if !is_secure && !allow_private {
            return Err(TargetError::NotSecure);
        }
        let target = Self { uri, is_secure, allow_private };
        // Those that are named are looked up and judged at each attempt.
        if let Ok(address) = target.host().parse() {
            target.judge(address)?;
        }
        Ok(target)
    }

    pub(super) fn host(&self) -> &str {
        let host = self.uri.host().unwrap_or_default();
        host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
    }

    pub(super) fn port(&self) -> u16 {
        self.uri.port_u16().unwrap_or(if self.is_secure { 443 } else { 80 })
    }

    /// Those of its addresses that may be connected to; otherwise what is wrong with one of them.
    pub(super) fn permitted(&self, found: impl Iterator<Item = SocketAddr>) -> Result<Vec<SocketAddr>, TargetError> {
        let (mut permitted, mut fault) = (Vec::new(), None);
        for address in found {
            match self.judge(address.ip()) {
                Ok(()) => permitted.push(address),
                Err(error) => fault = Some(error),
            }
        }
        if permitted.is_empty() { fault.map_or(Ok(permitted), Err) } else { Ok(permitted) }
    }

    fn judge(&self, address: IpAddr) -> Result<(), TargetError> {
        match (is_public(address), self.is_secure) {
            (true, true) => Ok(()),
            (true, false) => Err(TargetError::NotSecure),
            (false, _) if self.allow_private && is_own(address) => Ok(()),
            (false, _) => Err(TargetError::Private(address)),
        }
    }
}

fn is_own(address: IpAddr) -> bool {
    let address = address.to_canonical();
    let network = |text: &&str| text.parse::<IpNet>().expect("a network");
    // Where the cloud answers to instances over IPv6.
    let tells_who_we_are = address == IpAddr::from([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254]);
    !tells_who_we_are && OWN.iter().map(network).any(|network| network.contains(&address))
}

/// Whether anybody on the internet could be meant.
fn is_public(address: IpAddr) -> bool {
    static NETWORKS: LazyLock<(Vec<IpNet>, IpNet)> = LazyLock::new(|| {
        let network = |text: &&str| text.parse().expect("a network");
        (PRIVATE_V4.iter().chain(PRIVATE_V6).map(network).collect(), network(&PUBLIC_V6))
    });
    let (private, public_v6) = &*NETWORKS;
    let address = address.to_canonical();
    (address.is_ipv4() || public_v6.contains(&address)) && !private.iter().any(|network| network.contains(&address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_operator_opens_are_networks_of_ones_own_and_no_others() {
        for own in
            ["10.1.2.3", "127.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "::1", "fd12::1", "::ffff:10.0.0.1"]
        {
            let url = if own.contains(':') { format!("http://[{own}]/") } else { format!("http://{own}/") };
            assert!(Target::parse(&url, true).is_ok(), "{own}");
            assert!(Target::parse(&url.replace("http:", "https:"), false).is_err(), "{own}");
        }
        for never in
            ["169.254.169.254", "0.0.0.0", "224.0.0.1", "255.255.255.255", "fe80::1", "ff02::1", "::", "fd00:ec2::254"]
        {
            let url = if never.contains(':') { format!("https://[{never}]/") } else { format!("https://{never}/") };
            assert_eq!(Target::parse(&url, true).err(), Some(TargetError::Private(never.parse().unwrap())), "{never}");
        }
    }

    #[test]
    fn public_is_what_no_network_keeps_for_itself() {
        for public in ["1.1.1.1", "172.15.0.1", "172.32.0.1", "100.63.0.1", "2606:4700::1111", "2a00::1"] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        for private in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "198.19.0.1",
            "203.0.113.9",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:10.0.0.1",
            "::ffff:127.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
            "fc00::1",
            "fd12::1",
            "fe80::1",
            "ff02::1",
        ] {
            assert!(!is_public(private.parse().unwrap()), "{private}");
        }
    }

    #[test]
    fn an_endpoint_speaks_tls_and_is_public_unless_private_ones_are_allowed() {
        let why = |text: &str, allowed| Target::parse(text, allowed).err();
        let private = |ip: &str| Some(TargetError::Private(ip.parse().unwrap()));
        for sound in ["https://example.com", "https://example.com:8443/a/b?c=d", "https://1.1.1.1/x"] {
            assert_eq!((why(sound, false), why(sound, true)), (None, None), "{sound}");
        }
        assert_eq!(why("http://example.com/", false), Some(TargetError::NotSecure));
        assert_eq!(why("https://127.0.0.1/", false), private("127.0.0.1"));
        assert_eq!(why("https://[::1]:1/", false), private("::1"));
        assert_eq!(why("https://[::ffff:10.0.0.1]/", false), private("::ffff:10.0.0.1"));
        assert_eq!((why("http://127.0.0.1:9/", true), why("https://10.0.0.1/", true)), (None, None));
        assert_eq!(why("http://1.1.1.1/", true), Some(TargetError::NotSecure));
        assert_eq!(why("https://user:word@example.com/", false), Some(TargetError::Credentials));
        for bad in
            ["", "example.com", "/a", "ftp://example.com", "https://", "https:///a", "https://a b/", "https://ä/"]
        {
            assert!(matches!(why(bad, true), Some(TargetError::NotAUrl(_))), "{bad}");
        }
        assert!(matches!(why(&format!("https://a/{}", "x".repeat(3000)), true), Some(TargetError::NotAUrl(_))));
        assert!(matches!(why("https://example.com/#part", true), Some(TargetError::NotAUrl(_))));
    }

    #[test]
    fn of_the_addresses_of_a_name_only_the_permitted_ones_are_connected_to() {
        let target = Target::parse("https://example.com", false).unwrap();
        let of = |addresses: &[&str]| {
            target.permitted(addresses.iter().map(|text| SocketAddr::new(text.parse().unwrap(), target.port())))
        };
        assert_eq!(of(&["10.0.0.1", "1.1.1.1"]), Ok(vec!["1.1.1.1:443".parse().unwrap()]));
        assert_eq!(of(&["10.0.0.1", "::1"]), Err(TargetError::Private("::1".parse().unwrap())));
        assert_eq!(of(&[]), Ok(Vec::new()));
    }
}
