//! Promise: programs that people use leave a closed namespace by name as they do an open one, with certificates checked, and get
//! nowhere else: curl, wget, Python, git over HTTPS, psql with TLS, a gRPC client. The servers are real, outside of the cluster, and
//! answer to a forbidden name as they do to the allowed one.

use anyhow::Context as _;
use e2e::eventually::eventually;
use e2e::installed;
use e2e::installed::AS_USER;
use e2e::installed::prepared;
use e2e::internet;
use e2e::lab::LabConfig;
use e2e::scenario;

const POLICY: &str = "apiVersion: tulle.dev/v1alpha1\nkind: EgressPolicy\nmetadata: {name: out, namespace: shop}\nspec:\n  rules:\n\
    \x20 - hosts: [good.example]\n    ports: [{port: 443, protocol: TLS}, {port: 5432, protocol: TCP}, {port: 50051, protocol: TLS}]\n";

/// What each program is run as, and what it then prints. `HOST` is the name.
const CLIENTS: [(&str, &str, &str); 6] = [
    ("curl", "curl -sS --max-time 20 --cacert ca.pem https://HOST/", "inet HOST"),
    ("wget", "wget -q -O - -t 1 -T 20 --ca-certificate=ca.pem https://HOST/", "inet HOST"),
    (
        "Python",
        "/usr/bin/python3 -c 'import ssl, urllib.request as u; c = ssl.create_default_context(cafile=\"ca.pem\"); \
         print(u.urlopen(\"https://HOST/\", timeout=20, context=c).read().decode())'",
        "inet HOST",
    ),
    (
        "git",
        "rm -rf copy; GIT_SSL_CAINFO=$D/ca.pem git clone -q https://HOST/files/repo.git copy && cat copy/greeting",
        "hello",
    ),
    (
        "psql",
        "psql 'host=HOST user=tulle dbname=postgres sslmode=verify-full sslrootcert=ca.pem connect_timeout=20' -XAtqc \
         \"select 'tls ' || ssl from pg_stat_ssl where pid = pg_backend_pid()\"",
        "tls true",
    ),
    ("gRPC", "/usr/bin/python3 rpc.py ask HOST ca.pem", "said hello"),
];

fn world() -> String {
    [
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {tulle.dev/egress: deny}}\n".to_owned(),
        scenario::client("shop", "web", 1),
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: out, annotations: {lab.tulle.dev/outside: 'true'}}\n\
         ---\napiVersion: v1\nkind: Pod\nmetadata: {name: inet, namespace: out}\nspec: {containers: [{name: main, image: none}]}\n"
            .to_owned(),
    ]
    .concat()
}

#[test]
fn programs_reach_what_is_allowed_and_nothing_else() -> anyhow::Result<()> {
    let needs = [
        "wget",
        "git",
        "python3",
        "python3/dist-packages/grpc",
        "initdb",
        "postgres",
        "psql",
        "unshare",
        "libnss_wrapper.so",
    ];
    if !scenario::has_tools(&internet::TOOLS) || !installed::all(&needs) {
        return Ok(());
    }
    let server = e2e::address::outside(1);
    let config = LabConfig::of(&world()).env("ztunnel", "TULLE_NAME_SERVERS", &server.v4.to_string());
    let Some(lab) = scenario::lab(config) else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let records: String =
        ["good", "evil"].map(|name| format!("{name} A {}\n{name} AAAA {}\n", server.v4, server.v6)).concat();
    let names = internet::name_server(folder.path(), &records)?;
    let web = internet::web_server(folder.path(), &["good.example", "evil.example"])?;
    installed::write_names(folder.path())?;
    std::fs::write(folder.path().join("rpc.py"), include_str!("testdata/rpc.py"))?;
    let repository = "mkdir -p files work && cd work && git init -q -b main . && echo hello > greeting && git add . && \
        git -c user.name=t -c user.email=t@example commit -qm one && cd .. && git clone -q --bare work files/repo.git && \
        git -C files/repo.git update-server-info";
    let database = format!(
        "{AS_USER} sh -ec 'mkdir -p run; initdb -D $D/data -U tulle --auth=trust -N >/dev/null
        cp host.key data/server.key; cp host.pem data/server.crt; chmod 600 data/server.key
        echo \"hostssl all all all trust\" > $D/data/pg_hba.conf
        exec postgres -D $D/data -c listen_addresses=* -c unix_socket_directories=$D/run -c fsync=off -c ssl=on'"
    );
    lab.exec_ok("out/inet", &["sh", "-ec", &prepared(repository, folder.path())])?;
    let serving = [
        format!("exec unbound -d -c {names}"),
        format!("exec nginx -c {web}"),
        database,
        "exec /usr/bin/python3 rpc.py serve host.key host.pem".to_owned(),
    ];
    let _serving = serving
        .map(|script| lab.spawn("out/inet", &["sh", "-ec", &prepared(&script, folder.path())]))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    lab.apply_yaml(POLICY)?;
    let run = |command: &str, host: &str, place: &str| -> Result<String, String> {
        let script = prepared(&command.replace("HOST", host), folder.path());
        let output = lab.exec(place, &["timeout", "50", "sh", "-ec", &script]).map_err(|error| error.to_string())?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    };
    for (program, command, expected) in CLIENTS {
        let expected = expected.replace("HOST", "good.example");
        eventually(program, std::time::Duration::from_secs(120), || match run(command, "good.example", "shop/web") {
            Ok(said) if said.contains(&expected) => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
        let refused = run(command, "evil.example", "shop/web");
        anyhow::ensure!(refused.is_err(), "{program} reached another name: {refused:?}");
        // It is the mesh that refuses: the name is there.
        let known = lab.exec_ok("out/inet", &["dig", "+short", "@127.0.0.1", "evil.example"])?;
        anyhow::ensure!(known.contains(&server.v4.to_string()), "{known}");
    }
    for (port, spoken) in [(443, "TLS"), (50051, "TLS")] {
        scenario::await_log(&lab, "node-1", &["egress=\"allowed\"", "good.example", &format!(":{port}")])
            .with_context(|| format!("{spoken} at {port}"))?;
    }
    Ok(())
}
