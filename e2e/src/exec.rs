//! `lab exec`: enter a place of the lab and become the command, so that input, output, signals and exit code are its
//! own.
//!
//! It reads `lab.json` instead of asking the supervisor, because joining a user namespace is possible only while the
//! process has one thread and because it must work while the supervisor is busy. Limits: the command sees the machine's
//! own files but for `/etc/hosts` and `/etc/resolv.conf`.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::Context;

use crate::place::Placement;
use crate::rootless;
use crate::state::Paths;
use crate::state::View;
use crate::supervise::process::path_with;

/// Becomes `argv` in `place` (`namespace/pod`, `namespace/deployment`, `control`, `node-1`, `fabric`); returns only
/// when that fails.
pub fn exec(state: &Path, place: &str, argv: &[String]) -> anyhow::Result<std::convert::Infallible> {
    let (program, arguments) = argv.split_first().context("no command; write it after `--`")?;
    let paths = Paths(state.to_path_buf());
    let view = View::read(&paths)?;
    let (placement, env) = find(&paths, &view, place)?;
    if view.rootless {
        rootless::join(view.pid)?;
    }
    placement
        .prepare()
        .and_then(|prepared| prepared.enter())
        .with_context(|| format!("{place} cannot be entered; it takes the user who started the lab"))?;
    // Last, where `control` and `tulle` are that were built with this program.
    let mut path = path_with(&paths.bin());
    if let Some(own) = std::env::current_exe().ok().as_deref().and_then(Path::parent) {
        path.push(":");
        path.push(own);
    }
    let error = Command::new(program).args(arguments).env("PATH", path).envs(env).exec();
    Err(error).with_context(|| format!("{program} cannot be run"))
}

type Env = Vec<(&'static str, String)>;

fn find(paths: &Paths, view: &View, place: &str) -> anyhow::Result<(Placement, Env)> {
    if let Some((namespace, name)) = place.split_once('/') {
        let pod =
            view.pod(namespace, name).with_context(|| format!("there is no pod {place}; `lab status` lists them"))?;
        let placement =
            Placement { netns: Some(pod.netns.clone()), etc: Some(pod.etc.clone()), hostname: Some(pod.name.clone()) };
        let env = vec![("POD_NAME", pod.name.clone()), ("POD_NAMESPACE", pod.namespace.clone())];
        return Ok((placement, env));
    }
    let mut all = view.nodes.iter().chain([&view.control]).map(|it| (it.name.as_str(), &it.netns));
    let netns = if place == "fabric" {
        Some(&view.fabric)
    } else {
        all.find(|(name, _)| *name == place).map(|(_, netns)| netns)
    };
    let netns = netns.with_context(|| {
        format!(
            "{place} is no place of this lab; name a pod as namespace/pod, node-1 to node-{}, or control",
            view.nodes.len()
        )
    })?;
    // `control token` and `control rotate` find the CA as the control of this lab does, and `tulle` this lab's control, whatever
    // cluster the user has a kubeconfig for.
    let env = match place {
        "control" => vec![
            ("TULLE_CONTROL_CA_DIR", paths.ca().display().to_string()),
            ("TULLE_CONTROL", "http://127.0.0.1:15014".to_owned()),
        ],
        _ => vec![],
    };
    Ok((Placement { netns: Some(netns.clone()), ..Placement::default() }, env))
}
