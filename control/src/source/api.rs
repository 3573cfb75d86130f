//! The API as a source: what was wanted through it, on disk. One JSON file for each service, in the words
//! it was given in, so that a change costs the same with ten thousand of them as with one.
//!
//! What [`Store::put`] and [`Store::remove`] have returned from survives kill -9 and power loss. All of it
//! blocks for as long as the disk takes.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File, TryLockError},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    config::{Maglev, Remark, ServiceSpec},
    desired::Service,
};

/// Services by their names.
pub type Services = BTreeMap<String, Arc<Service>>;

/// What the API's services are kept in.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    /// Held for as long as we live, once there is a directory.
    lock: Option<File>,
}

/// Why what was wanted can't be read or written.
#[derive(Debug, thiserror::Error, miette::Diagnostic)]
pub enum StoreError {
    /// Another daemon has it.
    #[error("another daemon keeps its services in {0}")]
    #[diagnostic(help("stop it, or give this one another api.state_directory"))]
    InUse(PathBuf),
    /// The kernel says no.
    #[error("cannot use {path}; see api.state_directory")]
    Io {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what was written.
    #[error("{path} can't be understood: {reason}")]
    #[diagnostic(help("mend it, or move it away to do without the service"))]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl Store {
    /// Opens it, and reads all that is in it. A directory that is not there is made when it is needed.
    ///
    /// # Errors
    /// If anything in it can't be read: to go on without would take a service away.
    pub fn open(directory: &Path, maglev: &Maglev) -> Result<(Self, Services), StoreError> {
        let mut store = Self { directory: directory.to_owned(), lock: None };
        // What can't be looked at may well be full of services.
        if !directory.try_exists().map_err(failed(directory))? {
            return Ok((store, Services::new()));
        }
        store.prepare()?;
        let folder = store.folder();
        let mut services = Services::new();
        let entries = fs::read_dir(&folder).map_err(failed(&folder))?;
        for entry in entries {
            let path = entry.map_err(failed(&folder))?.path();
            match path.extension().and_then(OsStr::to_str) {
                Some(UNFINISHED) => fs::remove_file(&path).map_err(failed(&path))?,
                Some(FINISHED) => {
                    let service = read(&path, maglev)?;
                    services.insert(service.name.clone(), Arc::new(service));
                }
                _ => {}
            }
        }
        Ok((store, services))
    }

    /// Keeps a service, in place of the one of its name.
    ///
    /// # Errors
    /// If the disk refuses. Either is then kept, this or what was before.
    pub fn put(&mut self, name: &str, spec: &ServiceSpec) -> Result<(), StoreError> {
        self.prepare()?;
        let (path, new) = (self.path(name, FINISHED), self.path(name, UNFINISHED));
        let mut text = serde_json::to_vec_pretty(spec).expect("a service is plain data");
        text.push(b'\n');
        let write = || {
            let mut options = File::options();
            let mut file =
                options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            sync(&self.folder())
        };
        write().map_err(|error| {
            // A full disk has no room for it.
            let _ = fs::remove_file(&new);
            failed(&path)(error)
        })
    }

    /// Keeps a service no longer.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn remove(&mut self, name: &str) -> Result<(), StoreError> {
        if self.lock.is_none() {
            // Nothing in it is ours, and it may be another daemon's by now.
            return Ok(());
        }
        let path = self.path(name, FINISHED);
        let removed = match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        if !self.folder().exists() {
            return Ok(());
        }
        removed.and_then(|()| sync(&self.folder())).map_err(failed(&path))
    }

    /// Makes the directory, and makes it ours.
    fn prepare(&mut self) -> Result<(), StoreError> {
        if self.lock.is_some() {
            return Ok(());
        }
        let folder = self.folder();
        let missing: Vec<&Path> = folder.ancestors().take_while(|path| !path.exists()).collect();
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&folder).map_err(failed(&folder))?;
        // Each new name is durable once the directory that it stands in is.
        for parent in missing.iter().filter_map(|made| made.parent()) {
            sync(parent).map_err(failed(parent))?;
        }
        let path = self.directory.join("lock");
        let lock = File::options().create(true).append(true).mode(0o600).open(&path);
        let lock = lock.map_err(failed(&path))?;
        match lock.try_lock() {
            Ok(()) => self.lock = Some(lock),
            Err(TryLockError::WouldBlock) => {
                return Err(StoreError::InUse(self.directory.clone()));
            }
            Err(TryLockError::Error(error)) => return Err(failed(&path)(error)),
        }
        Ok(())
    }

    fn folder(&self) -> PathBuf {
        self.directory.join("services")
    }

    fn path(&self, name: &str, extension: &str) -> PathBuf {
        self.folder().join(format!("{name}.{extension}"))
    }
}

/// Extensions of a file that is whole, and of one that may not be.
const FINISHED: &str = "json";
const UNFINISHED: &str = "new";

/// Makes what was done to the names in a directory durable.
fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn failed(path: &Path) -> impl Fn(io::Error) -> StoreError {
    move |source| StoreError::Io { path: path.to_owned(), source }
}

fn read(path: &Path, maglev: &Maglev) -> Result<Service, StoreError> {
    let invalid = |reason| StoreError::Invalid { path: path.to_owned(), reason };
    let text = fs::read(path).map_err(failed(path))?;
    let spec: ServiceSpec =
        serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?;
    let sentence =
        |Remark { pointer, detail, remedy }: &Remark| format!("{pointer}: {detail}: {remedy}");
    let (service, _) = spec
        .understand(maglev)
        .map_err(|remarks| invalid(remarks.iter().map(sentence).collect::<Vec<_>>().join("; ")))?;
    if path.file_stem().and_then(OsStr::to_str) != Some(&service.name) {
        return Err(invalid(format!("it is the service `{}`, by its own words", service.name)));
    }
    Ok(service)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str) -> ServiceSpec {
        ServiceSpec {
            name: Some(name.to_owned()),
            vip: Some("203.0.113.10".to_owned()),
            ports: Some(vec!["80/tcp".to_owned()]),
            ..ServiceSpec::default()
        }
    }

    fn open(directory: &Path) -> Result<(Store, Services), StoreError> {
        Store::open(directory, &Maglev::default())
    }

    fn kept(directory: &Path) -> Vec<String> {
        open(directory).unwrap().1.into_keys().collect()
    }

    #[test]
    fn what_is_put_is_there_again_in_the_same_words_and_what_is_removed_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("state");
        let (mut store, services) = open(&directory).unwrap();
        assert!(services.is_empty() && !directory.exists(), "made when it is needed");
        store.put("a", &spec("a")).unwrap();
        let changed = ServiceSpec { vni: Some(7), ..spec("b") };
        store.put("b", &spec("b")).unwrap();
        store.put("b", &changed).unwrap();
        drop(store);
        let (mut store, services) = open(&directory).unwrap();
        assert_eq!(services["b"].written.as_deref(), Some(&changed));
        store.remove("a").unwrap();
        store.remove("a").unwrap();
        drop(store);
        assert_eq!(kept(&directory), ["b"]);
    }

    #[test]
    fn a_directory_has_one_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let (store, _) = open(directory.path()).unwrap();
        let error = open(directory.path()).unwrap_err();
        assert!(matches!(error, StoreError::InUse(_)), "{error}");
        drop(store);
        open(directory.path()).unwrap();
    }

    #[test]
    fn who_does_not_have_the_directory_takes_nothing_out_of_it() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("state");
        // Neither finds a directory, so neither has it.
        let (mut first, _) = open(&directory).unwrap();
        let (mut second, _) = open(&directory).unwrap();
        first.put("a", &spec("a")).unwrap();
        let error = second.put("a", &spec("a")).unwrap_err();
        assert!(matches!(error, StoreError::InUse(_)), "{error}");
        // As is done with what was refused.
        second.remove("a").unwrap();
        drop((first, second));
        assert_eq!(kept(&directory), ["a"]);
    }

    #[test]
    fn a_directory_that_cannot_be_looked_at_is_not_taken_for_one_that_is_not_there() {
        let parent = tempfile::tempdir().unwrap();
        let (a, b) = (parent.path().join("a"), parent.path().join("b"));
        std::os::unix::fs::symlink(&a, &b).unwrap();
        std::os::unix::fs::symlink(&b, &a).unwrap();
        let error = open(&a).unwrap_err();
        assert!(error.to_string().contains("api.state_directory"), "{error}");
    }

    #[test]
    fn what_can_not_be_written_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let (mut store, _) = open(directory.path()).unwrap();
        let (path, new) = (store.path("a", FINISHED), store.path("a", UNFINISHED));
        // A file does not take a directory's place.
        fs::create_dir(&path).unwrap();
        store.put("a", &spec("a")).unwrap_err();
        assert!(!new.exists());
    }

    #[test]
    fn a_write_that_was_cut_off_leaves_what_was_before() {
        let directory = tempfile::tempdir().unwrap();
        let (mut store, _) = open(directory.path()).unwrap();
        store.put("a", &spec("a")).unwrap();
        let cut = store.path("a", UNFINISHED);
        fs::write(&cut, "{ \"name\": \"a\", \"vi").unwrap();
        drop(store);
        assert_eq!(kept(directory.path()), ["a"]);
        assert!(!cut.exists());
    }

    #[test]
    fn what_is_not_understood_is_named_and_nothing_is_lost_by_going_on_without() {
        let directory = tempfile::tempdir().unwrap();
        let (mut store, _) = open(directory.path()).unwrap();
        store.put("a", &spec("a")).unwrap();
        let path = store.path("a", FINISHED);
        drop(store);
        let good = fs::read_to_string(&path).unwrap();
        for (bad, reason) in [
            (good[..20].to_owned(), "EOF"),
            (good.replace("203.0.113.10", "nowhere"), "/vip: `vip` is `nowhere`"),
            (good.replace("\"a\"", "\"b\""), "it is the service `b`"),
        ] {
            fs::write(&path, bad).unwrap();
            let error = open(directory.path()).unwrap_err().to_string();
            assert!(error.contains("a.json") && error.contains(reason), "{error}");
        }
    }
}
