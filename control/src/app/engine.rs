//! The one loop that owns the state of the mesh: loaded objects in, published resources and views out.
//!
//! The first change after a quiet time is published at once; changes that follow are gathered for 20 ms, so that a
//! storm of events costs a bounded number of translations. A file that never could be read keeps the first translation
//! back: serving without it could fail open.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::admin::View;
use crate::base::{Stop, unix_now};
use crate::ca::grant::Accounts;
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
    pub accounts: watch::Receiver<Arc<Accounts>>,
    /// For people.
    pub view: watch::Receiver<Arc<View>>,
}

/// The loop's state.
pub struct Engine {
    settings: Settings,
    memory: translate::Memory,
    published: watch::Sender<Published>,
    accounts: watch::Sender<Arc<Accounts>>,
    view: watch::Sender<Arc<View>>,
}

/// An engine that has published nothing.
pub fn new(settings: Settings) -> (Engine, Outputs) {
    let (published_sender, published) = watch::channel(Published::default());
    let (accounts_sender, accounts) = watch::channel(Arc::default());
    let (view_sender, view) =
        watch::channel(Arc::new(View { waiting: vec!["the first reading of the source".into()], ..View::default() }));
    let memory = translate::Memory::default();
    let engine = Engine { settings, memory, published: published_sender, accounts: accounts_sender, view: view_sender };
    let outputs = Outputs { published, accounts, view };
    (engine, outputs)
}

impl Engine {
    /// Runs until it is told to stop or the source is gone.
    pub async fn run(mut self, mut source: watch::Receiver<Option<Arc<Loaded>>>, mut stop: Stop) {
        loop {
            tokio::select! {
                () = stop.requested() => return,
                changed = source.changed() => if changed.is_err() { return },
            }
            let loaded = source.borrow_and_update().clone();
            if let Some(loaded) = loaded {
                self.publish(loaded);
            }
            tokio::time::sleep(COALESCE).await;
        }
    }

    /// One generation. The set is sent last: who sees the new generation finds its view and accounts in place.
    fn publish(&mut self, loaded: Arc<Loaded>) {
        let previous = self.published.borrow().clone();
        if previous.generation == 0 && !loaded.never_read.is_empty() {
            let waiting = loaded
                .never_read
                .iter()
                .map(|file| format!("{file} cannot be read, and what it says is not known; repair or remove it"))
                .collect();
            self.view.send_replace(Arc::new(View { loaded, waiting, ..View::default() }));
            return;
        }
        self.settings.now = unix_now();
        let translation = translate::translate(&loaded.world, &self.settings, &mut self.memory);
        let next = previous.next(translation.resources);
        let generation = next.generation;
        self.accounts.send_replace(Arc::new(translation.accounts));
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
