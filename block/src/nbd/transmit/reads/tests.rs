use super::*;

fn data(len: u64) -> StatusExtent {
    StatusExtent::data(len)
}

fn hole(len: u64) -> StatusExtent {
    StatusExtent::zero(len)
}

fn cut(offset: u64, len: u64, status: &[StatusExtent]) -> Vec<(u64, u64, bool)> {
    chunks(offset, len, status).into_iter().map(|c| (c.offset, c.len, c.hole)).collect()
}

#[test]
fn chunks_cover_the_range_whatever_is_known_of_it() {
    assert_eq!(cut(100, 50, &[]), [(100, 50, false)]);
    assert_eq!(cut(100, 50, &[hole(50)]), [(100, 50, true)]);
    assert_eq!(cut(100, 50, &[hole(60)]), [(100, 50, true)]);
    assert_eq!(cut(100, 50, &[hole(10)]), [(100, 10, true), (110, 40, false)]);
    assert_eq!(cut(100, 50, &[data(10)]), [(100, 50, false)]);
    let below = StatusExtent { depth: 2, ..data(5) };
    let expected = [(100, 10, false), (110, 40, true)];
    assert_eq!(cut(100, 50, &[data(5), below, hole(40)]), expected);
}

#[test]
fn a_read_has_a_bounded_number_of_chunks() {
    let status: Vec<_> = (0..100).flat_map(|_| [data(1), hole(1)]).collect();
    let chunks = cut(0, 200, &status);
    assert_eq!(chunks.len(), MAX_CHUNKS + 1);
    assert_eq!(chunks.iter().map(|c| c.1).sum::<u64>(), 200);
    assert_eq!(chunks.last(), Some(&(16, 184, false)));
}
