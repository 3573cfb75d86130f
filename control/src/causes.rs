//! An error with all its causes, as one line for logs and terminals.

use std::{error::Error, iter};

/// The error, its cause, and so on, in one sentence.
pub fn line(error: &(dyn Error + 'static)) -> String {
    joined(iter::successors(Some(error), |error| (**error).source()))
}

/// One sentence of them. Some errors tell their cause themselves: it is not said again.
pub fn joined<'a>(causes: impl Iterator<Item = &'a (dyn Error + 'static)>) -> String {
    let mut line = String::new();
    for cause in causes.map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{said}")]
    struct Outer {
        said: &'static str,
        source: io::Error,
    }

    #[test]
    fn a_cause_is_said_once() {
        for said in ["cannot listen", "cannot listen: no luck"] {
            let error = Outer { said, source: io::Error::other("no luck") };
            assert_eq!(line(&error), "cannot listen: no luck");
        }
    }
}
