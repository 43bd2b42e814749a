//! The harness itself: what other tests take for granted of the API server that they start.

use anyhow::Context as _;
use e2e::kube::cluster::code;
use e2e::kube::{self, Options};
use e2e::scenario;
use http::Method;
use serde_json::{Value, json};

#[test]
fn objects_live_through_restarts_and_the_server_leaves_nothing() -> anyhow::Result<()> {
    let Some(mut api) = kube::start(Options::default()) else { return Ok(()) };
    api.apply(&scenario::world(true))?;
    let uid =
        |api: &kube::Cluster| anyhow::Ok(api.get("Pod", "shop/cart")?.context("no pod")?["metadata"]["uid"].clone());
    let before = uid(&api)?;
    api.restart()?;
    assert_eq!(uid(&api)?, before, "etcd kept it");
    let service = api.get("Service", "shop/cart")?.context("no Service")?;
    let address = service["spec"]["clusterIP"].as_str().unwrap_or_default();
    assert!(address.starts_with("10.96."), "the server gives addresses from its range: {service}");

    api.kill();
    assert!(api.get("Pod", "shop/cart").is_err(), "nobody answers");
    api.begin()?;
    api.await_ready()?;
    assert_eq!(uid(&api)?, before);

    api.remove("Pod", "shop/cart")?;
    api.delete("Namespace", "shop")?;
    assert!(api.list("Pod", "shop")?.is_empty() && api.get("Namespace", "shop")?.is_none());
    let (dir, port) = (api.dir().to_path_buf(), api.address());
    drop(api);
    assert!(!dir.exists(), "{} is left", dir.display());
    std::net::TcpListener::bind(port).context("somebody still has the port")?;
    Ok(())
}

#[test]
fn a_watch_from_before_a_compaction_is_refused_after_a_restart() -> anyhow::Result<()> {
    let Some(mut api) = kube::start(Options::default()) else { return Ok(()) };
    let list = |api: &kube::Cluster| api.ask(Method::GET, "/api/v1/configmaps", "", &Value::Null);
    let old = list(&api)?["metadata"]["resourceVersion"].as_str().context("no version")?.to_owned();
    for count in 0..20 {
        let map = format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: m}}\ndata: {{count: '{count}'}}\n");
        api.apply(&map)?;
    }
    api.compact()?;
    api.restart()?;
    // A list at exactly that version needs the past that is gone, as a watch from it does.
    let uri = format!("/api/v1/configmaps?resourceVersion={old}&resourceVersionMatch=Exact");
    let refused = api.ask(Method::GET, &uri, "", &Value::Null).err().context("the past is still there")?;
    assert_eq!(code(&refused), Some(410), "{refused:#}");
    Ok(())
}

#[test]
fn who_asks_is_authorised_and_on_record() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    let account = api.kubeconfig_for("shop/reader")?;
    let reader = kube::Cluster::connect(&account, "shop-reader/1.0 (test)")?;
    let refused = reader.list("Pod", "shop").err().context("nobody allowed that")?;
    assert_eq!(code(&refused), Some(403), "{refused:#}");
    api.apply(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: Role\nmetadata: {name: reader, namespace: shop}\n\
         rules: [{apiGroups: [''], resources: [pods], verbs: [list]}]\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: RoleBinding\nmetadata: {name: reader, namespace: shop}\n\
         roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}\n\
         subjects: [{kind: ServiceAccount, name: reader, namespace: shop}]\n",
    )?;
    e2e::eventually::eventually("the role is in force", kube::cluster::PATIENCE, || reader.list("Pod", "shop"))?;
    let events = api.audit()?;
    let codes: Vec<u64> = events
        .iter()
        .filter(|it| it.agent.starts_with("shop-reader") && it.resource == "pods")
        .map(|it| it.code)
        .collect();
    assert!(codes.first() == Some(&403) && codes.last() == Some(&200), "{codes:?}");
    let binding =
        events.iter().find(|it| it.resource == "rolebindings" && it.writes()).context("no record of the binding")?;
    assert_eq!((binding.user.as_str(), &binding.body["roleRef"]["name"]), ("admin", &json!("reader")));
    Ok(())
}

#[test]
fn every_kind_that_the_mesh_reads_can_be_made() -> anyhow::Result<()> {
    let Some(api) = kube::start(Options::default()) else { return Ok(()) };
    kube::crds::install(&api)?;
    api.apply(&scenario::world(false))?;
    let rules = "[{from: [{source: {namespaces: [shop]}}]}]";
    api.apply(&scenario::authorization("shop", "some", "cart", "ALLOW", rules))?;
    api.patch_status("AuthorizationPolicy", "shop/some", &json!({"status": {"conditions": []}}))?;
    api.label("Namespace", "shop", "tulle.dev/mesh", Some("enabled"))?;
    let namespace = api
        .wait("Namespace", "shop", "it has the label", |it| it["metadata"]["labels"]["tulle.dev/mesh"] == "enabled")?;
    assert_eq!(namespace["status"]["phase"], "Active");
    assert!(
        api.dry_run("apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: shop}\nspec: {container: []}\n")
            .is_err()
    );
    Ok(())
}
