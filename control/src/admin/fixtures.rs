//! Worlds and views for the tests of this module, from manifests. They go through the folder source, so what a test writes is
//! what users write.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::admin::View;
use crate::model::World;
use crate::source::files::Files;

/// The view of a folder with one file.
///
/// # Panics
/// When the manifests cannot be read.
pub(super) fn view(manifests: &str) -> View {
    let path = "case.yaml".to_owned();
    let loaded =
        Files::default().update(&BTreeSet::from([path.clone()]), vec![(path, Ok(manifests.as_bytes().to_vec()))]);
    let errors: Vec<_> = loaded.problems.iter().filter(|problem| problem.error).collect();
    assert!(errors.is_empty(), "{errors:?}");
    View { loaded: Arc::new(loaded), ..View::default() }
}

/// Its objects.
pub(super) fn world(manifests: &str) -> World {
    view(manifests).world().clone()
}
