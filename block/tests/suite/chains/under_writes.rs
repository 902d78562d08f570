//! Streams and commits while the disk is written, cancelled at any step, and with errors.

use super::*;

#[test]
fn chains_are_shortened_under_writes_and_qemu_finds_the_same_disk_in_them() {
    if !have_qemu_img("chains under writes") {
        return;
    }
    for options in ["cluster_size=4k", "compat=0.10", "extended_l2=on", "cluster_size=2M"] {
        for (work, layers) in Work::all() {
            let chain = chain(4, options);
            let graph = chain.open();
            let user = device(&graph, "n3");
            let stop = AtomicBool::new(false);
            let (wrote, writes) = channel();
            let model = thread::scope(|scope| {
                let writer = scope.spawn(|| {
                    let wrote = || wrote.send(()).unwrap();
                    write_on(user.link(), chain.contents.clone(), &stop, &wrote)
                });
                writes.recv().unwrap();
                let mut operation = work.start(&graph);
                let control = Control::default();
                operation.run(&control).unwrap();
                let (done, total) = control.progress();
                assert!(done == total && total >= 4 * MIB as u64, "{done} of {total}");
                (0..5).for_each(|_| writes.recv().unwrap());
                operation.commit().unwrap();
                drop(operation);
                (0..5).for_each(|_| writes.recv().unwrap());
                stop.store(true, Ordering::Release);
                writer.join().unwrap()
            });
            assert!(read(user.link()) == model, "{options} {work:?}");
            let depth = user.node().info(false).unwrap().backing_file_depth;
            assert_eq!(depth as usize, layers.len() - 1);
            for n in 0..3 {
                assert!(graph.get(&format!("n{n}")).unwrap().read_only(), "n{n}");
            }
            let file = serde_json::to_value(user.node().info(false).unwrap()).unwrap();
            assert_eq!(file["file"], path(chain.top()), "the image names what is below");
            drop(user);
            for n in [3, 2, 1, 0] {
                graph.remove(&format!("n{n}")).unwrap();
            }
            chain.closed_is(&layers, &model);
        }
    }
}

#[test]
fn an_operation_cancelled_at_any_step_leaves_the_chain_as_it_was() {
    if !have_qemu_img("cancelled chains") {
        return;
    }
    for (work, layers) in Work::all() {
        let mut steps = 1;
        loop {
            // Anew, since what was copied before stays copied.
            let chain = chain(4, "cluster_size=64k");
            let graph = chain.open();
            let user = device(&graph, "n3");
            let before = picture(&graph);
            let mut operation = work.start(&graph);
            // So slow that it waits after each piece, until the speed is another one.
            let control = Control::default();
            control.set_speed(1);
            let ended = thread::scope(|scope| {
                let run = scope.spawn(|| operation.run(&control));
                for step in 0..steps {
                    let before = control.progress().0;
                    // A speed that is set before the operation waits is the one by which it then does.
                    let mut speed = 2 + step % 2;
                    while control.progress().0 == before && !run.is_finished() {
                        control.set_speed(speed);
                        speed ^= 1;
                        thread::sleep(std::time::Duration::from_millis(1));
                    }
                }
                control.cancel(true);
                run.join().unwrap()
            });
            match ended {
                Err(Error::Cancelled) => {
                    operation.abort();
                    drop(operation);
                    assert_eq!(picture(&graph), before, "{work:?} step {steps}");
                    assert!(read(user.link()) == chain.contents, "{work:?} step {steps}");
                    chain.survives(&chain.contents);
                    steps += 1;
                }
                Ok(()) => {
                    // The whole of it, and still nothing is different until the commit, but that the
                    // base takes writes.
                    let either = |list: Vec<String>| list.join(";").replace(" rw ", " ro ");
                    assert_eq!(either(picture(&graph)), either(before), "{work:?}");
                    chain.survives(&chain.contents);
                    operation.commit().unwrap();
                    chain.survives(&chain.contents);
                    drop((operation, user));
                    for n in [3, 2, 1, 0] {
                        graph.remove(&format!("n{n}")).unwrap();
                    }
                    chain.closed_is(&layers, &chain.contents);
                    break;
                }
                Err(error) => panic!("{work:?} step {steps}: {error}"),
            }
        }
        assert!(steps > 1, "{work:?} has {steps} steps");
    }
}

#[test]
fn a_read_error_stops_fails_or_is_waited_out() {
    if !have_qemu_img("errors in chains") {
        return;
    }
    for work in [Work::Stream(stream(None)), Work::Commit(commit("n2", "n0"))] {
        for policy in [OnError::Report, OnError::Stop, OnError::Ignore] {
            let chain = chain(4, "cluster_size=64k");
            // The last data cluster of an image in the middle is missing for a while.
            let image = &chain.images[2];
            let whole = std::fs::read(image).unwrap();
            let file = std::fs::OpenOptions::new().write(true).open(image).unwrap();
            let graph = chain.open();
            let user = device(&graph, "n3");
            file.set_len(whole.len() as u64 - 200_000).unwrap();
            let work = match &work {
                Work::Stream(o) => Work::Stream(StreamOptions { on_error: policy, ..o.clone() }),
                Work::Commit(o) => Work::Commit(CommitOptions { on_error: policy, ..o.clone() }),
            };
            let mut operation = work.start(&graph);
            let (control, told) = watched();
            let result = thread::scope(|scope| {
                let run = scope.spawn(|| operation.run(&control));
                let action = match policy {
                    OnError::Report => Action::Report,
                    OnError::Ignore => Action::Ignore,
                    _ => Action::Stop,
                };
                let expected = Notice::Error { read: true, action, nospace: false };
                assert_eq!(told.recv().unwrap(), expected);
                if policy != OnError::Report {
                    std::fs::write(image, &whole).unwrap();
                }
                if policy == OnError::Stop {
                    assert_eq!(told.recv().unwrap(), Notice::Paused);
                    control.resume();
                }
                run.join().unwrap()
            });
            if policy == OnError::Report {
                let error = result.unwrap_err().to_string();
                assert!(error.contains("beyond the end of the file"), "{error}");
                operation.abort();
                std::fs::write(image, &whole).unwrap();
            } else {
                result.unwrap();
                operation.commit().unwrap();
            }
            drop(operation);
            assert!(read(user.link()) == chain.contents, "{work:?}");
        }
    }
}
