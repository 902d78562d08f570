//! qemu-img works on checkpoints that share clusters with each other and are compressed in part, and what it
//! leaves is opened, loaded and built upon.

use block::qcow2::Compression;

use crate::images::{Images, qemu_img, text};
use crate::incremental::Chain;

/// The byte that the disks have at a checkpoint.
fn byte(n: usize) -> u8 {
    0x21 + u8::try_from(n).unwrap()
}

fn number(tag: &str) -> usize {
    tag[1..].parse().unwrap()
}

/// A chain of checkpoints whose disks tell which they are.
struct Marked {
    chain: Chain,
    next: usize,
}

impl Marked {
    fn save(&mut self) {
        let (chain, n) = (&mut self.chain, self.next);
        self.next += 1;
        (0..2).for_each(|disk| chain.images.write(disk, byte(n)));
        chain.run();
        chain.compress = (n % 3 == 1).then_some(Compression::Zstd);
        chain.save(&format!("t{n}"), n % 2 == 0);
    }

    /// Every checkpoint is what it was, in any order, RAM and disks.
    fn all_are_whole(&mut self) {
        let chain = &mut self.chain;
        let tags: Vec<_> = chain.saved.iter().map(|(tag, _)| tag.clone()).collect();
        for at in (0..tags.len()).rev() {
            chain.load(at);
            let byte = byte(number(&tags[at]));
            assert_eq!((chain.images.read(0), chain.images.read(1)), (byte, byte), "{}", tags[at]);
        }
    }

    fn any(&mut self) -> (usize, String) {
        let at = self.chain.random.usize(..self.chain.saved.len());
        (at, self.chain.saved[at].0.clone())
    }

    /// On both images, which nobody has open meanwhile.
    fn with_qemu_img(&mut self, work: impl Fn(&str)) {
        let images: &mut Images = &mut self.chain.images;
        images.close();
        images.paths.iter().for_each(|path| work(text(path)));
        images.check();
    }
}

#[test]
fn checkpoints_that_share_and_are_compressed_are_listed_applied_converted_and_deleted_by_qemu_img()
{
    let chain = Chain::new("compression_type=zstd");
    let mut marked = Marked { chain, next: 0 };
    (0..6).for_each(|_| marked.save());
    marked.all_are_whole();
    for round in 0..8 {
        let (_, applied) = marked.any();
        let raw = marked.chain.images.paths[0].with_extension("raw");
        let (listed, converted) = (marked.any().1, marked.any().1);
        marked.with_qemu_img(|path| {
            let list = qemu_img(&["snapshot", "-l", path]);
            assert!(list.contains(&format!(" {listed} ")), "{list}");
            qemu_img(&["convert", "-O", "raw", "-l", &converted, path, text(&raw)]);
            let bytes = std::fs::read(&raw).unwrap();
            assert_eq!(bytes[(5 << 20) + 512], byte(number(&converted)), "{converted}");
            qemu_img(&["snapshot", "-a", &applied, path]);
        });
        let now = (marked.chain.images.read(0), marked.chain.images.read(1));
        assert_eq!(now, (byte(number(&applied)), byte(number(&applied))), "{applied}");

        let (at, deleted) = marked.any();
        marked.with_qemu_img(|path| drop(qemu_img(&["snapshot", "-d", &deleted, path])));
        marked.chain.saved.remove(at);
        marked.all_are_whole();
        if round < 4 {
            // Upon the checkpoint that was loaded last, which qemu-img has let be.
            marked.save();
            marked.all_are_whole();
        }
        if marked.chain.saved.is_empty() {
            break;
        }
    }
    marked.chain.delete_all();
}
