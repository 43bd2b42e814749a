//! Principals of a mesh whose trust domain has several names.
//!
//! While a trust domain is renamed, half of the proxies still show the old name. A principal of a policy that names one
//! of the names therefore stands for all of them, in `principals` and in `notPrincipals` alike: the same account is meant
//! either way. A principal that names another domain, or none (`*/sa/cart`), is left as it is.

use std::borrow::Cow;

use crate::model::{Compare, ConditionKey, Rule, TextMatch};
use crate::translate::Settings;

/// The rules with each principal in every name of the trust domain.
pub(super) fn expand<'a>(rules: &'a [Rule], settings: &Settings) -> Cow<'a, [Rule]> {
    if settings.trust_domain_aliases.is_empty() {
        return Cow::Borrowed(rules);
    }
    let domains: Vec<&str> =
        std::iter::once(&settings.trust_domain).chain(&settings.trust_domain_aliases).map(String::as_str).collect();
    let mut rules = rules.to_vec();
    for rule in &mut rules {
        for source in &mut rule.from {
            compare(&mut source.principals, &domains);
        }
        for when in &mut rule.when {
            if let ConditionKey::SourcePrincipal(values) = &mut when.key {
                compare(values, &domains);
            }
        }
    }
    Cow::Owned(rules)
}

fn compare(values: &mut Compare<TextMatch>, domains: &[&str]) {
    for list in [&mut values.any, &mut values.none] {
        *list = list.iter().flat_map(|value| all_names(value, domains)).collect();
    }
}

fn all_names(value: &TextMatch, domains: &[&str]) -> Vec<TextMatch> {
    let (text, make): (&str, fn(String) -> TextMatch) = match value {
        TextMatch::Exact(text) => (text, TextMatch::Exact),
        TextMatch::Prefix(text) => (text, TextMatch::Prefix),
        // They hold for any domain.
        TextMatch::Suffix(_) | TextMatch::Present => return vec![value.clone()],
    };
    match text.split_once('/') {
        Some((domain, rest)) if domains.contains(&domain) => {
            domains.iter().map(|domain| make(format!("{domain}/{rest}"))).collect()
        }
        _ => vec![value.clone()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_principal_of_one_name_is_one_of_all_names() {
        let domains = ["new", "old"];
        let exact = |text: &str| TextMatch::Exact(text.to_owned());
        let prefix = |text: &str| TextMatch::Prefix(text.to_owned());
        let cases = [
            (exact("old/ns/shop/sa/cart"), vec![exact("new/ns/shop/sa/cart"), exact("old/ns/shop/sa/cart")]),
            (prefix("new/ns/shop/"), vec![prefix("new/ns/shop/"), prefix("old/ns/shop/")]),
            (exact("else/ns/shop/sa/cart"), vec![exact("else/ns/shop/sa/cart")]),
            // `ne*` is a pattern of domains, not the name of one.
            (prefix("ne"), vec![prefix("ne")]),
            (TextMatch::Suffix("/sa/cart".into()), vec![TextMatch::Suffix("/sa/cart".into())]),
            (TextMatch::Present, vec![TextMatch::Present]),
        ];
        for (value, expected) in cases {
            assert_eq!(all_names(&value, &domains), expected);
        }
    }
}
