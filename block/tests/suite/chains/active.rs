//! Commits of the uppermost image, which somebody uses.

use super::*;

#[test]
fn a_commit_of_the_uppermost_image_is_ready_first_and_moves_readers_to_the_base() {
    if !have_qemu_img("commit of the top") {
        return;
    }
    let chain = chain(3, "");
    let graph = chain.open();
    let options = CommitOptions { device: "n2".to_owned(), ..CommitOptions::default() };
    let reader = graph.attach("n2", User::device("vda", false, false)).unwrap();
    let base = graph.get("n0").unwrap().size();
    let mut operation = Commit::new(&graph, &options).unwrap();
    assert!(operation.is_active());
    assert!(graph.get("n0").unwrap().size() == base && (base as usize) < SIZE);
    let control = Control::default();
    control.complete();
    operation.run(&control).unwrap();
    assert_eq!(reader.node().name(), "n2", "nothing took effect yet");
    operation.commit().unwrap();
    assert_eq!(reader.node().name(), "n0");
    assert_eq!(reader.node().size() as usize, SIZE, "the base has grown");
    assert!(read(reader.link()) == chain.contents);
}

#[test]
fn an_image_in_use_is_committed_left_or_given_up_under_writes() {
    if !have_qemu_img("active commit") {
        return;
    }
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum End {
        Complete,
        Leave,
        Cancel,
    }
    for options in ["cluster_size=4k", "compat=0.10", "extended_l2=on"] {
        for base in ["n0", "n2"] {
            for end in [End::Complete, End::Leave, End::Cancel] {
                let chain = chain(4, options);
                let graph = chain.open();
                let user = device(&graph, "n3");
                let before = picture(&graph);
                let stop = AtomicBool::new(false);
                let (wrote, writes) = channel();
                let (control, told) = watched();
                let model = thread::scope(|scope| {
                    let writer = scope.spawn(|| {
                        let wrote = || wrote.send(()).unwrap();
                        write_on(user.link(), chain.contents.clone(), &stop, &wrote)
                    });
                    writes.recv().unwrap();
                    let mut operation = Commit::new(&graph, &commit("n3", base)).unwrap();
                    assert!(operation.is_active());
                    let error = Commit::new(&graph, &commit("n2", "n1")).err().unwrap().to_string();
                    assert_eq!(error, "Need a root block node");
                    let run = scope.spawn(|| {
                        let result = operation.run(&control);
                        (operation, result)
                    });
                    assert_eq!(told.recv().unwrap(), Notice::Ready);
                    (0..20).for_each(|_| writes.recv().unwrap());
                    match end {
                        End::Complete => control.complete(),
                        End::Leave => control.cancel(false),
                        End::Cancel => control.cancel(true),
                    }
                    let (mut operation, result) = run.join().unwrap();
                    assert_eq!(user.node().name(), "n3", "nothing took effect yet");
                    if end == End::Cancel {
                        assert!(matches!(result, Err(Error::Cancelled)));
                        operation.abort();
                    } else {
                        result.unwrap();
                        operation.commit().unwrap();
                    }
                    drop(operation);
                    (0..20).for_each(|_| writes.recv().unwrap());
                    stop.store(true, Ordering::Release);
                    writer.join().unwrap()
                });
                let now = if end == End::Complete { base } else { "n3" };
                assert_eq!(user.node().name(), now);
                let found = read(user.link());
                assert_eq!(found.len(), model.len(), "{options} {base} {end:?}");
                let wrong = found.iter().zip(&model).position(|(a, b)| a != b);
                assert_eq!(wrong, None, "{options} {base} {end:?}: the first byte that differs");
                if end != End::Complete {
                    assert_eq!(picture(&graph), before);
                }
                drop(user);
                for n in [3, 2, 1, 0] {
                    graph.remove(&format!("n{n}")).unwrap();
                }
                let image = |name: &str| &chain.images[name[1..].parse::<usize>().unwrap()];
                chain.images.iter().for_each(|image| check(image));
                assert!(common::qemu_contents(chain.dir.path(), image(now), None) == model);
            }
        }
    }
}
