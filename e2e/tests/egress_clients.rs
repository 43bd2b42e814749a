//! Promise: programs that people use reach by name what a rule allows and nothing else, straight from their node and through an
//! egress gateway: curl, wget, Python's urllib, git over HTTPS, psql with TLS, and a gRPC client. All check the server's certificate
//! by its name, so what answers them is the server itself, through bytes that nobody changed.

use std::path::Path;

use anyhow::Context as _;
use e2e::address;
use e2e::eventually::eventually;
use e2e::installed;
use e2e::installed::AS_USER;
use e2e::installed::prepared;
use e2e::internet;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::lab::Running;
use e2e::scenario;

const NEEDS: [&str; 10] = [
    "wget",
    "git",
    "python3",
    "python3/dist-packages/grpc",
    "initdb",
    "postgres",
    "psql",
    "unshare",
    "libnss_wrapper.so",
    "sh",
];

/// A program that people use.
struct Client {
    name: &'static str,
    /// A script that asks the host `$H`, and prints what it says of itself and of who asks.
    by_name: &'static str,
    /// The same at the address `$A`, whatever its certificate says; `$H` may be claimed.
    by_address: &'static str,
    port: u16,
    /// Whether its server says who asks.
    sees: bool,
}

const CLIENTS: [Client; 6] = [
    Client {
        name: "curl",
        by_name: "curl -sS --max-time 20 --cacert ca.pem https://$H/",
        by_address: "curl -sSk --max-time 20 --resolve $H:443:$A https://$H/",
        port: 443,
        sees: true,
    },
    Client {
        name: "wget",
        by_name: "wget -nv -O - --tries=1 --timeout=20 --ca-certificate=ca.pem https://$H/",
        by_address: "wget -nv -O - --tries=1 --timeout=20 --no-check-certificate https://$A/",
        port: 443,
        sees: true,
    },
    Client {
        name: "Python",
        by_name: "/usr/bin/python3 outside.py get . $H",
        by_address: "/usr/bin/python3 outside.py get . $A",
        port: 443,
        sees: true,
    },
    Client {
        name: "git",
        by_name: "export GIT_SSL_CAINFO=$D/ca.pem HOME=$D; C=$(mktemp -d); git clone -q https://$H/git/repo.git $C && cd $C &&
            git commit -q --allow-empty -m two && git push -q origin HEAD:refs/heads/${C##*.} &&
            git ls-remote --exit-code origin refs/heads/${C##*.} && echo inet",
        by_address: "git -c http.sslVerify=false clone -q https://$A/git/repo.git $(mktemp -d)/clone",
        port: 443,
        sees: false,
    },
    Client {
        name: "psql",
        by_name: "psql \"host=$H user=tulle dbname=postgres sslmode=verify-full sslrootcert=ca.pem connect_timeout=20\" \
            -XAtc \"select 'inet', ssl, inet_client_addr() from pg_stat_ssl where pid = pg_backend_pid() and ssl\"",
        by_address: "psql \"host=$H hostaddr=$A user=tulle dbname=postgres sslmode=require connect_timeout=20\" -XAtc 'select 1'",
        port: 5432,
        sees: true,
    },
    Client {
        name: "gRPC",
        by_name: "/usr/bin/python3 outside.py call . $H",
        by_address: "/usr/bin/python3 outside.py call . $H $A",
        port: 50051,
        sees: true,
    },
];

/// Rules for one host that is reached from the node, for one that is reached through the gateway, and for `more`.
fn policy(more: &str) -> String {
    let ports = "[{port: 443, protocol: TLS}, {port: 5432, protocol: TCP}, {port: 50051, protocol: TLS}]";
    format!(
        "---\napiVersion: tulle.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: out, namespace: shop}}\nspec:\n  rules:\n\
         \x20 - hosts: [near.example{more}]\n    ports: {ports}\n\
         \x20 - hosts: [far.example]\n    ports: {ports}\n    via: {{gateway: {{namespace: egress, name: out}}}}\n"
    )
}

/// The servers: names, HTTPS with a repository to clone, PostgreSQL, gRPC.
fn servers(lab: &Lab, folder: &Path) -> anyhow::Result<Vec<Running>> {
    let ip = address::outside(1);
    let names = ["near", "far", "evil"];
    let records = names.map(|name| format!("{name} A {}\n{name} AAAA {}\n", ip.v4, ip.v6));
    let web = internet::web_server(folder, &names.map(|name| format!("{name}.example")))?;
    let names = internet::name_server(folder, &format!("api A {}\n{}", ip.v4, records.concat()))?;
    installed::write_names(folder)?;
    std::fs::write(folder.join("outside.py"), include_str!("testdata/outside.py"))?;
    let database = format!(
        "mkdir -p run; {AS_USER} sh -ec 'initdb -D $D/data -U tulle --auth=trust -N >/dev/null
        echo \"hostssl all all all trust\" >> $D/data/pg_hba.conf
        exec postgres -D $D/data -c listen_addresses=* -c unix_socket_directories=$D/run -c fsync=off \
            -c ssl=on -c ssl_cert_file=$D/host.pem -c ssl_key_file=$D/host.key'"
    );
    // It is cloned from and pushed to by git's own protocol, and not as a folder of files.
    let repository = "mkdir git; export HOME=$D; git config --global user.name t; git config --global user.email t@t
        git init -q work; git -C work commit -q --allow-empty -m one; git clone -q --bare work git/repo.git
        git -C git/repo.git config http.receivepack true; git -C git/repo.git config http.getanyfile false";
    lab.exec_ok("out/inet", &["sh", "-ec", &prepared(repository, folder)])?;
    Ok(vec![
        lab.spawn("out/inet", &["unbound", "-d", "-c", &names])?,
        lab.spawn("out/inet", &["nginx", "-c", &web])?,
        lab.spawn("out/inet", &["sh", "-ec", &prepared(&database, folder)])?,
        lab.spawn("out/inet", &["sh", "-ec", &prepared("exec /usr/bin/python3 outside.py serve .", folder)])?,
        lab.spawn("out/inet", &["sh", "-ec", &prepared("HOME=$D exec /usr/bin/python3 outside.py git $D", folder)])?,
    ])
}

/// What a client's script prints.
///
/// # Errors
/// What it says if it fails.
fn run(lab: &Lab, folder: &Path, script: &str, host: &str) -> Result<String, String> {
    let script = prepared(&format!("H={host} A={}\n{script}", address::outside(1).v4), folder);
    let output = lab.exec("shop/web", &["timeout", "40", "sh", "-ec", &script]).map_err(|error| error.to_string())?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(said) } else { Err(said) }
}

#[test]
fn programs_that_people_use_get_out_by_name_and_not_otherwise() -> anyhow::Result<()> {
    if !scenario::has_tools(&internet::TOOLS) || !installed::all(&NEEDS) {
        return Ok(());
    }
    let labels = "tulle.dev/mesh: enabled, tulle.dev/egress: deny";
    let gateway = internet::gateway_service() + &internet::gateway("out-0", 2);
    let objects = internet::world(labels, &["inet"]) + &gateway;
    let Some(lab) = internet::lab(LabConfig::of(&objects)) else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let _servers = servers(&lab, folder.path())?;
    lab.apply_yaml(&policy(""))?;
    internet::answers(&lab)?;
    let view = lab.view()?;
    let gateways = &view.pod("egress", "out-0").context("no gateway")?.addresses;
    let reaches = |client: &Client, host: &str| {
        // The servers are starting.
        eventually(&format!("{} reaches {host}", client.name), scenario::PATIENCE, || {
            let said = run(&lab, folder.path(), client.by_name, host)?;
            if said.contains("inet") { Ok(said) } else { Err(said) }
        })
    };
    for client in &CLIENTS {
        let near = reaches(client, "near.example")?;
        let far = reaches(client, "far.example")?;
        let from_gateway = |said: &str| gateways.iter().any(|ip| said.contains(ip.as_str()));
        anyhow::ensure!(!from_gateway(&near), "{}: {near}", client.name);
        anyhow::ensure!(from_gateway(&far) || !client.sees, "{}: {far} and {gateways:?}", client.name);
        for (host, seen) in [("near.example", "node-1"), ("far.example", "egress/out-0")] {
            let (host, port) = (format!("egress.host=\"{host}\""), format!(":{} ", client.port));
            scenario::await_log(&lab, seen, &["egress=\"allowed\"", &host, &port]).context(client.name)?;
        }

        let other = run(&lab, folder.path(), client.by_name, "evil.example");
        anyhow::ensure!(other.is_err(), "{} reached another name: {other:?}", client.name);
        let target = format!("{}:{}", address::outside(1).v4, client.port);
        let refusals = || scenario::log_lines(&lab, "node-1", &["EGRESS_DENIED", &target]).len();
        let before = refusals();
        let address = run(&lab, folder.path(), client.by_address, "near.example");
        anyhow::ensure!(address.is_err(), "{} reached an address: {address:?}", client.name);
        eventually("the refusal is recorded", scenario::PATIENCE, || match refusals() {
            now if now > before => Ok(()),
            now => Err(format!("{}: {now} of them", client.name)),
        })?;
    }
    // It was the policy, and nothing else, that kept them from it.
    lab.apply_yaml(&policy(", evil.example"))?;
    for client in &CLIENTS {
        reaches(client, "evil.example")?;
    }
    Ok(())
}
