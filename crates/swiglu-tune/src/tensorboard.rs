//! TensorBoard's event files, as far as scalars go: TFRecords of `Event` messages.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// One event file of a run.
#[derive(Debug)]
pub(crate) struct Board {
    file: File,
}

impl Board {
    /// A new event file in `dir`.
    pub(crate) fn create(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let name = format!("events.out.tfevents.{}.swiglu-tune.{}", now() as u64, std::process::id());
        let mut board = Self { file: File::create(dir.join(name))? };
        let mut event = head(0);
        text(&mut event, 3, "brain.Event:2");
        board.write(&event)?;
        Ok(board)
    }

    /// Values of one step; what is not finite is left out.
    pub(crate) fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> io::Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values.iter().filter(|(_, value)| value.is_finite()) {
            let mut one = Vec::new();
            text(&mut one, 1, tag);
            key(&mut one, 2, 5);
            one.extend((*value as f32).to_le_bytes());
            bytes(&mut summary, 1, &one);
        }
        let mut event = head(step);
        bytes(&mut event, 5, &summary);
        self.write(&event)
    }

    /// A TFRecord: length and data, each with its masked checksum. In one write, so that a reader meets whole records.
    fn write(&mut self, data: &[u8]) -> io::Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let parts = [&length[..], &masked(&length), data, &masked(data)];
        self.file.write_all(&parts.concat())
    }
}

fn masked(data: &[u8]) -> [u8; 4] {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// Time and step, with which every event begins.
fn head(step: u64) -> Vec<u8> {
    let mut event = Vec::new();
    key(&mut event, 1, 1);
    event.extend(now().to_le_bytes());
    key(&mut event, 2, 0);
    varint(&mut event, step);
    event
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// A protocol buffer's field number and wire type.
fn key(message: &mut Vec<u8>, field: u64, wire: u64) {
    varint(message, field << 3 | wire);
}

fn text(message: &mut Vec<u8>, field: u64, value: &str) {
    bytes(message, field, value.as_bytes());
}

fn bytes(message: &mut Vec<u8>, field: u64, value: &[u8]) {
    key(message, field, 2);
    varint(message, value.len() as u64);
    message.extend(value);
}

fn varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_framed_and_hold_what_was_given() {
        // The checksum of RFC 3720, appendix B.4, masked by hand.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        let dir = tempfile::tempdir().unwrap();
        let mut board = Board::create(dir.path()).unwrap();
        board.scalars(300, &[("median_us", 12.5), ("drift", f64::NAN)]).unwrap();
        let file = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap();
        assert!(file.file_name().to_string_lossy().contains("tfevents"));
        let mut rest = &fs::read(file.path()).unwrap()[..];
        let mut records = Vec::new();
        while let Some((length, tail)) = rest.split_at_checked(8) {
            let size = u64::from_le_bytes(length.try_into().unwrap()) as usize;
            assert_eq!(tail[..4], masked(length));
            let data = &tail[4..4 + size];
            assert_eq!(tail[4 + size..8 + size], masked(data));
            records.push(data.to_vec());
            rest = &tail[8 + size..];
        }
        assert!(rest.is_empty() && records.len() == 2);
        assert!(records[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        // Step 300; one value, tag and float.
        let expected = [&b"\x10\xac\x02\x2a\x12\x0a\x10\x0a\x09median_us\x15"[..], &12.5f32.to_le_bytes()].concat();
        assert_eq!(records[1][9..], expected);
    }
}
