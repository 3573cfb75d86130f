//! The command line: what it accepts, and what it prints.
//!
//! Exit codes: 0 done, 1 refused, failed or (explain) dropped, 2 not understood. Results go to stdout, all
//! else to stderr.

use std::{
    fmt,
    io::{self, IsTerminal, Read, Write},
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Parser, Subcommand};
use miette::{Diagnostic, IntoDiagnostic, MietteHandler, Report, ReportHandler, WrapErr, miette};

use crate::{
    causes, config, daemon,
    desired::Protocol,
    explain::{self, Explanation},
    replay,
    status::Status,
};

/// A routing mesh in user space: every node answers on every published port.
///
/// Exit codes: 0 done, 1 refused, failed or (explain) dropped, 2 not understood.
#[derive(Debug, Parser)]
#[command(name = "wiremesh", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// How long a daemon may take to tell its status.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The default place of the configuration.
const CONFIG: &str = "/etc/wiremesh/wiremesh.toml";

#[derive(Debug, Subcommand)]
enum Command {
    /// Forward packets, until SIGTERM. SIGHUP, or a change of the file, reloads it
    Run {
        /// The configuration
        #[arg(short, long, default_value = CONFIG)]
        config: PathBuf,
    },
    /// Validate a configuration, pointing at what is wrong
    Check {
        /// The configuration
        #[arg(short, long, default_value = CONFIG)]
        config: PathBuf,
    },
    /// Run a capture through the packet path, without privileges or network
    ///
    /// Interfaces that are not there count as having an MTU of 1500 bytes and a zero MAC address. Next hops
    /// come from [[next_hop]] in the configuration; without, outer MAC addresses are zero.
    Replay {
        /// The configuration
        #[arg(short, long, default_value = CONFIG)]
        config: PathBuf,
        /// The capture to read, pcap or pcapng
        input: PathBuf,
        /// The pcap to write: the frames as they would leave
        output: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Say which backend a connection would get, and why
    ///
    /// It asks no running daemon: every backend counts as reachable, and no connection as remembered.
    /// Exits with 1 if the connection would be dropped.
    ///
    /// Example: wiremesh explain tcp 198.51.100.7:40000 203.0.113.10:80
    Explain {
        /// The configuration
        #[arg(short, long, default_value = CONFIG)]
        config: PathBuf,
        /// tcp, udp or sctp
        #[arg(value_parser = parse_protocol)]
        protocol: Protocol,
        /// The client, as 198.51.100.7:40000 or [2001:db8::7]:40000
        client: SocketAddr,
        /// The VIP, as 203.0.113.10:80
        vip: SocketAddr,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what a running daemon does
    Status {
        /// The daemon's socket, if not /run/wiremesh/control.sock
        #[arg(short, long, conflicts_with = "config")]
        socket: Option<PathBuf>,
        /// The daemon's configuration, to find its socket by
        #[arg(short, long)]
        config: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

fn parse_protocol(text: &str) -> Result<Protocol, String> {
    text.parse().map_err(|_| "it is one of tcp, udp and sctp".to_owned())
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    execute(cli.command).unwrap_or_else(|report| {
        eprint!("{}", Complaint(&report));
        ExitCode::FAILURE
    })
}

fn execute(command: Command) -> Result<ExitCode, Report> {
    match command {
        Command::Run { config } => run(&config)?,
        Command::Check { config } => check(&config)?,
        Command::Replay { config, input, output, json } => {
            let (config, _) = config::load(&config)?;
            let outcome = replay::replay(&config, &input, &output)?;
            print(json, &outcome)?;
        }
        Command::Explain { config, protocol, client, vip, json } => {
            let (config, _) = config::load(&config)?;
            let explanation = explain::explain(&config, protocol, client, vip)?;
            print(json, &explanation)?;
            if let Explanation::Dropped { .. } = explanation {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Status { socket, config, json } => {
            let socket = match (socket, config) {
                (Some(socket), _) => socket,
                (None, Some(config)) => config::load(&config)?.0.node.control_socket,
                (None, None) => config::Node::default().control_socket,
            };
            print(json, &status(&socket)?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What went wrong: one line that makes sense alone, in the form of clap's own, then the remedy and the
/// places that it is about.
struct Complaint<'a>(&'a Report);

impl fmt::Display for Complaint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "error: {}", causes::line(self.0.chain()))?;
        if let Some(help) = self.0.help() {
            writeln!(f, "help: {help}")?;
        }
        for finding in self.0.related().into_iter().flatten() {
            writeln!(f)?;
            write!(f, "{}", Shown(finding))?;
        }
        Ok(())
    }
}

/// A diagnostic with the lines that it points at, in colour if that is for a terminal.
struct Shown<'a>(&'a dyn Diagnostic);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        MietteHandler::default().debug(self.0, f)
    }
}

fn run(config: &Path) -> Result<(), Report> {
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing::Level::INFO.into())
        .from_env_lossy();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .into_diagnostic()
        .wrap_err("cannot start the control thread")?;
    Ok(runtime.block_on(daemon::run(config))?)
}

fn check(path: &Path) -> Result<(), Report> {
    let (config, warnings) = config::load(path)?;
    for warning in &warnings {
        eprintln!("{}", Shown(warning));
    }
    let services = &config.desired.services;
    let backends = services.iter().map(|service| service.backends.len()).sum();
    println!(
        "{} is valid: {}, {}, {}",
        path.display(),
        count(services.len(), "service"),
        count(backends, "backend"),
        count(warnings.len(), "warning"),
    );
    Ok(())
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

fn status(socket: &Path) -> Result<Status, Report> {
    let mut stream = UnixStream::connect(socket).map_err(|error| {
        miette!(
            help = "is it running, and is this its node.control_socket? name another with -s",
            "no daemon answers on {}: {error}",
            socket.display()
        )
    })?;
    let mut json = Vec::new();
    let read =
        stream.set_read_timeout(Some(ANSWER_TIMEOUT)).and_then(|()| stream.read_to_end(&mut json));
    read.map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => miette!(
            help = "is it stopped, or the machine overloaded?",
            "the daemon on {} does not answer within {ANSWER_TIMEOUT:?}",
            socket.display()
        ),
        _ => miette!("the daemon on {} stopped answering: {error}", socket.display()),
    })?;
    serde_json::from_slice(&json)
        .into_diagnostic()
        .wrap_err("the daemon's answer is not understood: is it of another version?")
}

/// Prints for people, or for machines.
fn print(json: bool, value: &(impl std::fmt::Display + serde::Serialize)) -> Result<(), Report> {
    let mut out = io::stdout().lock();
    let written = if json {
        serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)
    } else {
        write!(out, "{value}")
    };
    match written.and_then(|()| if json { writeln!(out) } else { Ok(()) }) {
        // `wiremesh status | head` is no failure.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.into_diagnostic(),
    }
}
