//! Watch channels that wake nobody for what is known already.

use tokio::sync::watch;

/// Tells watchers what is new. `false` if it is what they were told last: then nobody wakes.
pub fn tell<T: PartialEq>(watchers: &watch::Sender<T>, newest: T) -> bool {
    watchers.send_if_modified(|last| {
        let is_new = *last != newest;
        if is_new {
            *last = newest;
        }
        is_new
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_watches_wakes_for_news_only() {
        let (watchers, mut watcher) = watch::channel(1);
        assert!(!tell(&watchers, 1) && !watcher.has_changed().unwrap());
        assert!(tell(&watchers, 2) && watcher.has_changed().unwrap());
        assert_eq!(*watcher.borrow_and_update(), 2);
    }
}
