//! `stoker serve`.

use crate::{
    config::Config,
    output::Output,
    serve::{Server, Variant},
};

/// Serves until it is told to stop.
pub(crate) async fn run(config: &Config, variant: Variant, output: Output) -> anyhow::Result<()> {
    let server = Server::start(config, variant).await?;
    output.line(&format!("listening on http://{}/v1  ({})", server.address(), server.budgets()));
    server.until_signalled().await
}
