use std::sync::mpsc::{Receiver, channel};
use std::thread;

use super::*;

fn control() -> (Control, Receiver<Notice>) {
    let (tell, told) = channel();
    let tell = Mutex::new(tell);
    let control = Control::new(move |notice| tell.lock().unwrap().send(notice).unwrap());
    (control, told)
}

fn io_error(errno: i32) -> Error {
    let source = std::io::Error::from_raw_os_error(errno);
    Error::Io { operation: "write", filename: "f".to_owned(), offset: 0, source }
}

#[test]
fn a_paused_operation_rests_until_it_is_resumed() {
    let (control, told) = control();
    control.rest().unwrap();
    control.pause();
    thread::scope(|scope| {
        let operation = scope.spawn(|| control.rest());
        assert_eq!(told.recv().unwrap(), Notice::Paused);
        assert!(!control.busy() && !operation.is_finished());
        control.resume();
        operation.join().unwrap().unwrap();
    });
    assert!(control.busy());
}

#[test]
fn a_pause_right_after_a_resume_is_told_again() {
    let (control, told) = control();
    control.pause();
    thread::scope(|scope| {
        let operation = scope.spawn(|| {
            loop {
                control.rest()?;
                thread::yield_now();
            }
        });
        for _ in 0..100 {
            assert_eq!(told.recv().unwrap(), Notice::Paused);
            control.resume();
            control.pause();
        }
        control.cancel(true);
        let ended: Result<()> = operation.join().unwrap();
        assert!(matches!(ended, Err(Error::Cancelled)));
    });
}

#[test]
fn a_cancelled_operation_ends_where_it_rests_waits_or_idles() {
    type Wait = fn(&Control) -> Result<()>;
    let waits: [Wait; 4] = [
        |control| {
            control.pause();
            control.rest()
        },
        |control| {
            control.set_speed(1);
            control.throttle(1 << 40)?;
            control.throttle(1)
        },
        |control| control.idle(|| false).map(drop),
        |control| control.failed(OnError::Stop, Side::Target, io_error(libc::EIO)),
    ];
    for wait in waits {
        let (control, _told) = control();
        thread::scope(|scope| {
            let operation = scope.spawn(|| wait(&control));
            control.cancel(false);
            assert!(matches!(operation.join().unwrap(), Err(Error::Cancelled)));
        });
        control.steps().check().unwrap_err();
    }
}

#[test]
fn a_speed_that_is_lifted_lets_the_operation_go_on() {
    let (control, _told) = control();
    control.set_speed(1);
    assert_eq!(control.speed(), 1);
    control.throttle(1 << 40).unwrap();
    thread::scope(|scope| {
        let operation = scope.spawn(|| control.throttle(1));
        control.set_speed(0);
        operation.join().unwrap().unwrap();
    });
}

#[test]
fn a_pause_and_its_end_are_heeded_while_waiting_for_the_speed() {
    let (control, told) = control();
    control.set_speed(1);
    control.throttle(1 << 40).unwrap();
    thread::scope(|scope| {
        let operation = scope.spawn(|| control.throttle(1));
        control.pause();
        assert_eq!(told.recv().unwrap(), Notice::Paused);
        control.set_speed(0);
        control.resume();
        operation.join().unwrap().unwrap();
    });
}

#[test]
fn an_idle_operation_is_woken_by_work_and_by_its_end_but_not_while_paused() {
    let (control, told) = control();
    let work = std::sync::atomic::AtomicBool::new(false);
    let look = || work.load(std::sync::atomic::Ordering::Relaxed);
    thread::scope(|scope| {
        let operation = scope.spawn(|| control.idle(look));
        work.store(true, std::sync::atomic::Ordering::Relaxed);
        control.wake();
        assert_eq!(operation.join().unwrap().unwrap(), Wake::Work);
    });
    work.store(false, std::sync::atomic::Ordering::Relaxed);
    control.pause();
    thread::scope(|scope| {
        let operation = scope.spawn(|| control.idle(look));
        assert_eq!(told.recv().unwrap(), Notice::Paused);
        control.complete();
        assert!(!operation.is_finished());
        control.resume();
        assert_eq!(operation.join().unwrap().unwrap(), Wake::Finish(Finish::Complete));
    });
}

#[test]
fn cancelling_a_ready_operation_leaves_its_copy_unless_forced() {
    let (control, told) = control();
    control.ready();
    control.ready();
    assert_eq!(told.try_iter().collect::<Vec<_>>(), [Notice::Ready]);
    control.cancel(false);
    assert_eq!(control.idle(|| false).unwrap(), Wake::Finish(Finish::Leave));
    control.cancel(true);
    assert!(matches!(control.rest(), Err(Error::Cancelled)));
}

#[test]
fn errors_are_reported_ignored_or_stop_the_operation() {
    let (control, told) = control();
    let failed = |policy, errno| control.failed(policy, Side::Target, io_error(errno));
    let error = |action, nospace| Notice::Error { read: false, action, nospace };
    failed(OnError::Report, libc::EIO).unwrap_err();
    assert_eq!(told.recv().unwrap(), error(Action::Report, false));
    failed(OnError::Enospc, libc::EIO).unwrap_err();
    assert_eq!(told.recv().unwrap(), error(Action::Report, false));
    failed(OnError::Ignore, libc::EIO).unwrap();
    assert_eq!(told.recv().unwrap(), error(Action::Ignore, false));
    for (errno, io_status) in [(libc::ENOSPC, IoStatus::NoSpace), (libc::EIO, IoStatus::Failed)] {
        let policy = if errno == libc::EIO { OnError::Stop } else { OnError::Enospc };
        thread::scope(|scope| {
            let operation = scope.spawn(|| failed(policy, errno));
            assert_eq!(told.recv().unwrap(), error(Action::Stop, errno == libc::ENOSPC));
            assert_eq!(told.recv().unwrap(), Notice::Paused);
            assert_eq!(control.io_status(), io_status);
            control.resume();
            operation.join().unwrap().unwrap();
        });
        assert_eq!(control.io_status(), IoStatus::Ok);
    }
}

#[test]
fn progress_only_grows() {
    let control = Control::default();
    control.add_total(100);
    control.advance(60);
    control.set_remaining(30);
    assert_eq!(control.progress(), (60, 100));
    control.set_remaining(70);
    assert_eq!(control.progress(), (60, 130));
    control.caught_up();
    control.caught_up();
    assert_eq!(control.progress(), (130, 130));
}
