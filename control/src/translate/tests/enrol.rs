//! When peers send tunnels to a pod of the mesh, by what was published of its capture.

use crate::model::World;
use crate::source::decode;
use crate::source::tree;
use crate::translate::{Settings, enrol};

#[test]
fn a_pod_gets_tunnels_once_its_capture_is_published() {
    for (annotations, in_a_folder, in_a_cluster) in [
        ("", true, false),
        ("ambient.istio.io/redirection: pending", false, false),
        ("ambient.istio.io/redirection: enabled", true, true),
    ] {
        let text = [
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {tulle.dev/mesh: enabled}}\n".to_owned(),
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: shop, annotations: {{{annotations}}}}}\n\
                 spec: {{nodeName: n}}\nstatus: {{podIP: 10.0.0.1}}\n"
            ),
        ];
        let mut world = World::default();
        for document in &text {
            for object in decode::document(&tree::parse(document).expect("yaml")).objects {
                world.put(object);
            }
        }
        let pod = world.pods.values().next().expect("a pod").clone();
        for (captured_unless_told, expected) in [(true, in_a_folder), (false, in_a_cluster)] {
            let settings = Settings { captured_unless_told, ..Settings::default() };
            let found = enrol::speaks_hbone(&pod, &world, &settings);
            assert_eq!(found, expected, "[{annotations}] {captured_unless_told}");
            assert_eq!(enrol::why_outside(&pod, &world, &settings).is_none(), expected, "[{annotations}]");
        }
    }
}
