//! The file as a source: read again on SIGHUP and when it changes. What is wrong with it is handed
//! on like the rest; to keep the running state then is for others.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher, event};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::Notify,
    time::{Duration, Instant, sleep_until},
};

use crate::config::{self, Config, LoadError, Warning};

/// How long a file has to be left alone before it is read: writers need several steps.
const QUIET: Duration = Duration::from_millis(100);
/// When it is read at the latest, lest a busy neighbour in its directory hide it forever.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why the file was read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// SIGHUP: the operator wants an answer, even if nothing has changed.
    Hangup,
    /// There is something new in it.
    Written,
}

/// The file, read again.
#[derive(Debug)]
pub struct Change {
    /// Why.
    pub cause: Cause,
    /// What is in it now.
    pub loaded: Result<(Config, Vec<Warning>), LoadError>,
}

/// Why a file cannot be watched.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum FileSourceError {
    /// No handler for SIGHUP.
    #[error("SIGHUP cannot be caught")]
    Signal(#[source] io::Error),
    /// No inotify instance.
    #[error("changes of files cannot be watched")]
    #[diagnostic(help("raise fs.inotify.max_user_instances with sysctl"))]
    Watcher(#[source] notify::Error),
}

/// A configuration file and what wakes us for it.
pub struct FileSource {
    path: PathBuf,
    watcher: RecommendedWatcher,
    touched: Arc<Notify>,
    hangup: Signal,
    settling: Option<Settling>,
    /// What the last reading gave, to tell whether the next gives anything else.
    last: Option<Result<String, io::ErrorKind>>,
}

/// Something happened in the directory, and may not be over.
#[derive(Clone, Copy)]
struct Settling {
    since: Instant,
    until: Instant,
}

impl FileSource {
    /// Watches from now on, so that no change after the first [`load`](Self::load) is missed. The
    /// file need not exist yet. To be called within a Tokio runtime.
    ///
    /// # Errors
    /// If the kernel has no more watches or signal handlers to give.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self, FileSourceError> {
        let touched = Arc::new(Notify::new());
        let touch = Arc::clone(&touched);
        let on_event = move |event: notify::Result<Event>| {
            if event.is_ok_and(|event| is_harmless(&event)) {
                return;
            }
            touch.notify_one();
        };
        let watcher = notify::recommended_watcher(on_event).map_err(FileSourceError::Watcher)?;
        let hangup = signal(SignalKind::hangup()).map_err(FileSourceError::Signal)?;
        let path = path.into();
        let mut source = Self { path, watcher, touched, hangup, settling: None, last: None };
        source.watch();
        Ok(source)
    }

    /// Reads the file now, whether it has changed or not.
    ///
    /// # Errors
    /// If it cannot be read, or all that is wrong with it.
    pub fn load(&mut self) -> Result<(Config, Vec<Warning>), LoadError> {
        let text = self.read();
        self.last = Some(outcome(&text));
        config::understand(&self.path, text)
    }

    /// Waits for SIGHUP or new content. Nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> Change {
        loop {
            // Whether the file is settling is kept in `self`, for the future may be dropped
            // meanwhile.
            let settling = self.settling;
            let until = settling.map_or_else(Instant::now, |settling| settling.until);
            tokio::select! {
                Some(()) = self.hangup.recv() => {
                    return Change { cause: Cause::Hangup, loaded: self.load() };
                }
                () = self.touched.notified() => self.settle(),
                () = sleep_until(until), if settling.is_some() => {
                    self.settling = None;
                    if let Some(change) = self.read_if_new() {
                        return change;
                    }
                }
            }
        }
    }

    fn settle(&mut self) {
        let now = Instant::now();
        let since = self.settling.map_or(now, |settling| settling.since);
        self.settling = Some(Settling { since, until: (now + QUIET).min(since + PATIENCE) });
    }

    fn read_if_new(&mut self) -> Option<Change> {
        let text = self.read();
        let outcome = Some(outcome(&text));
        if self.last == outcome {
            return None;
        }
        self.last = outcome;
        Some(Change { cause: Cause::Written, loaded: config::understand(&self.path, text) })
    }

    /// Blocks the runtime for as long as it takes to read a few kilobytes, which is less than
    /// handing the work to another thread.
    fn read(&mut self) -> io::Result<String> {
        // First, so that a file replaced in between is noticed.
        self.watch();
        fs::read_to_string(&self.path)
    }

    /// Watches the directory of the file, as a file that is replaced takes its own watch with it;
    /// and if it is a link, that of the file meant. To watch twice changes nothing, and finds a
    /// directory that was replaced. One that is not there cannot be watched; SIGHUP does without.
    fn watch(&mut self) {
        let meant = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        for directory in [directory(&self.path), directory(&meant)] {
            if let Err(error) = self.watcher.watch(directory, RecursiveMode::NonRecursive) {
                let directory = directory.display();
                tracing::warn!(%directory, %error, "cannot watch for changes; send SIGHUP instead");
            }
        }
    }
}

/// Reading is no change. Our own would wake us for ever.
fn is_harmless(event: &Event) -> bool {
    let written = EventKind::Access(event::AccessKind::Close(event::AccessMode::Write));
    event.kind.is_access() && event.kind != written && !event.need_rescan()
}

fn directory(file: &Path) -> &Path {
    match file.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn outcome(text: &io::Result<String>) -> Result<String, io::ErrorKind> {
    match text {
        Ok(text) => Ok(text.clone()),
        Err(error) => Err(error.kind()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::symlink,
        process::Command,
        sync::{PoisonError, RwLock},
    };

    use tempfile::TempDir;
    use tokio::{runtime, time::timeout};

    use super::*;

    const LONG: Duration = Duration::from_secs(5);

    /// A signal reaches every source of the process. Held for reading by the tests that expect
    /// none.
    static SIGNALS: RwLock<()> = RwLock::new(());

    /// A file with one service of this name, and nothing wrong.
    fn text(service: &str) -> String {
        format!("[[service]]\nname = \"{service}\"\nvip = \"192.0.2.1\"\nports = [\"80/tcp\"]\n")
    }

    fn directory_with(name: &str, text: &str) -> (TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        fs::write(&path, text).unwrap();
        (directory, path)
    }

    fn run(test: impl Future<Output = ()>) {
        let _quiet = SIGNALS.read().unwrap_or_else(PoisonError::into_inner);
        run_alone(test);
    }

    fn run_alone(test: impl Future<Output = ()>) {
        runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
    }

    /// What the next change of the file brings: the name of its service, or its first error.
    async fn written(source: &mut FileSource) -> String {
        let change = timeout(LONG, source.next()).await.expect("a change is noticed");
        assert_eq!(change.cause, Cause::Written);
        summary(change.loaded)
    }

    async fn nothing(source: &mut FileSource) {
        assert!(timeout(4 * QUIET, source.next()).await.is_err());
        assert!(source.settling.is_none(), "to read the file must not count as touching it");
    }

    fn summary(loaded: Result<(Config, Vec<Warning>), LoadError>) -> String {
        match loaded {
            Ok((config, _)) => config.desired.services[0].name.clone(),
            Err(error) => error.sentences()[0].clone(),
        }
    }

    #[test]
    fn a_file_that_is_overwritten_is_read_again_once() {
        run(async {
            let (_directory, path) = directory_with("wiremesh.toml", &text("one"));
            let mut source = FileSource::new(&path).unwrap();
            assert_eq!(summary(source.load()), "one");
            fs::write(&path, text("two")).unwrap();
            assert_eq!(written(&mut source).await, "two");
            nothing(&mut source).await;
        });
    }

    #[test]
    fn a_file_that_is_replaced_is_read_again_each_time() {
        run(async {
            let (directory, path) = directory_with("wiremesh.toml", &text("one"));
            let mut source = FileSource::new(&path).unwrap();
            assert_eq!(summary(source.load()), "one");
            for name in ["two", "three"] {
                let other = directory.path().join("new");
                fs::write(&other, text(name)).unwrap();
                fs::rename(&other, &path).unwrap();
                assert_eq!(written(&mut source).await, name);
            }
        });
    }

    #[test]
    fn the_same_content_again_is_no_change() {
        run(async {
            let (_directory, path) = directory_with("wiremesh.toml", &text("one"));
            let mut source = FileSource::new(&path).unwrap();
            assert_eq!(summary(source.load()), "one");
            fs::write(&path, text("one")).unwrap();
            nothing(&mut source).await;
        });
    }

    #[test]
    fn a_bad_file_is_told_and_the_good_one_after_it() {
        run(async {
            let (_directory, path) = directory_with("wiremesh.toml", &text("one"));
            let mut source = FileSource::new(&path).unwrap();
            assert_eq!(summary(source.load()), "one");
            fs::write(&path, "[nodes]\n").unwrap();
            let expected =
                format!("{}:1:2: unknown key `nodes`: did you mean `node`?", path.display());
            assert_eq!(written(&mut source).await, expected);
            fs::write(&path, "").unwrap();
            assert_eq!(written(&mut source).await, format!("{} is empty", path.display()));
            fs::remove_file(&path).unwrap();
            let expected = format!("there is no file {}", path.display());
            assert_eq!(written(&mut source).await, expected);
            fs::write(&path, text("one")).unwrap();
            assert_eq!(written(&mut source).await, "one");
        });
    }

    /// How Kubernetes updates a ConfigMap: file → ..data/file, ..data → ..1, and ..data is
    /// replaced.
    #[test]
    fn a_link_that_is_turned_elsewhere_is_a_change() {
        run(async {
            let directory = tempfile::tempdir().unwrap();
            let within = |name: &str| directory.path().join(name);
            for (version, service) in [("..1", "one"), ("..2", "two")] {
                fs::create_dir(within(version)).unwrap();
                fs::write(within(version).join("wiremesh.toml"), text(service)).unwrap();
            }
            symlink("..1", within("..data")).unwrap();
            symlink("..data/wiremesh.toml", within("wiremesh.toml")).unwrap();

            let mut source = FileSource::new(within("wiremesh.toml")).unwrap();
            assert_eq!(summary(source.load()), "one");
            symlink("..2", within("..data_tmp")).unwrap();
            fs::rename(within("..data_tmp"), within("..data")).unwrap();
            fs::remove_dir_all(within("..1")).unwrap();
            assert_eq!(written(&mut source).await, "two");
        });
    }

    #[test]
    fn a_file_behind_a_link_is_watched_where_it_lies() {
        run(async {
            let (_elsewhere, target) = directory_with("real.toml", &text("one"));
            let directory = tempfile::tempdir().unwrap();
            let link = directory.path().join("wiremesh.toml");
            symlink(&target, &link).unwrap();
            let mut source = FileSource::new(&link).unwrap();
            assert_eq!(summary(source.load()), "one");
            fs::write(&target, text("two")).unwrap();
            assert_eq!(written(&mut source).await, "two");
        });
    }

    #[test]
    fn a_dropped_wait_loses_no_change() {
        run(async {
            let (_directory, path) = directory_with("wiremesh.toml", &text("one"));
            let mut source = FileSource::new(&path).unwrap();
            assert_eq!(summary(source.load()), "one");
            fs::write(&path, text("two")).unwrap();
            // Long enough to hear of it, and too short for it to settle.
            assert!(timeout(QUIET / 2, source.next()).await.is_err());
            assert_eq!(written(&mut source).await, "two");
        });
    }

    #[test]
    fn sighup_reads_the_file_even_if_nothing_changed() {
        let _alone = SIGNALS.write().unwrap_or_else(PoisonError::into_inner);
        run_alone(async {
            let (_directory, path) = directory_with("wiremesh.toml", &text("one"));
            let mut source = FileSource::new(&path).unwrap();
            assert_eq!(summary(source.load()), "one");
            let id = std::process::id().to_string();
            assert!(
                Command::new("sh").args(["-c", "kill -HUP $0", &id]).status().unwrap().success()
            );
            let change = timeout(LONG, source.next()).await.expect("the signal is noticed");
            assert_eq!(change.cause, Cause::Hangup);
            assert_eq!(summary(change.loaded), "one");
        });
    }
}
