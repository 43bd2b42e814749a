//! An Internet for tests: a name server with zones, and a server with TLS whose certificate a test's own CA signed.
//!
//! Both are real programs (unbound, nginx), configured as text here and started by whoever tests, on hosts outside of the lab's
//! cluster; the world around them, and clients that ask them, are here too, so that tests of egress differ in what they promise.
//! Limits: the name server has authority for `example.` alone and asks nobody; certificates are good for two days.

use std::path::Path;
use std::process::Command;

use crate::address;
use crate::eventually::eventually;
use crate::lab::Lab;
use crate::lab::LabConfig;
use crate::scenario;

/// Programs that are needed; see [`crate::scenario::has_tools`].
pub const TOOLS: [&str; 5] = ["dig", "unbound", "nginx", "curl", "openssl"];

/// A namespace `shop` with these labels (YAML in flow style), in which `web` on node 1 is a client and `cart` on node 2 a server;
/// a client `plain/guest` outside of the mesh; and `hosts` outside of the cluster, in the namespace `out`.
pub fn world(labels: &str, hosts: &[&str]) -> String {
    let mut text = format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{{labels}}}}}\n");
    for part in [
        scenario::client("shop", "web", 1),
        scenario::server("shop", "cart", "cart", 2),
        scenario::service("shop", "cart"),
        scenario::namespace("plain", false),
        scenario::client("plain", "guest", 1),
    ] {
        text.push_str(&part);
    }
    text.push_str(
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: out, annotations: {lab.tulle.dev/outside: 'true'}}\n",
    );
    for host in hosts {
        text.push_str(&format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {host}, namespace: out}}\n\
             spec: {{containers: [{{name: main, image: none}}]}}\n"
        ));
    }
    text
}

/// The lab of `config`, whose nodes and gateways ask the first host outside what names mean. Its address is known before there
/// is a lab, since these hosts get theirs in the order of their names. `None`: this machine has no lab.
pub fn lab(config: LabConfig) -> Option<Lab> {
    let server = address::outside(1).v4.to_string();
    scenario::lab(
        ["ztunnel", "gateway"].iter().fold(config, |config, of| config.env(of, "TULLE_NAME_SERVERS", &server)),
    )
}

/// Waits until that name server tells everybody that `api.example` is at its own address.
///
/// # Errors
/// It does not; with what it said.
pub fn answers(lab: &Lab) -> anyhow::Result<()> {
    let server = address::outside(1).v4.to_string();
    eventually("the name server answers", scenario::PATIENCE, || {
        let said = dig(lab, "plain/guest", &["+short", &format!("@{server}"), "api.example"])?;
        if said.contains(&server) { Ok(()) } else { Err(anyhow::anyhow!(said)) }
    })
}

/// What curl in the pod `from` prints.
///
/// # Errors
/// What it says if it fails.
pub fn curl(lab: &Lab, from: &str, more: &[&str], url: &str) -> Result<String, String> {
    let argv = [&["curl", "-sS", "--max-time", "20"][..], more, &[url]].concat();
    let output = lab.exec(from, &argv).map_err(|error| error.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// What dig in the pod `from` prints.
///
/// # Errors
/// It could not be started.
pub fn dig(lab: &Lab, from: &str, question: &[&str]) -> anyhow::Result<String> {
    let argv = [&["dig", "+time=10", "+tries=1"][..], question].concat();
    Ok(String::from_utf8_lossy(&lab.exec(from, &argv)?.stdout).into_owned())
}

/// A replica of the egress gateway `egress/out`, which is a Service over all of them ([`gateway_service`]).
pub fn gateway(name: &str, node: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: egress\n\
         \x20 labels: {{app: out, networking.istio.io/tunnel: http}}\n  annotations: {{lab.tulle.dev/gateway: out}}\n\
         spec:\n  nodeName: node-{node}\n  serviceAccountName: out\n  containers:\n  - name: main\n    image: ztunnel\n\
         \x20   command: [ztunnel, gateway]\n    ports: [{{containerPort: 15008}}]\n"
    )
}

/// The namespace and the Service of the egress gateway.
pub fn gateway_service() -> String {
    let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: out, namespace: egress}\n\
         spec: {selector: {app: out}, ports: [{name: hbone, port: 15008}]}\n";
    format!("{}{service}", scenario::namespace("egress", false))
}

/// Puts a configuration of unbound into `folder`, with authority for `example.`, whose records are `records` (RFC 1035 §5.1).
/// Questions are logged to `unbound.log` there. Its path.
///
/// # Errors
/// A file cannot be written.
pub fn name_server(folder: &Path, records: &str) -> anyhow::Result<String> {
    let at = folder.display();
    let zone = format!("$ORIGIN example.\n$TTL 1\n@ IN SOA ns hostmaster 1 60 60 60 1\n@ IN NS ns\n{records}");
    std::fs::write(folder.join("example.zone"), zone)?;
    let conf = format!(
        "server:\n  interface: 0.0.0.0\n  interface: ::0\n  access-control: 0.0.0.0/0 allow\n  access-control: ::/0 allow\n\
         \x20 chroot: \"\"\n  username: \"\"\n  pidfile: \"\"\n  directory: \"{at}\"\n  use-syslog: no\n  do-daemonize: no\n\
         \x20 num-threads: 1\n  module-config: \"iterator\"\n  log-queries: yes\n  logfile: \"{at}/unbound.log\"\n\
         \x20 local-zone: \"cluster.local.\" static\n\
         auth-zone:\n  name: \"example.\"\n  zonefile: \"{at}/example.zone\"\n  for-downstream: yes\n  for-upstream: no\n"
    );
    let path = folder.join("unbound.conf");
    std::fs::write(&path, conf)?;
    Ok(path.display().to_string())
}

/// Makes a CA in `folder` (`ca.pem`) and a certificate (`host.pem`, `host.key`) for `names`.
///
/// # Errors
/// What openssl said.
pub fn certificate<S: AsRef<str>>(folder: &Path, names: &[S]) -> anyhow::Result<()> {
    let names: Vec<String> = names.iter().map(|name| format!("DNS:{}", name.as_ref())).collect();
    let script = format!(
        "{NEW} -subj /CN=ca -keyout ca.key -out ca.pem && {NEW} -subj /CN=host -CA ca.pem -CAkey ca.key \
         -keyout host.key -out host.pem -addext basicConstraints=critical,CA:FALSE -addext 'subjectAltName={}'",
        names.join(",")
    );
    openssl(folder, &script)
}

/// Begins a call of openssl that makes a certificate with its key.
const NEW: &str = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2";

fn openssl(folder: &Path, script: &str) -> anyhow::Result<()> {
    let made = Command::new("sh").args(["-c", script]).current_dir(folder).output()?;
    anyhow::ensure!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
    Ok(())
}

/// Makes a certificate for `name` that the CA in the folder `authority` signed, and puts it with its key into `folder` as a Secret has
/// them: `tls.crt`, `tls.key`.
///
/// # Errors
/// What openssl said, or a file cannot be written.
pub fn client_certificate(authority: &Path, folder: &Path, name: &str) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    let to = folder.display();
    let files = format!("-keyout {to}/tls.key -out {to}/tls.crt -CA ca.pem -CAkey ca.key");
    openssl(authority, &format!("{NEW} -subj /CN={name} {files} -addext basicConstraints=critical,CA:FALSE"))
}

/// Makes a [`certificate`] for `names`, and puts a configuration of nginx into `folder` that serves HTTP at 80 and TLS at 443 and
/// 8443: `inet`, the Host, the client's address, the scheme and the version of TLS; below `/git/`, what a server at 8418 of loopback
/// answers. At 8444 it serves those alone who show a certificate that the same CA signed, and says whose. Its path.
///
/// # Errors
/// What openssl said, or a file cannot be written.
pub fn web_server<S: AsRef<str>>(folder: &Path, names: &[S]) -> anyhow::Result<String> {
    certificate(folder, names)?;
    let at = folder.display();
    let conf = format!(
        "user root; daemon off; master_process off; pid {at}/nginx.pid; error_log stderr;\nevents {{}}\n\
         http {{\n  access_log off; client_body_temp_path {at}/b; proxy_temp_path {at}/p; fastcgi_temp_path {at}/f;\n\
         \x20 uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;\n\
         \x20 server {{ listen 80; listen [::]:80; listen 443 ssl; listen [::]:443 ssl; listen 8443 ssl;\n\
         \x20   ssl_certificate {at}/host.pem; ssl_certificate_key {at}/host.key; ssl_protocols TLSv1.2 TLSv1.3;\n\
         \x20   location / {{ return 200 \"inet $host $remote_addr $scheme $ssl_protocol\\n\"; }}\n\
         \x20   location /git/ {{ proxy_pass http://127.0.0.1:8418; }} }}\n\
         \x20 server {{ listen 8444 ssl; ssl_certificate {at}/host.pem; ssl_certificate_key {at}/host.key;\n\
         \x20   ssl_client_certificate {at}/ca.pem; ssl_verify_client on;\n\
         \x20   location / {{ return 200 \"inet $ssl_client_s_dn\\n\"; }} }}\n}}\n"
    );
    let path = folder.join("nginx.conf");
    std::fs::write(&path, conf)?;
    Ok(path.display().to_string())
}
