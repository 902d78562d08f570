//! What images name as their backing file.

use super::*;

#[test]
fn another_name_of_the_backing_file_is_written_and_told() {
    if !have_qemu_img("change-backing-file") {
        return;
    }
    let chain = chain(3, "");
    let graph = chain.open();
    let user = device(&graph, "n2");
    let before = picture(&graph);
    let refusal = |device: &str, node: &str, name: &str| {
        graph.change_backing_file(device, node, name).unwrap_err().to_string()
    };
    assert_eq!(refusal("zz", "n2", "x"), "Cannot find device='zz' nor node-name='zz'");
    assert_eq!(refusal("n2", "zz", "x"), "Cannot find device='' nor node-name='zz'");
    assert_eq!(refusal("n1", "n1", "x"), "Need a root block node");
    assert_eq!(
        refusal("n2", "n0", "x"),
        "not allowing backing file change on an image without a backing file"
    );
    let long = "y".repeat(1100);
    let error = refusal("n2", "n1", &long);
    assert!(error.starts_with("Could not change backing file to 'yyy"), "{error}");
    let held = graph.claim(&["n2"], "mirror").unwrap();
    assert_eq!(refusal("n2", "n1", "x"), "Need a root block node");
    drop(held);
    assert_eq!(picture(&graph), before);
    graph.change_backing_file("n2", "n1", "0.qcow2").unwrap();
    let n1 = graph.get("n1").unwrap();
    assert!(n1.read_only());
    let info = serde_json::to_value(n1.info(false).unwrap()).unwrap();
    assert_eq!(info["image"]["backing-filename"], "0.qcow2");
    assert_eq!(info["image"]["full-backing-filename"], path(&chain.images[0]));
    assert_eq!(info["image"]["backing-filename-format"], "qcow2");
    assert_eq!(info["file"], path(&chain.images[1]));
    graph.change_backing_file("n2", "n2", "elsewhere.qcow2").unwrap();
    let info = serde_json::to_value(user.node().info(false).unwrap()).unwrap();
    assert!(info["file"].as_str().unwrap().starts_with("json:"), "{info}");
    graph.change_backing_file("n2", "n2", "1.qcow2").unwrap();
    assert!(read(user.link()) == chain.contents);
    drop((user, n1));
    for n in [2, 1, 0] {
        graph.remove(&format!("n{n}")).unwrap();
    }
    assert!(common::qemu_contents(chain.dir.path(), chain.top(), None) == chain.contents);
}
