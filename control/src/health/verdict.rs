//! Results in a row make a verdict.

use std::{collections::HashMap, sync::Arc};

use super::Pace;

/// What is thought of a backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing yet: it takes connections, as if there were no checks.
    #[default]
    Unknown,
    /// It takes connections.
    Up,
    /// It takes none.
    Down {
        /// What the check said that tipped the scales.
        reason: Arc<str>,
    },
}

impl Verdict {
    /// In a word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Up => "up",
            Self::Down { .. } => "down",
        }
    }

    /// Whether it takes no connections.
    pub fn is_down(&self) -> bool {
        matches!(self, Self::Down { .. })
    }
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The backend serves; in what words.
    Passed(String),
    /// It does not, and why.
    Failed(String),
    /// The check could not be done, for a reason on this node: says nothing about the backend.
    Impossible(String),
}

/// A backend's verdict, and what may become of it.
#[derive(Clone, Debug, Default)]
pub struct Streak {
    verdict: Verdict,
    passed: u32,
    failed: u32,
}

impl Streak {
    /// What is thought now.
    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    /// Whether the last check failed, and more of them would change the verdict.
    pub fn is_suspicious(&self) -> bool {
        self.failed > 0 && !self.verdict.is_down()
    }

    /// Counts a result. Says whether the verdict is another one now.
    pub fn count(&mut self, outcome: &Outcome, pace: &Pace) -> bool {
        match outcome {
            Outcome::Impossible(_) => return false,
            Outcome::Passed(_) => (self.passed, self.failed) = (self.passed.saturating_add(1), 0),
            Outcome::Failed(_) => (self.passed, self.failed) = (0, self.failed.saturating_add(1)),
        }
        let next = match outcome {
            Outcome::Passed(_) if self.passed >= pace.rise => Verdict::Up,
            Outcome::Failed(why) if self.failed >= pace.fall && !self.verdict.is_down() => {
                Verdict::Down { reason: why.as_str().into() }
            }
            _ => return false,
        };
        let changed = next != self.verdict;
        self.verdict = next;
        changed
    }
}

/// Services' backends and what is thought of them. One that is not named is unknown.
#[derive(Clone, Debug, Default)]
pub struct Verdicts(HashMap<Arc<str>, HashMap<Arc<str>, Verdict>>);

impl Verdicts {
    /// Of one backend.
    pub fn of(&self, service: &str, backend: &str) -> Verdict {
        let backends = self.0.get(service);
        backends.and_then(|backends| backends.get(backend)).cloned().unwrap_or_default()
    }

    /// Notes a verdict. Returns the one before.
    pub fn set(&mut self, service: &Arc<str>, backend: &Arc<str>, verdict: Verdict) -> Verdict {
        let backends = self.0.entry(service.clone()).or_default();
        backends.insert(backend.clone(), verdict).unwrap_or_default()
    }

    /// Forgets all others.
    pub fn retain(&mut self, mut wanted: impl FnMut(&str, &str) -> bool) {
        self.0.retain(|service, backends| {
            backends.retain(|backend, _| wanted(service, backend));
            !backends.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn pace(rise: u32, fall: u32) -> Pace {
        let (interval, timeout) = (Duration::from_secs(2), Duration::from_secs(1));
        Pace { interval, timeout, rise, fall, jitter_percent: 0 }
    }

    fn outcome(passed: bool) -> Outcome {
        match passed {
            true => Outcome::Passed("200 OK".to_owned()),
            false => Outcome::Failed("connection refused".to_owned()),
        }
    }

    #[test]
    fn a_backend_falls_and_rises_by_results_in_a_row() {
        let mut streak = Streak::default();
        let mut count = |passed| {
            let changed = streak.count(&outcome(passed), &pace(2, 3));
            (streak.verdict().word(), changed)
        };
        let said: Vec<_> =
            [true, true, false, false, true, false, false, false, true, false, true, true]
                .map(&mut count)
                .into();
        let up = ("up", false);
        let down = ("down", false);
        assert_eq!(
            said,
            [
                ("unknown", false),
                ("up", true),
                up,
                up,
                up,
                up,
                up,
                ("down", true),
                down,
                down,
                down,
                ("up", true)
            ]
        );
    }

    #[test]
    fn what_could_not_be_checked_says_nothing() {
        let mut streak = Streak::default();
        let impossible = Outcome::Impossible("no file descriptor".to_owned());
        for result in [outcome(false), impossible.clone(), impossible, outcome(false)] {
            assert!(!streak.count(&result, &pace(1, 3)));
        }
        assert!(streak.is_suspicious());
        assert!(streak.count(&outcome(false), &pace(1, 3)));
        assert_eq!(*streak.verdict(), Verdict::Down { reason: "connection refused".into() });
        assert!(!streak.is_suspicious(), "more failures change nothing");
    }

    proptest! {
        /// The verdict is that of the last run that was long enough, whatever came before and after it.
        #[test]
        fn the_last_run_that_was_long_enough_decides(
            results in proptest::collection::vec(any::<bool>(), 0..60), rise in 1_usize..6, fall in 1_usize..6,
        ) {
            let mut streak = Streak::default();
            let mut before = "unknown";
            for end in 1..=results.len() {
                let changed =
                    streak.count(&outcome(results[end - 1]), &pace(rise as u32, fall as u32));
                let ends_run = |end: usize, long: usize, of: bool| {
                    end >= long && results[end - long..end].iter().all(|result| *result == of)
                };
                let decided = (1..=end).rev().find_map(|end| {
                    let up = ends_run(end, rise, true).then_some("up");
                    up.or(ends_run(end, fall, false).then_some("down"))
                });
                let expected = decided.unwrap_or("unknown");
                prop_assert_eq!(streak.verdict().word(), expected);
                prop_assert_eq!(changed, expected != before);
                before = expected;
            }
        }
    }
}
