//! The names of a vocabulary, by id and back, in two allocations.

/// Names by id, and ids by name: open addressing over an arena, as a vocabulary of a quarter of a million strings is
/// built once and only looked up in.
#[derive(Debug, Clone)]
pub(super) struct Names {
    text: String,
    /// Where each name ends in `text`; it begins where the one before ends.
    ends: Vec<u32>,
    /// Id plus one, or 0. A power of two, at most half full.
    slots: Box<[u32]>,
    hasher: ahash::RandomState,
    holes: u32,
}

/// A name that is there already, with this id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Taken(pub(super) u32);

// === impl Names ===

impl Names {
    /// Room for `count` names of `bytes` bytes together.
    pub(super) fn with_capacity(count: usize, bytes: usize) -> Self {
        Self {
            text: String::with_capacity(bytes),
            ends: Vec::with_capacity(count),
            slots: vec![0; (count.max(1) * 2).next_power_of_two()].into(),
            hasher: ahash::RandomState::new(),
            holes: 0,
        }
    }

    /// Gives the next id to a name.
    pub(super) fn push(&mut self, name: &str) -> Result<(), Taken> {
        if self.ends.len() * 2 >= self.slots.len() {
            self.grow();
        }
        let slot = match self.find(name) {
            Ok(first) => return Err(Taken(first)),
            Err(slot) => slot,
        };
        self.append(name);
        self.slots[slot] = self.len();
        Ok(())
    }

    /// Gives the next id to nothing that can be found.
    pub(super) fn skip(&mut self) {
        self.append("");
        self.holes += 1;
    }

    pub(super) fn id(&self, name: &str) -> Option<u32> {
        self.find(name).ok()
    }

    /// The name of an id; empty where there is none.
    pub(super) fn name(&self, id: u32) -> &str {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return "" };
        let begin = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.text[begin as usize..end as usize]
    }

    /// The highest id plus one.
    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.ends.len()).unwrap_or(u32::MAX)
    }

    /// How many names there are.
    pub(super) fn count(&self) -> u32 {
        self.len() - self.holes
    }

    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        (0..self.len()).map(|id| self.name(id))
    }

    fn append(&mut self, name: &str) {
        self.text.push_str(name);
        // The text of a tokenizer's file is far below 4 GiB: its readers bound it.
        self.ends.push(u32::try_from(self.text.len()).unwrap_or(u32::MAX));
    }

    /// The id of a name, or the slot where it belongs.
    fn find(&self, name: &str) -> Result<u32, usize> {
        let mask = self.slots.len() - 1;
        let mut at = self.hash(name) & mask;
        loop {
            match self.slots[at] {
                0 => return Err(at),
                id if self.name(id - 1) == name => return Ok(id - 1),
                _ => at = (at + 1) & mask,
            }
        }
    }

    fn hash(&self, name: &str) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "any bits of a hash are as good as others")]
        let hash = self.hasher.hash_one(name) as usize;
        hash
    }

    fn grow(&mut self) {
        let old = std::mem::take(&mut self.slots);
        self.slots = vec![0; old.len() * 2].into();
        for id in old.into_iter().filter(|id| *id > 0) {
            if let Err(slot) = self.find(self.name(id - 1)) {
                self.slots[slot] = id;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_whatever_room_there_was() {
        let mut names = Names::with_capacity(0, 0);
        for n in 0..1000_u32 {
            if n % 10 == 3 {
                names.skip();
            } else {
                names.push(&format!("name{n}")).unwrap();
            }
        }
        assert_eq!(names.push("name500"), Err(Taken(500)));
        assert_eq!((names.len(), names.count()), (1000, 900));
        for n in 0..1000 {
            let name = format!("name{n}");
            assert_eq!(names.id(&name), (n % 10 != 3).then_some(n));
            assert_eq!(names.name(n), if n % 10 == 3 { "" } else { &*name });
        }
        assert_eq!((names.id(""), names.id("name")), (None, None));
        assert_eq!(names.name(1000), "");
    }
}
