//! Who may ask: API keys, or where there are none only names of this machine.

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, header};
use stoker_types::ClientId;

use crate::{
    config::{ApiKey, GatewayConfig},
    errors::ApiError,
};

/// Both ends of a client's connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ends {
    pub(crate) peer: SocketAddr,
    pub(crate) local: SocketAddr,
}

/// Identifies the client, or refuses it.
///
/// Without keys the `Host` header, and `Origin` where there is one, must name this machine: else any web page could
/// point a name of its own at the loopback address (DNS rebinding), or post to it, through its visitor's browser.
pub(crate) fn identify(
    config: &GatewayConfig,
    headers: &HeaderMap,
    ends: Ends,
) -> Result<ClientId, ApiError> {
    if config.keys.is_empty() {
        let text = |name| headers.get(name).map(|v: &header::HeaderValue| v.to_str().unwrap_or("?"));
        let host = text(header::HOST).unwrap_or_default();
        if !is_own_name(config, host, ends.local.ip()) {
            return Err(ApiError::foreign("Host", host));
        }
        if let Some(origin) = text(header::ORIGIN)
            && !origin.split_once("://").is_some_and(|(_, host)| is_own_name(config, host, ends.local.ip()))
        {
            return Err(ApiError::foreign("Origin", origin));
        }
        return Ok(ClientId(ends.peer.ip().to_string().into()));
    }
    let given = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, key)| key.trim());
    let Some(given) = given else {
        return Err(ApiError::unauthorized("an API key is needed: `Authorization: Bearer KEY`"));
    };
    match ApiKey::find(&config.keys, given) {
        Some(key) => Ok(ClientId(key.name.clone())),
        None => Err(ApiError::unauthorized("this API key is not known here")),
    }
}

/// Whether `host`, with or without a port, names this machine.
fn is_own_name(config: &GatewayConfig, host: &str, local: IpAddr) -> bool {
    let name = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let name = name.trim_end_matches('.');
    if let Ok(ip) = name.parse::<IpAddr>() {
        // An address can't be rebound; the one that the client connected to is ours.
        return ip.is_loopback() || ip == local.to_canonical();
    }
    name.eq_ignore_ascii_case("localhost")
        || name.to_ascii_lowercase().ends_with(".localhost")
        || config.allowed_hosts.iter().any(|allowed| name.eq_ignore_ascii_case(allowed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends() -> Ends {
        Ends { peer: ([127, 0, 0, 1], 9).into(), local: ([192, 168, 1, 5], 7433).into() }
    }

    #[test]
    fn only_own_names_are_answered_without_keys() {
        let config = GatewayConfig { allowed_hosts: vec!["box.example".into()], ..GatewayConfig::default() };
        let ask = |host: Option<&str>, origin: Option<&str>| {
            let mut headers = HeaderMap::new();
            for (name, value) in [(header::HOST, host), (header::ORIGIN, origin)] {
                if let Some(value) = value {
                    headers.insert(name, value.parse().unwrap());
                }
            }
            identify(&config, &headers, ends()).is_ok()
        };
        for host in [
            "localhost",
            "LOCALHOST:7433",
            "127.0.0.1:7433",
            "[::1]:7433",
            "box.example:80",
            "192.168.1.5",
            "a.localhost",
        ] {
            assert!(ask(Some(host), None), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:7433",
            "localhost.evil.example",
            "10.0.0.1",
            "",
            "[",
            "[::2]",
            "127.0.0.1.evil",
        ] {
            assert!(!ask(Some(host), None), "{host}");
        }
        assert!(!ask(None, None));
        assert!(ask(Some("localhost"), Some("http://localhost:3000")));
        assert!(!ask(Some("localhost"), Some("https://evil.example")));
        assert!(!ask(Some("localhost"), Some("null")));
    }

    #[test]
    fn keys_are_bearer_tokens() {
        let config =
            GatewayConfig { keys: vec![ApiKey::from_plain("ann", "k1")], ..GatewayConfig::default() };
        let ask = |value: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            }
            identify(&config, &headers, ends()).map(|c| c.to_string()).map_err(|e| e.status.as_u16())
        };
        assert_eq!(ask(Some("Bearer k1")), Ok("ann".into()));
        assert_eq!(ask(Some("bearer  k1 ")), Ok("ann".into()));
        for wrong in [None, Some("Bearer"), Some("Basic k1"), Some("Bearer k2"), Some("k1")] {
            assert_eq!(ask(wrong), Err(401), "{wrong:?}");
        }
    }
}
