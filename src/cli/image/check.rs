//! `image check`: everything that is wrong with an image, line by line or as JSON.

use anyhow::bail;

use super::{Existing, open_shared};
use crate::{
    cli::output::Output,
    disk::{check::Report, image},
};

/// Options of `check`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    image: Existing,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What `check --json` prints.
#[derive(Debug, serde::Serialize)]
struct Checked {
    image: String,
    format: String,
    #[serde(flatten)]
    report: Report,
}

/// Checks and tells; damage is an error after all of it was told.
pub(super) fn run(args: &CheckArgs, out: &Output) -> anyhow::Result<()> {
    let config = args.image.config(out)?;
    let (storage, _lock) = open_shared(&config)?;
    let report = image::check(&storage, config.format);
    let image = config.path.display().to_string();
    let (errors, warnings) = (report.errors, report.warnings);
    if args.json {
        out.json(&Checked {
            image: image.clone(),
            format: config.format.to_string(),
            report,
        })?;
    } else {
        for finding in &report.findings {
            out.line(&finding.to_string());
        }
        if report.omitted() > 0 {
            out.line(&format!("... and {} more", report.omitted()));
        }
        out.line(&format!("{errors} errors, {warnings} warnings"));
    }
    if errors > 0 {
        bail!("{image} is damaged: {errors} errors; restore it from a copy");
    }
    Ok(())
}
