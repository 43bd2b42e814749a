//! The folder mode of `tulle`: the same source and translation as control's, in this process.
//!
//! Nothing is contacted, so it shows what control would publish and not what proxies hold.

use std::path::Path;

use serde_json::Value;
use serde_json::json;

use crate::base::unix_now;
use crate::cli::Failure;
use crate::resource::{Kind, view};
use crate::source::Loaded;
use crate::source::files::watch::Folder;
use crate::translate::{Memory, Settings, Translation, translate};

fn load(dir: &Path) -> Result<(Loaded, Translation), Failure> {
    let cannot = |error: String| Failure::wrong(format!("cannot read {}: {error}", dir.display()));
    let loaded = Folder::new(dir.to_owned()).look().map_err(|error| cannot(error.to_string()))?.unwrap_or_default();
    let settings = Settings { now: unix_now(), ..Settings::default() };
    let translation = translate(&loaded.world, &settings, &mut Memory::default());
    Ok((loaded, translation))
}

/// What control would publish.
pub(super) fn resources(dir: &Path) -> Result<Value, Failure> {
    let (_, translation) = load(dir)?;
    let all = [Kind::Address, Kind::Authorization, Kind::NetworkPolicy, Kind::TrustBundle]
        .into_iter()
        .flat_map(|kind| translation.resources.of(kind).values());
    Ok(all.map(|resource| view::resource(resource)).collect())
}

/// What control would say about the objects.
pub(super) fn conditions(dir: &Path) -> Result<Value, Failure> {
    Ok(json!(load(dir)?.1.conditions))
}

/// Errors, hints and conditions; `errors` counts what must be repaired.
pub(super) fn check(dir: &Path) -> Result<Value, Failure> {
    let (loaded, translation) = load(dir)?;
    let errors = loaded.problems.iter().filter(|problem| problem.error).count();
    Ok(json!({
        "files": loaded.files.len(),
        "errors": errors,
        "problems": loaded.problems,
        "conditions": translation.conditions,
    }))
}
