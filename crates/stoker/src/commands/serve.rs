//! `stoker serve`.

use crate::{
    config::Config,
    output::Output,
    serve::{Server, Variant},
};

/// Serves until it is told to stop.
pub(crate) async fn run(config: &Config, variant: Variant, output: Output) -> anyhow::Result<()> {
    let server = Server::start(config, variant).await?;
    let (dram, kv) = server.budgets();
    output.line(&format!("listening on http://{}/v1  (DRAM {}, KV {})", server.address(), dram, kv));
    server.until_signalled().await
}
