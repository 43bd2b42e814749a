//! Promise: programs that people use work through the mesh as they do without it: nginx and curl, PostgreSQL, Redis, SSH,
//! git, iperf3, and Python's WebSockets and gRPC. Each server is in a STRICT namespace, so what answers came through a tunnel.

use std::time::Duration;

use e2e::eventually::eventually;
use e2e::installed;
use e2e::installed::AS_USER;
use e2e::installed::prepared;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::scenario;

const PATIENCE: Duration = Duration::from_secs(60);

struct World {
    lab: Lab,
    dir: tempfile::TempDir,
}

/// A server that runs `script` in a pod of node 2 behind a Service of the same name, and a client on node 1. `$D` in
/// scripts is a folder of the test.
fn world(name: &str, port: u16, needs: &[&str], script: &str) -> anyhow::Result<Option<World>> {
    if !installed::all(needs) {
        return Ok(None);
    }
    let dir = tempfile::tempdir()?;
    installed::write_names(dir.path())?;
    let script = serde_json::to_string(&prepared(script, dir.path()))?;
    let mut objects = scenario::namespace("shop", true);
    objects.push_str(&scenario::peer_authentication("shop", "STRICT"));
    objects.push_str(&scenario::client("shop", "client", 1));
    objects.push_str(&format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}\n\
         spec: {{nodeName: node-2, serviceAccountName: {name}, containers: [{{name: main, image: none, \
         command: [sh, -ec, {script}]}}]}}\n\
         ---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{selector: {{app: {name}}}, ports: [{{name: tcp, port: {port}}}]}}\n"
    ));
    Ok(scenario::lab(LabConfig::of(&objects)).map(|lab| World { lab, dir }))
}

impl World {
    /// A script in the client's pod: its output, or an error with what it said.
    fn run(&self, script: &str) -> anyhow::Result<String> {
        let script = prepared(script, self.dir.path());
        let output = self.lab.exec("shop/client", &["timeout", "240", "sh", "-ec", &script])?;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        anyhow::ensure!(output.status.success(), "{}: {out}{err}", output.status);
        Ok(out.into_owned())
    }

    /// Repeats a script until it succeeds: the server is starting.
    fn ready(&self, script: &str) -> anyhow::Result<String> {
        eventually("the server answers", PATIENCE, || self.run(script))
    }

    /// Every connection to `port` that reached the server was of the client's identity.
    fn came_through_the_mesh(&self, port: u16) -> anyhow::Result<()> {
        let port = format!(":{port}");
        let words = ["inbound", &port, "spiffe://cluster.local/ns/shop/sa/client"];
        scenario::await_log(&self.lab, "node-2", &words).map(|_| ())
    }
}

/// HTTP/1.1 on 8080, HTTP/2 on 8081.
const NGINX: &str = "
        mkdir -p www tmp; head -c 5000000 /dev/urandom > www/big; echo hello > www/small
        cat > conf <<END
user root root; worker_processes 1; master_process off; daemon off; pid $D/pid; error_log stderr;
events { worker_connections 512; }
http { access_log off; client_max_body_size 50m;
  client_body_temp_path $D/tmp/a; proxy_temp_path $D/tmp/b; fastcgi_temp_path $D/tmp/c; uwsgi_temp_path $D/tmp/d; scgi_temp_path $D/tmp/e;
  server { listen 8080; listen [::]:8080; root $D/www; location /echo { return 200 \"\\$request_method \\$server_protocol \\$remote_addr\"; } }
  server { listen 8081 http2; listen [::]:8081 http2; root $D/www; } }
END
        exec nginx -p $D -c $D/conf -e stderr";

#[test]
fn nginx_and_curl() -> anyhow::Result<()> {
    let Some(world) = world("web", 8080, &["nginx", "curl"], NGINX)? else { return Ok(()) };
    let client = world.lab.pod_ip("shop", "client")?;
    let said = world.ready("curl -4sSf http://web.shop:8080/echo")?;
    assert_eq!(said, format!("GET HTTP/1.1 {client}"), "the server sees the client's own address");
    let sums =
        "test $(curl -sSf http://web.shop:8080/big | sha256sum | cut -c1-64) = $(sha256sum < www/big | cut -c1-64)";
    world.run(sums)?;
    world.run(
        "for i in $(seq 20); do echo url=http://web.shop:8080/echo?$i; done > urls; curl -sSf -K urls > /dev/null",
    )?;
    let ip = world.lab.pod_ip("shop", "web")?;
    world.run(&format!("curl -sSf --http2-prior-knowledge http://{ip}:8081/big | cmp - www/big"))?;
    let status = world.run("curl -s -o /dev/null -w '%{http_code}' http://web.shop:8080/absent")?;
    assert_eq!(status, "404");
    world.came_through_the_mesh(8080)
}

/// The same through routes: each request is read, and what a client gets is the same.
#[test]
fn nginx_and_curl_through_routes() -> anyhow::Result<()> {
    let Some(world) = world("web", 8080, &["nginx", "curl", "h2load", "wrk"], NGINX)? else { return Ok(()) };
    world.lab.apply_yaml(
        "apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}, {name: http2, port: 81, targetPort: 8081}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: one, namespace: shop}
spec:
  parentRefs: [{kind: Service, group: '', name: api, port: 80}]
  rules:
  - filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: x-routed, value: one}]}}]
    backendRefs: [{name: api, port: 80}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: two, namespace: shop}
spec:
  parentRefs: [{kind: Service, group: '', name: api, port: 81}]
  rules:
  - filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: x-routed, value: two}]}}]
    backendRefs: [{name: api, port: 81}]
",
    )?;
    let client = world.lab.pod_ip("shop", "client")?;
    let said = world.ready("curl -4sSf http://api.shop/echo")?;
    assert_eq!(said, format!("GET HTTP/1.1 {client}"), "the server sees the client's own address");
    assert_eq!(
        world.run("curl -0 -4sSf http://api.shop/echo")?,
        format!("GET HTTP/1.1 {client}"),
        "an HTTP/1.0 client"
    );
    world.run("curl -sSf -D - -o /dev/null http://api.shop/echo | grep -i 'x-routed: one'")?;
    world.run("curl -sSf http://api.shop/big | cmp - www/big")?;
    world.run("for i in $(seq 20); do echo url=http://api.shop/echo?$i; done > urls; curl -sSf -K urls > /dev/null")?;
    // A large upload with Expect: 100-continue, and one in chunks; nginx says that it takes no POST for a file.
    for more in ["--data-binary @www/big", "-T - -X POST < www/big"] {
        let status = world.run(&format!("curl -s -o /dev/null -w '%{{http_code}}' {more} http://api.shop/big"))?;
        assert_eq!(status, "405", "{more}");
    }
    let status = world.run("curl -s -o /dev/null -w '%{http_code}' http://api.shop/absent")?;
    assert_eq!(status, "404", "the server's own");
    world.run("curl -4sSf --http2-prior-knowledge http://api.shop:81/big | cmp - www/big")?;
    world
        .run("curl -4sSf --http2-prior-knowledge -D - -o /dev/null http://api.shop:81/big | grep -i 'x-routed: two'")?;
    // Fifty large answers at once on one connection; and more than nginx answers on one (1,000), from many clients. (curl
    // 7.88 cannot do several at once with prior knowledge, also without a mesh.)
    for (load, total) in
        [("-n 50 -c 1 -m 50 http://api.shop:81/big", 50), ("-n 6000 -c 5 -m 20 http://api.shop:81/small", 6000)]
    {
        let said = world.run(&format!("h2load {load}"))?;
        let all = format!("{total} done, {total} succeeded, 0 failed, 0 errored, 0 timeout");
        assert!(said.contains(&all), "{load}: {said}");
    }
    // As fast as it is answered, on connections that outlive those to nginx. Of errors it speaks only where there are some.
    let said = world.run("wrk -t 2 -c 20 -d 2s http://api.shop/small")?;
    let errors = said.contains("Socket errors") || said.contains("Non-2xx");
    assert!(said.contains(" requests in ") && !said.contains("\n  0 requests in ") && !errors, "{said}");
    scenario::await_log(&world.lab, "node-1", &["request complete", "HTTP/2", "HTTPRoute/shop/two"])?;
    world.came_through_the_mesh(8080)
}

/// A pod that runs `program` as its server, and a client.
fn talking(port: u16, needs: &[&str], program: &str) -> anyhow::Result<Option<World>> {
    let script = "until [ -e talk.py ]; do sleep 0.1; done; exec /usr/bin/python3 talk.py serve";
    let Some(world) = world("talk", port, needs, script)? else { return Ok(None) };
    let (part, whole) = (world.dir.path().join("part"), world.dir.path().join("talk.py"));
    std::fs::write(&part, program)?;
    std::fs::rename(part, whole)?;
    Ok(Some(world))
}

/// A WebSocket pair over HTTP/2, read at both sides in the same way.
#[test]
fn websockets_over_http2_through_routes() -> anyhow::Result<()> {
    let needs = ["python3", "python3/dist-packages/h2", "python3/dist-packages/wsproto"];
    let Some(world) = talking(8766, &needs, include_str!("testdata/talk2.py"))? else { return Ok(()) };
    world.lab.apply_yaml(
        "apiVersion: v1
kind: Service
metadata: {name: both, namespace: shop}
spec: {selector: {app: talk}, ports: [{name: http2-chat, port: 8766}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: chat, namespace: shop}
spec:
  parentRefs: [{kind: Service, group: '', name: both, port: 8766}]
  rules: [{backendRefs: [{name: both, port: 8766}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: shop}
spec:
  action: DENY
  rules: [{to: [{operation: {paths: [/closed], methods: [GET]}}]}]
",
    )?;
    let said = world.ready("/usr/bin/python3 talk.py ask both.shop")?;
    assert_eq!(said.trim(), "well");
    scenario::await_log(&world.lab, "node-1", &["request complete", "HTTPRoute/shop/chat", "/chat"])?;
    scenario::await_log(&world.lab, "node-2", &["request complete", "/closed", "policy"])?;
    Ok(())
}

/// A WebSocket pair and a gRPC pair, read at both sides: by routes at the client's, by a policy with paths at the server's.
#[test]
fn websockets_and_grpc_through_routes() -> anyhow::Result<()> {
    let needs = ["python3", "python3/dist-packages/websockets", "python3/dist-packages/grpc"];
    let Some(world) = talking(8765, &needs, include_str!("testdata/talk.py"))? else { return Ok(()) };
    world.lab.apply_yaml(
        "apiVersion: v1
kind: Service
metadata: {name: both, namespace: shop}
spec: {selector: {app: talk}, ports: [{name: http-chat, port: 8765}, {name: grpc, port: 50051}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: chat, namespace: shop}
spec:
  parentRefs: [{kind: Service, group: '', name: both, port: 8765}]
  rules: [{backendRefs: [{name: both, port: 8765}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: echo, namespace: shop}
spec:
  parentRefs: [{kind: Service, group: '', name: both, port: 50051}]
  rules: [{matches: [{method: {service: echo.Echo}}], backendRefs: [{name: both, port: 50051}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: shop}
spec:
  action: DENY
  rules: [{to: [{operation: {paths: [/closed, /echo.Echo/Closed]}}]}]
",
    )?;
    let said = world.ready("/usr/bin/python3 talk.py ask both.shop")?;
    assert_eq!(said.trim(), "well");
    scenario::await_log(&world.lab, "node-1", &["request complete", "GRPCRoute/shop/echo", "/echo.Echo/Each"])?;
    scenario::await_log(&world.lab, "node-2", &["request complete", "/echo.Echo/Closed", "policy"])?;
    Ok(())
}

#[test]
fn postgresql_and_psql() -> anyhow::Result<()> {
    let script = format!(
        "mkdir -p run; {} sh -ec 'initdb -D $D/data -U tulle --auth=trust -N >/dev/null
        echo \"host all all all trust\" >> $D/data/pg_hba.conf
        exec postgres -D $D/data -c listen_addresses=* -c unix_socket_directories=$D/run -c fsync=off'",
        AS_USER
    );
    let needs = ["initdb", "postgres", "psql", "pgbench", "unshare", "libnss_wrapper.so"];
    let Some(world) = world("db", 5432, &needs, &script)? else { return Ok(()) };
    let psql = "psql -h db.shop -U tulle -d postgres -XAtq -v ON_ERROR_STOP=1";
    assert_eq!(world.ready(&format!("{psql} -c 'select 40 + 2'"))?.trim(), "42");
    world.run("pgbench -h db.shop -U tulle -i -q -s 1 postgres")?;
    let bench = world
        .run("pgbench -h db.shop -U tulle -c 4 -t 50 -n postgres; pgbench -h db.shop -U tulle -C -t 20 -n postgres")?;
    assert!(bench.contains("number of transactions actually processed: 200/200"), "{bench}");
    assert!(bench.contains("number of transactions actually processed: 20/20"), "a connection each: {bench}");
    let copy = format!(
        "seq 200000 > in; {psql} -c 'create table n (i int)' -c '\\copy n from in' -c '\\copy (select i from n order by i) to out'; cmp in out"
    );
    world.run(&copy)?;
    // A notification finds its way to another connection.
    let listen = format!(
        "(echo 'listen news;'; for i in $(seq 100); do echo 'select pg_sleep(0.1);'; done) | {psql} > heard & listener=$!
        for i in $(seq 200); do {psql} -c \"notify news, 'x'\"; ! grep -q 'news.*x' heard || break; done
        kill $listener; grep -q 'news.*x' heard"
    );
    world.run(&listen)?;
    world.came_through_the_mesh(5432)
}

#[test]
fn redis_and_its_command_line() -> anyhow::Result<()> {
    let script = "exec redis-server --port 6379 --bind '* -::*' --protected-mode no --save '' --dir $D";
    let Some(world) = world("cache", 6379, &["redis-server", "redis-cli", "redis-benchmark"], script)? else {
        return Ok(());
    };
    let cli = "redis-cli -h cache.shop";
    assert_eq!(world.ready(&format!("{cli} ping | grep PONG"))?.trim(), "PONG");
    let script = format!(
        "head -c 3000000 /dev/urandom > in; {cli} -x set big < in > /dev/null; {cli} get big | head -c 3000000 | cmp - in"
    );
    world.run(&script)?;
    let piped = world.run("redis-benchmark -h cache.shop -n 20000 -c 20 -P 16 -t set,get --csv")?;
    assert!(piped.contains("\"SET\"") && piped.contains("\"GET\""), "{piped}");
    world.run(&format!("(timeout 5 {cli} subscribe news > heard || true) & for i in $(seq 100); do {cli} publish news hello | grep -q 1 && break; done; wait; grep -q hello heard"))?;
    world.came_through_the_mesh(6379)
}

#[test]
fn ssh_scp_and_git() -> anyhow::Result<()> {
    let script = format!(
        "ssh-keygen -q -t ed25519 -N '' -f host; ssh-keygen -q -t ed25519 -N '' -f me
        git init -q --bare repo.git
        printf 'Port 2222\\nHostKey %s/host\\nPidFile none\\nUsePAM no\\nStrictModes no\\nPasswordAuthentication no\\nAuthorizedKeysFile %s/me.pub\\nSubsystem sftp internal-sftp\\n' $D $D > conf
        {AS_USER} $(command -v sshd) -D -e -f $D/conf"
    );
    let needs = ["sshd", "ssh", "scp", "ssh-keygen", "git", "unshare", "libnss_wrapper.so"];
    let Some(world) = world("host", 2222, &needs, &script)? else { return Ok(()) };
    let options = "-F none -i $D/me -o StrictHostKeyChecking=no -o UserKnownHostsFile=$D/known -o LogLevel=ERROR";
    let user = AS_USER.trim_start_matches("exec ");
    let said =
        world.ready(&format!("{user} ssh {options} -p 2222 tulle@host.shop 'echo hello $POD_NAME; cat' < passwd"))?;
    assert!(said.starts_with("hello") && said.contains("tulle:x:1000"), "{said}");
    world.run(&format!(
        "head -c 4000000 /dev/urandom > in; {user} scp {options} -P 2222 in tulle@host.shop:$D/out; cmp in out"
    ))?;
    let git = format!(
        "export GIT_SSH_COMMAND=\"{user} ssh {options}\" GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'
        export GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@t GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@t
        git clone -q ssh://tulle@host.shop:2222$D/repo.git work 2>&1; cd work
        cp ../in .; git add in; git commit -qm one; git push -q origin HEAD:main
        git clone -q -b main ssh://tulle@host.shop:2222$D/repo.git ../again; cmp ../again/in in"
    );
    world.run(&git)?;
    world.came_through_the_mesh(2222)
}

#[test]
fn iperf3_both_ways_and_both_families() -> anyhow::Result<()> {
    let Some(world) = world("perf", 5201, &["iperf3"], "exec iperf3 -s")? else { return Ok(()) };
    let view = world.lab.view()?;
    let pod = view.pod("shop", "perf").ok_or_else(|| anyhow::anyhow!("no pod"))?;
    let v6 = pod.addresses.iter().find(|address| address.to_string().contains(':'));
    let v6 = v6.ok_or_else(|| anyhow::anyhow!("no IPv6 address: {:?}", pod.addresses))?.to_string();
    world.ready("iperf3 -c perf.shop -n 1K")?;
    for target in ["perf.shop", &v6] {
        // A test ends when its client has sent (or, with -R, read) so much, and each end tells what it has read by then:
        // what lies in buffers on the way, some 10 MB a stream, is not counted. None ends by time, since a machine that
        // is busy with something else may move nothing within it.
        for more in ["-n 40M", "-n 40M -R", "-n 120M -P 4", "-n 80M --bidir"] {
            let json = world.run(&format!("iperf3 -c {target} {more} -J"))?;
            let report: serde_json::Value = serde_json::from_str(&json)?;
            let end = &report["end"];
            let read = |sum: &str| end[sum]["bytes"].as_u64().unwrap_or_default();
            let (there, back) = (read("sum_received"), read("sum_received_bidir_reverse"));
            let enough = match more.ends_with("--bidir") {
                true => there > 0 && back > 0 && there + back >= 40_000_000,
                false => there >= 30_000_000,
            };
            assert!(enough, "{target} {more}: {there} and {back} bytes read\n{end}\n{}", report["error"]);
        }
    }
    world.came_through_the_mesh(5201)
}
