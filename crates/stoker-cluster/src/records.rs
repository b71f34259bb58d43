//! What lies under the keys. Each is a few hundred bytes of JSON; nothing here changes with a request.

use serde::{Deserialize, Serialize};
use stoker_types::{
    ByteSize, ClientId, DeviceId, Epoch, Generation, InstanceId, KeepAlive, ModelFacts, ModelName,
    ModelSettings, NodeId, Tier,
};

use crate::{Record, Version};

/// Who leads. Under the leader's lease; the revision that created it is the term's epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaderRecord {
    /// The controller's name: host, or whatever it was given.
    pub controller: String,
    /// Where it answers, `host:port`.
    pub address: String,
}

/// A node that is there. Under its lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Where its agent answers, `host:port`.
    pub address: String,
    /// Stoker's version there.
    pub software: String,
    /// Set when joining: tells one life of a node from the next, and is higher in the later one.
    #[serde(default)]
    pub incarnation: u64,
    /// Its devices, by their number. Empty: it computes from memory.
    #[serde(default)]
    pub devices: Vec<DeviceRecord>,
    /// How much memory weights may take.
    pub dram: ByteSize,
    /// How much of its disk copies may take.
    pub ssd: ByteSize,
}

/// A device of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Its number there.
    pub device: DeviceId,
    /// What it is, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// How much of its memory Stoker may take.
    pub memory: ByteSize,
    /// The memory of the host that it is nearest to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa_node: Option<u32>,
    /// Devices of the node that it can copy to without the host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<DeviceId>,
}

/// A model that is to be served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// What the scheduler needs to know of it, with its settings.
    #[serde(with = "Facts")]
    pub facts: ModelFacts,
    /// SHA-256 of its manifest, in hexadecimal: by it, nodes and gateways fetch what belongs to the model.
    pub manifest: String,
}

/// Who owns an instance. Written by the leader under its fence, or by the node that has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// The node.
    pub node: NodeId,
    /// The device there.
    pub device: DeviceId,
    /// The model.
    pub model: ModelName,
    /// Of the instance: grows when it is handed over.
    pub generation: Generation,
    /// The term in which it was ordered.
    pub epoch: Epoch,
}

/// A migration that has begun. Whoever leads next finishes or aborts it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationRecord {
    /// The model.
    pub model: ModelName,
    /// The instance whose streams move.
    pub source: InstanceId,
    /// Its node.
    pub source_node: NodeId,
    /// The node that they move to.
    pub destination_node: NodeId,
    /// The device there.
    pub destination_device: DeviceId,
    /// How far it is.
    pub phase: MigrationPhase,
    /// The term in which it was ordered.
    pub epoch: Epoch,
    /// When it was, in milliseconds since 1970.
    pub began_ms: u64,
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationPhase {
    /// The destination loads the model; the source goes on as before.
    Loading,
    /// The destination recomputes what the source has; the source goes on.
    Resuming,
    /// The streams go to the destination.
    Switched,
}

/// An API key, found by the hash of its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKeyRecord {
    /// Whose it is: for limits, fairness and bills.
    pub client: ClientId,
    /// The models that it may ask for; `None`: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<ModelName>>,
    /// Most requests a minute; `None`: as many as come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_minute_max: Option<u32>,
    /// Most requests at the same time; `None`: as many as come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency_max: Option<u32>,
    /// When it ends, in milliseconds since 1970; `None`: when it is removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
}

/// A token with which a node may join, found by its hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinTokenRecord {
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// When it ends; `None`: when it is used or removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
    /// Good for one node only.
    pub single_use: bool,
    /// Who used it, once somebody has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<JoinTokenUse>,
}

/// The use of a single-use token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinTokenUse {
    /// The node that joined.
    pub node: NodeId,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Of the attempt that used it, so that an attempt whose answer was lost knows its own.
    pub nonce: u64,
}

macro_rules! record {
    ($($name:ident, $kind:literal;)*) => {
        $(impl Record for $name {
            const KIND: &'static str = $kind;
            const VERSION: Version = Version::new(1, 0);
        })*
    };
}

record! {
    LeaderRecord, "leader";
    NodeRecord, "node";
    ModelRecord, "model";
    InstanceRecord, "instance";
    MigrationRecord, "migration";
    ApiKeyRecord, "API key";
    JoinTokenRecord, "join token";
}

/// [`ModelFacts`] as they are stored. Those of a newer Stoker may have more fields.
#[derive(Serialize, Deserialize)]
#[serde(remote = "ModelFacts")]
struct Facts {
    model: ModelName,
    #[serde(with = "Settings")]
    settings: ModelSettings,
    weight_bytes: ByteSize,
    pool_bytes: ByteSize,
    device_bytes: ByteSize,
    kv_bytes_per_token: ByteSize,
    context_trained: u32,
    weights_on: Tier,
}

/// [`ModelSettings`] likewise. In a configuration file an unknown field is a mistake, here it is a newer Stoker's.
#[derive(Serialize, Deserialize)]
#[serde(remote = "ModelSettings", default = "ModelSettings::default")]
struct Settings {
    keep_alive: KeepAlive,
    pin: bool,
    preload: bool,
    instances_max: u32,
    concurrency: u32,
    context: Option<u32>,
    priority: i32,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{RecordError, Versioned, limits};

    fn model() -> ModelRecord {
        let settings = ModelSettings { pin: true, ..ModelSettings::default() };
        let facts = ModelFacts {
            model: ModelName::new("team/summariser@v3").unwrap(),
            settings,
            weight_bytes: ByteSize(14),
            pool_bytes: ByteSize(16),
            device_bytes: ByteSize(15),
            kv_bytes_per_token: ByteSize(2),
            context_trained: 8_192,
            weights_on: Tier::Ssd,
        };
        ModelRecord { facts, manifest: "0".repeat(64) }
    }

    fn comes_back<T: Record>(record: T) -> Value {
        let bytes = Versioned::new(record.clone()).encode().unwrap();
        assert!(bytes.len() < limits::VALUE_LEN_MAX / 100, "{} bytes", bytes.len());
        assert_eq!(Versioned::<T>::decode(&bytes).unwrap().record, record);
        serde_json::from_slice(&bytes).unwrap()
    }

    #[test]
    fn every_record_comes_back() {
        let node = NodeId::new("gpu-1").unwrap();
        let model_name = ModelName::new("m").unwrap();
        comes_back(LeaderRecord { controller: "c".into(), address: "h:7436".into() });
        comes_back(NodeRecord {
            address: "h:7435".into(),
            software: "0.1.0".into(),
            incarnation: u64::MAX,
            devices: vec![DeviceRecord {
                device: DeviceId(1),
                name: "H100".into(),
                memory: ByteSize(80 << 30),
                numa_node: Some(0),
                peers: vec![DeviceId(0)],
            }],
            dram: ByteSize(1),
            ssd: ByteSize(2),
        });
        comes_back(model());
        comes_back(InstanceRecord {
            node: node.clone(),
            device: DeviceId(0),
            model: model_name.clone(),
            generation: Generation(3),
            epoch: Epoch(9),
        });
        comes_back(MigrationRecord {
            model: model_name.clone(),
            source: InstanceId(1),
            source_node: node.clone(),
            destination_node: node.clone(),
            destination_device: DeviceId(0),
            phase: MigrationPhase::Resuming,
            epoch: Epoch(9),
            began_ms: 5,
        });
        comes_back(ApiKeyRecord {
            client: ClientId("team".into()),
            models: Some(vec![model_name]),
            requests_per_minute_max: Some(60),
            concurrency_max: None,
            expires_ms: None,
        });
        let used = JoinTokenUse { node, at_ms: 1, nonce: 2 };
        comes_back(JoinTokenRecord { created_ms: 1, expires_ms: None, single_use: true, used: Some(used) });
    }

    #[test]
    fn settings_of_a_newer_stoker_survive() {
        let mut json = comes_back(model());
        json["version"] = "1.4".into();
        json["facts"]["settings"]["spread"] = json!("racks");
        json["facts"]["layers"] = json!(32);
        let mut read = Versioned::<ModelRecord>::decode(json.to_string().as_bytes()).unwrap();
        read.record.facts.settings.pin = false;
        json["facts"]["settings"]["pin"] = json!(false);
        assert_eq!(serde_json::from_slice::<Value>(&read.encode().unwrap()).unwrap(), json);
    }

    #[test]
    fn another_major_is_an_error() {
        let error = Versioned::<LeaderRecord>::decode(br#"{"version":"2.0"}"#).unwrap_err();
        assert!(matches!(error, RecordError::Major { kind: "leader", .. }), "{error}");
    }
}
