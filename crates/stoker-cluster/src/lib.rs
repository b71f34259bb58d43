//! Cluster state: what must survive any one process, in one small transactional store that every role can watch.
//!
//! [`ClusterStore`] is the whole seam. [`Embedded`] is one file for one machine, [`etcd`] a cluster's; one suite of
//! tests runs on both, and [`Faulty`] makes either misbehave on purpose. The roles don't use the trait by hand but what
//! is built on it: [`Election`] (one leader, with a number that fences its orders), [`Membership`] (who is there) and
//! [`Table`] (a typed copy of everything under a prefix that follows the store).
//!
//! What is in the store, under which keys: [`keys`] and [`records`], and for people `docs/cluster-state.md`.
//!
//! Time is always passed in: each call has a [`Deadline`], leases count by a [`Clock`].

mod clock;
mod election;
mod embedded;
mod error;
pub mod etcd;
mod faulty;
mod join_token;
pub mod keys;
mod lease;
mod membership;
pub mod records;
mod retry;
mod store;
mod table;
mod versioned;

pub use clock::{Clock, Deadline, ManualClock, TokioClock};
pub use election::{Election, Leader, LeaderView, Term};
pub use embedded::{Embedded, EmbeddedSettings, OpenError};
pub use error::{Error, Retry};
pub use faulty::{FaultCounts, Faults, Faulty};
pub use join_token::{JoinTokenError, JoinTokens};
pub use lease::{HeldLease, LeaseSettings};
pub use membership::{JoinError, Member, MemberState, Membership, MembershipEvent, MembershipEvents};
pub use store::{
    Changes, ClusterStore, ClusterStoreExt, Committed, Compare, Entry, Event, Expect, Lease, LeaseId,
    Listing, Page, Revision, Txn, Watch, Write, limits,
};
pub use table::{Bad, Change, Delta, Row, Snapshot, Subscription, Table, TableSettings, TableState, Update};
pub use versioned::{Record, RecordError, Version, Versioned};
