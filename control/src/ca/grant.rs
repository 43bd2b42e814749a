//! Which caller may have which identity. Pure.
//!
//! Everybody may have his own. Only the node account of the root namespace, with a node claim, may have others', and
//! only those of accounts with an unfinished pod on that node: a stolen node token is worth the identities that the
//! node held anyway.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;

use tulle_certs::SpiffeId;
use tulle_proto::names;

use crate::authn::Caller;

/// (namespace, account) of the unfinished pods of each node.
pub type Accounts = BTreeMap<String, Arc<BTreeSet<(String, String)>>>;

/// What must be known to decide.
pub struct Facts<'a> {
    /// Proven by the token.
    pub caller: &'a Caller,
    /// `ImpersonatedIdentity` of the request.
    pub impersonated: Option<&'a str>,
    /// Named by the CSR.
    pub csr: &'a SpiffeId,
    /// The mesh's trust domain.
    pub trust_domain: &'a str,
    /// Namespace of the node account.
    pub root_namespace: &'a str,
    /// What runs where.
    pub accounts: &'a Accounts,
}

/// The identity to sign, or why not, in words for the caller's log.
pub fn decide(facts: &Facts<'_>) -> Result<SpiffeId, String> {
    let caller = facts.caller;
    let own = SpiffeId::new(facts.trust_domain, &caller.namespace, &caller.service_account)
        .map_err(|error| format!("the token's account has no identity: {error}"))?;
    let wanted = match facts.impersonated {
        None => own.clone(),
        Some(text) => {
            text.parse::<SpiffeId>().map_err(|error| format!("the impersonated identity is not one: {error}"))?
        }
    };
    if wanted != own {
        may_impersonate(facts, &wanted)?;
    }
    if *facts.csr != wanted {
        return Err(format!("the certificate request names {}, but {wanted} was asked for", facts.csr));
    }
    Ok(wanted)
}

fn may_impersonate(facts: &Facts<'_>, wanted: &SpiffeId) -> Result<(), String> {
    let caller = facts.caller;
    let is_node_account =
        caller.namespace == facts.root_namespace && caller.service_account == names::NODE_SERVICE_ACCOUNT;
    if !is_node_account {
        return Err(format!(
            "{}/{} may have its own identity only; {}/{} alone may ask for others",
            caller.namespace,
            caller.service_account,
            facts.root_namespace,
            names::NODE_SERVICE_ACCOUNT,
        ));
    }
    let Some(node) = &caller.node else {
        return Err("the token has no tulle.dev/node claim, so it may not ask for others' identities".into());
    };
    if wanted.trust_domain() != facts.trust_domain {
        return Err(format!("{wanted} is not of the trust domain {}", facts.trust_domain));
    }
    let account = (wanted.namespace().to_owned(), wanted.service_account().to_owned());
    if facts.accounts.get(node).is_some_and(|on_node| on_node.contains(&account)) {
        return Ok(());
    }
    Err(format!("no unfinished pod of {}/{} runs on node {node}", account.0, account.1))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tulle_certs::SpiffeId;

    use crate::authn::Caller;
    use crate::ca::grant::{Accounts, Facts, decide};

    #[test]
    fn only_the_node_account_gets_others_and_only_what_runs_on_its_node() {
        let cart = "spiffe://cluster.local/ns/shop/sa/cart";
        let own = "spiffe://cluster.local/ns/tulle-system/sa/ztunnel";
        let node = |name| ("tulle-system", "ztunnel", Some(name));
        // caller, impersonated, CSR, expected part of the refusal ("" = granted)
        let cases = [
            (node("node-1"), Some(cart), cart, ""),
            (node("node-1"), None, own, ""),
            (node("node-1"), Some(own), own, ""),
            (node("node-2"), Some(cart), cart, "no unfinished pod of shop/cart"),
            (node("node-9"), Some(cart), cart, "no unfinished pod"),
            (("tulle-system", "ztunnel", None), Some(cart), cart, "no tulle.dev/node claim"),
            (("shop", "ztunnel", Some("node-1")), Some(cart), cart, "its own identity only"),
            (("tulle-system", "other", Some("node-1")), Some(cart), cart, "its own identity only"),
            (("shop", "cart", None), None, cart, ""),
            (("shop", "cart", Some("node-1")), None, cart, ""),
            (("shop", "cart", None), None, own, "names spiffe://cluster.local/ns/tulle"),
            (node("node-1"), Some(cart), own, "the certificate request names"),
            (node("node-1"), None, cart, "the certificate request names"),
            (node("node-1"), Some("cart"), cart, "not one"),
            (node("node-1"), Some(""), cart, "not one"),
            (
                node("node-1"),
                Some("spiffe://other.td/ns/shop/sa/cart"),
                "spiffe://other.td/ns/shop/sa/cart",
                "not of the trust domain",
            ),
            (node("node-1"), Some("spiffe://cluster.local/ns/shop/sa/web"), cart, "no unfinished pod"),
        ];
        let mut accounts = Accounts::new();
        accounts.insert("node-1".into(), BTreeSet::from([("shop".into(), "cart".into())]).into());
        accounts.insert("node-2".into(), BTreeSet::from([("shop".into(), "web".into())]).into());
        for ((namespace, account, node), impersonated, csr, expected) in cases {
            let caller =
                Caller { namespace: namespace.into(), service_account: account.into(), node: node.map(str::to_owned) };
            let decided = decide(&Facts {
                caller: &caller,
                impersonated,
                csr: &csr.parse::<SpiffeId>().expect("valid"),
                trust_domain: "cluster.local",
                root_namespace: "tulle-system",
                accounts: &accounts,
            });
            let case = format!("{caller:?} {impersonated:?} {csr}: {decided:?}");
            match decided {
                Ok(_) => assert!(expected.is_empty(), "{case}"),
                Err(text) => assert!(!expected.is_empty() && text.contains(expected), "{case}"),
            }
        }
    }
}
