//! An Internet for tests: a name server with zones, and a server with TLS whose certificate a test's own CA signed.
//!
//! Both are real programs (unbound, nginx), configured as text here and started by whoever tests, on hosts outside of the lab's
//! cluster. Limits: the name server has authority for `example.` alone and asks nobody; certificates are good for two days.

use std::path::Path;
use std::process::Command;

/// Programs that are needed; see [`crate::scenario::has_tools`].
pub const TOOLS: [&str; 5] = ["dig", "unbound", "nginx", "curl", "openssl"];

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

/// Makes a CA in `folder` (`ca.pem`) and a certificate (`host.pem`, `host.key`) for `names`, and puts a configuration of nginx
/// there that serves HTTP at 80 and TLS at 443 and 8443: `inet`, the Host and the client's address. Its path.
///
/// # Errors
/// What openssl said, or a file cannot be written.
pub fn web_server(folder: &Path, names: &[&str]) -> anyhow::Result<String> {
    let at = folder.display();
    let new = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2";
    let names: Vec<String> = names.iter().map(|name| format!("DNS:{name}")).collect();
    let script = format!(
        "cd {at} && {new} -subj /CN=ca -keyout ca.key -out ca.pem && {new} -subj /CN=host -CA ca.pem -CAkey ca.key \
         -keyout host.key -out host.pem -addext basicConstraints=critical,CA:FALSE -addext 'subjectAltName={}'",
        names.join(",")
    );
    let made = Command::new("sh").args(["-c", &script]).output()?;
    anyhow::ensure!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
    let conf = format!(
        "user root; daemon off; master_process off; pid {at}/nginx.pid; error_log stderr;\nevents {{}}\n\
         http {{\n  access_log off; client_body_temp_path {at}/b; proxy_temp_path {at}/p; fastcgi_temp_path {at}/f;\n\
         \x20 uwsgi_temp_path {at}/u; scgi_temp_path {at}/s;\n\
         \x20 server {{ listen 80; listen [::]:80; listen 443 ssl; listen [::]:443 ssl; listen 8443 ssl;\n\
         \x20   ssl_certificate {at}/host.pem; ssl_certificate_key {at}/host.key;\n\
         \x20   location / {{ return 200 \"inet $host $remote_addr\\n\"; }}\n\
         \x20   location /files/ {{ alias {at}/files/; }} }}\n}}\n"
    );
    let path = folder.join("nginx.conf");
    std::fs::write(&path, conf)?;
    Ok(path.display().to_string())
}
