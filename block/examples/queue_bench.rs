//! As `qemu-img bench`, over [`block::queue::Queue`]: requests on an image, so many in flight.
//!
//!     queue_bench IMAGE [-d DEPTH] [-c COUNT] [-s SIZE] [-S STEP] [-o OFFSET] [-w] [-r] [-t none] [-f FORMAT] [-i AIO]
//!
//! `-r` takes offsets at random instead of in steps. Prints the seconds it took.

use std::time::Instant;

use block::queue::{AlignedBuf, Completion, OwnedBufs, Queue, Request};

struct Options {
    image: String,
    depth: u64,
    count: u64,
    size: u64,
    step: u64,
    offset: u64,
    write: bool,
    random: bool,
    direct: bool,
    format: String,
    aio: String,
}

fn options() -> Option<Options> {
    let mut all = Options {
        image: String::new(),
        depth: 64,
        count: 75_000,
        size: 4096,
        step: 0,
        offset: 0,
        write: false,
        random: false,
        direct: false,
        format: "qcow2".to_owned(),
        aio: "io_uring".to_owned(),
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "-d" => all.depth = args.next()?.parse().ok()?,
            "-c" => all.count = args.next()?.parse().ok()?,
            "-s" => all.size = args.next()?.parse().ok()?,
            "-S" => all.step = args.next()?.parse().ok()?,
            "-o" => all.offset = args.next()?.parse().ok()?,
            "-f" => all.format = args.next()?,
            "-i" => all.aio = args.next()?,
            "-t" => all.direct = args.next()? == "none",
            "-w" => all.write = true,
            "-r" => all.random = true,
            _ => all.image = arg,
        }
    }
    if all.step == 0 {
        all.step = all.size;
    }
    (!all.image.is_empty()).then_some(all)
}

/// Where the requests go, as qemu-img bench has it, or at random.
struct Places {
    next: u64,
    step: u64,
    random: Option<u64>,
    disk: u64,
    size: u64,
}

impl Places {
    fn next(&mut self) -> u64 {
        let room = self.disk - self.size;
        if let Some(state) = &mut self.random {
            *state ^= *state << 13;
            *state ^= *state >> 7;
            *state ^= *state << 17;
            return *state % (room / self.size + 1) * self.size;
        }
        let now = self.next;
        self.next += self.step;
        if self.disk <= self.next {
            self.next %= self.disk;
        }
        now.min(room)
    }
}

fn main() {
    let Some(options) = options() else {
        eprintln!("usage: see the head of the source");
        std::process::exit(1);
    };
    if let Err(error) = run(&options) {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

fn run(options: &Options) -> block::Result<()> {
    let graph = block::Graph::new();
    let node = graph.add_text(&format!(
        "driver={},node-name=d,read-only={},cache.direct={},file.driver=file,file.aio={},file.filename={}",
        options.format,
        if options.write { "off" } else { "on" },
        if options.direct { "on" } else { "off" },
        options.aio,
        options.image
    ))?;
    let mut places = Places {
        next: options.offset,
        step: options.step,
        random: options.random.then_some(0x9e37_79b9_7f4a_7c15),
        disk: node.size(),
        size: options.size,
    };
    let mut queue = Queue::new(node)?;
    let len = usize::try_from(options.size).unwrap_or(4096);
    let mut spare: Vec<OwnedBufs> =
        (0..options.depth).map(|_| OwnedBufs::from_aligned(AlignedBuf::new(len))).collect();
    let mut done: Vec<Completion> = Vec::new();
    let (mut sent, mut ended) = (0, 0);
    let start = Instant::now();
    while ended < options.count {
        while sent < options.count
            && let Some(bufs) = spare.pop()
        {
            let at = places.next();
            queue.submit(if options.write {
                Request::write(sent, at, false, bufs)
            } else {
                Request::read(sent, at, bufs)
            });
            sent += 1;
        }
        queue.wait();
        queue.reap(&mut done);
        for completion in done.drain(..) {
            completion.result?;
            spare.push(completion.bufs);
            ended += 1;
        }
    }
    // As qemu-img bench, which does not flush either.
    println!("{:.3}", start.elapsed().as_secs_f64());
    Ok(())
}
