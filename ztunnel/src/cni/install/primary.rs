//! Which configuration a node's container runtime would use without us, and the list that is ours made of it.
//!
//! Runtimes take the first file by name that they can read. So ours is the primary's plugins with our own at their end, under a
//! name that sorts before it; the primary's file is never touched. Its text is cut and joined, not read and written again, so that
//! numbers, order and what nobody here knows stay as they are. A file that leads to our plugin already (an aggregating plugin's,
//! which took ours for its first network) is not a primary, or the two would wrap each other for ever. All of it is pure.

use serde_json::{Value, json};

use crate::cni::conf::{PLUGIN, VERSIONS};
use crate::cni::json;

/// Names of our file, the usual one first; others are for nodes where a configuration sorts before that.
pub const OWN: [&str; 3] = ["00-tulle.conflist", "00--tulle.conflist", "0--tulle.conflist"];

/// A configuration of the folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its file's name.
    pub name: String,
    /// Its text, or why there is none.
    pub text: Result<String, String>,
}

/// What is to be in our file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Our file's name.
    pub name: &'static str,
    /// Its content.
    pub text: String,
    /// The primary's name.
    pub primary: String,
}

/// What becomes of our file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// It is to be so.
    Chain(Chain),
    /// It stays as it is: what it was made of cannot be read for now.
    Keep(String),
    /// There is nothing to chain to.
    Nothing(String),
    /// What there is cannot be chained to.
    Refuse(String),
}

/// Whether a runtime reads a file of this name.
pub fn is_configuration(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(_, extension)| matches!(extension, "conf" | "conflist" | "json"))
}

/// The primary's name that our file says.
pub fn primary_of(text: &str) -> Option<String> {
    let list: Value = serde_json::from_str(text).ok()?;
    let own = list["plugins"].as_array()?.iter().find(|plugin| plugin["type"] == PLUGIN)?;
    own["primary"].as_str().map(str::to_owned)
}

/// Decides. `others` are the configurations of the folder besides ours, in any order; `last` is the primary that our present file
/// was made of; `settings` are the fields of our plugin.
pub fn choose(mut others: Vec<Candidate>, last: Option<&str>, settings: &Value) -> Choice {
    others.retain(|candidate| is_configuration(&candidate.name) && !OWN.contains(&candidate.name.as_str()));
    others.sort_by(|a, b| a.name.cmp(&b.name));
    let mut broken = Vec::new();
    let mut wrapping = Vec::new();
    let mut first = None;
    for candidate in &others {
        let read = candidate.text.clone().and_then(|text| check(&candidate.name, &text).map(|value| (value, text)));
        match read {
            Ok((value, _)) if json::mentions_type(&value, PLUGIN) => wrapping.push(candidate.name.as_str()),
            Ok((_, text)) => {
                first = first.or(Some((candidate.name.as_str(), text)));
            }
            // A file that is half written must not hand the node over to another network.
            Err(why) if first.is_none() && last == Some(candidate.name.as_str()) => {
                return Choice::Keep(format!(
                    "{} cannot be read ({why}); the list made of it before stays",
                    candidate.name
                ));
            }
            Err(why) => broken.push(format!("{} ({why})", candidate.name)),
        }
    }
    let Some((primary, text)) = first else {
        let unusable = if broken.is_empty() { String::new() } else { format!("; unusable: {}", broken.join(", ")) };
        return Choice::Nothing(format!("no CNI configuration to chain to{unusable}"));
    };
    let before = others.iter().map(|it| it.name.as_str()).filter(|name| !wrapping.contains(name));
    let least = before.min().unwrap_or(primary);
    let Some(name) = OWN.into_iter().find(|own| *own < least) else {
        return Choice::Refuse(format!("{least} sorts before every name that our list may have; rename it"));
    };
    match compose(primary, &text, settings) {
        Ok(text) => Choice::Chain(Chain { name, text, primary: primary.to_owned() }),
        Err(why) => Choice::Refuse(format!("{primary} cannot be chained to: {why}")),
    }
}

/// Whether a runtime would take the file.
fn check(name: &str, text: &str) -> Result<Value, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let has_type = |plugin: &Value| plugin["type"].as_str().is_some_and(|kind| !kind.is_empty());
    if !name.ends_with(".conflist") {
        return if has_type(&value) { Ok(value) } else { Err("it has no type".to_owned()) };
    }
    let plugins = value["plugins"].as_array().filter(|plugins| !plugins.is_empty()).ok_or("it has no plugins")?;
    if !plugins.iter().all(has_type) {
        return Err("one of its plugins has no type".to_owned());
    }
    if value["name"].as_str().is_none_or(str::is_empty) {
        return Err("it has no name".to_owned());
    }
    Ok(value)
}

/// The primary's text as a list with our plugin at its end.
fn compose(name: &str, text: &str, settings: &Value) -> Result<String, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let version = value["cniVersion"].as_str().unwrap_or("0.1.0");
    if !VERSIONS.contains(&version) {
        let known = VERSIONS.join(", ");
        return Err(format!("its cniVersion is {version}, and a chain with tulle-cni has to be of {known}"));
    }
    let mut own = settings.clone();
    own["type"] = PLUGIN.into();
    own["primary"] = name.into();
    let own = own.to_string();
    let odd = || "its plugins cannot be found in it".to_owned();
    if name.ends_with(".conflist") {
        return json::appended(&spoken_by_both(text, &value), "plugins", &own).ok_or_else(odd);
    }
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let network = value["name"].as_str().filter(|network| !network.is_empty()).unwrap_or(stem);
    let (version, network) = (json!(version), json!(network));
    Ok(format!("{{\"cniVersion\":{version},\"name\":{network},\"plugins\":[{},{own}]}}\n", text.trim()))
}

/// A list may offer further versions, of which the runtime takes the newest that it knows; what our plugin does not speak
/// is left out.
fn spoken_by_both(text: &str, value: &Value) -> String {
    let (Some(offered), Some(span)) = (value["cniVersions"].as_array(), json::value_span(text, "cniVersions")) else {
        return text.to_owned();
    };
    let known = |version: &&Value| version.as_str().is_some_and(|version| VERSIONS.contains(&version));
    if offered.iter().all(|version| known(&version)) {
        return text.to_owned();
    }
    let kept: Vec<&Value> = offered.iter().filter(known).collect();
    format!("{}{}{}", &text[..span.start], json!(kept), &text[span.end..])
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{Candidate, Chain, Choice, OWN, choose, is_configuration, primary_of};

    const LIST: &str = "{\n  \"cniVersion\": \"0.4.0\",\n  \"name\": \"k8s-pod-network\",\n  \"plugins\": [\n    {\"type\": \"calico\", \"mtu\": 1.0, \"unknown\": [12345678901234567890123]},\n    {\"type\": \"portmap\", \"capabilities\": {\"portMappings\": true}}\n  ],\n  \"disableCheck\": true\n}\n";
    const SINGLE: &str = r#"{"cniVersion":"0.3.1","name":"dbnet","type":"bridge","ipam":{"type":"host-local"}}"#;

    fn settings() -> Value {
        json!({"socket": "/run/tulle/cni.sock"})
    }

    fn files(files: &[(&str, &str)]) -> Vec<Candidate> {
        files.iter().map(|(name, text)| Candidate { name: (*name).into(), text: Ok((*text).into()) }).collect()
    }

    fn chain(files_: &[(&str, &str)]) -> Chain {
        match choose(files(files_), None, &settings()) {
            Choice::Chain(chain) => chain,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_first_valid_file_by_name_is_the_primary_and_stays_word_for_word() {
        let found = chain(&[
            ("99-loopback.conf", SINGLE),
            ("10-calico.conflist", LIST),
            ("calico.yaml", "x"),
            ("05-x.conf", "{}"),
        ]);
        assert_eq!((found.name, found.primary.as_str()), (OWN[0], "10-calico.conflist"));
        let own = r#",{"primary":"10-calico.conflist","socket":"/run/tulle/cni.sock","type":"tulle-cni"}"#;
        assert_eq!(found.text, LIST.replace("}}\n  ]", &format!("}}}}{own}\n  ]")));
        assert_eq!(primary_of(&found.text).as_deref(), Some("10-calico.conflist"));
    }

    #[test]
    fn a_single_plugin_becomes_a_list() {
        let found = chain(&[("10-bridge.conf", SINGLE)]);
        let list: Value = serde_json::from_str(&found.text).unwrap();
        assert_eq!((&list["cniVersion"], &list["name"]), (&json!("0.3.1"), &json!("dbnet")));
        assert_eq!(list["plugins"][0], serde_json::from_str::<Value>(SINGLE).unwrap());
        assert_eq!(list["plugins"][1]["type"], "tulle-cni");
        assert!(found.text.contains(SINGLE), "word for word");
    }

    #[test]
    fn our_file_sorts_before_every_other() {
        for (other, expected) in [
            ("10-calico.conflist", OWN[0]),
            ("00-multus.conflist", OWN[1]),
            ("00--a.conflist", OWN[2]),
            ("0-a.conflist", OWN[2]),
        ] {
            let found = chain(&[(other, LIST)]);
            assert_eq!(found.name, expected, "{other}");
            assert!(found.name < other && is_configuration(found.name));
        }
        let before = choose(files(&[("!.conflist", LIST)]), None, &settings());
        assert!(matches!(&before, Choice::Refuse(why) if why.contains("!.conflist")), "{before:?}");
        // A broken file that sorts first may be whole in a moment.
        assert_eq!(chain(&[("00-a.conf", "{"), ("10-b.conflist", LIST)]).name, OWN[1]);
    }

    #[test]
    fn an_aggregator_that_leads_to_us_is_no_primary() {
        let multus = r#"{"cniVersion":"0.3.1","name":"m","type":"multus","delegates":[{"plugins":[{"type":"bridge"},{"type":"tulle-cni"}]}]}"#;
        let found = chain(&[("00-multus.conf", multus), ("10-calico.conflist", LIST)]);
        assert_eq!((found.name, found.primary.as_str()), (OWN[0], "10-calico.conflist"));
        let plain = multus.replace("tulle-cni", "tuning");
        let found = chain(&[("00-multus.conf", &plain), ("10-calico.conflist", LIST)]);
        assert_eq!((found.name, found.primary.as_str()), (OWN[1], "00-multus.conf"));
    }

    #[test]
    fn a_broken_primary_changes_nothing_and_a_removed_one_does() {
        let broken = [("10-calico.conflist", "{\"cniVersion\""), ("87-podman.conflist", LIST)];
        let kept = choose(files(&broken), Some("10-calico.conflist"), &settings());
        assert!(matches!(&kept, Choice::Keep(why) if why.contains("10-calico.conflist")), "{kept:?}");
        let removed = choose(files(&broken[1..]), Some("10-calico.conflist"), &settings());
        assert!(matches!(&removed, Choice::Chain(chain) if chain.primary == "87-podman.conflist"), "{removed:?}");
        for (name, text) in [
            ("a.conflist", r#"{"name":"a","plugins":[]}"#),
            ("a.conflist", r#"{"name":"a","plugins":[{}]}"#),
            ("a.conflist", r#"{"plugins":[{"type":"a"}]}"#),
            ("a.conf", LIST),
        ] {
            let nothing = choose(files(&[(name, text)]), None, &settings());
            assert!(matches!(&nothing, Choice::Nothing(why) if why.contains(name)), "{nothing:?}");
        }
        assert!(matches!(choose(Vec::new(), None, &settings()), Choice::Nothing(_)));
    }

    #[test]
    fn a_version_that_has_no_chains_or_is_not_known_is_refused() {
        for version in ["0.2.0", "2.0.0"] {
            let text = LIST.replace("0.4.0", version);
            let refused = choose(files(&[("10-a.conflist", &text)]), None, &settings());
            assert!(matches!(&refused, Choice::Refuse(why) if why.contains(version)), "{refused:?}");
        }
        let offering = LIST.replace("\"name\"", "\"cniVersions\": [\"0.4.0\", \"1.1.0\", \"1.9.0\"], \"name\"");
        let list: Value = serde_json::from_str(&chain(&[("10-a.conflist", &offering)]).text).unwrap();
        assert_eq!(list["cniVersions"], json!(["0.4.0", "1.1.0"]));
    }
}
