//! What is wrong with a configuration, and where: diagnostics that point at the line and say what
//! would be right. They print by miette in a terminal, and as one sentence each in a log.

use std::{fmt, io, path::PathBuf, sync::Arc};

use miette::{Diagnostic, LabeledSpan, NamedSource, Severity, SourceCode};

/// Bytes of the text, from and to.
pub type Span = std::ops::Range<usize>;

/// One thing to say about one place of a configuration.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Finding {
    severity: Severity,
    message: String,
    remedy: String,
    labels: Vec<LabeledSpan>,
    source_code: Arc<NamedSource<String>>,
    line: usize,
    column: usize,
}

/// A finding that keeps nobody from using the configuration.
pub type Warning = Finding;

impl Finding {
    /// Where it is, counted from 1.
    pub fn line(&self) -> usize {
        self.line
    }

    /// The character of its line, counted from 1.
    pub fn column(&self) -> usize {
        self.column
    }

    /// The first byte of its place.
    pub(super) fn place(&self) -> usize {
        self.labels[0].offset()
    }

    /// What would be right.
    pub(super) fn remedy(&self) -> &str {
        &self.remedy
    }

    /// All of it in one line: `FILE:LINE:COLUMN: what is wrong: what would be right`.
    pub fn sentence(&self) -> String {
        let Self { line, column, message, remedy, .. } = self;
        format!("{}:{line}:{column}: {message}: {remedy}", self.source_code.name())
    }
}

impl Diagnostic for Finding {
    fn severity(&self) -> Option<Severity> {
        Some(self.severity)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        Some(Box::new(self.labels.iter().cloned()))
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        Some(&self.source_code)
    }
}

/// Why a configuration is refused: everything found, not only the first.
#[derive(Clone, Debug, thiserror::Error, Diagnostic)]
#[error("{file} cannot be used: {}", Count(findings.len()))]
pub struct ConfigErrors {
    file: String,
    #[related]
    findings: Vec<Finding>,
}

impl ConfigErrors {
    /// Each of them, at least one.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error, Diagnostic)]
pub enum LoadError {
    /// No such file.
    #[error("there is no file {}", path.display())]
    #[diagnostic(help("write it, as config/example.toml shows, or name another with -c"))]
    Missing {
        /// The file asked for.
        path: PathBuf,
    },
    /// It is there, but cannot be read.
    #[error("{} cannot be read", path.display())]
    #[diagnostic(help("it must be a UTF-8 text file that this user may read"))]
    Unreadable {
        /// The file asked for.
        path: PathBuf,
        /// What the kernel, or the decoder, said.
        source: io::Error,
    },
    /// Nothing in it. Every key has a default, so this would be a valid file that removes all
    /// services; but it is also what a full disk or an interrupted copy leaves behind.
    #[error("{} is empty", path.display())]
    #[diagnostic(help("to run without services, write at least a comment"))]
    Empty {
        /// The file asked for.
        path: PathBuf,
    },
    /// Something in it is wrong.
    #[error(transparent)]
    #[diagnostic(transparent)]
    Invalid(#[from] ConfigErrors),
}

impl LoadError {
    /// One line for each thing that is wrong, for a log.
    pub fn sentences(&self) -> Vec<String> {
        match self {
            Self::Invalid(errors) => errors.findings.iter().map(Finding::sentence).collect(),
            Self::Unreadable { source, .. } => vec![format!("{self}: {source}")],
            Self::Missing { .. } | Self::Empty { .. } => vec![self.to_string()],
        }
    }
}

/// What has been found so far in one text.
pub(super) struct Report {
    source_code: Arc<NamedSource<String>>,
    errors: Vec<Finding>,
    warnings: Vec<Warning>,
}

impl Report {
    pub(super) fn new(file: &str, text: &str) -> Self {
        let source_code = Arc::new(NamedSource::new(file, text.to_owned()).with_language("TOML"));
        Self { source_code, errors: Vec::new(), warnings: Vec::new() }
    }

    /// `remedy` says what would be right, and stands under the place.
    pub(super) fn error(
        &mut self,
        span: Span,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        let finding = self.finding(Severity::Error, span, message.into(), remedy.into());
        self.errors.push(finding);
    }

    /// An error that another place of the text has a part in.
    pub(super) fn conflict(
        &mut self,
        span: Span,
        message: impl Into<String>,
        remedy: impl Into<String>,
        first: Span,
    ) {
        let mut finding = self.finding(Severity::Error, span, message.into(), remedy.into());
        finding.labels.push(LabeledSpan::new_with_span(Some("first here".to_owned()), first));
        self.errors.push(finding);
    }

    pub(super) fn warning(
        &mut self,
        span: Span,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        let finding = self.finding(Severity::Warning, span, message.into(), remedy.into());
        self.warnings.push(finding);
    }

    /// The warnings, if there was no error.
    pub(super) fn finish(self) -> Result<Vec<Warning>, ConfigErrors> {
        if self.errors.is_empty() {
            return Ok(self.warnings);
        }
        let mut findings = self.errors;
        findings.sort_by_key(|finding| (finding.line, finding.column));
        Err(ConfigErrors { file: self.source_code.name().to_owned(), findings })
    }

    fn finding(&self, severity: Severity, span: Span, message: String, remedy: String) -> Finding {
        let text = self.source_code.inner();
        let before = text.get(..span.start).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = before.matches('\n').count() + 1;
        let column = before[line_start..].chars().count() + 1;
        let label = LabeledSpan::new_primary_with_span(Some(remedy.clone()), span);
        let source_code = Arc::clone(&self.source_code);
        Finding { severity, message, remedy, labels: vec![label], source_code, line, column }
    }
}

struct Count(usize);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => write!(f, "1 error"),
            count => write!(f, "{count} errors"),
        }
    }
}
