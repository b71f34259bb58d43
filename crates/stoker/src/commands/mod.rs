//! One module per command, or per family of them.

pub(crate) mod bench;
pub(crate) mod cache;
pub(crate) mod chat;
pub(crate) mod config;
pub(crate) mod demo;
pub(crate) mod devices;
pub(crate) mod explain;
pub(crate) mod keeper;
pub(crate) mod memory;
pub(crate) mod models;
pub(crate) mod pack;
pub(crate) mod serve;
pub(crate) mod worker;
