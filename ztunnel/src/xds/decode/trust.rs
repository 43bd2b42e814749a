//! Decodes `tulle.mesh.v1alpha1.TrustBundle`.
//!
//! An unknown field may be what narrows whom a root may vouch for, so it rejects the bundle.

use prost::Message;
use rustls::pki_types::CertificateDer;
use tulle_certs::Roots;
use tulle_proto::mesh as wire;
use tulle_proto::names::TRUST_BUNDLE;

use crate::state::TrustBundle;
use crate::xds::decode::schemas::whole;
use crate::xds::wire::Schema;

const BUNDLE: Schema = Schema { scalars: &[1, 2], messages: &[] };

/// See the module's header. The error is what is wrong, as one clause.
pub(super) fn bundle(bytes: &[u8], id: &str, version: &str) -> Result<TrustBundle, String> {
    let from = wire::TrustBundle::decode(bytes).map_err(|error| format!("it is no TrustBundle: {error}"))?;
    if id.strip_prefix(TRUST_BUNDLE) != Some(&from.trust_domain) {
        return Err("its content has another name than the resource".to_owned());
    }
    tulle_certs::trust_domain(&from.trust_domain).map_err(|error| error.to_string())?;
    whole(bytes, &BUNDLE)?;
    let roots = Roots::from_der(from.roots.into_iter().map(|root| CertificateDer::from(Vec::from(root))).collect());
    let roots = roots.and_then(Roots::of_authorities).map_err(|error| error.to_string())?;
    Ok(TrustBundle { id: id.into(), version: version.into(), trust_domain: from.trust_domain.into(), roots })
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use tulle_certs::ca::Authority;
    use tulle_proto::mesh as wire;

    use super::bundle;

    #[test]
    fn a_bundle_is_taken_whole_or_not_at_all() {
        let authority = Authority::open(tempfile::tempdir().unwrap().path(), 1_800_000_000).unwrap();
        let root = authority.roots().certificates()[0].to_vec();
        let encoded = |domain: &str, roots: Vec<Vec<u8>>| {
            wire::TrustBundle { trust_domain: domain.to_owned(), roots: roots.into_iter().map(Into::into).collect() }
                .encode_to_vec()
        };
        let good = encoded("b.example", vec![root.clone()]);
        let taken = bundle(&good, "TrustBundle/b.example", "v1").unwrap();
        assert_eq!((&*taken.trust_domain, taken.roots.certificates().len()), ("b.example", 1));
        let more: Vec<u8> = good.iter().copied().chain([0x18, 1]).collect();
        for (bytes, id, expected) in [
            (good.clone(), "TrustBundle/c.example", "another name"),
            (good.clone(), "b.example", "another name"),
            (more, "TrustBundle/b.example", "must not ignore"),
            (encoded("B", vec![root.clone()]), "TrustBundle/B", "trust domain"),
            (encoded("b.example", vec![]), "TrustBundle/b.example", "no certificate"),
            (encoded("b.example", vec![root.clone(), vec![1, 2]]), "TrustBundle/b.example", "certificate 2"),
            (encoded("b.example", vec![root.clone(); 65]), "TrustBundle/b.example", "more than 64"),
            (vec![0xff], "TrustBundle/b.example", "no TrustBundle"),
        ] {
            let error = bundle(&bytes, id, "v1").unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
