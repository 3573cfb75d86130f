//! Watch channels that wake nobody for what is known already.

use tokio::sync::watch;

/// Tells watchers what is new. Nobody wakes if it is what they were told last.
pub fn tell<T: PartialEq>(watchers: &watch::Sender<T>, newest: T) {
    watchers.send_if_modified(|last| {
        let is_new = *last != newest;
        *last = newest;
        is_new
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_watches_wakes_for_news_only() {
        let (watchers, mut watcher) = watch::channel(1);
        tell(&watchers, 1);
        assert!(!watcher.has_changed().unwrap());
        tell(&watchers, 2);
        assert!(watcher.has_changed().unwrap());
        assert_eq!(*watcher.borrow_and_update(), 2);
    }
}
