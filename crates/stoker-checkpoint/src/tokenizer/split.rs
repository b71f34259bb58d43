//! How a text is cut into pieces before byte pairs are merged: GPT-2's pattern and its successors.
//!
//! The patterns are regular expressions with a look ahead, for which a general engine backtracks. The three that nearly
//! all models have are written out here, alternative by alternative; a property test holds them against the engine.

use std::sync::OnceLock;

use regex_syntax::hir::{Class, HirKind};

/// GPT-2's pattern.
pub(super) const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's.
pub(super) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's: as Llama 3's, but each digit by itself.
pub(super) const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Cuts a text into pieces; matches and what is between them alike.
#[derive(Debug)]
pub(super) enum Splitter {
    /// [`GPT2`].
    Gpt2,
    /// [`LLAMA3`] and [`QWEN2`]: so many digits make a piece.
    Llama3 { digits_max: usize },
    /// Each numeric character by itself.
    Digits,
    /// Any other pattern.
    Pattern(Box<fancy_regex::Regex>),
}

const OTHER: u8 = 0;
const LETTER: u8 = 1;
const NUMBER: u8 = 2;
const SPACE: u8 = 3;

/// Unicode's general categories L and N, and the property White_Space.
#[derive(Debug)]
struct Classes {
    /// Of each character of the basic plane.
    basic: Box<[u8]>,
    /// First, last and class of the others, ascending.
    above: Vec<(u32, u32, u8)>,
}

/// A text, looked at by class.
#[derive(Clone, Copy)]
struct Scanner<'a> {
    text: &'a str,
    classes: &'a Classes,
}

// === impl Splitter ===

impl Splitter {
    /// For the pattern of a `Split` in `tokenizer.json`; `None` when the engine doesn't know its syntax.
    pub(super) fn of_pattern(pattern: &str) -> Option<Self> {
        match pattern {
            GPT2 => Some(Self::Gpt2),
            LLAMA3 => Some(Self::Llama3 { digits_max: 3 }),
            QWEN2 => Some(Self::Llama3 { digits_max: 1 }),
            r"\p{N}" => Some(Self::Digits),
            _ => fancy_regex::Regex::new(pattern).ok().map(|regex| Self::Pattern(regex.into())),
        }
    }

    /// Calls `piece` with every piece, none empty, in order; together they are the text.
    pub(super) fn split<'t>(&self, text: &'t str, mut piece: impl FnMut(&'t str)) {
        let scanner = Scanner { text, classes: Classes::get() };
        let mut at = 0;
        match self {
            Self::Gpt2 => {
                while at < text.len() {
                    let end = scanner.gpt2(at);
                    piece(&text[at..end]);
                    at = end;
                }
            }
            Self::Llama3 { digits_max } => {
                while at < text.len() {
                    let end = scanner.llama3(at, *digits_max);
                    piece(&text[at..end]);
                    at = end;
                }
            }
            Self::Digits => {
                for (begin, c) in text.char_indices() {
                    if scanner.classes.of(c) == NUMBER {
                        if at < begin {
                            piece(&text[at..begin]);
                        }
                        at = begin + c.len_utf8();
                        piece(&text[begin..at]);
                    }
                }
            }
            Self::Pattern(regex) => {
                // A pattern that gives up on a text leaves its rest in one piece.
                for found in regex.find_iter(text).map_while(Result::ok) {
                    for (begin, end) in [(at, found.start()), (found.start(), found.end())] {
                        if begin < end {
                            piece(&text[begin..end]);
                        }
                    }
                    at = found.end();
                }
            }
        }
        if at < text.len() {
            piece(&text[at..]);
        }
    }
}

// === impl Scanner ===

impl Scanner<'_> {
    /// Where GPT-2's match at `at` ends. The alternatives are tried in the pattern's order; one of them always matches.
    fn gpt2(self, at: usize) -> usize {
        if let Some(end) = self.contraction(at, false) {
            return end;
        }
        let (first, after) = self.class(at);
        // ` ?\p{L}+`, ` ?\p{N}+`, ` ?[^\s\p{L}\p{N}]+`
        let behind_space = if self.text.as_bytes()[at] == b' ' { after } else { at };
        if let Some((class, next)) = self.next(behind_space).filter(|(class, _)| *class != SPACE) {
            return self.run(next, class);
        }
        debug_assert_eq!(first, SPACE, "every other class has matched");
        self.white_space(at, after)
    }

    /// Where Llama 3's match at `at` ends.
    fn llama3(self, at: usize, digits_max: usize) -> usize {
        if let Some(end) = self.contraction(at, true) {
            return end;
        }
        let byte = self.text.as_bytes()[at];
        let (first, after) = self.class(at);
        match first {
            // `[^\r\n\p{L}\p{N}]?\p{L}+`, without the first part...
            LETTER => return self.run(after, LETTER),
            // `\p{N}{1,3}`
            NUMBER => {
                let mut end = after;
                for _ in 1..digits_max {
                    match self.next(end) {
                        Some((NUMBER, next)) => end = next,
                        _ => break,
                    }
                }
                return end;
            }
            // ...and with it.
            _ if byte != b'\r' && byte != b'\n' => {
                if let Some((LETTER, next)) = self.next(after) {
                    return self.run(next, LETTER);
                }
            }
            _ => {}
        }
        // ` ?[^\s\p{L}\p{N}]+[\r\n]*`
        let behind_space = if byte == b' ' { after } else { at };
        if let Some((OTHER, next)) = self.next(behind_space) {
            let end = self.run(next, OTHER);
            let rest = &self.text.as_bytes()[end..];
            return end + rest.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
        }
        debug_assert_eq!(first, SPACE, "every other class has matched");
        // `\s*[\r\n]+`: to the last line end of the white space.
        let end = self.run(after, SPACE);
        match self.text.as_bytes()[at..end].iter().rposition(|b| matches!(b, b'\r' | b'\n')) {
            Some(line_end) => at + line_end + 1,
            None => self.white_space(at, after),
        }
    }

    /// `\s+(?!\S)|\s+`: white space without its last character when something else follows, unless it is the only one.
    fn white_space(self, at: usize, after: usize) -> usize {
        let end = self.run(after, SPACE);
        if end == self.text.len() {
            return end;
        }
        let last = self.text[at..end].chars().next_back().map_or(0, char::len_utf8);
        if end - last > at { end - last } else { end }
    }

    /// `'s|'t|'re|'ve|'m|'ll|'d`, with or without regard to case. The long s is an s of another case.
    fn contraction(self, at: usize, any_case: bool) -> Option<usize> {
        let rest = self.text[at..].strip_prefix('\'')?;
        let mut chars = rest.chars().map(|c| match c {
            'ſ' if any_case => 's',
            c if any_case => c.to_ascii_lowercase(),
            c => c,
        });
        let letters = match (chars.next()?, chars.next()) {
            ('s' | 't' | 'm' | 'd', _) => 1,
            ('r' | 'v', Some('e')) | ('l', Some('l')) => 2,
            _ => return None,
        };
        Some(at + 1 + rest.chars().take(letters).map(char::len_utf8).sum::<usize>())
    }

    /// Where the characters of `class` from `at` on end.
    fn run(self, mut at: usize, class: u8) -> usize {
        while let Some((_, next)) = self.next(at).filter(|(c, _)| *c == class) {
            at = next;
        }
        at
    }

    /// Class of the character at `at`, and where the next one begins.
    fn next(self, at: usize) -> Option<(u8, usize)> {
        (at < self.text.len()).then(|| self.class(at))
    }

    fn class(self, at: usize) -> (u8, usize) {
        let byte = self.text.as_bytes()[at];
        if byte.is_ascii() {
            return (self.classes.basic[usize::from(byte)], at + 1);
        }
        let c = self.text[at..].chars().next().unwrap_or_default();
        (self.classes.of(c), at + c.len_utf8())
    }
}

// === impl Classes ===

impl Classes {
    fn get() -> &'static Self {
        static CLASSES: OnceLock<Classes> = OnceLock::new();
        CLASSES.get_or_init(Self::new)
    }

    fn new() -> Self {
        let mut classes = Self { basic: vec![OTHER; 1 << 16].into(), above: Vec::new() };
        for (pattern, class) in [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE)] {
            let parsed = regex_syntax::parse(pattern).map(regex_syntax::hir::Hir::into_kind);
            let Ok(HirKind::Class(Class::Unicode(ranges))) = parsed else {
                unreachable!("the engine of these patterns has the tables of Unicode");
            };
            for range in ranges.iter() {
                let (first, last) = (u32::from(range.start()), u32::from(range.end()));
                let basic = first as usize..(last as usize + 1).min(1 << 16);
                if !basic.is_empty() {
                    classes.basic[basic].fill(class);
                }
                if last >= 1 << 16 {
                    classes.above.push((first.max(1 << 16), last, class));
                }
            }
        }
        classes.above.sort_unstable();
        classes
    }

    fn of(&self, c: char) -> u8 {
        let code = u32::from(c);
        match self.basic.get(code as usize) {
            Some(&class) => class,
            None => {
                let at = self.above.partition_point(|(_, last, _)| *last < code);
                self.above.get(at).filter(|(first, ..)| *first <= code).map_or(OTHER, |(.., class)| *class)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(splitter: &Splitter, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        splitter.split(text, |piece| out.push(piece.to_owned()));
        out
    }

    /// Characters that meet every alternative, and its neighbours.
    fn awkward() -> impl Strategy<Value = String> {
        let c = prop::sample::select(vec![
            "'", "s", "S", "ſ", "t", "re", "VE", "m", "ll", "lL", "d", "x", "é", "漢", "𐐷", "ǅ", "ʰ", "7",
            "½", "Ⅷ", "𝟘", " ", "  ", "\t", "\n", "\r", "\r\n", "\u{a0}", "\u{2003}", "\u{85}", ".", "!",
            "_", "😀", "\u{301}", "\u{200b}", "\0", "-", "/",
        ]);
        prop::collection::vec(c, 0..24).prop_map(|parts| parts.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn written_out_patterns_equal_the_engine(text in awkward()) {
            static BOTH: OnceLock<[(Splitter, Splitter); 4]> = OnceLock::new();
            let both = BOTH.get_or_init(|| [GPT2, LLAMA3, QWEN2, r"\p{N}"].map(|pattern| {
                let engine = Splitter::Pattern(Box::new(fancy_regex::Regex::new(pattern).unwrap()));
                (Splitter::of_pattern(pattern).unwrap(), engine)
            }));
            for (written, engine) in both {
                prop_assert!(!matches!(written, Splitter::Pattern(_)));
                prop_assert_eq!(pieces(written, &text), pieces(engine, &text), "{:?}", written);
                prop_assert_eq!(pieces(written, &text).concat(), &*text);
            }
        }
    }

    #[test]
    fn every_character_has_the_class_of_the_tables() {
        let [letter, number, space] =
            [r"\p{L}", r"\p{N}", r"\s"].map(|p| fancy_regex::Regex::new(p).unwrap());
        for c in (0..=0x10_ffff).step_by(7).chain(0..0x3000).filter_map(char::from_u32) {
            let text = c.to_string();
            let is = |regex: &fancy_regex::Regex| regex.is_match(&text).unwrap();
            let expected = match (is(&letter), is(&number), is(&space)) {
                (true, ..) => LETTER,
                (_, true, _) => NUMBER,
                (.., true) => SPACE,
                _ => OTHER,
            };
            assert_eq!(Classes::get().of(c), expected, "{c:?}");
        }
    }
}
