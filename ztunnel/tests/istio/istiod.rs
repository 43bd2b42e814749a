//! An istiod as a node sees it: delta discovery and certificates on one TLS port, with Istio's habits. It answers the first
//! request of a type with everything that the node does not say it has, and names as removed what the node has and the mesh
//! has not; it signs for accounts that the node impersonates. Whatever it is told it notes, for the test to look at.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use prost::Message;
use prost_types::Any;
use prost_types::value::Kind;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::TlsAcceptor;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::metadata::{KeyAndValueRef, MetadataMap};
use tonic::{Request, Response, Status, Streaming};
use tulle_certs::ca::Authority;
use tulle_proto::ca::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use tulle_proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use tulle_proto::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use tulle_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use tulle_proto::names::{TYPE_ADDRESS, TYPE_AUTHORIZATION};
use tulle_proto::security::Authorization;
use tulle_proto::workload::Address;
use tulle_proto::workload::address::Type;

use crate::node::{Lab, authority, now};

/// Headers by name.
pub type Headers = BTreeMap<String, String>;

/// One stream of discovery.
#[derive(Clone, Debug, Default)]
pub struct Told {
    pub headers: Headers,
    pub requests: Vec<DeltaDiscoveryRequest>,
}

/// One request for a certificate.
#[derive(Clone, Debug)]
pub struct Asked {
    pub headers: Headers,
    pub impersonated: Option<String>,
    pub validity: i64,
    pub identity: String,
}

type Sender = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;
/// By type and name: version and content.
type Resources = BTreeMap<(&'static str, String), (String, Vec<u8>)>;

#[derive(Default)]
struct State {
    resources: Resources,
    streams: Vec<Told>,
    to: Option<Sender>,
    nonce: u32,
    asked: Vec<Asked>,
}

impl State {
    fn answer(&mut self, kind: &'static str, names: &[String], removed: Vec<String>) -> DeltaDiscoveryResponse {
        self.nonce += 1;
        let resources = names.iter().map(|name| {
            let (version, value) = self.resources[&(kind, name.clone())].clone();
            let resource = Some(Any { type_url: kind.to_owned(), value });
            Resource { name: name.clone(), version, resource, ..Resource::default() }
        });
        DeltaDiscoveryResponse {
            type_url: kind.to_owned(),
            nonce: format!("nonce-{}", self.nonce),
            resources: resources.collect(),
            removed_resources: removed,
            ..DeltaDiscoveryResponse::default()
        }
    }

    /// To the first request of a type.
    fn begin(&mut self, request: &DeltaDiscoveryRequest) -> Option<DeltaDiscoveryResponse> {
        let kind = [TYPE_ADDRESS, TYPE_AUTHORIZATION].into_iter().find(|kind| *kind == request.type_url)?;
        let has = &request.initial_resource_versions;
        let known = |name: &str| self.resources.keys().any(|(own, other)| *own == kind && other == name);
        let removed = has.keys().filter(|name| !known(name)).cloned().collect();
        // Policies have no version here, so they are always sent.
        let news = self.resources.iter().filter(|((own, name), (version, _))| {
            *own == kind && (version.is_empty() || has.get(name) != Some(version))
        });
        let names: Vec<String> = news.map(|((_, name), _)| name.clone()).collect();
        Some(self.answer(kind, &names, removed))
    }
}

/// It runs until dropped.
pub struct Istiod {
    pub port: u16,
    state: Arc<Mutex<State>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Istiod {
    /// Starts it in the node's own namespace.
    pub fn start(lab: &Lab) -> Self {
        let _ = (*ztunnel::tls::provider()).clone().install_default();
        let state = Arc::<Mutex<State>>::default();
        let (ready, is_ready) = channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let (own, dir) = (state.clone(), lab.dir.path().to_owned());
        let thread = lab.within("", move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                ready.send(listener.local_addr().unwrap().port()).unwrap();
                tokio::select! {
                    _ = stopped => {}
                    () = serve(listener, own, &dir) => {}
                }
            });
        });
        Self { port: is_ready.recv().unwrap(), state, stop: Some(stop), thread: Some(thread) }
    }

    /// Puts workloads and services in the mesh, and tells a connected node.
    pub fn addresses(&self, all: Vec<Type>) {
        let named = all.into_iter().map(|one| {
            let name = match &one {
                Type::Workload(workload) => workload.uid.clone(),
                Type::Service(service) => format!("{}/{}", service.namespace, service.hostname),
            };
            (name, Address { r#type: Some(one) }.encode_to_vec())
        });
        let mut state = self.state.lock().unwrap();
        let mut names = Vec::new();
        for (name, value) in named {
            let version =
                format!("{:x}", value.iter().fold(7_u64, |hash, byte| hash.wrapping_mul(31) + u64::from(*byte)));
            state.resources.insert((TYPE_ADDRESS, name.clone()), (version, value));
            names.push(name);
        }
        Self::tell(&mut state, TYPE_ADDRESS, &names, vec![]);
    }

    /// The same with a policy.
    pub fn policy(&self, policy: &Authorization) {
        let name = format!("{}/{}", policy.namespace, policy.name);
        let mut state = self.state.lock().unwrap();
        state.resources.insert((TYPE_AUTHORIZATION, name.clone()), (String::new(), policy.encode_to_vec()));
        Self::tell(&mut state, TYPE_AUTHORIZATION, &[name], vec![]);
    }

    /// Takes a resource out of the mesh.
    pub fn remove(&self, kind: &'static str, name: &str) {
        let mut state = self.state.lock().unwrap();
        state.resources.remove(&(kind, name.to_owned()));
        Self::tell(&mut state, kind, &[], vec![name.to_owned()]);
    }

    /// Sends bytes that are no resource.
    pub fn broken(&self, kind: &'static str, name: &str) {
        let mut state = self.state.lock().unwrap();
        state.resources.insert((kind, name.to_owned()), ("broken".to_owned(), vec![0xff; 3]));
        Self::tell(&mut state, kind, &[name.to_owned()], vec![]);
        state.resources.remove(&(kind, name.to_owned()));
    }

    fn tell(state: &mut State, kind: &'static str, names: &[String], removed: Vec<String>) {
        let answer = state.answer(kind, names, removed);
        if let Some(to) = &state.to {
            let _ = to.try_send(Ok(answer));
        }
    }

    /// Ends the stream, and takes resources away before the node is back.
    pub fn hang_up_without(&self, gone: &[(&'static str, &str)]) {
        let mut state = self.state.lock().unwrap();
        state.to = None;
        for (kind, name) in gone {
            state.resources.remove(&(*kind, (*name).to_owned())).unwrap();
        }
    }

    /// What nodes told on each stream.
    pub fn streams(&self) -> Vec<Told> {
        self.state.lock().unwrap().streams.clone()
    }

    /// Requests for certificates.
    pub fn asked(&self) -> Vec<Asked> {
        self.state.lock().unwrap().asked.clone()
    }
}

impl Drop for Istiod {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

async fn serve(listener: TcpListener, state: Arc<Mutex<State>>, dir: &Path) {
    let authority = Arc::new(authority(dir, "cluster.local"));
    let certificate = authority.server_certificate(&["localhost".to_owned()], now()).unwrap();
    let mut tls = rustls::ServerConfig::builder_with_provider(ztunnel::tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(certificate.chain, certificate.key.into())
        .unwrap();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let incoming = TcpListenerStream::new(listener).then(move |tcp| {
        let acceptor = acceptor.clone();
        async move { acceptor.accept(tcp?).await }
    });
    let server = Server { state, authority };
    tonic::transport::Server::builder()
        .add_service(AggregatedDiscoveryServiceServer::new(server.clone()))
        .add_service(IstioCertificateServiceServer::new(server))
        .serve_with_incoming(incoming)
        .await
        .unwrap();
}

#[derive(Clone)]
struct Server {
    state: Arc<Mutex<State>>,
    authority: Arc<Authority>,
}

fn headers(of: &MetadataMap) -> Headers {
    let text = |entry| match entry {
        KeyAndValueRef::Ascii(name, value) => Some((name.to_string(), value.to_str().ok()?.to_owned())),
        KeyAndValueRef::Binary(..) => None,
    };
    of.iter().filter_map(text).collect()
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Server {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (to, answers) = mpsc::channel(64);
        let mut index = 0;
        {
            let mut state = self.state.lock().unwrap();
            let told = Told { headers: headers(request.metadata()), requests: vec![] };
            state.streams.push(told);
            state.to = Some(to);
            index += state.streams.len() - 1;
        }
        let (state, mut requests) = (self.state.clone(), request.into_inner());
        tokio::spawn(async move {
            while let Some(Ok(request)) = requests.next().await {
                let mut state = state.lock().unwrap();
                let begins = request.response_nonce.is_empty();
                let answer = if begins { state.begin(&request) } else { None };
                state.streams[index].requests.push(request);
                if let (Some(answer), Some(to)) = (answer, &state.to) {
                    let _ = to.try_send(Ok(answer));
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Server {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let headers = headers(request.metadata());
        let message = request.into_inner();
        let csr = tulle_certs::parse_csr(&message.csr).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let fields = message.metadata.map(|metadata| metadata.fields).unwrap_or_default();
        let impersonated = fields.get("ImpersonatedIdentity").and_then(|value| match &value.kind {
            Some(Kind::StringValue(text)) => Some(text.clone()),
            _ => None,
        });
        let validity = message.validity_duration;
        let asked = Asked { headers, impersonated: impersonated.clone(), validity, identity: csr.identity.to_string() };
        self.state.lock().unwrap().asked.push(asked);
        // A node proxy asks for others, never for itself.
        let identity = impersonated.ok_or_else(|| Status::permission_denied("nobody is impersonated"))?;
        let identity = identity.parse().map_err(|_| Status::invalid_argument("no SPIFFE id"))?;
        let signed = self.authority.sign(&csr, &identity, validity, now());
        let cert_chain = signed.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}
