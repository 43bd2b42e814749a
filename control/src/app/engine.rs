//! The one loop that owns the state of the mesh: loaded objects in, published resources and views out.
//!
//! The first change after a quiet time is published at once; changes that follow are gathered for 20 ms, so that a
//! storm of events costs a bounded number of translations. A file that never could be read, and a kind of object that was
//! never listed, keep the first translation back: serving without it could fail open. Keys of token issuers that are still being fetched keep it back for some
//! seconds: serving without them would take them from nodes that have them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::admin::View;
use crate::base::{Stop, unix_now};
use crate::ca::grant::Accounts;
use crate::keys;
use crate::model::{KeySource, KeySources, World};
use crate::source::Loaded;
use crate::translate;
use crate::translate::Settings;
use crate::xds::Published;

/// At least this long between two publications.
const COALESCE: Duration = Duration::from_millis(20);

/// What the engine gives out.
pub struct Outputs {
    /// For xDS.
    pub published: watch::Receiver<Published>,
    /// For the CA.
    pub accounts: watch::Receiver<Option<Arc<Accounts>>>,
    /// For people.
    pub view: watch::Receiver<Arc<View>>,
    /// For whoever fetches the keys of issuers: where they are.
    pub key_sources: watch::Receiver<Arc<BTreeSet<KeySource>>>,
}

/// The loop's state.
pub struct Engine {
    settings: Settings,
    memory: translate::Memory,
    published: watch::Sender<Published>,
    accounts: watch::Sender<Option<Arc<Accounts>>>,
    view: watch::Sender<Arc<View>>,
    key_sources: watch::Sender<Arc<BTreeSet<KeySource>>>,
}

/// An engine that has published nothing.
pub fn new(settings: Settings) -> (Engine, Outputs) {
    let (published_sender, published) = watch::channel(Published::default());
    let (accounts_sender, accounts) = watch::channel(None);
    let (view_sender, view) =
        watch::channel(Arc::new(View { waiting: vec!["the first reading of the source".into()], ..View::default() }));
    let (sources_sender, key_sources) = watch::channel(Arc::default());
    let memory = translate::Memory::default();
    let engine = Engine {
        settings,
        memory,
        published: published_sender,
        accounts: accounts_sender,
        view: view_sender,
        key_sources: sources_sender,
    };
    let outputs = Outputs { published, accounts, view, key_sources };
    (engine, outputs)
}

impl Engine {
    /// Runs until it is told to stop, or source or keys are gone.
    pub async fn run(
        mut self,
        mut source: watch::Receiver<Option<Arc<Loaded>>>,
        mut keys: watch::Receiver<KeySources>,
        mut stop: Stop,
    ) {
        loop {
            tokio::select! {
                () = stop.requested() => return,
                changed = source.changed() => if changed.is_err() { return },
                changed = keys.changed() => if changed.is_err() { return },
            }
            let loaded = source.borrow_and_update().clone();
            if let Some(loaded) = loaded {
                let wanted = Arc::new(loaded.world.key_sources());
                self.key_sources.send_if_modified(|last| std::mem::replace(last, wanted.clone()) != wanted);
                if self.published.borrow().generation == 0 {
                    let all_tried = |keys: &KeySources| wanted.iter().all(|source| keys.contains_key(source));
                    tokio::select! {
                        () = stop.requested() => return,
                        _ = tokio::time::timeout(keys::FIRST, keys.wait_for(all_tried)) => {}
                    }
                }
                let keys = keys.borrow_and_update().clone();
                self.publish(loaded, keys);
            }
            tokio::time::sleep(COALESCE).await;
        }
    }

    /// One generation. The set is sent last: who sees the new generation finds its view and accounts in place.
    fn publish(&mut self, loaded: Arc<Loaded>, keys: KeySources) {
        let previous = self.published.borrow().clone();
        if previous.generation == 0 && !(loaded.never_read.is_empty() && loaded.waiting.is_empty()) {
            let files = loaded.never_read.iter();
            let files =
                files.map(|file| format!("{file} cannot be read, and what it says is not known; repair or remove it"));
            let waiting = files.chain(loaded.waiting.iter().cloned()).collect();
            self.view.send_replace(Arc::new(View { loaded, waiting, ..View::default() }));
            return;
        }
        self.settings.now = unix_now();
        let world = World { keys, ..loaded.world.clone() };
        let translation = translate::translate(&world, &self.settings, &mut self.memory);
        let next = previous.next(translation.resources);
        let generation = next.generation;
        self.accounts.send_replace(Some(Arc::new(translation.accounts)));
        self.view.send_replace(Arc::new(View {
            generation,
            loaded,
            conditions: translation.conditions,
            nodes: translation.nodes,
            waiting: Vec::new(),
        }));
        self.published.send_replace(next);
        tracing::debug!(generation, "published");
    }
}
