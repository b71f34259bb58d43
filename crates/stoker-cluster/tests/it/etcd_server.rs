//! Real etcds, started by the tests.

use std::{
    fs::File,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use stoker_cluster::etcd::{
    Etcd, EtcdSettings, EtcdTls,
    api::{StatusRequest, StatusResponse, maintenance_client::MaintenanceClient},
};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// One or more members, in a directory that goes with them.
pub(crate) struct Cluster {
    /// Before the directory, which can't go while they write to it.
    members: Vec<Member>,
    dir: tempfile::TempDir,
    certificates: Option<Certificates>,
}

struct Member {
    client_port: u16,
    arguments: Vec<String>,
    log: PathBuf,
    child: Option<Child>,
}

/// An authority and what it has signed, as PEM.
#[derive(Clone)]
pub(crate) struct Certificates {
    pub(crate) ca: String,
    pub(crate) client: (String, String),
    server: (String, String),
}

// === impl Cluster ===

impl Cluster {
    /// So many members, without certificates.
    pub(crate) async fn start(count: usize) -> Self {
        Self::start_with(count, None).await
    }

    /// With certificates, which clients need too.
    pub(crate) async fn start_with(count: usize, certificates: Option<Certificates>) -> Self {
        // A port that was free a moment ago may be taken now.
        for _ in 0..5 {
            if let Some(cluster) = Self::try_start(count, certificates.clone()).await {
                return cluster;
            }
        }
        panic!("etcd didn't start: its logs are above");
    }

    async fn try_start(count: usize, certificates: Option<Certificates>) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let scheme = if certificates.is_some() { "https" } else { "http" };
        if let Some(Certificates { ca, server: (certificate, key), .. }) = &certificates {
            for (name, pem) in [("ca.pem", ca), ("server.pem", certificate), ("server.key", key)] {
                std::fs::write(dir.path().join(name), pem).unwrap();
            }
        }
        let ports = free_ports(2 * count);
        let peers = &ports[count..];
        let everyone: Vec<_> =
            peers.iter().enumerate().map(|(i, port)| format!("m{i}=http://127.0.0.1:{port}")).collect();
        let members = (0..count).map(|i| {
            let client = format!("{scheme}://127.0.0.1:{}", ports[i]);
            let peer = format!("http://127.0.0.1:{}", peers[i]);
            let mut arguments: Vec<String> = [
                ("name", format!("m{i}")),
                ("data-dir", dir.path().join(format!("m{i}")).display().to_string()),
                ("listen-client-urls", client.clone()),
                ("advertise-client-urls", client),
                ("listen-peer-urls", peer.clone()),
                ("initial-advertise-peer-urls", peer),
                ("initial-cluster", everyone.join(",")),
                ("initial-cluster-state", "new".to_owned()),
                ("logger", "zap".to_owned()),
                ("log-level", "warn".to_owned()),
            ]
            .into_iter()
            .map(|(name, value)| format!("--{name}={value}"))
            .collect();
            if certificates.is_some() {
                let file = |name: &str| dir.path().join(name).display().to_string();
                arguments.push(format!("--cert-file={}", file("server.pem")));
                arguments.push(format!("--key-file={}", file("server.key")));
                arguments.push(format!("--trusted-ca-file={}", file("ca.pem")));
                arguments.push("--client-cert-auth".to_owned());
            }
            let log = dir.path().join(format!("m{i}.log"));
            let child = Some(spawn(&arguments, &log));
            Member { client_port: ports[i], arguments, log, child }
        });
        let members = members.collect();
        let mut cluster = Self { dir, members, certificates };
        cluster.ready().await.then_some(cluster)
    }

    /// Waits until every running member knows a leader. False when one has exited.
    async fn ready(&mut self) -> bool {
        tokio::time::timeout(Duration::from_secs(60), async {
            loop {
                for member in &mut self.members {
                    let Some(child) = &mut member.child else { continue };
                    if child.try_wait().unwrap().is_some() {
                        eprintln!("{}", std::fs::read_to_string(&member.log).unwrap_or_default());
                        return false;
                    }
                }
                let mut led = 0;
                let running: Vec<_> = self.running().collect();
                for i in &running {
                    led += usize::from(self.status(*i).await.is_some_and(|status| status.leader != 0));
                }
                if led == running.len() {
                    return true;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await
        .expect("etcd had no leader for a minute")
    }

    fn running(&self) -> impl Iterator<Item = usize> {
        (0..self.members.len()).filter(|i| self.members[*i].child.is_some())
    }

    pub(crate) fn endpoints(&self) -> Vec<String> {
        let scheme = if self.certificates.is_some() { "https" } else { "http" };
        self.members.iter().map(|member| format!("{scheme}://127.0.0.1:{}", member.client_port)).collect()
    }

    /// How to reach all of them.
    pub(crate) fn settings(&self) -> EtcdSettings {
        let mut settings = EtcdSettings::new(self.endpoints());
        settings.tls = self.certificates.as_ref().map(Certificates::client_tls);
        settings
    }

    pub(crate) fn store(&self) -> Etcd {
        Etcd::new(self.settings()).unwrap()
    }

    pub(crate) async fn channel(&self, member: usize) -> Option<Channel> {
        let endpoint = Endpoint::from_shared(self.endpoints()[member].clone()).unwrap();
        let endpoint = match &self.certificates {
            Some(Certificates { ca, client: (certificate, key), .. }) => endpoint
                .tls_config(
                    ClientTlsConfig::new()
                        .ca_certificate(Certificate::from_pem(ca))
                        .identity(Identity::from_pem(certificate, key)),
                )
                .unwrap(),
            None => endpoint,
        };
        endpoint.connect_timeout(Duration::from_secs(1)).connect().await.ok()
    }

    async fn status(&self, member: usize) -> Option<StatusResponse> {
        let mut client = MaintenanceClient::new(self.channel(member).await?);
        let status = tokio::time::timeout(Duration::from_secs(1), client.status(StatusRequest {})).await;
        Some(status.ok()?.ok()?.into_inner())
    }

    /// Which member leads.
    pub(crate) async fn leader(&self) -> usize {
        for i in self.running() {
            if let Some(status) = self.status(i).await
                && status.leader == status.header.unwrap_or_default().member_id
            {
                return i;
            }
        }
        panic!("nobody leads");
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self, member: usize) {
        let mut child = self.members[member].child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub(crate) fn kill_all(&mut self) {
        let running: Vec<_> = self.running().collect();
        running.into_iter().for_each(|i| self.kill(i));
    }

    /// Starts those that aren't running, with what they have on disk.
    pub(crate) async fn start_again(&mut self) {
        for member in &mut self.members {
            if member.child.is_none() {
                member.child = Some(spawn(&member.arguments, &member.log));
            }
        }
        assert!(self.ready().await, "etcd didn't start again");
    }

    /// Stops a member without ending it, so that its connections stay and nothing comes over them; or lets it go on.
    pub(crate) async fn freeze(&self, member: usize, freeze: bool) {
        use rustix::process::{Pid, Signal, kill_process};
        let pid = Pid::from_child(self.members[member].child.as_ref().unwrap());
        kill_process(pid, if freeze { Signal::STOP } else { Signal::CONT }).unwrap();
        // The signal has been sent; each thread stops when it gets to it.
        let tasks = format!("/proc/{}/task", pid.as_raw_nonzero());
        let stopped = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
        };
        while freeze && !std::fs::read_dir(&tasks).unwrap().all(stopped) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // One that has exited by itself is fine.
            child.kill().ok();
            child.wait().ok();
        }
    }
}

fn spawn(arguments: &[String], log: &Path) -> Child {
    let log = File::options().create(true).append(true).open(log).unwrap();
    Command::new("etcd")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("`etcd` has to be on the path: apt-get install etcd-server")
}

fn free_ports(count: usize) -> Vec<u16> {
    let listeners: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    listeners.iter().map(|listener| listener.local_addr().unwrap().port()).collect()
}

// === impl Certificates ===

impl Certificates {
    /// An authority, a certificate for 127.0.0.1, and one for a client.
    pub(crate) fn make() -> Self {
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.distinguished_name.push(DnType::CommonName, "tests");
        let ca_key = KeyPair::generate().unwrap();
        let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
        let issuer = Issuer::new(ca, ca_key);
        let signed = |name: &str| {
            let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
            params.distinguished_name.push(DnType::CommonName, name);
            let key = KeyPair::generate().unwrap();
            (params.signed_by(&key, &issuer).unwrap().pem(), key.serialize_pem())
        };
        Self { server: signed("server"), client: signed("client"), ca: ca_pem }
    }

    pub(crate) fn client_tls(&self) -> EtcdTls {
        let (certificate, key) = self.client.clone();
        EtcdTls {
            ca: Some(self.ca.clone().into_bytes()),
            identity: Some((certificate.into_bytes(), key.into_bytes())),
            domain: None,
        }
    }
}
