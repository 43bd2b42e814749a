//! Promise: labelling a namespace puts its pods into the mesh while they run, and nothing else changes for them.
//! Before the label a marker is found on the node link, so that not finding it afterwards means something.

use e2e::lab::LabConfig;
use e2e::scenario;

#[test]
fn labelling_a_namespace_hides_its_bytes_and_disturbs_nothing() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(false))) else { return Ok(()) };
    let word = scenario::marker();
    let speak = |lab: &e2e::lab::Lab, more: &[&str]| {
        let mut argv = vec!["--data", word.as_str()];
        argv.extend(more);
        scenario::calls(lab, "shop/web", "http://cart.shop/", &argv)
    };

    let sniffer = lab.sniff("node-1", &[&word])?;
    let plain4 = speak(&lab, &["-4"])?.remove(0);
    let plain6 = speak(&lab, &["-6"])?.remove(0);
    let seen = sniffer.finish()?;
    assert!(seen.markers[&word] >= 4, "outside the mesh the marker crosses the link in the clear: {seen:?}");

    let pids = |lab: &e2e::lab::Lab| {
        anyhow::Ok(lab.view()?.pods.into_iter().map(|pod| (pod.name, pod.pids)).collect::<Vec<_>>())
    };
    let before = pids(&lab)?;
    let load = lab.load("shop/web", &["http://cart.shop/", "tcp://cart.shop:9000"], 50.0, &[])?;
    let kept = lab.load("shop/other", &["http://cart.shop/"], 50.0, &["--keep-alive"])?;
    lab.apply_yaml(&scenario::namespace("shop", true))?;
    for pod in ["web", "other"] {
        assert_eq!(scenario::pod_status(&lab, "node-1", pod)?["capture"], "Captured");
    }
    assert_eq!(scenario::pod_status(&lab, "node-2", "cart")?["capture"], "Captured");

    let sniffer = lab.sniff("node-1", &[&word])?;
    let mesh4 = speak(&lab, &["-4", "--count", "5"])?;
    let mesh6 = speak(&lab, &["-6", "--count", "5"])?;
    let seen = sniffer.finish()?;
    scenario::all_well(&mesh4, 2)?;
    scenario::all_well(&mesh6, 2)?;
    assert_eq!(seen.markers[&word], 0, "in the mesh the marker must not be readable: {seen:?}");
    assert!(seen.tls.encrypted_bytes > 10 * word.len() as u64, "its bytes must have crossed all the same: {seen:?}");

    for (before, after) in [(&plain4, &mesh4[0]), (&plain6, &mesh6[0])] {
        for field in ["status", "name", "pod", "source"] {
            assert_eq!(before[field], after[field], "the label changed {field}");
        }
    }
    scenario::all_well(&load.finish()?, 3)?;
    scenario::all_well(&kept.finish()?, 3)?;
    assert_eq!(before, pids(&lab)?, "nothing was restarted");
    Ok(())
}

#[test]
fn taking_the_label_away_lets_pods_go_and_disturbs_nothing() -> anyhow::Result<()> {
    let Some(lab) = scenario::lab(LabConfig::of(&scenario::world(true))) else { return Ok(()) };
    let word = scenario::marker();
    let load = lab.load("shop/web", &["http://cart.shop/"], 50.0, &[])?;
    lab.apply_yaml(&scenario::namespace("shop", false))?;
    assert_eq!(scenario::pod_status(&lab, "node-1", "web")?["capture"], "Uncaptured");
    let sniffer = lab.sniff("node-1", &[&word])?;
    scenario::all_well(&scenario::calls(&lab, "shop/web", "http://cart.shop/", &["--data", &word])?, 1)?;
    assert!(sniffer.finish()?.markers[&word] > 0, "outside the mesh the marker is readable again");
    scenario::all_well(&load.finish()?, 3)?;
    Ok(())
}

#[test]
fn a_pod_keeps_out_by_its_own_label() -> anyhow::Result<()> {
    let mut objects = scenario::world(true);
    objects
        .push_str(&scenario::client("shop", "loner", 1).replace("app: loner", "app: loner, tulle.dev/mesh: disabled"));
    let Some(lab) = scenario::lab(LabConfig::of(&objects)) else { return Ok(()) };
    assert_eq!(scenario::pod_status(&lab, "node-1", "loner")?["capture"], "Uncaptured");
    let word = scenario::marker();
    let sniffer = lab.sniff("node-1", &[&word])?;
    let reports = scenario::calls(&lab, "shop/loner", "http://cart.shop/", &["--data", &word])?;
    scenario::all_well(&reports, 1)?;
    assert!(sniffer.finish()?.markers[&word] > 0, "a pod outside speaks in the clear, and PERMISSIVE takes it");
    Ok(())
}
