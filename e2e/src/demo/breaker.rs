//! The step about circuit breaking: one of two carts gets slow and then dies, and is left alone until it is well again.
//!
//! What each cart did is read from its own log. The breaker is meant to lose a few requests, those by which it learns, so
//! the claim is about their number: three before it opens, and one for each time that the cart is tried again.

use std::time::Duration;

use anyhow::ensure;
use serde_json::Value;

use crate::demo::steps::FRONTEND;
use crate::eventually::eventually;
use crate::lab::Lab;
use crate::scenario;

const URL: &str = "http://cart.shop/breaker";

/// Half a second for an answer, and a breaker for who does not give it.
const RULES: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: cart, namespace: shop}
spec:
  host: cart
  trafficPolicy:
    loadBalancer: {simple: ROUND_ROBIN}
    outlierDetection: {consecutive5xxErrors: 3, interval: 1s, baseEjectionTime: 2s, maxEjectionPercent: 50}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: cart, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: cart, port: 80}]
  rules: [{timeouts: {backendRequest: 500ms}, backendRefs: [{name: cart, port: 80}]}]
";

/// Makes a pod of the shop behave so, past its Service.
pub(super) fn become_(lab: &Lab, pod: &str, how: &str) -> anyhow::Result<()> {
    let url = format!("http://{}:8080/become?{how}", lab.pod_ip("shop", pod)?);
    scenario::all_well(&scenario::calls(lab, FRONTEND, &url, &[])?, 1)
}

/// What each cart has logged of the step's requests so far.
fn served(lab: &Lab) -> [usize; 2] {
    ["shop/cart-0", "shop/cart-1"].map(|pod| scenario::log_lines(lab, pod, &["\"path\":\"/breaker\""]).len())
}

/// How often the frontend's node has ejected a cart that failed again when it was tried.
fn probes(lab: &Lab) -> usize {
    let nodes = ["node-1", "node-2"].iter();
    nodes.map(|node| scenario::log_lines(lab, node, &["endpoint ejected", "why=\"probe\""]).len()).sum()
}

/// Makes requests; how many failed, and what each cart has logged of them.
fn made(lab: &Lab, count: usize) -> anyhow::Result<(usize, [usize; 2])> {
    let (before, many) = (served(lab), count.to_string());
    let options = ["--keep-alive", "--timeout-ms", "20000", "--count", &many];
    let reports: Vec<Value> = scenario::calls(lab, FRONTEND, URL, &options)?;
    ensure!(reports.len() == count, "{} requests were made and not {count}", reports.len());
    let after = served(lab);
    Ok((scenario::failures(&reports).len(), [after[0] - before[0], after[1] - before[1]]))
}

/// Makes requests while the second cart fails: it gets those from which its failure is learnt, and no more.
fn opens(lab: &Lab, how: &str) -> anyhow::Result<String> {
    let tried = probes(lab);
    let (failed, [first, second]) = made(lab, 40)?;
    let learnt = 3 + probes(lab) - tried;
    ensure!(
        failed <= learnt && second <= learnt && first >= 40 - learnt,
        "{how}, it still got {second} of 40 requests and {failed} failed; {learnt} are needed to learn of it"
    );
    Ok(format!("{how} {failed} of 40 failed"))
}

/// Makes requests until the second cart gets its half again.
fn closes(lab: &Lab) -> anyhow::Result<()> {
    eventually("the cart gets its half again", Duration::from_secs(60), || match made(lab, 10) {
        Ok((0, [5, 5])) => Ok(()),
        other => Err(format!("{other:?}")),
    })
}

pub(super) fn opens_and_closes(lab: &Lab) -> anyhow::Result<String> {
    lab.apply_yaml(RULES)?;
    let shown = show(lab);
    // Whatever was seen, the next step finds two carts that are well.
    become_(lab, "cart-1", "")?;
    lab.delete("HTTPRoute", "shop/cart")?;
    lab.delete("DestinationRule", "shop/cart")?;
    shown
}

fn show(lab: &Lab) -> anyhow::Result<String> {
    let (failed, counts) = made(lab, 20)?;
    ensure!((failed, counts) == (0, [10, 10]), "in turn each cart should serve 10 of 20: {counts:?}, {failed} failed");
    become_(lab, "cart-1", "ms=5000")?;
    let slow = opens(lab, "slow")?;
    become_(lab, "cart-1", "")?;
    closes(lab)?;
    // A stopped process takes connections, by its kernel, and answers nothing.
    lab.kill("shop/cart-1", "STOP")?;
    let dead = opens(lab, "dead");
    lab.kill("shop/cart-1", "CONT")?;
    let dead = dead?;
    closes(lab)?;
    Ok(format!("while one of two carts was {slow}, and {dead}; afterwards it served its half again"))
}
