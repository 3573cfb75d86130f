//! The command line: what it accepts, and what it prints.
//!
//! Results go to stdout, all else to stderr. What is asked of a daemon is asked by its API; the exit codes
//! are those in [`EXIT_CODES`].

mod health;
mod service;
mod show;

use std::{
    fmt,
    io::{self, IsTerminal, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use miette::{Diagnostic, IntoDiagnostic, MietteHandler, Report, ReportHandler, WrapErr};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    api::{
        Event,
        client::{Client, ClientError, segment},
        resource::Flow,
    },
    causes, config, daemon,
    desired::Protocol,
    explain::{self, Explained, Explanation},
    replay,
    status::Status,
};

/// What the process ends with.
const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  refused, failed or (explain) dropped
  2  the command line is not understood
  3  there is no such service
  4  somebody else has it, or has changed it meanwhile
  5  no daemon answers";

/// A routing mesh in user space: every node answers on every published port.
#[derive(Debug, Parser)]
#[command(name = "wiremesh", version, propagate_version = true, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

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
    /// It asks the running daemon, and looks into its connection tables. With -c it asks no daemon, but
    /// what one with this configuration would do if every backend could be reached and no connection were
    /// remembered. Exits with 1 if the connection would be dropped.
    ///
    /// Example: wiremesh explain tcp 198.51.100.7:40000 203.0.113.10:80
    Explain {
        /// The daemon's socket, if not /run/wiremesh/api.sock
        #[arg(short, long, conflicts_with = "config")]
        socket: Option<PathBuf>,
        /// A configuration to explain, instead of a running daemon
        #[arg(short, long)]
        config: Option<PathBuf>,
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
        #[command(flatten)]
        daemon: Daemon,
    },
    /// Create, show and change services
    #[command(subcommand)]
    Service(service::Command),
    /// Show nodes
    #[command(subcommand)]
    Node(NodeCommand),
    /// Show why packets were dropped: every reason, how many, how many a second
    Drops {
        /// How long to look, in seconds, for the rate
        #[arg(long, default_value_t = 1.0, value_parser = seconds, value_name = "SECONDS")]
        interval: f64,
        #[command(flatten)]
        daemon: Daemon,
    },
    /// Show the backends with the most connections, and what goes to them now
    ///
    /// The connection tables remember a hash of each flow, not its addresses: single flows can't be listed.
    /// `wiremesh explain` tells of one.
    Flows {
        /// Of this service only
        #[arg(long)]
        service: Option<String>,
        /// At most so many
        #[arg(long, default_value_t = 20)]
        top: u16,
        /// How long to look, in seconds, for the rates
        #[arg(long, default_value_t = 1.0, value_parser = seconds, value_name = "SECONDS")]
        interval: f64,
        #[command(flatten)]
        daemon: Daemon,
    },
    /// Tell what is and then what changes, a line each, until interrupted
    Events {
        #[command(flatten)]
        daemon: Daemon,
    },
    /// Print a shell's completions
    ///
    /// Example: wiremesh completions bash > /usr/share/bash-completion/completions/wiremesh
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the manual's pages
    ///
    /// Example: wiremesh man /usr/local/share/man/man1
    Man {
        /// Where to
        directory: PathBuf,
    },
}

/// Nodes.
#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// List this node, and those that its tunnels lead to
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        daemon: Daemon,
    },
}

/// Which daemon is asked, and how its answer is shown.
#[derive(Debug, Default, Args)]
struct Daemon {
    /// The daemon's socket, if not /run/wiremesh/api.sock
    #[arg(short, long, conflicts_with = "config")]
    socket: Option<PathBuf>,
    /// The daemon's configuration, to find its socket by
    #[arg(short, long)]
    config: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Daemon {
    fn client(&self) -> Result<Client, Report> {
        let socket = match (&self.socket, &self.config) {
            (Some(socket), _) => socket.clone(),
            (None, Some(config)) => config::load(config)?.0.api.socket,
            (None, None) => config::Api::default().socket,
        };
        Ok(Client::new(&socket)?)
    }

    /// The same question twice, `interval` seconds apart, and how far apart the answers were.
    fn twice<T: DeserializeOwned>(
        &self,
        path: &str,
        interval: f64,
    ) -> Result<(T, T, Duration), Report> {
        let client = self.client()?;
        let begun = Instant::now();
        let first = client.get(path)?;
        thread::sleep(Duration::from_secs_f64(interval));
        let second = client.get(path)?;
        Ok((first, second, begun.elapsed()))
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.ok_or_else(|| "0.1 to 3600".to_owned())
}

fn parse_protocol(text: &str) -> Result<Protocol, String> {
    text.parse().map_err(|_| "it is one of tcp, udp and sctp".to_owned())
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    execute(cli.command).unwrap_or_else(|report| {
        complain(format_args!("{}", Complaint(&report)));
        exit_code(&report)
    })
}

/// To stderr; if nobody reads that, the exit code has to do.
fn complain(what: fmt::Arguments<'_>) {
    let _ = io::stderr().write_fmt(what);
}

/// See [`EXIT_CODES`].
fn exit_code(report: &Report) -> ExitCode {
    match report.downcast_ref::<ClientError>() {
        Some(ClientError::Refused(problem)) => match problem.status {
            404 => ExitCode::from(3),
            409 | 412 => ExitCode::from(4),
            _ => ExitCode::FAILURE,
        },
        Some(
            ClientError::NoDaemon { .. } | ClientError::Silent { .. } | ClientError::Broken { .. },
        ) => ExitCode::from(5),
        _ => ExitCode::FAILURE,
    }
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
        Command::Explain { socket, config, protocol, client, vip, json } => {
            let dropped = match config {
                Some(config) => {
                    let (config, _) = config::load(&config)?;
                    let explanation = explain::explain(&config, protocol, client, vip)?;
                    print(json, &explanation)?;
                    matches!(explanation, Explanation::Dropped { .. })
                }
                None => {
                    let daemon = Daemon { socket, config: None, json };
                    let (client, vip) = (segment(&client.to_string()), segment(&vip.to_string()));
                    let asked =
                        format!("/v1/explain?protocol={protocol}&client={client}&vip={vip}");
                    let explained: Explained = daemon.client()?.get(&asked)?;
                    print(json, &explained)?;
                    matches!(explained.first_packet, Explanation::Dropped { .. })
                }
            };
            if dropped {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Status { daemon } => {
            print(daemon.json, &daemon.client()?.get::<Status>("/v1/status")?)?;
        }
        Command::Service(command) => service::execute(command)?,
        Command::Node(NodeCommand::Ls { daemon }) => {
            print(daemon.json, &show::Nodes(daemon.client()?.get("/v1/nodes")?))?;
        }
        Command::Drops { interval, daemon } => {
            let (before, now, apart) = daemon.twice("/v1/drops", interval)?;
            print(daemon.json, &show::Dropped::new(&before, now, apart))?;
        }
        Command::Flows { service, top, interval, daemon } => {
            let service = service.map(|name| format!("&service={}", segment(&name)));
            let path = format!("/v1/flows?top={top}{}", service.unwrap_or_default());
            let (before, now, apart): (Vec<Flow>, _, _) = daemon.twice(&path, interval)?;
            print(daemon.json, &show::Flows::new(&before, now, apart))?;
        }
        Command::Events { daemon } => events(&daemon)?,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "wiremesh", &mut script);
            written(io::stdout().write_all(&script))?;
        }
        Command::Man { directory } => {
            let cannot = || format!("cannot write the manual into {}", directory.display());
            clap_mangen::generate_to(Cli::command(), &directory)
                .into_diagnostic()
                .wrap_err_with(cannot)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What went wrong: one line that makes sense alone, in the form of clap's own, then the remedy and the
/// places that it is about.
struct Complaint<'a>(&'a Report);

impl fmt::Display for Complaint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "error: {}", causes::joined(self.0.chain()))?;
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
        complain(format_args!("{}\n", Shown(warning)));
    }
    let services = &config.desired.services;
    let backends = services.iter().map(|service| service.backends.len()).sum();
    say(format_args!(
        "{} is valid: {}, {}, {}",
        path.display(),
        count(services.len(), "service"),
        count(backends, "backend"),
        count(warnings.len(), "warning"),
    ))
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Tells events, each on a line: by their sentence, or as the API has them.
fn events(daemon: &Daemon) -> Result<(), Report> {
    let mut outcome = Ok(());
    daemon.client()?.watch("/v1/events", |event: Event| {
        let line = match daemon.json {
            true => serde_json::to_string(&event).expect("an event is plain data"),
            false => event.to_string(),
        };
        let told = writeln!(io::stdout(), "{line}");
        // `wiremesh events | head` is no failure, and no reason to go on.
        let goes_on = told.is_ok();
        outcome = written(told);
        goes_on
    })?;
    outcome
}

/// Prints for people, or for machines.
fn print(json: bool, value: &(impl fmt::Display + Serialize)) -> Result<(), Report> {
    if json {
        return print_json(value);
    }
    // Takes the colours out again where they are not wanted: no terminal, or NO_COLOR.
    written(write!(anstream::stdout().lock(), "{value:#}"))
}

fn print_json(value: &impl Serialize) -> Result<(), Report> {
    let mut out = io::stdout().lock();
    let json = serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from);
    written(json.and_then(|()| writeln!(out)))
}

/// A line to stdout.
fn say(what: fmt::Arguments<'_>) -> Result<(), Report> {
    written(writeln!(io::stdout(), "{what}"))
}

/// `wiremesh status | head` is no failure.
fn written(outcome: io::Result<()>) -> Result<(), Report> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.into_diagnostic(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_shell_has_completions_and_every_command_a_page() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "wiremesh", &mut script);
            assert!(String::from_utf8(script).unwrap().contains("backend-add"), "{shell}");
        }
        let folder = tempfile::tempdir().unwrap();
        clap_mangen::generate_to(Cli::command(), folder.path()).unwrap();
        let page = std::fs::read_to_string(folder.path().join("wiremesh-service-create.1"));
        assert!(page.unwrap().contains("publish"));
    }

    /// `docs/cli.md` is what this prints: set WIREMESH_WRITE_DOCS to write it.
    #[test]
    fn the_reference_is_generated() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cli.md");
        // One for all terminals.
        let options = clap_markdown::MarkdownOptions::new()
            .title("Command line".to_owned())
            .show_footer(false);
        let now = clap_markdown::help_markdown_command_custom(&Cli::command(), &options);
        let now = now.lines().map(|line| format!("{}\n", line.trim_end())).collect::<String>();
        if std::env::var_os("WIREMESH_WRITE_DOCS").is_some() {
            std::fs::write(path, &now).unwrap();
        }
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert!(written == now, "docs/cli.md is out of date: run this with WIREMESH_WRITE_DOCS=1");
    }

    #[test]
    fn what_the_api_says_becomes_an_exit_code() {
        use crate::api::Problem;
        use hyper::StatusCode;
        let code = |error: ClientError| exit_code(&Report::new(error));
        let refused = |status| code(ClientError::Refused(Problem::new(status, "No.")));
        assert_eq!(refused(StatusCode::NOT_FOUND), ExitCode::from(3));
        assert_eq!(refused(StatusCode::PRECONDITION_FAILED), ExitCode::from(4));
        assert_eq!(refused(StatusCode::UNPROCESSABLE_ENTITY), ExitCode::FAILURE);
        let (socket, timeout) = (String::new(), Duration::ZERO);
        assert_eq!(code(ClientError::Silent { socket, timeout }), ExitCode::from(5));
    }

    #[test]
    fn a_daemon_that_dies_while_it_is_asked_does_not_answer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let dies = thread::spawn(move || drop(listener.accept().unwrap()));
        let error = Client::new(&path).unwrap().get::<Status>("/v1/status").unwrap_err();
        dies.join().unwrap();
        assert!(error.to_string().contains("stopped answering"), "{error}");
        assert_eq!(exit_code(&Report::new(error)), ExitCode::from(5));
    }

    #[test]
    fn a_daemon_that_stands_still_is_not_watched_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        // It lets in, and never answers.
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let (told, outcome) = std::sync::mpsc::channel();
        let watching = move || Client::new(&path).unwrap().watch("/v1/events", |_: Event| true);
        thread::spawn(move || told.send(watching()));
        let outcome = outcome.recv_timeout(Duration::from_secs(20)).expect("it gives up");
        assert!(matches!(outcome, Err(ClientError::Silent { .. })), "{outcome:?}");
    }
}
