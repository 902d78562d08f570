//! Bytes of a file in memory, in pages that copies share until one of them is written.

use std::sync::Arc;

const PAGE: usize = 4096;

/// A file: cheap to copy, whatever it holds.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pages {
    /// `None` reads as zeroes.
    pages: Vec<Option<Arc<[u8; PAGE]>>>,
    len: usize,
}

impl Pages {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let mut pages = Self::default();
        pages.write(0, bytes);
        pages
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.read(0, self.len)
    }

    /// What lies past the end is zero.
    pub(crate) fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        let mut at = 0;
        while at < len {
            let (page, skip) = ((offset + at) / PAGE, (offset + at) % PAGE);
            let n = (PAGE - skip).min(len - at);
            if let Some(Some(page)) = self.pages.get(page) {
                out[at..at + n].copy_from_slice(&page[skip..skip + n]);
            }
            at += n;
        }
        out
    }

    /// Grows where needed.
    pub(crate) fn write(&mut self, offset: usize, bytes: &[u8]) {
        self.change(offset, bytes.len(), |page, at| {
            page.copy_from_slice(&bytes[at..][..page.len()]);
        });
    }

    /// Sets all bytes of a range, growing where needed.
    pub(crate) fn fill(&mut self, offset: usize, len: usize, byte: u8) {
        self.change(offset, len, |page, _| page.fill(byte));
    }

    fn change(&mut self, offset: usize, len: usize, with: impl Fn(&mut [u8], usize)) {
        self.set_len(self.len.max(offset + len));
        let mut at = 0;
        while at < len {
            let (index, skip) = ((offset + at) / PAGE, (offset + at) % PAGE);
            let n = (PAGE - skip).min(len - at);
            let page = self.pages[index].get_or_insert_with(|| Arc::new([0; PAGE]));
            with(&mut Arc::make_mut(page)[skip..skip + n], at);
            at += n;
        }
    }

    /// Cuts, or extends with zeroes.
    pub(crate) fn set_len(&mut self, len: usize) {
        if len < self.len
            && !len.is_multiple_of(PAGE)
            && let Some(Some(page)) = self.pages.get_mut(len / PAGE)
        {
            Arc::make_mut(page)[len % PAGE..].fill(0);
        }
        self.pages.resize(len.div_ceil(PAGE), None);
        self.len = len;
    }
}

#[test]
fn pages_hold_what_a_plain_array_holds() {
    let mut random = crate::common::Random(7);
    let (mut plain, mut pages) = (Vec::new(), Pages::default());
    let mut copies = Vec::new();
    for _ in 0..500 {
        let (at, len) = (random.below(20_000) as usize, random.below(9000) as usize);
        match random.below(4) {
            0 | 1 => {
                let bytes = random.bytes(len as u64);
                plain.resize(plain.len().max(at + len), 0);
                plain[at..at + len].copy_from_slice(&bytes);
                pages.write(at, &bytes);
            }
            2 => {
                plain.resize(plain.len().max(at + len), 0);
                plain[at..at + len].fill(9);
                pages.fill(at, len, 9);
            }
            _ => {
                plain.resize(at, 0);
                pages.set_len(at);
            }
        }
        assert!(pages.bytes() == plain);
        if copies.len() < 50 {
            copies.push((plain.clone(), pages.clone()));
        }
    }
    assert!(copies.iter().all(|(plain, pages)| pages.bytes() == *plain));
}
