//! `/debug/callers`: who reached the pods of a namespace without an identity, as the nodes of those pods saw it.
//!
//! Kinds of connections of several nodes are joined. Nodes that could not be asked, and pods that nobody watches because they
//! are not captured, are named, so that an empty list is never taken for "nobody".

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::{Value, json};
use tulle_proto::node::node_message::Answer;
use tulle_proto::node::node_question::Question;
use tulle_proto::node::{CallersAnswer, CallersQuestion, PlainCaller};

use crate::admin::State;
use crate::nodes::AskError;

/// Query of `/debug/callers`.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Ask {
    /// Absent: all.
    namespace: Option<String>,
}

/// Asks the nodes that have pods there.
pub(super) async fn seen(state: &State, ask: &Ask) -> Value {
    let namespace = ask.namespace.clone().unwrap_or_default();
    let mut nodes = BTreeSet::new();
    let mut pods = BTreeSet::new();
    {
        let view = state.view.borrow();
        let here = view.world().pods.values().filter(|pod| namespace.is_empty() || pod.meta.namespace == namespace);
        for pod in here.filter(|pod| pod.takes_part() && !pod.host_network) {
            nodes.insert(pod.node.clone());
            pods.insert(pod.meta.path());
        }
    }
    let namespace = &namespace;
    let asked = nodes.iter().map(|node| async move {
        let question = Question::Callers(CallersQuestion { namespace: namespace.clone() });
        (node.clone(), state.registry.ask(node, question).await)
    });
    joined(&pods, futures_util::future::join_all(asked).await)
}

fn joined(pods: &BTreeSet<String>, answers: Vec<(String, Result<Answer, AskError>)>) -> Value {
    let mut unseen: BTreeSet<String> = pods.clone();
    let mut kinds: BTreeMap<[String; 7], PlainCaller> = BTreeMap::new();
    let (mut untold, mut errors) = (0, BTreeMap::new());
    for (node, answer) in answers {
        let CallersAnswer { callers, untold: own, captured } = match answer {
            Ok(Answer::Callers(answer)) => answer,
            Ok(_) => {
                errors.insert(node.clone(), format!("node {node} answered another question"));
                continue;
            }
            Err(error) => {
                errors.insert(node, error.to_string());
                continue;
            }
        };
        untold += own;
        captured.iter().for_each(|pod| {
            unseen.remove(pod);
        });
        for caller in callers {
            let key = [
                caller.namespace.clone(),
                caller.workload.clone(),
                caller.port.to_string(),
                caller.source_namespace.clone(),
                caller.source_workload.clone(),
                caller.source_account.clone(),
                caller.source_address.clone(),
            ];
            let sum = kinds.entry(key).or_insert_with(|| PlainCaller {
                connections: 0,
                refused: 0,
                open: 0,
                last: 0,
                ..caller.clone()
            });
            sum.connections += caller.connections;
            sum.refused += caller.refused;
            sum.open += caller.open;
            sum.last = sum.last.max(caller.last);
        }
    }
    json!({
        "callers": kinds.values().map(shown).collect::<Vec<_>>(),
        "untold": untold,
        "unseenPods": unseen,
        "errors": errors,
    })
}

fn shown(caller: &PlainCaller) -> Value {
    json!({
        "namespace": caller.namespace,
        "workload": caller.workload,
        "port": caller.port,
        "source": {
            "namespace": caller.source_namespace,
            "workload": caller.source_workload,
            "account": caller.source_account,
            "address": caller.source_address,
        },
        "connections": caller.connections,
        "refused": caller.refused,
        "open": caller.open,
        "last": caller.last,
    })
}

#[cfg(test)]
mod tests {
    use tulle_proto::node::node_message::Answer;
    use tulle_proto::node::{CallersAnswer, PlainCaller};

    use super::joined;
    use crate::nodes::AskError;

    #[test]
    fn what_several_nodes_saw_is_one_list_and_what_nobody_sees_is_named() {
        let caller = |workload: &str, connections: u64, last: i64| PlainCaller {
            namespace: "shop".into(),
            workload: workload.into(),
            port: 8080,
            source_namespace: "office".into(),
            source_workload: "clerk".into(),
            connections,
            last,
            ..PlainCaller::default()
        };
        let answer = |callers: Vec<PlainCaller>, captured: &str| {
            Ok(Answer::Callers(CallersAnswer { callers, untold: 1, captured: vec![captured.into()] }))
        };
        let pods = ["shop/cart-0", "shop/cart-1", "shop/old-0"].map(str::to_owned).into();
        let value = joined(
            &pods,
            vec![
                ("a".into(), answer(vec![caller("cart", 2, 5), caller("catalog", 1, 1)], "shop/cart-0")),
                ("b".into(), answer(vec![caller("cart", 3, 9)], "shop/cart-1")),
                ("c".into(), Err(AskError::NotAttached("c".into()))),
            ],
        );
        let callers = value["callers"].as_array().unwrap();
        assert_eq!(callers.len(), 2, "{value:#}");
        assert_eq!((&callers[0]["connections"], &callers[0]["last"]), (&5.into(), &9.into()));
        assert_eq!(value["untold"], 2);
        assert_eq!(value["unseenPods"], serde_json::json!(["shop/old-0"]));
        assert!(value["errors"]["c"].as_str().unwrap().contains("not attached"), "{value:#}");
    }
}
