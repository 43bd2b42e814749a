//! Promise: what the first page tells people to type on a cluster does what the page says.
//!
//! The API server, `kubectl` and `tulle` are real, and so are control and the nodes' agents and proxies. The lab plays kubelet, and
//! [`Controllers`] say that the installed pods run: the lab's own control and proxies stand for them.

use std::fs;
use std::path::Path;

use e2e::kube::controllers::Controllers;
use e2e::kube::{self, Options, crds, programs};
use e2e::lab::{LabConfig, programs_dir};
use e2e::{manifest, pages, scenario};

/// The shop of the examples, and a second version of its cart.
fn shop() -> anyhow::Result<String> {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/shop");
    let mut objects = String::new();
    for file in manifest::files(&examples)? {
        objects.push_str(&format!("---\n{}\n", fs::read_to_string(file)?));
    }
    for (version, node) in [("cart-v1", 1), ("cart-v2", 2)] {
        objects.push_str(&scenario::server("shop", version, version, node));
        objects.push_str(&scenario::service("shop", version));
    }
    Ok(objects)
}

#[test]
fn the_commands_of_the_first_page_do_what_it_says() -> anyhow::Result<()> {
    let steps = pages::read("docs/getting-started.md", 24)?;
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    let kubectl = match programs::find("kubectl") {
        Ok(kubectl) => kubectl,
        Err(why) => {
            assert!(std::env::var_os("CI").is_none(), "{why}");
            eprintln!("SKIPPED: {why}");
            return Ok(());
        }
    };
    crds::install(&api)?;
    let mut config = LabConfig::of(&shop()?).in_cluster(&api, true)?;
    config.timeout = kube::cluster::PATIENCE;
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    // A client outside the mesh, whom plaintext's end would cut off.
    let outsider = lab.load("office/clerk", &["http://catalog.shop/"], 20.0, &[])?;
    let _controllers = Controllers::start(&api, &["node-1", "node-2"]);

    // Where control is asked without a kubelet that would forward a port to it.
    let dir = tempfile::tempdir()?;
    let folders =
        [kubectl.parent().unwrap_or_else(|| Path::new("/")), &programs_dir()?].map(|path| path.display().to_string());
    let setting = format!(
        "cd {}\nexport PATH={}:$PATH KUBECONFIG={} TULLE_CONTROL=http://127.0.0.1:15014\n",
        dir.path().display(),
        folders.join(":"),
        api.in_lab(&api.kubeconfig())?.display()
    );
    pages::follow(&steps, |command| lab.exec("control", &["sh", "-c", &format!("{setting}{command}")]))?;
    scenario::all_well(&outsider.finish()?, 20)
}
