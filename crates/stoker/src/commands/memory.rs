//! `stoker ps`, `pin`, `unpin`, `preload`, `unload`: what a running server has in memory.

use stoker_types::{ByteSize, MemoryBudget, ModelName};

use crate::{
    cli::UnloadArgs,
    client::AdminClient,
    output::{Output, Table},
    serve::admin::{
        Budget, CachedRow, DeviceRow, Done, InstanceRow, ModelRequest, StatusReport, UnloadRequest, Unloaded,
    },
};

/// `stoker ps`.
pub(crate) async fn ps(admin: &AdminClient, output: Output) -> anyhow::Result<()> {
    let status: StatusReport = admin.get("/status").await?;
    output.show(&status, |status| {
        let mut table =
            Table::new(["MODEL", "STATE", "DEVICE", "PID", "STREAMS", "CONTEXT", "WEIGHTS", "KV", "LEAVES"]);
        for i in &status.instances {
            table.row([
                i.model.to_string(),
                i.state.clone(),
                i.device.clone(),
                i.pid.map_or_else(|| "-".into(), |p| p.to_string()),
                format!("{}/{}", i.in_flight, i.sequences),
                i.context.to_string(),
                i.pool_bytes.to_string(),
                i.kv_bytes.to_string(),
                leaves(i),
            ]);
        }
        let cached: Vec<&CachedRow> =
            status.cached.iter().filter(|c| !status.instances.iter().any(|i| i.model == c.model)).collect();
        let mut text = table.render();
        if !cached.is_empty() {
            let names: Vec<String> = cached.iter().map(|c| format!("{} ({})", c.model, c.bytes)).collect();
            text.push_str(&format!("\nin DRAM, without a worker: {}\n", names.join(", ")));
        }
        text.push('\n');
        for device in &status.devices {
            let DeviceRow { device, memory, free, cached, .. } = device;
            text.push_str(&format!("{device} {}, {free} free", used(memory)));
            if *cached > ByteSize::ZERO {
                text.push_str(&format!(", {cached} of weights that no worker uses"));
            }
            text.push('\n');
        }
        let kv = if status.devices.is_empty() { format!(", KV {}", used(&status.kv)) } else { String::new() };
        text.push_str(&format!(
            "DRAM {}{kv}, {} workers, {} waiting\n",
            used(&status.dram),
            status.workers,
            status.waiting
        ));
        if let Some(shortage) = &status.shortage {
            text.push_str(&format!("{shortage}\n"));
        }
        text
    })
}

fn used(budget: &Budget) -> String {
    let Budget { used, budget, configured } = *budget;
    format!("{used} of {}", MemoryBudget { configured, effective: budget })
}

fn leaves(i: &InstanceRow) -> String {
    if i.pinned {
        return "pinned".into();
    }
    match i.expires_in_ms {
        Some(ms) => format!("in {} s", ms / 1000),
        None if i.in_flight > 0 => "busy".into(),
        None => "for need".into(),
    }
}

/// `stoker pin`, `unpin`, `preload`.
pub(crate) async fn tell(
    admin: &AdminClient,
    what: &str,
    done: &str,
    model: ModelName,
    output: Output,
) -> anyhow::Result<()> {
    let answer: Done = admin.post(&format!("/{what}"), &ModelRequest { model }).await?;
    output.show(&answer, |answer| format!("{} {done}", answer.model))
}

/// `stoker unload`.
pub(crate) async fn unload(admin: &AdminClient, args: UnloadArgs, output: Output) -> anyhow::Result<()> {
    let UnloadArgs { model, all: _, force, dram } = args;
    let answer: Unloaded = admin.post("/unload", &UnloadRequest { model, force, dram }).await?;
    output.show(&answer, |answer| {
        let freed = if answer.freed > ByteSize::ZERO {
            format!(", {} of DRAM freed", answer.freed)
        } else {
            String::new()
        };
        format!("{} unloaded{freed}", answer.instances)
    })
}
