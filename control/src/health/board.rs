//! The last result of each check, for whoever asks, from any thread.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Outcome, Verdict};

/// What is thought of a backend, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Report {
    /// `up`, `down` or `unknown`: nothing yet, which counts as up.
    pub verdict: String,
    /// What the last check found.
    pub result: Option<String>,
    /// When it ended, in milliseconds since 1970.
    pub checked_unix_ms: Option<u64>,
    /// How long it took, in milliseconds.
    pub took_ms: Option<u64>,
}

impl Report {
    /// How long ago the last check ended.
    pub fn age(&self) -> Option<Duration> {
        let at = UNIX_EPOCH + Duration::from_millis(self.checked_unix_ms?);
        // The wall clock may have been set back meanwhile.
        Some(SystemTime::now().duration_since(at).unwrap_or_default())
    }
}

type Reports = HashMap<Arc<str>, HashMap<Arc<str>, Report>>;

/// All of them.
#[derive(Debug, Default)]
pub struct Board {
    reports: RwLock<Reports>,
    passed: AtomicU64,
    failed: AtomicU64,
    impossible: AtomicU64,
}

impl Board {
    /// Of one service's backends.
    pub fn of(&self, service: &str) -> HashMap<Arc<str>, Report> {
        let reports = self.reports.read().unwrap_or_else(PoisonError::into_inner);
        reports.get(service).cloned().unwrap_or_default()
    }

    /// Checks so far, by result.
    pub fn counts(&self) -> [(&'static str, u64); 3] {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        [
            ("passed", count(&self.passed)),
            ("failed", count(&self.failed)),
            ("impossible", count(&self.impossible)),
        ]
    }

    pub(super) fn note(
        &self,
        (service, backend): (&Arc<str>, &Arc<str>),
        verdict: &Verdict,
        outcome: Outcome,
        took: Duration,
    ) {
        let (count, result) = match outcome {
            Outcome::Passed(what) => (&self.passed, what),
            Outcome::Failed(why) => (&self.failed, why),
            Outcome::Impossible(why) => (&self.impossible, format!("not checked: {why}")),
        };
        count.fetch_add(1, Ordering::Relaxed);
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let report = Report {
            verdict: verdict.word().to_owned(),
            result: Some(result),
            checked_unix_ms: Some(ms(now)),
            took_ms: Some(ms(took)),
        };
        self.put(service, backend, report);
    }

    /// Begins without a result.
    pub(super) fn begin(&self, service: &Arc<str>, backend: &Arc<str>) {
        let report = Report { verdict: Verdict::Unknown.word().to_owned(), ..Report::default() };
        self.put(service, backend, report);
    }

    fn put(&self, service: &Arc<str>, backend: &Arc<str>, report: Report) {
        let mut reports = self.reports.write().unwrap_or_else(PoisonError::into_inner);
        reports.entry(service.clone()).or_default().insert(backend.clone(), report);
    }

    pub(super) fn forget(&self, service: &str, backend: &str) {
        let mut reports = self.reports.write().unwrap_or_else(PoisonError::into_inner);
        let Some(backends) = reports.get_mut(service) else { return };
        backends.remove(backend);
        if backends.is_empty() {
            reports.remove(service);
        }
    }
}
