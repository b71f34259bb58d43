//! Checksums of device memory, computed where it is.

#![expect(unsafe_code, reason = "the driver's interface is C")]

use std::{ffi::c_void, sync::Arc};

use cudarc::driver::sys::{self, CUdeviceptr, CUfunction, CUmodule};
use parking_lot::Mutex;
use stoker_types::{ChunkSum, crc64};

use super::{
    context::{Context, Event, Stream},
    memory::Mapping,
};
use crate::error::DeviceError;

/// The kernel, as `cuModuleLoadData` wants it. `kernels/crc64.cu` says what it does.
const KERNEL: &str = concat!(include_str!("kernels/crc64.ptx"), "\0");

/// Words of a row and threads of a block, as the kernel has it.
const COLUMNS: u16 = 256;

/// Bytes of a row.
const ROW: u64 = COLUMNS as u64 * 8;

/// Rows that a block does at least: fewer, and reading the tables takes longer than they do.
const ROWS_MIN: u64 = 64;

/// Blocks of one launch at most: several for each multiprocessor of any GPU.
const BLOCKS_MAX: u64 = 1024;

/// Sums that there is room for.
const ROOM: u64 = 1 << 17;

/// Words of the kernel's constants: eight tables, and the columns' places.
const CONSTANTS: usize = 8 * 256 + COLUMNS as usize;

/// The kernel on one device, and its memory.
pub(crate) struct Sums {
    context: Arc<Context>,
    module: CUmodule,
    function: CUfunction,
    /// The constants, then room for sums.
    memory: Mapping,
    stream: Stream,
    done: Event,
    /// Held by whoever uses the room.
    turn: Mutex<()>,
}

// SAFETY: the driver's functions may be called from any thread.
unsafe impl Send for Sums {}
// SAFETY: as above; the memory is used under `turn`.
unsafe impl Sync for Sums {}

/// Part of a range whose sum the kernel computes in bands of rows.
struct Launch {
    /// Which range.
    range: usize,
    rows: u64,
    rows_per_block: u64,
    /// Its first sum.
    at: u64,
}

// === impl Sums ===

impl Sums {
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        context.bind()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: a context is current; the text ends with a zero byte and is read before the call returns.
        let loaded = unsafe { sys::cuModuleLoadData(&raw mut module, KERNEL.as_ptr().cast()) };
        context.check("cuModuleLoadData", loaded)?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module was loaded; the name ends with a zero byte.
        let found = unsafe { sys::cuModuleGetFunction(&raw mut function, module, c"stoker_crc64".as_ptr()) };
        let constants = constants();
        let bytes = (CONSTANTS as u64 + ROOM) * 8;
        let made = context
            .check("cuModuleGetFunction", found)
            .and_then(|()| Ok((Mapping::create(context, bytes, bytes, &[])?, Stream::new(context)?)))
            .and_then(|(memory, stream)| Ok((memory, stream, Event::new(context)?)));
        let (memory, stream, done) = made.inspect_err(|_| {
            // SAFETY: loaded above, and nobody uses it.
            let _ = unsafe { sys::cuModuleUnload(module) };
        })?;
        let sums = Self {
            context: Arc::clone(context),
            module,
            function,
            memory,
            stream,
            done,
            turn: Mutex::new(()),
        };
        // SAFETY: the constants fit into the memory, and are there until the copy has ended.
        let copied = unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                sums.memory.address(),
                constants.as_ptr().cast(),
                CONSTANTS * 8,
                sums.stream.raw,
            )
        };
        sums.context.check("cuMemcpyHtoDAsync", copied)?;
        sums.wait()?;
        Ok(sums)
    }

    /// The sums of ranges of device memory, `(address, bytes)`, which the caller keeps as they are until this returns.
    pub(crate) fn of(&self, ranges: &[(CUdeviceptr, u64)]) -> Result<Vec<ChunkSum>, DeviceError> {
        let _turn = self.turn.lock();
        self.context.bind()?;
        self.all(ranges).inspect_err(|_| {
            // Nothing reads the ranges any more when the caller learns of it; an error here would be the same one.
            let _ = self.wait();
        })
    }

    fn all(&self, ranges: &[(CUdeviceptr, u64)]) -> Result<Vec<ChunkSum>, DeviceError> {
        let mut sums = Vec::with_capacity(ranges.len());
        let mut launches = Vec::new();
        let mut used = 0;
        for (range, &(address, len)) in ranges.iter().enumerate() {
            // What comes before a whole word is summed here.
            let head = address.next_multiple_of(8).saturating_sub(address).min(len);
            sums.push(ChunkSum::of(&self.read(address, head)?));
            let rows = (len - head) / ROW;
            if rows == 0 {
                continue;
            }
            let rows_per_block = rows.div_ceil(BLOCKS_MAX).max(ROWS_MIN);
            let blocks = rows.div_ceil(rows_per_block);
            if used + blocks > ROOM {
                self.collect(&mut launches, &mut sums, used)?;
                used = 0;
            }
            self.launch(address + head, rows, rows_per_block, used)?;
            launches.push(Launch { range, rows, rows_per_block, at: used });
            used += blocks;
        }
        self.collect(&mut launches, &mut sums, used)?;
        for (sum, &(address, len)) in sums.iter_mut().zip(ranges) {
            let head = address.next_multiple_of(8).saturating_sub(address).min(len);
            let tail = (len - head) % ROW;
            *sum = sum.then(ChunkSum::of(&self.read(address + len - tail, tail)?), tail);
        }
        Ok(sums)
    }

    fn launch(&self, words: CUdeviceptr, rows: u64, rows_per_block: u64, at: u64) -> Result<(), DeviceError> {
        let tables = self.memory.address();
        let columns = tables + 8 * 256 * 8;
        let sums = self.sums() + at * 8;
        let mut arguments = [words, rows, rows_per_block, tables, columns, sums];
        let mut pointers = arguments.each_mut().map(|argument| std::ptr::from_mut(argument).cast::<c_void>());
        // At most `BLOCKS_MAX`.
        let blocks = u32::try_from(rows.div_ceil(rows_per_block)).unwrap_or(u32::MAX);
        // SAFETY: the kernel takes six words of 64 bits, which are copied before the call returns. It reads whole rows of
        // words within the range, which the caller keeps, and writes one word for each block into the room.
        let launched = unsafe {
            sys::cuLaunchKernel(
                self.function,
                blocks,
                1,
                1,
                u32::from(COLUMNS),
                1,
                1,
                0,
                self.stream.raw,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        self.context.check("cuLaunchKernel", launched)
    }

    /// Waits for the launches, and adds what they found to their ranges' sums.
    fn collect(
        &self,
        launches: &mut Vec<Launch>,
        sums: &mut [ChunkSum],
        used: u64,
    ) -> Result<(), DeviceError> {
        if launches.is_empty() {
            return Ok(());
        }
        self.wait()?;
        let found = self.read(self.sums(), used * 8)?;
        let remainder = |at: u64| {
            let at = usize::try_from(at * 8).unwrap_or(usize::MAX);
            found.get(at..at + 8).and_then(|word| word.try_into().ok()).map_or(0, u64::from_le_bytes)
        };
        for Launch { range, rows, rows_per_block, at } in launches.drain(..) {
            let mut left = rows;
            for block in 0..rows.div_ceil(rows_per_block) {
                let len = left.min(rows_per_block) * ROW;
                let band = ChunkSum::of_remainder(remainder(at + block), len);
                sums[range] = sums[range].then(band, len);
                left -= left.min(rows_per_block);
            }
        }
        Ok(())
    }

    fn wait(&self) -> Result<(), DeviceError> {
        self.done.record(&self.stream)?;
        self.done.synchronize()
    }

    fn sums(&self) -> CUdeviceptr {
        self.memory.address() + CONSTANTS as u64 * 8
    }

    fn read(&self, address: CUdeviceptr, len: u64) -> Result<Vec<u8>, DeviceError> {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        if bytes.is_empty() {
            return Ok(bytes);
        }
        // SAFETY: the range is device memory that lives, as long as the buffer; the call waits for the copy.
        let read = unsafe { sys::cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), address, bytes.len()) };
        self.context.check("cuMemcpyDtoH", read)?;
        Ok(bytes)
    }
}

impl Drop for Sums {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: loaded by `new`; nothing runs, since every launch is waited for. An error would be an earlier one.
            let _ = unsafe { sys::cuModuleUnload(self.module) };
        }
    }
}

/// Eight tables of 256 words, and the columns' places.
fn constants() -> Vec<u64> {
    let row = crc64::power(ROW * 8);
    let tables =
        (0..8).flat_map(|byte| (0..256_u64).map(move |value| crc64::multiply(row, value << (8 * byte))));
    tables.chain((0..COLUMNS).map(|column| crc64::power(64 * u64::from(COLUMNS - column)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's arithmetic, in Rust, with its constants.
    #[test]
    fn rows_summed_by_columns_are_the_sum() {
        let constants = constants();
        let (tables, columns) = constants.split_at(8 * 256);
        let words: Vec<u64> = (0..u64::from(COLUMNS) * 5)
            .map(|i| (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17))
            .collect();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut remainder = 0;
        for (column, place) in columns.iter().enumerate() {
            let mut sum = 0_u64;
            for row in words.chunks(columns.len()) {
                let moved =
                    (0..8).fold(0, |moved, i| moved ^ tables[i * 256 + (sum >> (8 * i) & 255) as usize]);
                sum = moved ^ row[column];
            }
            remainder ^= crc64::multiply(*place, sum);
        }
        assert_eq!(ChunkSum::of_remainder(remainder, bytes.len() as u64), ChunkSum::of(&bytes));
    }
}
