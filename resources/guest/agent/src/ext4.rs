//! `mkfs`: an ext4 file system with extents and a journal, in the layout of the kernel's
//! `Documentation/filesystems/ext4`. A mke2fs in the initramfs would be larger than the agent
//! ten times over, and each byte there costs boot time.
//!
//! Blocks of 4 KiB, groups of 32768 blocks. Each group: in groups 0, 1 and the powers of 3, 5 and
//! 7 the superblock and the group descriptors; the block bitmap, the inode bitmap, the inode
//! table. Group 0 goes on with the root directory, lost+found and the journal.

use core::fmt::Write;

use crate::args::Args;
use crate::command::Agent;
use crate::console::Reply;
use crate::disk::{Disk, Range};
use crate::error::Error;
use crate::{pattern, sys};

const BLOCK: u64 = 4096;
const GROUP_BLOCKS: u64 = 32768;
const GROUP_INODES: u64 = 1024;
const INODE_SIZE: usize = 256;
const TABLE_BLOCKS: u64 = GROUP_INODES * INODE_SIZE as u64 / BLOCK;
/// The smallest journal the kernel takes.
const JOURNAL_BLOCKS: u64 = 1024;
const DESCRIPTOR_SIZE: u64 = 32;
/// Block numbers stay within 32 bits and descriptors within group 0 far below this.
const GROUPS_MAX: u64 = 8192;

const ROOT: u64 = 2;
const JOURNAL: u64 = 8;
const LOST_FOUND: u64 = 11;

const EXTENTS_FLAG: u32 = 0x8_0000;
const DIRECTORY: u8 = 2;

/// Where everything is.
struct Layout {
    blocks: u64,
    groups: u64,
    /// Blocks of group descriptors.
    descriptor_blocks: u64,
    /// Seconds of the wall clock, for all time stamps.
    now: u32,
    uuid: [u8; 16],
}

/// `mkfs <device>`
pub fn mkfs(agent: &mut Agent, mut args: Args, reply: &mut Reply) -> Result<(), Error> {
    let device = args.device()?;
    args.end()?;
    let disk = Disk::open(agent, &device, true)?;
    let layout = Layout::new(disk.size()?)?;
    // The superblock goes last: until then there is no file system.
    disk.zero(blocks(0, 1))?;
    for group in 0..layout.groups {
        write_group(agent, &disk, &layout, group)?;
    }
    write_directories(agent, &disk, &layout)?;
    write_journal(agent, &disk, &layout)?;
    write_inodes(agent, &disk, &layout)?;
    for group in (0..layout.groups).rev().filter(|group| has_superblock(*group)) {
        write_superblock(agent, &disk, &layout, group)?;
    }
    disk.flush()?;
    let _ = write!(reply, "blocks={} groups={}", layout.blocks, layout.groups);
    Ok(())
}

impl Layout {
    fn new(size: u64) -> Result<Self, Error> {
        let mut blocks = size / BLOCK;
        let mut groups = blocks.div_ceil(GROUP_BLOCKS);
        // A last group that could hold little more than its own tables is left out.
        let last = blocks % GROUP_BLOCKS;
        let descriptor_blocks = (groups * DESCRIPTOR_SIZE).div_ceil(BLOCK);
        if groups > 1 && last != 0 && last < descriptor_blocks + TABLE_BLOCKS + 64 {
            blocks -= last;
            groups -= 1;
        }
        if blocks < 2 * JOURNAL_BLOCKS {
            return Err(Error::State("the device is too small: 8 MiB at least"));
        }
        if groups > GROUPS_MAX {
            return Err(Error::State("the device is too large: 1 TiB at most"));
        }
        let now = sys::clock_ns(0).unwrap_or(0);
        let mut uuid = [0; 16];
        pattern::fill(&mut uuid, now, 0);
        // Version 4, variant 1 of RFC 9562.
        uuid[6] = uuid[6] & 0x0f | 0x40;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        let now = (now / 1_000_000_000) as u32;
        Ok(Self { blocks, groups, descriptor_blocks, now, uuid })
    }

    fn group_blocks(&self, group: u64) -> u64 {
        (self.blocks - group * GROUP_BLOCKS).min(GROUP_BLOCKS)
    }

    /// The block bitmap; the inode bitmap and the inode table follow it.
    fn bitmap(&self, group: u64) -> u64 {
        let superblock = if has_superblock(group) { 1 + self.descriptor_blocks } else { 0 };
        group * GROUP_BLOCKS + superblock
    }

    fn table(&self, group: u64) -> u64 {
        self.bitmap(group) + 2
    }

    /// The root directory's block; lost+found's and the journal's follow it.
    fn root_block(&self) -> u64 {
        self.table(0) + TABLE_BLOCKS
    }

    fn journal_block(&self) -> u64 {
        self.root_block() + 2
    }

    fn used_blocks(&self, group: u64) -> u64 {
        let data = if group == 0 { 2 + JOURNAL_BLOCKS } else { 0 };
        self.table(group) + TABLE_BLOCKS - group * GROUP_BLOCKS + data
    }

    fn free_blocks(&self, group: u64) -> u64 {
        self.group_blocks(group) - self.used_blocks(group)
    }

    fn used_inodes(group: u64) -> u64 {
        if group == 0 { LOST_FOUND } else { 0 }
    }
}

/// The `sparse_super` rule: groups 0, 1 and the powers of 3, 5 and 7.
fn has_superblock(group: u64) -> bool {
    let is_power_of = |base: u64| {
        let mut power = base;
        while power < group {
            power *= base;
        }
        power == group
    };
    group <= 1 || is_power_of(3) || is_power_of(5) || is_power_of(7)
}

fn blocks(first: u64, count: u64) -> Range {
    Range { offset: first * BLOCK, length: count * BLOCK }
}

/// A zeroed block in the agent's buffer, to be filled and written.
fn blank(agent: &mut Agent) -> &mut [u8] {
    let block = agent.buffer.first(BLOCK);
    block.fill(0);
    block
}

fn put16(to: &mut [u8], at: usize, value: u64) {
    to[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
}

fn put32(to: &mut [u8], at: usize, value: u64) {
    to[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
}

/// Sets the bits `first..end` of a bitmap.
fn set_bits(bitmap: &mut [u8], first: u64, end: u64) {
    for bit in first..end {
        bitmap[bit as usize / 8] |= 1 << (bit % 8);
    }
}

/// The bitmaps of a group, and its inode table, zeroed.
fn write_group(agent: &mut Agent, disk: &Disk, layout: &Layout, group: u64) -> Result<(), Error> {
    let at = layout.bitmap(group);
    let bitmap = blank(agent);
    set_bits(bitmap, 0, layout.used_blocks(group));
    // Blocks the last group does not have count as used.
    set_bits(bitmap, layout.group_blocks(group), GROUP_BLOCKS);
    disk.write(bitmap, at * BLOCK)?;

    let bitmap = blank(agent);
    set_bits(bitmap, 0, Layout::used_inodes(group));
    set_bits(bitmap, GROUP_INODES, BLOCK * 8);
    disk.write(bitmap, (at + 1) * BLOCK)?;
    disk.zero(blocks(layout.table(group), TABLE_BLOCKS))
}

/// The superblock and the group descriptors, as group `group` holds them.
fn write_superblock(
    agent: &mut Agent,
    disk: &Disk,
    layout: &Layout,
    group: u64,
) -> Result<(), Error> {
    let first = group * GROUP_BLOCKS;
    let per_block = BLOCK / DESCRIPTOR_SIZE;
    for index in 0..layout.descriptor_blocks {
        let block = blank(agent);
        let described = index * per_block..layout.groups.min((index + 1) * per_block);
        for (of, entry) in described.zip(block.chunks_mut(DESCRIPTOR_SIZE as usize)) {
            fill_descriptor(entry, layout, of);
        }
        disk.write(block, (first + 1 + index) * BLOCK)?;
    }
    let block = blank(agent);
    // The first superblock comes after the boot sector, its copies start their group.
    let at = if group == 0 { 1024 } else { 0 };
    fill_superblock(&mut block[at..at + 1024], layout, group);
    disk.write(block, first * BLOCK)
}

fn fill_descriptor(entry: &mut [u8], layout: &Layout, group: u64) {
    put32(entry, 0x00, layout.bitmap(group));
    put32(entry, 0x04, layout.bitmap(group) + 1);
    put32(entry, 0x08, layout.table(group));
    put16(entry, 0x0c, layout.free_blocks(group));
    put16(entry, 0x0e, GROUP_INODES - Layout::used_inodes(group));
    // Directories: the root and lost+found.
    put16(entry, 0x10, if group == 0 { 2 } else { 0 });
}

fn fill_superblock(block: &mut [u8], layout: &Layout, group: u64) {
    let free: u64 = (0..layout.groups).map(|group| layout.free_blocks(group)).sum();
    let inodes = layout.groups * GROUP_INODES;
    let now = u64::from(layout.now);
    put32(block, 0x00, inodes);
    put32(block, 0x04, layout.blocks);
    put32(block, 0x0c, free);
    put32(block, 0x10, inodes - LOST_FOUND);
    // Block and cluster size: 1024 << 2.
    put32(block, 0x18, 2);
    put32(block, 0x1c, 2);
    put32(block, 0x20, GROUP_BLOCKS);
    put32(block, 0x24, GROUP_BLOCKS);
    put32(block, 0x28, GROUP_INODES);
    put32(block, 0x30, now);
    put16(block, 0x36, 0xffff); // never a check because of many mounts
    put16(block, 0x38, 0xef53);
    put16(block, 0x3a, 1); // clean
    put16(block, 0x3c, 1); // on errors: go on
    put32(block, 0x40, now);
    put32(block, 0x4c, 1); // revision with variable inode sizes
    put32(block, 0x54, LOST_FOUND); // first inode for use
    put16(block, 0x58, INODE_SIZE as u64);
    put16(block, 0x5a, group);
    put32(block, 0x5c, 0x4 | 0x8); // has_journal, ext_attr
    put32(block, 0x60, 0x2 | 0x40); // filetype, extents
    put32(block, 0x64, 0x1 | 0x2 | 0x8 | 0x20 | 0x40); // sparse_super, large_file, huge_file, dir_nlink, extra_isize
    block[0x68..0x78].copy_from_slice(&layout.uuid);
    put32(block, 0xe0, JOURNAL);
    pattern::fill(&mut block[0xec..0xfc], now, 16); // hash seed of directories
    block[0xfc] = 1; // half MD4 for directory hashes
    block[0xfd] = 1; // a copy of the journal's block map follows
    put32(block, 0x108, now);
    fill_extent(&mut block[0x10c..0x148], layout.journal_block(), JOURNAL_BLOCKS);
    put32(block, 0x14c, JOURNAL_BLOCKS * BLOCK);
    put16(block, 0x15c, 32); // inodes have 32 bytes beyond the old 128
    put16(block, 0x15e, 32);
    put32(block, 0x160, 0x1); // directory hashes are signed
}

/// An inode's block map: an extent tree of one extent.
fn fill_extent(map: &mut [u8], first: u64, count: u64) {
    put16(map, 0, 0xf30a);
    put16(map, 2, 1); // entries
    put16(map, 4, 4); // room for
    put16(map, 16, count);
    put32(map, 20, first);
}

/// The root directory and lost+found.
fn write_directories(agent: &mut Agent, disk: &Disk, layout: &Layout) -> Result<(), Error> {
    let size = BLOCK as usize;
    let block = blank(agent);
    fill_entry(&mut block[0..12], ROOT, b".");
    fill_entry(&mut block[12..24], ROOT, b"..");
    fill_entry(&mut block[24..size], LOST_FOUND, b"lost+found");
    disk.write(block, layout.root_block() * BLOCK)?;
    let block = blank(agent);
    fill_entry(&mut block[0..12], LOST_FOUND, b".");
    fill_entry(&mut block[12..size], ROOT, b"..");
    disk.write(block, (layout.root_block() + 1) * BLOCK)
}

/// A directory entry that takes all of `entry`.
fn fill_entry(entry: &mut [u8], inode: u64, name: &[u8]) {
    put32(entry, 0, inode);
    put16(entry, 4, entry.len() as u64);
    entry[6] = name.len() as u8;
    entry[7] = DIRECTORY;
    entry[8..8 + name.len()].copy_from_slice(name);
}

/// An empty journal. All of it is zeroed: what an earlier file system left there must never be
/// taken for transactions of this one.
fn write_journal(agent: &mut Agent, disk: &Disk, layout: &Layout) -> Result<(), Error> {
    disk.zero(blocks(layout.journal_block(), JOURNAL_BLOCKS))?;
    let block = blank(agent);
    // Big-endian: magic, superblock version 2, then from 0x0c block size, length, first block of
    // the log, first sequence; start 0 means clean.
    for (at, value) in [
        (0x00, 0xc03b_3998u32),
        (0x04, 4),
        (0x0c, BLOCK as u32),
        (0x10, JOURNAL_BLOCKS as u32),
        (0x14, 1),
        (0x18, 1),
        (0x40, 1), // users
    ] {
        block[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
    block[0x30..0x40].copy_from_slice(&layout.uuid);
    disk.write(block, layout.journal_block() * BLOCK)
}

/// The first block of the inode table, which holds every inode in use.
fn write_inodes(agent: &mut Agent, disk: &Disk, layout: &Layout) -> Result<(), Error> {
    let root = layout.root_block();
    let block = blank(agent);
    for (number, mode, links, first, count) in [
        (ROOT, 0o40755, 3, root, 1),
        (LOST_FOUND, 0o40700, 2, root + 1, 1),
        (JOURNAL, 0o100_600, 1, layout.journal_block(), JOURNAL_BLOCKS),
    ] {
        let at = (number as usize - 1) * INODE_SIZE;
        let inode = &mut block[at..at + INODE_SIZE];
        put16(inode, 0x00, mode);
        put32(inode, 0x04, count * BLOCK);
        for time in [0x08, 0x0c, 0x10, 0x90] {
            put32(inode, time, layout.now.into());
        }
        put16(inode, 0x1a, links);
        put32(inode, 0x1c, count * BLOCK / 512);
        put32(inode, 0x20, EXTENTS_FLAG.into());
        fill_extent(&mut inode[0x28..0x64], first, count);
        put16(inode, 0x80, 32);
    }
    disk.write(block, layout.table(0) * BLOCK)
}
