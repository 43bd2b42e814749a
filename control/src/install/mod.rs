//! Putting Tulle into a cluster and taking it away: values, the objects that they give, and the steps with the API server.
//!
//! `values` and `manifests` are pure; `apply` brings objects by server-side apply and waits until they work; `uninstall`
//! first releases every pod, because a captured pod without its proxy has no network. The `tulle` command is around it.
//! Every step has a deadline and can be done again: what is already there, or already gone, is no error.

pub mod apply;
mod kinds;
pub mod manifests;
pub mod uninstall;
pub mod values;

/// The field manager of server-side apply, and who brought an object (label app.kubernetes.io/managed-by).
pub const MANAGER: &str = "tulle-install";
