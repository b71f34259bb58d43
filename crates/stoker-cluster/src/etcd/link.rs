//! The connection to one member, moving to the next when it fails, and the token of the login.

use std::{sync::Arc, time::Duration};

use tokio::sync::{Mutex, watch};
use tonic::{
    Request,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use super::{
    EtcdLogin, EtcdSettings, EtcdTls,
    api::{AuthenticateRequest, auth_client::AuthClient},
    status::{self, Meaning, meaning},
};
use crate::{Deadline, Error, retry::Backoff};

/// A connection. Everything that uses one moves when its generation isn't the current one any more.
#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) channel: Channel,
    /// The endpoint, for messages.
    pub(super) name: Arc<str>,
    pub(super) generation: u64,
}

/// The members, and the connection to one of them.
#[derive(Debug)]
pub(super) struct Links {
    members: Vec<(Arc<str>, Endpoint)>,
    login: Option<EtcdLogin>,
    connect_timeout: Duration,
    attempt_timeout: Duration,
    current: Mutex<Current>,
    /// Which connection is the current one; one more whenever it has failed.
    generation: watch::Sender<u64>,
    token: Mutex<()>,
    known_token: parking_lot::Mutex<Option<Token>>,
}

#[derive(Debug)]
struct Current {
    /// The member to try first.
    member: usize,
    link: Option<Link>,
}

/// What a login gave.
#[derive(Debug, Clone)]
pub(super) struct Token {
    /// `None`: the server has authentication off.
    value: Option<MetadataValue<Ascii>>,
    serial: u64,
}

impl Links {
    pub(super) fn new(settings: EtcdSettings) -> Result<Self, Error> {
        let EtcdSettings {
            endpoints,
            namespace: _,
            tls,
            login,
            connect_timeout,
            attempt_timeout,
            ping_interval,
            ping_timeout,
        } = settings;
        let invalid = |reason: String| Error::Invalid { reason };
        if endpoints.is_empty() {
            return Err(invalid("no endpoint of etcd".to_owned()));
        }
        let tls = tls.map(tls_config);
        let member = |url: String| {
            let endpoint = Endpoint::from_shared(url.clone())
                .map_err(|error| invalid(format!("`{url}` is no endpoint: {}", status::text(&error))))?;
            match (endpoint.uri().scheme_str(), &tls) {
                (Some("http"), None) | (Some("https"), Some(_)) => {}
                (Some("http"), Some(_)) => {
                    return Err(invalid(format!("`{url}` has certificates, but isn't https")));
                }
                _ => {
                    return Err(invalid(format!(
                        "`{url}`: write http://host:port, or https:// with certificates"
                    )));
                }
            }
            // No pings without a stream: etcd takes those for an attack. A watch is one, and every role has one.
            let endpoint = endpoint
                .connect_timeout(connect_timeout)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(ping_interval)
                .keep_alive_timeout(ping_timeout)
                .keep_alive_while_idle(false);
            let endpoint = match &tls {
                Some(tls) => endpoint.tls_config(tls.clone()).map_err(|error| {
                    invalid(format!("certificates for `{url}`: {}", status::text(&error)))
                })?,
                None => endpoint,
            };
            Ok((Arc::from(url), endpoint))
        };
        let members = endpoints.into_iter().map(member).collect::<Result<Vec<_>, _>>()?;
        // Clients of one configuration shouldn't all be at the first member.
        let first = rand::random_range(0..members.len());
        Ok(Self {
            members,
            login,
            connect_timeout,
            attempt_timeout,
            current: Mutex::new(Current { member: first, link: None }),
            generation: watch::channel(0).0,
            token: Mutex::new(()),
            known_token: parking_lot::Mutex::new(None),
        })
    }

    pub(super) fn attempt_timeout(&self) -> Duration {
        self.attempt_timeout
    }

    /// Ends when `link` isn't the current connection any more.
    pub(super) fn moved(&self, link: &Link) -> impl Future<Output = ()> + Send + use<> {
        let (mut generation, mine) = (self.generation.subscribe(), link.generation);
        // A sender that is gone leaves nothing to move to.
        async move { drop(generation.wait_for(|current| *current != mine).await) }
    }

    /// Says that `link` has failed; whoever asks next gets one to another member.
    pub(super) fn failed(&self, link: &Link) {
        let first = self.generation.send_if_modified(|generation| {
            let current = *generation == link.generation;
            *generation += u64::from(current);
            current
        });
        if first {
            tracing::debug!(member = %link.name, "leaving this member of etcd");
        }
    }

    /// The current connection, or a new one. Cancel-safe.
    pub(super) async fn link(&self, deadline: Deadline) -> Result<Link, Error> {
        let busy = || Error::unavailable("connecting took longer than the deadline");
        let mut current = deadline.bound(self.current.lock()).await.ok_or_else(busy)?;
        let generation = *self.generation.borrow();
        if let Some(link) = &current.link {
            if link.generation == generation {
                return Ok(link.clone());
            }
            current.link = None;
            current.member = (current.member + 1) % self.members.len();
        }
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
        loop {
            let mut failures = Vec::new();
            for _ in 0..self.members.len() {
                let (name, endpoint) = &self.members[current.member];
                match deadline.or_after(self.connect_timeout).bound(endpoint.connect()).await {
                    Some(Ok(channel)) => {
                        tracing::debug!(member = %name, "connected to etcd");
                        let link = Link { channel, name: Arc::clone(name), generation };
                        current.link = Some(link.clone());
                        return Ok(link);
                    }
                    Some(Err(error)) => {
                        if let Some(reason) = status::tls_refusal(&error) {
                            return Err(Error::Refused { reason: format!("{name}: {reason}") });
                        }
                        failures.push(format!("{name}: {}", status::text(&error)));
                    }
                    None => failures.push(format!("{name}: no connection within {:?}", self.connect_timeout)),
                }
                current.member = (current.member + 1) % self.members.len();
            }
            if deadline.bound(tokio::time::sleep(backoff.pause())).await.is_none() || deadline.passed() {
                return Err(Error::unavailable(failures.join("; ")));
            }
        }
    }

    /// The login's token, by a login if there is none yet; `None` without a login.
    pub(super) async fn token(&self, link: &Link, deadline: Deadline) -> Result<Option<Token>, Error> {
        let Some(login) = &self.login else { return Ok(None) };
        if let Some(token) = self.known_token.lock().clone() {
            return Ok(Some(token));
        }
        let slow = || Error::unavailable("the login took longer than the deadline");
        let _turn = deadline.bound(self.token.lock()).await.ok_or_else(slow)?;
        if let Some(token) = self.known_token.lock().clone() {
            return Ok(Some(token));
        }
        let message = AuthenticateRequest { name: login.user.clone(), password: login.password.clone() };
        let mut client = AuthClient::new(link.channel.clone());
        let value = match deadline.bound(client.authenticate(message)).await {
            Some(Ok(response)) => {
                let token = response.into_inner().token;
                let bad = |_| Error::Protocol { reason: "a token that is no header value".to_owned() };
                Some(MetadataValue::try_from(token).map_err(bad)?)
            }
            Some(Err(status)) if status.message().contains("authentication is not enabled") => {
                tracing::warn!(
                    user = login.user,
                    "etcd has authentication off: user and password are not checked"
                );
                None
            }
            Some(Err(status)) => {
                return Err(match meaning(&status) {
                    Meaning::Final(error) => error,
                    Meaning::StaleToken => Error::Refused { reason: status.message().to_owned() },
                    Meaning::NotDone | Meaning::Unknown => {
                        self.failed(link);
                        Error::unavailable(format!("{}: {}", link.name, status::text(&status)))
                    }
                });
            }
            None => {
                self.failed(link);
                return Err(slow());
            }
        };
        let token = Token { value, serial: rand::random() };
        *self.known_token.lock() = Some(token.clone());
        Ok(Some(token))
    }

    /// Forgets the token with this serial, so that the next call logs in again. False when there is no login.
    pub(super) fn renew_token(&self, serial: Option<u64>) -> bool {
        let mut known = self.known_token.lock();
        if known.as_ref().map(|token| token.serial) == serial {
            *known = None;
        }
        self.login.is_some()
    }
}

/// Adds token and the wish to be refused by a member that has lost its leader. The token's serial.
pub(super) fn authorise<M>(request: &mut Request<M>, token: Option<&Token>) -> Option<u64> {
    request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
    if let Some(value) = token.and_then(|token| token.value.clone()) {
        request.metadata_mut().insert("token", value);
    }
    token.map(|token| token.serial)
}

fn tls_config(tls: EtcdTls) -> ClientTlsConfig {
    let EtcdTls { ca, identity, domain } = tls;
    let mut config = ClientTlsConfig::new();
    config = match ca {
        Some(ca) => config.ca_certificate(Certificate::from_pem(ca)),
        None => config.with_native_roots(),
    };
    if let Some((certificate, key)) = identity {
        config = config.identity(Identity::from_pem(certificate, key));
    }
    match domain {
        Some(domain) => config.domain_name(domain),
        None => config,
    }
}
