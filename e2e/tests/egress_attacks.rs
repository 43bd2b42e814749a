//! Promise: nothing comes out of a pod whose egress is closed past the proxy, whatever its containers do with the power over their own
//! network that they have, also while the proxy is dead or restarts, and behind a bridge. Each attack runs as root with the
//! capabilities that containerd gives every container, and again with all that can be had. Packets are counted at a host outside
//! that nobody has reason to speak to, whoever they say that they come from; and the count is seen to count, without the fence.

use std::io::BufRead as _;
use std::io::BufReader;
use std::path::Path;

use anyhow::Context as _;
use e2e::eventually::eventually;
use e2e::internet;
use e2e::lab::Lab;
use e2e::lab::LabConfig;
use e2e::lab::Running;
use e2e::scenario;

/// Where the packets that leave are counted.
const PREY: &str = "out/prey";
/// What containerd gives containers by default, CAP_NET_RAW among it.
const DEFAULT: &str = "-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap,+net_bind_service,+net_raw,\
    +sys_chroot,+mknod,+audit_write,+setfcap";

/// Besides the usual, a pod on the same node that is not in the mesh.
fn world(egress: &str) -> String {
    let labels = format!("tulle.dev/mesh: enabled, tulle.dev/egress: {egress}");
    let desk = scenario::server("plain", "desk", "desk", 1) + &scenario::service("plain", "desk");
    internet::world(&labels, &["prey"]) + &desk
}

/// Both addresses of a pod.
fn pair(lab: &Lab, namespace: &str, pod: &str) -> anyhow::Result<(String, String)> {
    let view = lab.view()?;
    let addresses = &view.pod(namespace, pod).with_context(|| format!("no pod {namespace}/{pod}"))?.addresses;
    let of = |v6: bool| addresses.iter().find(|ip| ip.contains(':') == v6).cloned();
    Ok((of(false).context("no IPv4")?, of(true).context("no IPv6")?))
}

/// What is tried: with the system's own programs, and by hand.
struct Attack {
    plain: String,
    powerful: String,
}

impl Attack {
    fn new(lab: &Lab, folder: &Path) -> anyhow::Result<Self> {
        let program = folder.join("attack.py");
        std::fs::write(&program, include_str!("testdata/attack.py"))?;
        let (own, prey) = (pair(lab, "shop", "web")?, pair(lab, "out", "prey")?);
        let (desk, cart) = (pair(lab, "plain", "desk")?, pair(lab, "shop", "cart")?);
        let node = e2e::address::gateway(1);
        let argument = |(v4, v6): &(String, String)| format!("{v4},{v6}");
        let all: Vec<String> = [&own, &prey, &desk, &cart].into_iter().map(argument).collect();
        let by_hand = format!("/usr/bin/python3 {} {} {},{}", program.display(), all.join(" "), node.v4, node.v6);
        let (v4, v6) = prey;
        let once = "curl -sS --max-time 0.5";
        let pod = &own.0;
        // With empty tags, which the node takes off late; and a connection that the prey seems to begin.
        let forged = format!(
            "via=$(ip -4 route show default | sed 's/.*via \\([^ ]*\\).*/\\1/')\n\
             mac=$(ip neigh show $via | sed 's/.*lladdr \\([^ ]*\\).*/\\1/')\n\
             forge() {{ lab forge --mac $mac \"$@\" || echo it could not be forged; }}\n\
             for tags in 0 1 2 3; do forge --from {pod}:9 --to {v4}:443 --tags $tags; done\n\
             forge --from {v4}:4431 --to {pod}:15008\nforge --from {pod}:15008 --to {v4}:4431\n"
        );
        let known = format!("{once} http://{v4}/; {once} 'http://[{v6}]/'\n{by_hand}\n{forged}");
        // Of what needs more than this kernel has, what it has is tried.
        let marked = "table inet evil {\n chain out {\n type route hook output priority -300; policy accept;\n\
             meta mark set 0x539\n ct mark set 0x111\n }\n}\n";
        let taken = format!(
            "ip link add link eth0 name mv type macvlan mode bridge; ip link set mv up\n\
             ip link add link eth0 name vl type vlan id 7; ip link set vl up\n\
             ip link add tun type ipip local {} remote {}; ip link set tun up\n\
             for dev in mv vl tun; do ip route replace {v4} dev $dev && {once} http://{v4}/; done; ip route del {v4}\n\
             for dev in mv vl tun; do ip link del $dev; done\n\
             ip addr add 203.0.113.77/32 dev eth0; ip addr add 10.10.0.99/32 dev eth0\n\
             for own in 203.0.113.77 10.10.0.99; do {once} --interface $own http://{v4}/; done\n\
             ip addr del 203.0.113.77/32 dev eth0; ip addr del 10.10.0.99/32 dev eth0\n",
            own.0, node.v4,
        );
        let routed = "via=$(ip route show default | sed 's/.* via \\([^ ]*\\).*/\\1/')\n\
             ip rule add pref 1 lookup 66; ip -6 rule add pref 1 lookup 66\n\
             ip route add default via $via dev eth0 onlink table 66; ip -6 route add default via fe80::1 dev eth0 table 66\n";
        let away = "ip rule del pref 1; ip -6 rule del pref 1; ip route flush table 66; ip -6 route flush table 66";
        let powerful = format!(
            "{known}echo '{marked}' | nft -f -\n{known}nft flush ruleset\n{known}{routed}{known}{away}\n{taken}"
        );
        Ok(Self { plain: known, powerful })
    }

    /// As a container without privileges.
    fn plainly(&self) -> Vec<String> {
        let script = format!("PATH=$PATH:/usr/sbin:/sbin\n{}true", self.plain);
        ["setpriv", "--bounding-set", DEFAULT, "sh", "-c", &script].map(str::to_owned).into()
    }

    /// As a container with all power over its own network.
    fn with_all_power(&self) -> Vec<String> {
        ["sh".to_owned(), "-c".to_owned(), format!("PATH=$PATH:/usr/sbin:/sbin\n{}true", self.powerful)].into()
    }

    /// Runs it; it is known to have been tried.
    fn run(lab: &Lab, argv: &[String]) -> anyhow::Result<()> {
        let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
        let said = lab.exec_ok("shop/web", &argv)?;
        anyhow::ensure!(said.contains("tried") && !said.contains("could not be forged"), "{said}");
        Ok(())
    }
}

fn nothing_came(lab: &Lab, when: &str) -> anyhow::Result<()> {
    let count = scenario::counted_packets(lab, PREY)?;
    anyhow::ensure!(count == 0, "{count} packets came to the outside, {when}");
    Ok(())
}

/// The prey speaks to a pod that is not closed, which says nothing: one pod's errors about that are not another one's to send.
fn prey_speaks(lab: &Lab) -> anyhow::Result<()> {
    let (v4, v6) = pair(lab, "plain", "desk")?;
    let speak = format!(
        "import socket as s\nfor f, a in ((s.AF_INET, '{v4}'), (s.AF_INET6, '{v6}')):\n \
         u = s.socket(f, s.SOCK_DGRAM); u.bind(('', 4444)); u.sendto(b'question', (a, 7777))"
    );
    lab.exec_ok(PREY, &["/usr/bin/python3", "-c", &speak]).map(drop)
}

/// Somebody who takes that and does not answer.
fn listener(lab: &Lab) -> anyhow::Result<Running> {
    let listen = "import socket as s, sys\nu = s.socket(s.AF_INET6, s.SOCK_DGRAM); u.bind(('::', 7777)); print('up', flush=True); sys.stdin.read()";
    let mut running = lab.spawn("plain/desk", &["/usr/bin/python3", "-c", listen])?;
    let stdout = running.child().and_then(|child| child.stdout.take()).context("no output")?;
    let first = BufReader::new(stdout).lines().next().context("it has ended")??;
    anyhow::ensure!(first == "up", "{first}");
    Ok(running)
}

fn is_fenced(lab: &Lab) -> anyhow::Result<()> {
    eventually("the pod is fenced", scenario::PATIENCE, || {
        let status = scenario::pod_status(lab, "node-1", "web").map_err(|error| error.to_string())?;
        if status["fence"] == "Fenced" { Ok(()) } else { Err(status.to_string()) }
    })
}

/// What counts can count, and each part of the fence is needed: without the check of sources other pods answer the prey, without the
/// mark of connections the pod itself does, without a fence all of it comes.
fn counts_without_a_fence(lab: &Lab, attack: &Attack) -> anyhow::Result<()> {
    // It would put up again what is taken away.
    lab.kill("node-1", "KILL")?;
    let away = |what: &str| lab.exec_ok("node-1", &["sh", "-c", &format!("PATH=$PATH:/usr/sbin nft {what}")]);
    let count = || {
        Attack::run(lab, &attack.plainly())?;
        scenario::counted_packets(lab, PREY)
    };
    away("flush chain inet tulle_fence source")?;
    anyhow::ensure!(count()? > 0, "without the check of sources nothing came");
    lab.exec_ok(PREY, &["sh", "-c", "PATH=$PATH:/usr/sbin nft flush ruleset"])?;
    scenario::count_packets(lab, PREY, &lab.pod_ip("shop", "web")?)?;
    let own = count()?;
    anyhow::ensure!(own == 0, "{own} packets of the pod itself came, without the check of sources");
    away("insert rule inet tulle_fence fence ct direction reply accept")?;
    let replies = count()?;
    anyhow::ensure!(replies > 0, "nothing came, whoever began a connection");
    away("delete table inet tulle_fence")?;
    let all = count()? - replies;
    anyhow::ensure!(all > replies, "without a fence {all} packets came, with a part of it {replies}");
    Ok(())
}

#[test]
fn the_fence_holds_against_the_pod_itself_with_and_without_a_proxy() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    if !scenario::has_tools(&["curl", "setpriv", "python3"]) {
        return Ok(());
    }
    let Some(lab) = scenario::lab(LabConfig::of(&world("deny"))) else { return Ok(()) };
    is_fenced(&lab)?;
    let attack = Attack::new(&lab, folder.path())?;
    let _listener = listener(&lab)?;
    scenario::count_all_packets(&lab, PREY)?;
    prey_speaks(&lab)?;
    Attack::run(&lab, &attack.plainly())?;
    nothing_came(&lab, "by a container without privileges")?;
    prey_speaks(&lab)?;
    Attack::run(&lab, &attack.with_all_power())?;
    nothing_came(&lab, "by a container with all power over its network")?;
    lab.kill("node-1", "KILL")?;
    Attack::run(&lab, &attack.plainly())?;
    Attack::run(&lab, &attack.with_all_power())?;
    nothing_came(&lab, "with the proxy dead")?;
    // While it starts, without a pause.
    let endless = format!("exec >/dev/null 2>&1\nwhile :; do {}done", attack.plain);
    let command = ["sh", "-c", &format!("PATH=$PATH:/usr/sbin:/sbin\n{endless}")];
    let attacking = lab.spawn("shop/web", &command)?;
    lab.restart("node-1")?;
    is_fenced(&lab)?;
    lab.kill("node-1", "KILL")?;
    lab.restart("node-1")?;
    is_fenced(&lab)?;
    drop(attacking);
    nothing_came(&lab, "while the proxy restarted")?;
    scenario::reaches(&lab, "shop/web", "http://cart.shop/")?;
    scenario::reaches(&lab, "shop/web", "http://desk.plain/")?;
    counts_without_a_fence(&lab, &attack)?;
    // And it comes back with the proxy, rules and all.
    lab.restart("node-1")?;
    is_fenced(&lab)?;
    let nft = |what: &str| lab.exec("node-1", &["sh", "-c", &format!("PATH=$PATH:/usr/sbin:/sbin nft {what}")]);
    let pods = || anyhow::Ok(String::from_utf8(nft("list set inet tulle_fence pods")?.stdout)?);
    let before = pods()?;
    anyhow::ensure!(before.contains("elements"), "{before}");
    // Also when another program flushes the node's rules.
    anyhow::ensure!(nft("flush ruleset")?.status.success());
    eventually("the fence is put up again", scenario::PATIENCE, || match pods() {
        Ok(now) if now == before => Ok(()),
        other => Err(format!("{other:?}")),
    })
}

/// Puts a bridge between the pod and its node, as flannel and many others have one. `FILTER`: whether what it passes on goes through
/// the rules of the network layer, too (br_netfilter), as kube-proxy's documents ask for.
const BRIDGE: &str = r"
set -e
via=$(ip -o route get $V4); dev=$(echo $via | sed 's/.* dev \([^ ]*\).*/\1/'); from=$(echo $via | sed 's/.* src \([^ ]*\).*/\1/')
own=$(ip -o link show dev $dev | sed 's/.*link.ether \([^ ]*\).*/\1/')
its=$(ip -o neigh show $V4 dev $dev | sed 's/.*lladdr \([^ ]*\).*/\1/')
ip link add br9 type bridge mcast_snooping 0
ip link set br9 address $own up
ip link set $dev master br9
ip addr del fe80::1/64 dev $dev
ip addr add fe80::1/64 dev br9 nodad
ip route replace $V4/32 dev br9 src $from
ip -6 route del $V6 dev $dev
ip -6 route add $V6/128 dev br9
for ip in $V4 $V6; do ip neigh replace $ip lladdr $its dev br9 nud permanent; done
for layer in ip ip6; do
  switch=/proc/sys/net/bridge/bridge-nf-call-${layer}tables
  [ $FILTER = 0 -a ! -e $switch ] || echo $FILTER >$switch
done
";

#[test]
fn a_pod_behind_a_bridge_is_fenced_too() -> anyhow::Result<()> {
    behind_a_bridge("0")
}

#[test]
fn a_pod_behind_a_bridge_that_asks_the_network_layer_is_fenced_too() -> anyhow::Result<()> {
    if !Path::new("/proc/sys/net/bridge/bridge-nf-call-iptables").exists() {
        eprintln!("SKIPPED: the kernel has no br_netfilter, or it is not loaded");
        return Ok(());
    }
    behind_a_bridge("1")
}

fn behind_a_bridge(filter: &str) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    if !scenario::has_tools(&["curl", "setpriv", "python3"]) {
        return Ok(());
    }
    let Some(lab) = scenario::lab(LabConfig::of(&world("allow"))) else { return Ok(()) };
    let (v4, v6) = pair(&lab, "shop", "web")?;
    lab.exec_ok(
        "node-1",
        &["sh", "-c", &format!("V4={v4} V6={v6} FILTER={filter} PATH=$PATH:/usr/sbin:/sbin; {BRIDGE}")],
    )?;
    scenario::reaches(&lab, "shop/web", "http://desk.plain/")?;
    lab.apply_yaml(&world("deny"))?;
    is_fenced(&lab)?;
    scenario::reaches(&lab, "shop/web", "http://cart.shop/")?;
    scenario::reaches(&lab, "shop/web", "http://desk.plain/")?;
    let attack = Attack::new(&lab, folder.path())?;
    scenario::count_all_packets(&lab, PREY)?;
    Attack::run(&lab, &attack.plainly())?;
    Attack::run(&lab, &attack.with_all_power())?;
    nothing_came(&lab, "through the bridge")?;
    // A port of the bridge that is no pod's: what it would carry stays in.
    let wire = "PATH=$PATH:/usr/sbin:/sbin; nft list table bridge tulle_fence";
    anyhow::ensure!(lab.exec_ok("node-1", &["sh", "-c", wire])?.contains("oifkind != \"veth\""));
    counts_without_a_fence(&lab, &attack)
}
