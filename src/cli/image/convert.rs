//! `image convert`: the same disk in another file, in any format and kind.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{Source, new::NewImage};
use crate::{
    base::{ids::SystemIds, units::Bytes},
    cli::{output::Output, runtime},
    node::{
        self,
        convert::{self, Conversion, Converted, Holes},
    },
    storage::draft::Durability,
};

/// Options of `convert`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ConvertArgs {
    #[command(flatten)]
    source: Source,
    /// The image file to make; an existing one is never overwritten.
    #[arg(value_name = "DST")]
    target: PathBuf,
    #[command(flatten)]
    new: NewImage,
    /// Store zeros where DST could have holes. Windows does not attach an image in a sparse file.
    #[arg(long)]
    no_sparse: bool,
    /// Do not wait until DST is on the disk: for an image that can be made again. If the power fails within the next
    /// minutes, DST may be damaged.
    #[arg(long)]
    no_sync: bool,
}

/// Converts, until done or told to stop.
pub(super) fn run(args: &ConvertArgs, out: &Output) -> anyhow::Result<()> {
    let source = args.source.config(out)?;
    let new = args.new.options(&args.target)?;
    let plan = Conversion {
        source,
        target: args.target.clone(),
        format: new.format,
        kind: new.kind,
        block_size: new.block_size,
        logical_sector: new.logical_sector,
        physical_sector: new.physical_sector,
        holes: if args.no_sparse {
            Holes::Fill
        } else {
            Holes::Keep
        },
        durability: if args.no_sync {
            Durability::Cached
        } else {
            Durability::Synced
        },
    };
    let label = format!(
        "{} -> {}",
        plan.source.path.display(),
        plan.target.display()
    );
    let mut bar = out.progress("convert");
    let stop = Arc::new(AtomicBool::new(false));
    let converted = runtime()?.block_on(async {
        let mut signals = node::stop_signals()?;
        let stopped = Arc::clone(&stop);
        let mut work = tokio::task::spawn_blocking(move || {
            let converted = convert::convert(
                &plan,
                &(Arc::new(SystemIds::default()) as _),
                &stopped,
                &mut |done, total| bar.set(done, total),
            );
            bar.finish_if(converted.is_ok());
            converted
        });
        let ended = tokio::select! {
            ended = &mut work => ended,
            () = signals.next() => {
                stop.store(true, Ordering::Relaxed);
                work.await
            }
        };
        anyhow::Ok(ended.expect("converting does not panic")?)
    })?;
    let Converted {
        source,
        target,
        written,
    } = converted;
    out.line(&format!(
        "converted {label}: {}, {} written",
        Bytes(source.size),
        Bytes(written)
    ));
    if source.logical_sector != target.logical_sector {
        out.note(&format!(
            "the source has sectors of {} bytes, DST does not say so: attach it with sectors of that size",
            source.logical_sector
        ));
    }
    Ok(())
}
