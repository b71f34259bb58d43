//! What a forward pass tells the kernels about its rows.

#![expect(unsafe_code, reason = "words on the device are written by address")]

use stoker_device::{ComputeStream, DeviceError};

use super::kernels::{ATTENTION_ROWS, ATTENTION_ROWS_MANY, SPLIT, Work};
use crate::{Batch, Span, kv::BLOCK_TOKENS};

/// One upload: everything that kernels read of a batch, in words of 32 bits.
#[derive(Debug, Default)]
pub(super) struct Pass {
    words: Vec<u32>,
    tokens: Part,
    positions: Part,
    places: Part,
    logit_rows: Part,
    tables: Part,
    few: Part,
    many: Part,
    /// Places for partial results that are used.
    pub(super) places_used: u32,
}

/// Words of the upload.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Part {
    first: usize,
    len: usize,
}

/// Bounds of a pass.
#[derive(Debug, Clone, Copy)]
pub(super) struct PassShape {
    /// Query heads that share a key and value head.
    pub(super) group: u32,
    pub(super) kv_heads: u32,
    /// Places for partial results.
    pub(super) places: u32,
}

/// Addresses of the parts on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Uploaded {
    pub(super) tokens: u64,
    pub(super) positions: u64,
    pub(super) places: u64,
    pub(super) logit_rows: u64,
    pub(super) tables: u64,
    /// Works of one warp each, and how many.
    pub(super) few: (u64, u32),
    /// Works of four warps each, and how many.
    pub(super) many: (u64, u32),
}

/// Blocks of attention that are enough to keep a chip busy without dividing sequences.
const BUSY: u32 = 2048;

// === impl Pass ===

impl Pass {
    /// Describes a batch, in place of what was described before.
    pub(super) fn describe(&mut self, batch: &Batch<'_>, shape: PassShape) {
        let PassShape { group, kv_heads, places } = shape;
        self.words.clear();
        self.tokens = self.part(batch.tokens.iter().copied());
        let rows = || {
            batch.spans.iter().flat_map(|span| {
                (span.start..span.start + span.rows).map(|position| (span.blocks, word(position)))
            })
        };
        self.positions = self.part(rows().map(|(_, position)| position));
        let block = word(BLOCK_TOKENS);
        self.places = self.part(
            rows().map(|(blocks, position)| blocks[(position / block) as usize] * block + position % block),
        );
        self.logit_rows = self.part(batch.logit_rows.iter().map(|row| word(*row)));
        self.tables = self.part(batch.spans.iter().flat_map(|span| span.blocks.iter().copied()));

        // A span whose rows all fit into one warp's share is one: a sequence that decodes, most of all.
        let short = |span: &Span<'_>| word(span.rows) * group <= ATTENTION_ROWS;
        let decoding = word(batch.spans.iter().filter(|span| short(span)).count());
        let divide = decoding.saturating_mul(kv_heads) <= BUSY;
        let (mut few, mut many): (Vec<Work>, Vec<Work>) = (Vec::new(), Vec::new());
        let (mut token, mut table) = (0, 0);
        self.places_used = 0;
        for span in batch.spans {
            let rows = word(span.rows) * group;
            let work = |first_row: u32, most: u32| Work {
                first_row,
                rows: (rows - first_row).min(most),
                span_token: token,
                position: word(span.start),
                table,
                split: 0,
                splits: 1,
                partial: 0,
            };
            if short(span) {
                let splits = (word(span.start + span.rows)).div_ceil(SPLIT);
                let divided = divide && span.rows == 1 && splits > 1 && splits <= places - self.places_used;
                let whole = work(0, ATTENTION_ROWS);
                if divided {
                    let partial = self.places_used;
                    few.extend((0..splits).map(|split| Work { split, splits, partial, ..whole }));
                    self.places_used += splits;
                } else {
                    few.push(whole);
                }
            } else {
                let most = ATTENTION_ROWS_MANY;
                many.extend((0..rows).step_by(most as usize).map(|first_row| work(first_row, most)));
            }
            token += word(span.rows);
            table += word(span.blocks.len());
        }
        assert_eq!(token as usize, batch.tokens.len(), "spans cover the batch's rows");
        self.few = self.works(&few);
        self.many = self.works(&many);
    }

    /// What to upload.
    pub(super) fn words(&self) -> &[u32] {
        &self.words
    }

    /// The parts of what was uploaded to `address`.
    pub(super) fn at(&self, address: u64) -> Uploaded {
        let of = |part: Part| address + part.first as u64 * 4;
        let works = |part: Part| (of(part), word(part.len / WORK_WORDS));
        Uploaded {
            tokens: of(self.tokens),
            positions: of(self.positions),
            places: of(self.places),
            logit_rows: of(self.logit_rows),
            tables: of(self.tables),
            few: works(self.few),
            many: works(self.many),
        }
    }

    fn part(&mut self, words: impl Iterator<Item = u32>) -> Part {
        let first = self.words.len();
        self.words.extend(words);
        Part { first, len: self.words.len() - first }
    }

    fn works(&mut self, works: &[Work]) -> Part {
        self.part(works.iter().flat_map(|work| {
            let Work { first_row, rows, span_token, position, table, split, splits, partial } = *work;
            [first_row, rows, span_token, position, table, split, splits, partial]
        }))
    }
}

const WORK_WORDS: usize = size_of::<Work>() / 4;

/// Sets the words of a gate.
pub(super) fn fill(stream: &ComputeStream, address: u64, words: u64, value: u32) -> Result<(), DeviceError> {
    // SAFETY: the words are in a slab that the gate holds; whoever calls waits for the stream.
    unsafe { stream.fill_words(address, value, usize::try_from(words).unwrap_or(0)) }
}

fn word(n: usize) -> u32 {
    u32::try_from(n).expect("counts of a batch fit into 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: PassShape = PassShape { group: 2, kv_heads: 4, places: 8 };

    fn described(batch: &Batch<'_>, shape: PassShape) -> (Pass, Vec<Work>, Vec<Work>) {
        let mut pass = Pass::default();
        pass.describe(batch, shape);
        let works = |part: Part| {
            let words = &pass.words[part.first..part.first + part.len];
            words
                .chunks_exact(WORK_WORDS)
                .map(|w| Work {
                    first_row: w[0],
                    rows: w[1],
                    span_token: w[2],
                    position: w[3],
                    table: w[4],
                    split: w[5],
                    splits: w[6],
                    partial: w[7],
                })
                .collect()
        };
        let (few, many) = (works(pass.few), works(pass.many));
        (pass, few, many)
    }

    #[test]
    fn every_row_is_in_exactly_one_work_of_each_split() {
        let blocks: Vec<u32> = (0..20).rev().collect();
        let spans = [
            Span { rows: 1, start: 300, blocks: &blocks[..10] },
            Span { rows: 70, start: 5, blocks: &blocks[10..13] },
            Span { rows: 3, start: 0, blocks: &blocks[13..14] },
            Span { rows: 1, start: 127, blocks: &blocks[14..18] },
        ];
        let tokens: Vec<u32> = (0..75).collect();
        let batch = Batch { tokens: &tokens, spans: &spans, logit_rows: &[0, 70, 74] };
        let (pass, few, many) = described(&batch, SHAPE);
        assert_eq!(few.iter().filter(|work| work.span_token == 0).count(), 3);
        assert!(
            few[..3].iter().enumerate().all(|(i, w)| (w.split as usize, w.splits, w.partial) == (i, 3, 0))
        );
        assert_eq!(pass.places_used, 3);
        assert_eq!(
            few[3],
            Work {
                first_row: 0,
                rows: 6,
                span_token: 71,
                position: 0,
                table: 13,
                split: 0,
                splits: 1,
                partial: 0
            }
        );
        assert_eq!(
            (few[4].span_token, few[4].table, few[4].splits),
            (74, 14, 1),
            "127 and before are one split"
        );
        assert_eq!(few.len(), 5);
        let rows: Vec<(u32, u32)> = many.iter().map(|work| (work.first_row, work.rows)).collect();
        assert_eq!(rows, [(0, 64), (64, 64), (128, 12)]);
        assert!(many.iter().all(|work| (work.span_token, work.position, work.table) == (1, 5, 10)));

        let at = pass.at(4000);
        assert_eq!((at.tokens, at.positions, at.places), (4000, 4000 + 300, 4000 + 600));
        let place = |row: usize| pass.words[pass.places.first + row];
        assert_eq!(place(0), blocks[9] * 32 + 300 % 32);
        assert_eq!(place(1), blocks[10] * 32 + 5);
        assert_eq!((at.few.1, at.many.1), (5, 3));
        assert_eq!(at.many.0 % 4, 0);
    }

    #[test]
    fn sequences_are_not_divided_beyond_the_places_that_there_are() {
        let blocks: Vec<u32> = (0..40).collect();
        let spans =
            [Span { rows: 1, start: 1000, blocks: &blocks }, Span { rows: 1, start: 200, blocks: &blocks }];
        let batch = Batch { tokens: &[1, 2], spans: &spans, logit_rows: &[] };
        let splits = |places| -> Vec<u32> {
            let (pass, few, _) = described(&batch, PassShape { places, ..SHAPE });
            assert!(pass.places_used <= places);
            few.iter().map(|work| work.splits).collect()
        };
        assert_eq!(splits(10), [8, 8, 8, 8, 8, 8, 8, 8, 2, 2]);
        assert_eq!(splits(8), [8, 8, 8, 8, 8, 8, 8, 8, 1]);
        assert_eq!(splits(7), [1, 2, 2]);
        let (_, few, _) = described(&batch, PassShape { kv_heads: BUSY, ..SHAPE });
        assert_eq!(few.len(), 2, "there are enough to keep the chip busy");
    }
}
