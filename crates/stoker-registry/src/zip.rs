//! The little of the ZIP format that finding one member takes (APPNOTE 6.3.10, sections 4.3.7 to 4.3.16; no ZIP64:
//! package indexes don't take files of 4 GiB).

/// The end record and the longest comment behind it, bytes.
pub(crate) const TAIL_BYTES: u64 = END_BYTES as u64 + 0xffff;
/// The largest table of contents that is read, bytes: about half a million members.
pub(crate) const DIRECTORY_BYTES_MAX: u64 = 64 << 20;
/// A member's own header, without its name and extra fields, bytes.
pub(crate) const LOCAL_HEADER_BYTES: usize = 30;

const END_BYTES: usize = 22;
const ENTRY_BYTES: usize = 46;

/// Where the table of contents is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Directory {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// A member, as the table of contents has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Member {
    /// Of its local header.
    pub(crate) offset: u64,
    pub(crate) compressed_len: u64,
    pub(crate) len: u64,
    pub(crate) crc32: u32,
    pub(crate) method: Method,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Stored,
    Deflated,
}

/// Finds the table of contents from the last bytes of a file of `total` bytes.
pub(crate) fn directory(tail: &[u8], total: u64) -> Result<Directory, &'static str> {
    let last = tail.len().checked_sub(END_BYTES).ok_or("too short for a ZIP file")?;
    let is_end = |at: &usize| {
        let at = *at;
        tail[at..].starts_with(b"PK\x05\x06")
            && at + END_BYTES + usize::from(u16_at(tail, at + 20)) == tail.len()
    };
    let at = (0..=last).rev().find(is_end).ok_or("no end record of a ZIP file")?;
    let (len, offset) = (u64::from(u32_at(tail, at + 12)), u64::from(u32_at(tail, at + 16)));
    if offset == u64::from(u32::MAX) || len == u64::from(u32::MAX) {
        return Err("a ZIP64 file, which is not supported");
    }
    let end = total - (tail.len() - at) as u64;
    if offset + len > end {
        return Err("the table of contents is outside of the file");
    }
    if len > DIRECTORY_BYTES_MAX {
        return Err("an absurdly long table of contents");
    }
    Ok(Directory { offset, len })
}

/// Finds a member in the table of contents; `None` when there is none of this name.
pub(crate) fn find(mut directory: &[u8], name: &str) -> Result<Option<Member>, &'static str> {
    while !directory.is_empty() {
        if directory.len() < ENTRY_BYTES || !directory.starts_with(b"PK\x01\x02") {
            return Err("the table of contents is damaged");
        }
        let len_at = |at| usize::from(u16_at(directory, at));
        let name_end = ENTRY_BYTES + len_at(28);
        let end = name_end + len_at(30) + len_at(32);
        if end > directory.len() {
            return Err("the table of contents is cut off");
        }
        if &directory[ENTRY_BYTES..name_end] == name.as_bytes() {
            if u16_at(directory, 8) & 1 != 0 {
                return Err("the member is encrypted");
            }
            let number = |at| u64::from(u32_at(directory, at));
            let member = Member {
                offset: number(42),
                compressed_len: number(20),
                len: number(24),
                crc32: u32_at(directory, 16),
                method: match u16_at(directory, 10) {
                    0 => Method::Stored,
                    8 => Method::Deflated,
                    _ => return Err("the member is compressed in a way that is not supported"),
                },
            };
            if [member.offset, member.compressed_len, member.len].contains(&u64::from(u32::MAX)) {
                return Err("a ZIP64 member, which is not supported");
            }
            if member.method == Method::Stored && member.len != member.compressed_len {
                return Err("the lengths of the stored member contradict each other");
            }
            return Ok(Some(member));
        }
        directory = &directory[end..];
    }
    Ok(None)
}

/// Where a member's bytes begin, from its local header.
pub(crate) fn data_offset(member: &Member, header: &[u8]) -> Result<u64, &'static str> {
    if header.len() < LOCAL_HEADER_BYTES || !header.starts_with(b"PK\x03\x04") {
        return Err("the member's header is damaged");
    }
    let behind = LOCAL_HEADER_BYTES as u64 + u64::from(u16_at(header, 26)) + u64::from(u16_at(header, 28));
    Ok(member.offset + behind)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
#[path = "../tests/common/archive.rs"]
mod archive;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    use super::archive::archive;

    fn locate(bytes: &[u8], name: &str) -> Result<Option<(Member, u64)>, &'static str> {
        let tail = &bytes[bytes.len().saturating_sub(usize::try_from(TAIL_BYTES).unwrap())..];
        let directory = directory(tail, bytes.len() as u64)?;
        let at = usize::try_from(directory.offset).unwrap();
        let Some(member) = find(&bytes[at..at + usize::try_from(directory.len).unwrap()], name)? else {
            return Ok(None);
        };
        let header = bytes.get(usize::try_from(member.offset).unwrap()..).unwrap_or_default();
        data_offset(&member, header).map(|at| Some((member, at)))
    }

    #[test]
    fn members_are_found() {
        let bytes = archive(&[("a/b.txt", b"hello", true), ("c", &[7; 1000], false)]);
        let (member, at) = locate(&bytes, "a/b.txt").unwrap().unwrap();
        let at = usize::try_from(at).unwrap();
        assert_eq!((&bytes[at..at + 5], member.len), (&b"hello"[..], 5));
        let (member, _) = locate(&bytes, "c").unwrap().unwrap();
        assert_eq!((member.method, member.len), (Method::Deflated, 1000));
        assert!(member.compressed_len < 100);
        assert_eq!(locate(&bytes, "d"), Ok(None));
        assert!(locate(&bytes[..bytes.len() - 1], "c").is_err());
        assert!(locate(b"no zip", "c").is_err());
    }

    proptest! {
        #[test]
        fn damaged_archives_are_errors(at in 0_usize..200, byte in any::<u8>(), cut in 0_usize..50) {
            let mut bytes = archive(&[("a", b"hello", true), ("b", b"world", false)]);
            let len = bytes.len();
            bytes[at % len] = byte;
            bytes.truncate(len - cut % len);
            let _ = locate(&bytes, "b");
        }
    }
}
