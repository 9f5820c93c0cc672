"""Where a text can be cut so that its pieces, encoded one by one, give the tokens of the whole.

A pre-tokenizer splits a text from left to right by the alternatives of a pattern; what it splits apart, the model never
joins. So a cut is safe if no alternative matches across it, and each matches on either side alone what it matches in
the whole text. Which patterns that holds for is known of those below; a tokenizer with another one reads texts whole.
"""

import json
import re
from typing import Literal

import tokenizers

# Before a white space that another character follows: for GPT-2's pattern, which `ByteLevel` has too. Of several white
# spaces `\s+(?!\S)` leaves the last one; on the left alone it matches all others, as it does in the whole. Unlike
# Python's, the \s of both libraries does not match the separators 1C to 1F.
GPT2_CUTS = re.compile(r"[^\S\x1c-\x1f](?=[\S\x1c-\x1f])")
# Between any character and the white space after it: for GPT-2's pattern beside other steps, which may treat several
# white spaces in their own way. No alternative matches a white space after another character.
WORD_CUTS = re.compile(r"(?<=\S)(?=[^\S\x1c-\x1f])")
# The same but before a line end, which a mark may take in; and after the last line end of several white spaces, if
# another character follows at all: `\s*[\r\n]+` matches up to there, and on the left alone as well.
LINE_CUTS = re.compile(r"(?<=\S)(?=[^\S\r\n\x1c-\x1f])|(?<=[\r\n])(?=[^\S\r\n]*+\S)")
GPT2 = ["'s|'t|'re|'ve|'m|'ll|'d", r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+"]
OTHERS = [
    # Llama 3, OLMo 2
    *(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*"),
    *(r"\p{N}", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),  # Qwen
]
CUTS_OF_PATTERNS = {
    re.compile("(?:(?:{})\\|)+{}".format("|".join(map(re.escape, alternatives)), re.escape(spaces))): cuts
    for alternatives, spaces, cuts in (
        (GPT2, r"\s+(?!\S)|\s+", WORD_CUTS),
        (GPT2 + OTHERS, r"\s*[\r\n]+|\s+(?!\S)|\s+", LINE_CUTS),
    )
}


def cuts_of(tokenizer: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """What matches where a text can be cut for a tokenizer that reads special tokens as ordinary text.

    A match starts at the cut. None: no cut is known to be safe.
    """
    normalizer, splitter = (
        json.loads(part.__getstate__()) if part else {} for part in (tokenizer.normalizer, tokenizer.pre_tokenizer)
    )
    steps = splitter.get("pretokenizers", [splitter])
    cuts = [_cuts_of_step(step) for step in steps]
    added = [token for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
    if (
        None in cuts
        or any(step["type"] == "ByteLevel" for step in steps[:-1])  # after it, there are no white spaces
        or normalizer not in ({}, {"type": "NFC"})
        or any(token.lstrip or token.rstrip or token.single_word for token in added)
        or not all(re.fullmatch(r"(\s)\1*|\S+", token.content) for token in added)
    ):
        return None
    if cuts == [WORD_CUTS] and steps[0]["type"] == "ByteLevel" and not added and not normalizer:
        return GPT2_CUTS
    return next(filter(None, cuts), None)  # what the first one splits apart, the others see apart


def _cuts_of_step(step: dict) -> re.Pattern[str] | Literal[False] | None:
    """Where a pre-tokenizer splits; False: not at any cut; None: it may depend on more than a cut's neighbours."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(splits)}:
            return splits and WORD_CUTS
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Removed",
            "invert": True,
        }:
            return next((cuts for known, cuts in CUTS_OF_PATTERNS.items() if known.fullmatch(pattern)), None)
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
