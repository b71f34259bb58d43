//! Stop strings, found in a stream of text wherever its pieces begin and end.

/// As in the OpenAI API, with room: it allows 4.
pub const STOPS_MAX: usize = 16;

/// Why stop strings can't be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StopError {
    /// More than [`STOPS_MAX`].
    #[error("{count} stop strings, at most {STOPS_MAX} are possible")]
    TooMany {
        /// How many.
        count: usize,
    },
    /// An empty stop string would stop before anything.
    #[error("a stop string is empty")]
    Empty,
}

/// Passes text on, except for what could be the beginning of a stop string, and says when one is there.
///
/// The stop string whose end comes first wins; of several with the same end, the longest. Neither it nor anything
/// after it is passed on.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    /// Text that isn't passed on yet.
    held: String,
    matched: Option<usize>,
}

/// One stop string and how far the text matches it: Knuth, Morris, Pratt.
#[derive(Debug, Clone)]
struct Stop {
    text: Box<[u8]>,
    /// For each length of a partial match: the next shorter one that it contains as its end.
    shorter: Box<[u32]>,
    matched: usize,
}

// === impl StopMatcher ===

impl StopMatcher {
    /// For these stop strings; none is fine.
    ///
    /// # Errors
    /// [`StopError`] for too many, or an empty one.
    pub fn new<S: AsRef<str>>(stops: impl IntoIterator<Item = S>) -> Result<Self, StopError> {
        let stops: Vec<Stop> = stops.into_iter().map(|s| Stop::new(s.as_ref().as_bytes())).collect();
        if stops.len() > STOPS_MAX {
            return Err(StopError::TooMany { count: stops.len() });
        }
        if stops.iter().any(|stop| stop.text.is_empty()) {
            return Err(StopError::Empty);
        }
        Ok(Self { stops, held: String::new(), matched: None })
    }

    /// Takes in more text and appends to `out` what can't be part of a stop string. Returns the index of the stop
    /// string that was found, now or before; from then on nothing is passed on.
    pub fn push(&mut self, text: &str, out: &mut String) -> Option<usize> {
        if self.matched.is_some() {
            return self.matched;
        }
        if self.stops.is_empty() {
            out.push_str(text);
            return None;
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            let mut longest: Option<(usize, usize)> = None;
            for (index, stop) in self.stops.iter_mut().enumerate() {
                if stop.step(byte) && longest.is_none_or(|(len, _)| stop.text.len() > len) {
                    longest = Some((stop.text.len(), index));
                }
            }
            if let Some((len, index)) = longest {
                out.push_str(&self.held[..before + at + 1 - len]);
                self.held = String::new();
                self.matched = Some(index);
                return self.matched;
            }
        }
        let hold = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        let pass = self.held.len() - hold;
        out.push_str(&self.held[..pass]);
        self.held.drain(..pass);
        None
    }

    /// The text has ended: appends what was held back.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        for stop in &mut self.stops {
            stop.matched = 0;
        }
    }

    /// The stop string that was found.
    #[must_use]
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }
}

// === impl Stop ===

impl Stop {
    fn new(text: &[u8]) -> Self {
        let mut shorter = vec![0_u32; text.len()];
        let mut matched = 0_usize;
        for at in 1..text.len() {
            while matched > 0 && text[at] != text[matched] {
                matched = shorter[matched - 1] as usize;
            }
            if text[at] == text[matched] {
                matched += 1;
            }
            shorter[at] = u32::try_from(matched).unwrap_or(u32::MAX);
        }
        Self { text: text.into(), shorter: shorter.into(), matched: 0 }
    }

    /// Takes in a byte; whether the text now ends with the stop string.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.text[self.matched] != byte {
            self.matched = self.shorter[self.matched - 1] as usize;
        }
        if self.text[self.matched] == byte {
            self.matched += 1;
        }
        self.matched == self.text.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[String], pieces: &[String]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops).unwrap();
        let mut out = String::new();
        for piece in pieces {
            matcher.push(piece, &mut out);
        }
        matcher.finish(&mut out);
        (out, matcher.matched())
    }

    /// The stop string whose end comes first; the longest of those.
    fn naive(stops: &[String], text: &str) -> (String, Option<usize>) {
        let ends = stops
            .iter()
            .enumerate()
            .filter_map(|(i, s)| text.find(s.as_str()).map(|at| (at + s.len(), at, i)));
        match ends.min() {
            Some((_, at, index)) => (text[..at].to_owned(), Some(index)),
            None => (text.to_owned(), None),
        }
    }

    #[test]
    fn what_could_become_a_stop_string_is_held_back() {
        let mut matcher = StopMatcher::new(["</s>", "\n\nHuman:"]).unwrap();
        let mut out = String::new();
        assert_eq!(matcher.push("Hello <", &mut out), None);
        assert_eq!(out, "Hello ");
        assert_eq!(matcher.push("/", &mut out), None);
        assert_eq!(matcher.push("b>\n", &mut out), None);
        assert_eq!(out, "Hello </b>");
        assert_eq!(matcher.push("\nHum", &mut out), None);
        assert_eq!(matcher.push("an: x", &mut out), Some(1));
        assert_eq!(matcher.push("more", &mut out), Some(1));
        matcher.finish(&mut out);
        assert_eq!(out, "Hello </b>");
    }

    #[test]
    fn the_end_releases_what_was_held_back() {
        assert_eq!(run(&["stop".into()], &["don't st".into(), "o".into()]), ("don't sto".into(), None));
    }

    #[test]
    fn too_many_and_empty_ones_are_refused() {
        assert_eq!(StopMatcher::new(vec!["x"; 17]).unwrap_err(), StopError::TooMany { count: 17 });
        assert_eq!(StopMatcher::new([""]).unwrap_err(), StopError::Empty);
    }

    proptest! {
        #[test]
        fn equals_a_search_in_the_whole_text(
            stops in prop::collection::vec("[abé]{1,5}", 0..5),
            pieces in prop::collection::vec("[abé]{0,6}", 0..20),
        ) {
            prop_assert_eq!(run(&stops, &pieces), naive(&stops, &pieces.concat()));
        }
    }
}
