"""Where a text can be cut so that its pieces, encoded one by one, give the tokens of the whole.

A pre-tokenizer splits a text from left to right by the alternatives of a pattern; what it splits apart, the model never
joins. So a cut is safe if no alternative matches across it, and each matches on either side alone what it matches in
the whole text. Which patterns that holds for is known of those below; a tokenizer with another one reads texts whole.
"""

import json
import re

import tokenizers

# Before a white space that another character follows: for GPT-2's pattern, which `ByteLevel` has too. Of several white
# spaces `\s+(?!\S)` leaves the last one; on the left alone it matches all others, as it does in the whole. Unlike
# Python's, the \s of both libraries does not match the separators 1C to 1F.
GPT2_CUTS = re.compile(r"[^\S\x1c-\x1f](?=[\S\x1c-\x1f])")
# Before a single space between words, and between a single newline and a word: for any pattern of these alternatives.
# None of them matches a space after another character, or a letter after a newline.
CUTS = re.compile(r"(?<=\S) (?=[^\W\d_])|(?<=\S\n)(?=[^\W\d_])")
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ALTERNATIVES = [
    *(CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}"),  # Llama 3, OLMo 2
    *(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"),
    *(r"\p{N}", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),  # Qwen
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTIONS + "?",  # GPT-4o
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTIONS + "?",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    *("'s|'t|'re|'ve|'m|'ll|'d", r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+"),  # GPT-2
]
KNOWN_PATTERN = re.compile("(?:(?:{})\\|)+{}".format("|".join(map(re.escape, ALTERNATIVES)), re.escape(r"\s+")))


def cuts_of(tokenizer: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """What matches where a text can be cut for a tokenizer that reads special tokens as ordinary text.

    A match starts at the cut. None: no cut is known to be safe.
    """
    normalizer, splitter = (
        json.loads(part.__getstate__()) if part else {} for part in (tokenizer.normalizer, tokenizer.pre_tokenizer)
    )
    steps = splitter.get("pretokenizers", [splitter])
    split_here = [_splits(step) for step in steps]
    added = [token for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
    if (
        None in split_here
        or True not in split_here
        or normalizer not in ({}, {"type": "NFC"})
        or any(token.lstrip or token.rstrip or token.single_word for token in added)
        or not all(re.fullmatch(r"\s+|\S+", token.content) for token in added)
    ):
        return None
    return CUTS if added or normalizer or len(steps) > 1 or steps[0]["type"] != "ByteLevel" else GPT2_CUTS


def _splits(step: dict) -> bool | None:
    """Whether a pre-tokenizer splits at CUTS; None if what it does there may depend on more than their neighbours."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(splits)}:
            return splits
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Removed",
            "invert": True,
        }:
            return True if KNOWN_PATTERN.fullmatch(pattern) else None
        case {"type": "Digits"}:
            return False
    return None


def last_cut(text: str, cuts: re.Pattern[str]) -> int:
    """The last place within a text where it can be cut; 0 if there is none."""
    for size in (2**8, 2**12, len(text)):
        found = [match.start() for match in cuts.finditer(text, max(1, len(text) - size))]
        if found:
            return found[-1]
    return 0
