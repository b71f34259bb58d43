//! Writes ZIP files for tests.

use std::io::Write;

/// A ZIP file with these members: name, content, whether it is stored (else deflated).
pub(crate) fn archive(members: &[(&str, &[u8], bool)]) -> Vec<u8> {
    let le32 = |n: usize| u32::try_from(n).unwrap().to_le_bytes();
    let le16 = |n: usize| u16::try_from(n).unwrap().to_le_bytes();
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, content, stored) in members {
        let mut crc = flate2::Crc::new();
        crc.update(content);
        let data = if *stored {
            content.to_vec()
        } else {
            let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(content).unwrap();
            encoder.finish().unwrap()
        };
        let mut common = vec![20, 0, 0, 0];
        common.extend(le16(if *stored { 0 } else { 8 }));
        common.extend([0; 4]);
        common.extend(crc.sum().to_le_bytes());
        common.extend(le32(data.len()));
        common.extend(le32(content.len()));
        common.extend(le16(name.len()));
        let offset = out.len();
        out.extend(b"PK\x03\x04");
        out.extend(&common);
        // An extra field here and none in the table of contents: the two needn't agree.
        out.extend(le16(4));
        out.extend(name.as_bytes());
        out.extend([1, 0, 0, 0]);
        out.extend(&data);
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&common);
        directory.extend([0; 12]);
        directory.extend(le32(offset));
        directory.extend(name.as_bytes());
    }
    let offset = out.len();
    out.extend(&directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend([le16(members.len()), le16(members.len())].concat());
    out.extend([le32(directory.len()), le32(offset)].concat());
    out.extend(b"\x02\x00hi");
    out
}
