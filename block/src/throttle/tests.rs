use super::*;

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Does requests of `size` whenever they may begin; how many within `time`.
fn run(bucket: &mut Bucket, start: Duration, time: Duration, size: u64) -> u64 {
    let (mut now, mut done) = (start, 0);
    loop {
        let wait = bucket.wait(now);
        now += wait;
        if now >= start + time {
            return done;
        }
        if wait.is_zero() {
            bucket.take(size);
            done += 1;
        }
    }
}

#[test]
fn without_a_rate_nothing_waits() {
    let mut bucket = Bucket::default();
    bucket.take(u64::MAX);
    assert_eq!(bucket.wait(Duration::ZERO), Duration::ZERO);
}

#[test]
fn a_steady_rate_holds_over_time_and_has_room_for_a_tenth_of_a_second() {
    let mut bucket = Bucket::new(Rate::steady(1000));
    let done = run(&mut bucket, Duration::ZERO, ms(10_000), 10);
    // 10 seconds, and the room.
    assert_eq!(done, 1000 + 10);
    bucket.take(500);
    let wait = bucket.wait(ms(10_000));
    assert!(wait > ms(490) && wait <= ms(520), "{wait:?}");
}

#[test]
fn a_request_larger_than_the_bucket_is_let_through_and_paid_for_later() {
    let mut bucket = Bucket::new(Rate::steady(100));
    assert_eq!(bucket.wait(ms(5)), Duration::ZERO);
    bucket.take(1 << 20);
    assert_eq!(bucket.wait(ms(5)), Duration::from_millis(((1 << 20) - 10) * 10));
    // Time that runs backwards gives nothing back.
    assert_eq!(bucket.wait(ms(1)), Duration::from_millis(((1 << 20) - 10) * 10));
}

#[test]
fn idle_time_is_not_saved_up() {
    let mut bucket = Bucket::new(Rate::steady(1000));
    bucket.take(10);
    assert_eq!(run(&mut bucket, ms(1_000_000), ms(1000), 10), 100 + 10);
}

#[test]
fn a_burst_goes_at_its_rate_for_its_time_and_then_on_average() {
    let rate = Rate { average: 100, max: 1000, burst_secs: 10 };
    let mut bucket = Bucket::new(rate);
    let first = run(&mut bucket, Duration::ZERO, ms(10_000), 10);
    assert!((990..=1020).contains(&first), "{first}");
    // It has leaked 1000 of its room of 10000 meanwhile, which is done in about a second more.
    let second = run(&mut bucket, ms(10_000), ms(10_000), 10);
    assert!((190..=230).contains(&second), "{second}");
    let third = run(&mut bucket, ms(20_000), ms(10_000), 10);
    assert!((99..=102).contains(&third), "{third}");
}

#[test]
fn another_rate_forgets_what_was_done() {
    let mut bucket = Bucket::new(Rate::steady(1));
    bucket.take(1_000_000);
    assert!(bucket.wait(ms(1)) > ms(1_000_000));
    bucket.set_rate(Rate::steady(2), ms(1));
    assert_eq!(bucket.wait(ms(1)), Duration::ZERO);
}

#[test]
fn reads_and_writes_have_limits_apart_and_together() {
    let read = Rate::steady(1000);
    let bytes = Kind { read, ..Kind::default() };
    let requests = Kind { total: Rate::steady(10), ..Kind::default() };
    let mut throttle = Throttle::new(Limits { bytes, requests, request_size: 0 });
    throttle.take(2000, false);
    assert_eq!(throttle.wait(ms(0), false), ms(1900));
    assert_eq!(throttle.wait(ms(0), true), Duration::ZERO);
    throttle.take(1, true);
    assert_eq!(throttle.wait(ms(0), true), ms(100));
    assert_eq!(throttle.wait(ms(100), true), Duration::ZERO);
}

#[test]
fn large_requests_count_as_several() {
    let requests = Kind { total: Rate::steady(10), ..Kind::default() };
    let limits = Limits { requests, request_size: 4096, ..Limits::default() };
    let mut throttle = Throttle::new(limits);
    throttle.take(4096 * 4 + 1, true);
    assert_eq!(throttle.wait(ms(0), false), ms(400));
}

#[test]
fn limits_that_contradict_each_other_are_refused() {
    let with = |bytes: Kind| Limits { bytes, ..Limits::default() };
    let text = |limits: Limits| limits.check().unwrap_err().to_string();
    let steady = Rate::steady(5);
    let mixed = Kind { total: steady, read: steady, write: Rate::default() };
    assert!(text(with(mixed)).starts_with("bps/iops/max total values"));
    let total = |total| with(Kind { total, ..Kind::default() });
    assert!(text(total(Rate::steady(MAX_VALUE + 1))).contains("must be within"));
    let rate = Rate { average: 0, max: 5, burst_secs: 1 };
    assert!(text(total(rate)).contains("require corresponding"));
    let rate = Rate { average: 6, max: 5, burst_secs: 1 };
    assert!(text(total(rate)).contains("cannot be lower"));
    let rate = Rate { average: 6, max: 0, burst_secs: 2 };
    assert!(text(total(rate)).contains("without burst rate"));
    let rate = Rate { average: 6, max: 7, burst_secs: 0 };
    assert!(text(total(rate)).contains("cannot be 0"));
    let rate = Rate { average: 6, max: MAX_VALUE, burst_secs: 2 };
    assert!(text(total(rate)).contains("too high"));
    assert!(text(Limits { request_size: 1, ..Limits::default() }).contains("iops size"));
    let rate = Rate { average: 6, max: 7, burst_secs: 3 };
    total(rate).check().unwrap();
    assert!(total(rate).any() && !Limits::default().any());
}
