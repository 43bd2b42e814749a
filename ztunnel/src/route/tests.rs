//! The pure parts one by one: paths in one spelling, shares of turns, changes of headers, paths and locations.

use http::{HeaderMap, HeaderName, HeaderValue};
use proptest::prelude::{Just, Strategy, any, prop};
use proptest::{prop_assert, prop_assert_eq, prop_oneof, proptest};

use crate::route::change;
use crate::route::path::{PathError, normalise};
use crate::route::share::{Salt, hits, pick};
use crate::route::{RequestFacts, split_authority};
use crate::state::{HeaderChanges, PathChange, PathMatch, Redirect, Turns};

#[test]
fn a_path_has_one_spelling_or_none() {
    let cases: &[(&str, Result<&str, PathError>)] = &[
        ("/", Ok("/")),
        ("/a/b", Ok("/a/b")),
        ("*", Ok("*")),
        ("/a/./b", Ok("/a/b")),
        ("/a/../b", Ok("/b")),
        ("/../../a", Ok("/a")),
        ("/..", Ok("/")),
        ("/a/.", Ok("/a/")),
        ("/a/b/..", Ok("/a/")),
        ("/%2e%2E/admin", Ok("/admin")),
        ("/public/%2e%2e/admin", Ok("/admin")),
        ("\\public\\..\\admin", Ok("/admin")),
        ("/%61dmin", Ok("/admin")),
        ("/a%2fb", Ok("/a%2Fb")),
        ("/a%5c..", Ok("/a%5C..")),
        ("/a//b", Ok("/a//b")),
        ("/a//../b", Ok("/a/b")),
        ("/a;v=1/.hidden", Ok("/a;v=1/.hidden")),
        ("/é", Ok("/%C3%A9")),
        ("/%c3%a9", Ok("/%C3%A9")),
        ("/%25%32%65", Ok("/%252e")),
        ("/%2%65", Err(PathError::Escape)),
        ("/%", Err(PathError::Escape)),
        ("/%zz", Err(PathError::Escape)),
        ("/a%00b", Err(PathError::Character)),
        ("/a b", Err(PathError::Character)),
        ("/a#b", Err(PathError::Character)),
        ("/a\u{7f}", Err(PathError::Character)),
        ("", Err(PathError::Relative)),
        ("a/b", Err(PathError::Relative)),
        ("%2fa", Err(PathError::Relative)),
    ];
    for (path, expected) in cases {
        assert_eq!(normalise(path).as_deref(), expected.as_ref().map(|text| *text), "{path:?}");
    }
}

proptest! {
    #[test]
    fn the_spelling_of_a_spelling_is_itself(
        parts in prop::collection::vec(
            prop_oneof![
                Just("/".to_owned()), Just("\\".to_owned()), Just("..".to_owned()), Just(".".to_owned()),
                Just("%2e".to_owned()), Just("%2F".to_owned()), Just("%5c".to_owned()), Just("%25".to_owned()),
                Just("%".to_owned()), Just("é".to_owned()), "[a-zA-Z0-9;=%]{0,3}", any::<char>().prop_map(String::from),
            ],
            0..12,
        ),
    ) {
        let path = format!("/{}", parts.concat());
        if let Ok(once) = normalise(&path) {
            prop_assert!(once.starts_with('/') && once.is_ascii(), "{:?}", once);
            let dots = once.split('/').any(|element| element == "." || element == "..");
            prop_assert!(!dots && !once.contains('\\'), "{:?}", once);
            let again = normalise(&once);
            prop_assert_eq!(again.as_deref(), Ok(&*once));
        }
    }

    #[test]
    fn every_weight_gets_its_share_of_any_window(
        weights in prop::collection::vec(0u32..2_000, 1..17),
        start in 0u64..1 << 48,
        window in 1u64..3_000,
    ) {
        let all: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
        let mut counts = vec![0u64; weights.len()];
        for turn in start..start + window {
            match pick(&weights, turn) {
                Some(index) => counts[index] += 1,
                None => prop_assert_eq!(all, 0),
            }
        }
        for (weight, count) in weights.iter().zip(&counts) {
            let exact = (window * u64::from(*weight)) as f64 / all.max(1) as f64;
            // One for each halving of a list of 16.
            prop_assert!((*count as f64 - exact).abs() < 4.01, "{weights:?}: {count} of {window}, exactly {exact}");
            prop_assert!(*weight > 0 || *count == 0);
        }
    }

    #[test]
    fn a_random_split_passes_the_chi_square_test(
        weights in prop::collection::vec(1u32..100, 2..9),
        start in 0u64..1 << 48,
    ) {
        const REQUESTS: u64 = 20_000;
        let all: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
        let mut counts = vec![0u64; weights.len()];
        for turn in start..start + REQUESTS {
            counts[pick(&weights, turn).unwrap()] += 1;
        }
        let apart = weights.iter().zip(&counts).map(|(weight, count)| {
            let exact = (REQUESTS * u64::from(*weight)) as f64 / all as f64;
            (*count as f64 - exact).powi(2) / exact
        });
        // 5 % of one degree of freedom: of more of them, the limit is higher.
        let apart: f64 = apart.sum();
        prop_assert!(apart < 3.84, "{weights:?}: {counts:?}, chi-square {apart}");
    }
}

#[test]
fn one_in_a_hundred_is_ten_of_any_thousand() {
    for start in (0..5_000).chain([1 << 47, 12_345_678_901]) {
        let canary = (start..start + 1_000).filter(|turn| pick(&[99, 1], *turn) == Some(1)).count();
        assert_eq!(canary, 10, "from {start}");
    }
}

#[test]
fn quiet_nodes_meet_a_small_canary_together() {
    // 1 % over 50 nodes with 20 requests each.
    for route in ["HTTPRoute/shop/cart", "HTTPRoute/shop/web", "HTTPRoute/a/b", "GRPCRoute/shop/cart"] {
        let hits: usize = (1..=50)
            .map(|node| {
                let turns = Turns::of(&format!("node-{node}"), route, "[0]");
                (0..20).filter(|_| pick(&[99, 1], turns.take()) == Some(1)).count()
            })
            .sum();
        assert!((5..=15).contains(&hits), "{route}: {hits}");
    }
}

#[test]
fn an_edit_of_weights_goes_on_where_it_was() {
    // Edited before every request, between 1 % and 2 %: neither starves nor floods the canary.
    let canary = (0..10_000u64).filter(|turn| pick(&[99, 1 + (turn % 2) as u32], *turn) == Some(1)).count();
    assert!((100..=200).contains(&canary), "{canary}");
}

#[test]
fn copies_and_faults_do_not_follow_the_backend() {
    for salt in [Salt::Mirror(0), Salt::Mirror(1), Salt::Delay, Salt::Abort] {
        let mut both = [[0u32; 2]; 2];
        for turn in 0..100_000u64 {
            let backend = pick(&[50, 50], turn).unwrap();
            both[backend][usize::from(hits(salt, 10, 100, turn))] += 1;
        }
        for of_backend in both {
            assert!((4_900..=5_100).contains(&of_backend[1]), "{salt:?}: {both:?}");
        }
    }
    assert!((0..1_000).all(|turn| hits(Salt::Delay, 1, 1, turn)));
    assert!(!(0..1_000).any(|turn| hits(Salt::Delay, 0, 100, turn)));
}

#[test]
fn prefixes_are_replaced_as_the_api_says() {
    let prefix = |text: &str| PathMatch::Prefix(text.trim_end_matches('/').into());
    let cases = [
        ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
        ("/foo", "/foo", "/xyz", "/xyz"),
        ("/foo/", "/foo", "/xyz", "/xyz/"),
        ("/foo/bar", "/foo", "", "/bar"),
        ("/foo/", "/foo", "", "/"),
        ("/foo", "/foo", "", "/"),
        ("/foo/", "/foo", "/", "/"),
        ("/foo", "/foo", "/", "/"),
    ];
    for (path, matched, replacement, expected) in cases {
        let change = PathChange::Prefix(replacement.into());
        assert_eq!(change::path(&change, &prefix(matched), path), expected, "{path} {matched} {replacement}");
    }
    let change = PathChange::Prefix("/v2".into());
    assert_eq!(change::path(&change, &PathMatch::Any, "/a"), "/v2/a");
    assert_eq!(change::path(&PathChange::Full("/x".into()), &PathMatch::Any, "/a"), "/x");
}

#[test]
fn a_redirect_leads_where_the_api_says() {
    let headers = HeaderMap::new();
    let facts = |port: u16| RequestFacts {
        method: "GET",
        scheme: "http",
        authority: "cart.shop:8080",
        port,
        path: "/a/b",
        query: Some("x=1"),
        headers: &headers,
    };
    let none = Redirect { scheme: None, hostname: None, port: None, path: None, status: 302 };
    let cases = [
        (none.clone(), 80, "http://cart.shop/a/b?x=1"),
        (none.clone(), 8080, "http://cart.shop:8080/a/b?x=1"),
        (Redirect { scheme: Some("https".into()), ..none.clone() }, 8080, "https://cart.shop/a/b?x=1"),
        (Redirect { scheme: Some("http".into()), ..none.clone() }, 8080, "http://cart.shop/a/b?x=1"),
        (Redirect { port: Some(80), ..none.clone() }, 8080, "http://cart.shop/a/b?x=1"),
        (
            Redirect { port: Some(8443), scheme: Some("https".into()), ..none.clone() },
            80,
            "https://cart.shop:8443/a/b?x=1",
        ),
        (Redirect { port: Some(443), scheme: Some("https".into()), ..none.clone() }, 80, "https://cart.shop/a/b?x=1"),
        (Redirect { hostname: Some("example.org".into()), ..none.clone() }, 80, "http://example.org/a/b?x=1"),
        (Redirect { path: Some(PathChange::Prefix("/v2".into())), ..none }, 80, "http://cart.shop/v2/b?x=1"),
    ];
    for (redirect, port, expected) in cases {
        assert_eq!(change::location(&redirect, &PathMatch::Prefix("/a".into()), &facts(port)), expected);
    }
}

#[test]
fn headers_are_set_then_added_then_removed() {
    let pair =
        |name: &'static str, value: &'static str| (HeaderName::from_static(name), HeaderValue::from_static(value));
    let changes = HeaderChanges {
        set: vec![pair("a", "set")],
        add: vec![pair("a", "added"), pair("b", "added")],
        remove: vec![HeaderName::from_static("c"), HeaderName::from_static("b")],
    };
    let mut headers = HeaderMap::new();
    for (name, value) in [pair("a", "1"), pair("a", "2"), pair("b", "1"), pair("c", "1"), pair("d", "1")] {
        headers.append(name, value);
    }
    change::headers(&changes, &mut headers);
    let of = |name: &str| headers.get_all(name).iter().map(|v| v.to_str().unwrap()).collect::<Vec<_>>();
    assert_eq!((of("a"), of("b"), of("c"), of("d")), (vec!["set", "added"], vec![], vec![], vec!["1"]));
}

#[test]
fn an_authority_is_taken_apart() {
    let cases = [
        ("cart", ("cart", None)),
        ("cart:80", ("cart", Some("80"))),
        ("[::1]", ("[::1]", None)),
        ("[::1]:80", ("[::1]", Some("80"))),
        ("::1", ("::1", None)),
    ];
    for (authority, expected) in cases {
        assert_eq!(split_authority(authority), expected);
    }
}
