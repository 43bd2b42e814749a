//! What the programs of a cluster are told: their arguments and configuration files.
//!
//! Pure text, from the layout alone. Everything that costs processor time without use here is off (leader election,
//! profiling, resource reservations), and nothing asks a registry for an image. Limits: the flags are those of the
//! Kubernetes version that `e2e/kube/go.mod` names.

use std::path::Path;

use serde_json::Value;
use serde_json::json;

use crate::address;
use crate::cluster::layout;
use crate::cluster::layout::Folder;

/// Image of the process that holds a pod's namespaces.
pub const PAUSE: &str = "lab.local/pause:1";

/// Words of a command.
fn words(program: &Path, arguments: &[String]) -> Vec<String> {
    let mut all = vec![program.display().to_string()];
    all.extend_from_slice(arguments);
    all
}

/// How `user` reaches the API server.
pub fn kubeconfig(folder: &Folder, user: &str) -> String {
    let server = format!("https://{}:{}", layout::CONTROL_ADDRESS, layout::API_PORT);
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "lab", "cluster": {"server": server, "certificate-authority": folder.secret("ca.crt")}}],
        "users": [{"name": user, "user": {
            "client-certificate": folder.secret(&format!("{user}.crt")),
            "client-key": folder.secret(&format!("{user}.key")),
        }}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": user}}],
        "current-context": "lab",
    })
    .to_string()
}

/// The store.
pub fn etcd(program: &Path, data: &Path) -> Vec<String> {
    words(
        program,
        &[
            format!("--data-dir={}", data.display()),
            "--listen-client-urls=http://127.0.0.1:2379".into(),
            "--advertise-client-urls=http://127.0.0.1:2379".into(),
            // It lives for a day and nobody's data are in it.
            "--unsafe-no-fsync".into(),
        ],
    )
}

/// The API server.
pub fn api_server(program: &Path, folder: &Folder) -> Vec<String> {
    let file = |flag: &str, name: &str| format!("--{flag}={}", folder.secret(name).display());
    words(
        program,
        &[
            "--etcd-servers=http://127.0.0.1:2379".into(),
            "--bind-address=0.0.0.0".into(),
            format!("--advertise-address={}", layout::CONTROL_ADDRESS),
            format!("--secure-port={}", layout::API_PORT),
            "--endpoint-reconciler-type=master-count".into(),
            format!("--service-cluster-ip-range={}", address::SERVICES.0),
            file("tls-cert-file", "apiserver.crt"),
            file("tls-private-key-file", "apiserver.key"),
            file("client-ca-file", "ca.crt"),
            file("kubelet-client-certificate", "to-kubelet.crt"),
            file("kubelet-client-key", "to-kubelet.key"),
            file("kubelet-certificate-authority", "ca.crt"),
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
            file("service-account-key-file", "sa.pub"),
            file("service-account-signing-key-file", "sa.key"),
            "--authorization-mode=Node,RBAC".into(),
            "--enable-admission-plugins=NodeRestriction".into(),
            "--allow-privileged=true".into(),
            "--kubelet-preferred-address-types=InternalIP".into(),
            "--profiling=false".into(),
        ],
    )
}

/// The controllers.
pub fn controllers(program: &Path, folder: &Folder) -> Vec<String> {
    let own = folder.kubeconfig("controllers").display().to_string();
    let file = |flag: &str, name: &str| format!("--{flag}={}", folder.secret(name).display());
    words(
        program,
        &[
            format!("--kubeconfig={own}"),
            format!("--authentication-kubeconfig={own}"),
            format!("--authorization-kubeconfig={own}"),
            file("service-account-private-key-file", "sa.key"),
            file("root-ca-file", "ca.crt"),
            "--use-service-account-credentials=true".into(),
            "--leader-elect=false".into(),
            "--bind-address=127.0.0.1".into(),
            "--profiling=false".into(),
        ],
    )
}

/// The scheduler.
pub fn scheduler(program: &Path, folder: &Folder) -> Vec<String> {
    let own = folder.kubeconfig("scheduler").display().to_string();
    words(
        program,
        &[
            format!("--kubeconfig={own}"),
            format!("--authentication-kubeconfig={own}"),
            format!("--authorization-kubeconfig={own}"),
            "--leader-elect=false".into(),
            "--bind-address=127.0.0.1".into(),
        ],
    )
}

/// Address translation of Services on a node.
pub fn kube_proxy(program: &Path, folder: &Folder, node: &str) -> Vec<String> {
    words(
        program,
        &[
            format!("--kubeconfig={}", folder.kubeconfig("kube-proxy").display()),
            "--proxy-mode=nftables".into(),
            format!("--hostname-override={node}"),
            format!("--cluster-cidr={}", address::PODS.0),
            // The machine's own limits and times stay.
            "--conntrack-max-per-core=0".into(),
            "--conntrack-tcp-timeout-established=0s".into(),
            "--conntrack-tcp-timeout-close-wait=0s".into(),
            "--healthz-bind-address=127.0.0.1:10256".into(),
            "--metrics-bind-address=127.0.0.1:10249".into(),
        ],
    )
}

/// The node's own agent.
pub fn kubelet(program: &Path, folder: &Folder, node: u16) -> Vec<String> {
    let name = layout::node_name(node);
    words(
        program,
        &[
            "--config=/run/kubelet.json".into(),
            format!("--kubeconfig={}", folder.kubeconfig(&name).display()),
            format!("--hostname-override={name}"),
            format!("--node-ip={}", layout::node_address(node)),
        ],
    )
}

/// `/run/kubelet.json`.
pub fn kubelet_config(folder: &Folder, node: u16, cgroup: &str) -> Value {
    let name = layout::node_name(node);
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": folder.secret("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": folder.secret(&format!("{name}.crt")),
        "tlsPrivateKeyFile": folder.secret(&format!("{name}.key")),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{cgroup}"),
        "failCgroupV1": false,
        "failSwapOn": false,
        "oomScoreAdj": 0,
        "cgroupsPerQOS": true,
        "enforceNodeAllocatable": [],
        "makeIPTablesUtilChains": false,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "clusterDNS": [layout::DNS_SERVICE],
        "clusterDomain": "cluster.local",
        "resolvConf": "",
        "healthzPort": 10248,
        "readOnlyPort": 0,
        "volumePluginDir": "/var/lib/kubelet/plugins/volume",
        "registerNode": true,
        "shutdownGracePeriod": "0s",
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
    })
}

/// `/etc/containerd/config.toml`: the usual places; what Debian's packages put elsewhere is named.
pub fn containerd() -> String {
    format!(
        r#"version = 2
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
# Where the capability to make processes harder to kill is missing.
restrict_oom_score_adj = true
disable_apparmor = true
stream_server_address = "127.0.0.1"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"
"#
    )
}

/// `/etc/cni/net.d/10-lab.conflist`: a routed pair of interfaces for each pod, as kind and most routed networks have it.
/// A bridge would do, but what leaves a pod on one cannot be fenced.
pub fn cni(node: u16) -> Value {
    json!({
        "cniVersion": "0.4.0",
        "name": "lab",
        "plugins": [
            {
                "type": "ptp", "ipMasq": false,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": layout::pod_range(node)}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

/// The cluster's name server, as an object of the cluster; it runs beside the API server.
pub fn dns_objects() -> String {
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: kube-dns, namespace: kube-system}}
spec:
  clusterIP: {service}
  ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53, protocol: TCP}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: kube-dns-1, namespace: kube-system, labels: {{kubernetes.io/service-name: kube-dns}}}}
addressType: IPv4
ports: [{{name: dns, port: 53, protocol: UDP}}, {{name: dns-tcp, port: 53, protocol: TCP}}]
endpoints: [{{addresses: [{address}], conditions: {{ready: true}}}}]
",
        service = layout::DNS_SERVICE,
        address = layout::CONTROL_ADDRESS
    )
}
