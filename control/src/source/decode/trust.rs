//! ClusterTrustBundle of certificates.k8s.io: the roots of another trust domain, if its label names one.
//!
//! One that cannot be read is an object without roots, so that its condition can say so: whom it would vouch for is not
//! believed, which is the closed side. Bundles without the label belong to others and are passed over.

use std::sync::Arc;

use tulle_certs::Roots;
use tulle_proto::names::LABEL_TRUST_DOMAIN;

use crate::model::{Meta, Object, TrustBundle};
use crate::source::decode::policy::PolicyResult;
use crate::source::tree::{Cursor, FieldError, Read};

/// Whether the object is for us.
pub(super) fn is_labelled(at: &Cursor<'_>) -> bool {
    !at.get("metadata").get("labels").get(LABEL_TRUST_DOMAIN).is_absent()
}

pub(super) fn bundle(at: &Cursor<'_>, meta: Meta, error: Option<FieldError>) -> PolicyResult {
    let read = error.map_or_else(|| spec(at), Err);
    let error = read.as_ref().err().cloned();
    let bundle = TrustBundle { meta, spec: read.map_err(|error| error.to_string()) };
    Ok((Object::TrustBundle(Arc::new(bundle)), error))
}

fn spec(at: &Cursor<'_>) -> Read<(String, Roots)> {
    let label = at.get("metadata").get("labels").get(LABEL_TRUST_DOMAIN);
    let domain = label.required_text()?;
    tulle_certs::trust_domain(domain).map_err(|error| label.error(error.to_string()))?;
    let pem = at.get("spec").get("trustBundle");
    let roots = Roots::from_pem(pem.required_text()?.as_bytes()).and_then(Roots::of_authorities);
    Ok((domain.to_owned(), roots.map_err(|error| pem.error(error.to_string()))?))
}
