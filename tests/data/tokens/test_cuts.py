"""Pieces of a text, encoded one by one, give the tokens of the whole, for every tokenizer that is cut at all."""

import base64
import gzip
import itertools
import json
import re

import pytest
import tiktoken
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from dynaroute.data.text.sources import Document
from dynaroute.data.tokens import encode
from dynaroute.data.tokens.cuts import GPT2_CUTS, LINE_CUTS, WORD_CUTS, cuts_of, last_cut
from dynaroute.data.tokens.encode import pieces
from dynaroute.data.tokens.tokenizers import GPT2_FILE, HuggingFaceTokenizer, TiktokenTokenizer, Tokenizer
from dynaroute.errors import DynarouteError

LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = (
    LLAMA_PATTERN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace("{1,3}", "").replace(r"\s\p{L}", r"\s\p{L}\p{M}")
)
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_HUB_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Whatever a pattern, an added token or a normalization may treat in its own way.
NASTY = [
    *"aAs1 \n\r\t'./_\u00a0\u3000\u4e2d",
    *"\u2028\u0085\x0b\x1c\x1f\u180e\u200b\0\u00e9\u0301\u00a8\u017f\u212a\u00b2\u2167",
    *("\u1100\u1161\u11a8", "\U0001f469\u200d\U0001f680", "\u0378", "\U0010ffff", "\ufffd", "'ll", "'S", "\r\n"),
    *("<tok>", "word", " word", "   ", "\n\n", "  \n"),
]
FREQUENT = [*"as1 \n./'\t\u3000", " a", "\na", ".\n", "\n\t", " word"]  # where cuts are, and what is around them
TEXTS = st.lists(
    st.sampled_from(FREQUENT) | st.sampled_from(NASTY) | st.characters(exclude_categories=["Cs"]), max_size=20
).map("".join)


def byte_level(*steps: pre_tokenizers.PreTokenizer, normalizer=None, added=()) -> tokenizers.Tokenizer:
    """A tokenizer that shows where its text was split: within a part, any two bytes become one token, if they can."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [token for ((token, _),) in map(pre_tokenizers.ByteLevel(False).pre_tokenize_str, "as1. \n\t'/")]
    pairs = list(itertools.product(letters, repeat=2))
    vocabulary = [*alphabet, *("".join(pair) for pair in pairs)]
    model = models.BPE({token: number for number, token in enumerate(vocabulary)}, pairs)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(list(steps))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens(list(added))
    tokenizer.add_special_tokens(["<|endoftext|>", "s\n"])  # special ones are read as text
    return tokenizer


def split(pattern: str, *behavior) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), *(behavior or ("isolated",)))


SPLITTING, BYTES = pre_tokenizers.ByteLevel(False), pre_tokenizers.ByteLevel(False, use_regex=False)
CUT = {
    "GPT-2": byte_level(SPLITTING),
    "GPT-NeoX": byte_level(SPLITTING, normalizer=normalizers.NFC(), added=["   ", "  ", "\n\n"]),
    "SmolLM": byte_level(pre_tokenizers.Digits(True), SPLITTING),
    "Llama 3": byte_level(split(LLAMA_PATTERN), BYTES, added=["<tok>", "word"]),
    "OLMo 2": byte_level(split(LLAMA_PATTERN, "removed", True), BYTES),
    "Qwen": byte_level(split(QWEN_PATTERN), BYTES, normalizer=normalizers.NFC()),
    "GPT-2's pattern": byte_level(split(GPT2_HUB_PATTERN), BYTES),
}
WHOLE = {
    "GPT-4o": byte_level(split(O200K_PATTERN), BYTES),
    "nothing splits": tokenizers.Tokenizer(models.BPE()),
    "bytes alone": byte_level(BYTES),
    "digits alone": byte_level(pre_tokenizers.Digits(True), BYTES),
    "a space is put first": byte_level(pre_tokenizers.ByteLevel(True)),
    "Llama 2": byte_level(pre_tokenizers.Metaspace()),
    "quotations": byte_level(split(r'"[^"]*"|\s+'), BYTES),
    "spaces in a pattern": byte_level(split(LLAMA_PATTERN.replace("[^", "[ ^", 1)), BYTES),
    "gaps at spaces": byte_level(split(r" ?\p{L}+|\p{N}"), BYTES),
    "words are removed": byte_level(split(LLAMA_PATTERN, "removed"), BYTES),
    "lower case": byte_level(SPLITTING, normalizer=normalizers.Sequence([normalizers.Lowercase()])),
    "a token takes spaces": byte_level(SPLITTING, added=[AddedToken("<tok>", rstrip=True)]),
    "bytes first": byte_level(BYTES, split(LLAMA_PATTERN)),
    "line ends last": byte_level(split(LLAMA_PATTERN.replace(r"|\s*[\r\n]+", "") + r"|\s*[\r\n]+"), BYTES),
    "a token of two lines": byte_level(split(LLAMA_PATTERN), BYTES, added=["\n\t"]),
    "a token of two words": byte_level(SPLITTING, added=["two words"]),
    "a token that is a word": byte_level(SPLITTING, added=[AddedToken("word", single_word=True)]),
}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Tokenizer:
    """tiktoken with GPT-2's pattern and few tokens, among them all that a part may be split into wrongly."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokens = [bytes([value]) for value in range(256)]
    tokens += [bytes(pair) for pair in itertools.product(b"as1. \n\t'/", repeat=2)]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / GPT2_FILE).write_text("".join(lines))
    return TiktokenTokenizer(folder)


@pytest.fixture(scope="module", params=CUT)
def library(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    CUT[request.param].save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return HuggingFaceTokenizer(folder)


def assert_pieces_give_the_whole(tokenizer: Tokenizer, text: str) -> None:
    starts = [match.start() for match in tokenizer.cuts.finditer(text)]
    parts = [text[start:stop] for start, stop in itertools.pairwise([0, *starts, len(text)])]
    whole, *ids = (own.tolist() for own in tokenizer.encode_batch([text, *parts]))
    assert [*itertools.chain.from_iterable(ids)] == whole


@given(TEXTS)
@example("a  \n word\x1c \x1cs")
def test_gpt2_can_be_cut_at_every_cut(gpt2, text):
    assert_pieces_give_the_whole(gpt2, text)


@given(text=TEXTS)
@example(text="a  <tok> word\nword\n\nword <tok>a a")
@example(text="1;\n/a;\n\n \t'll\n\t\n\u3000\u3000\u4e2d.\r\n  1\r\ta")
def test_a_tokenizer_of_the_hub_can_be_cut_at_every_cut(library, text):
    assert_pieces_give_the_whole(library, text)


LINES = ["123,456\n", "12 34 56\n", "\u4e2d\u3002\n\u3000\u3000", "\u4e2d\u3002\n\n", "\t\tx=1;\n", "\u4e2d\n", ", "]
LINES += ["<p>\r\n\r\n", "1\t2\r", "---\n", "{\n    }\n"]


@pytest.mark.parametrize("line", LINES)
def test_a_text_of_lines_is_cut_near_its_end(library, line):
    assert last_cut(line * 100, library.cuts) > len(line) * 98
    assert_pieces_give_the_whole(library, line * 100)


def test_real_text_is_cut_often_and_gives_the_tokens_of_the_whole(library, shared_data):
    texts = [(shared_data / "wikitext/wiki.test.raw").read_text()]
    for path in sorted(shared_data.glob("dolma_sample/*-0000.json.gz")):
        lines = gzip.decompress(path.read_bytes()).splitlines()
        texts.append("\n".join(json.loads(line)["text"] for line in lines[:3]))
    for text in texts:
        assert len(library.cuts.findall(text[:50_000])) > len(text[:50_000]) / 50
        assert_pieces_give_the_whole(library, text[:50_000])


def test_both_libraries_agree_on_white_space():
    characters = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    theirs = {part for part, ends in split(r"\s").pre_tokenize_str(characters) if len(part) == 1}
    ranks = {bytes([value]): value for value in range(256)}
    encoding = tiktoken.Encoding("white space", pat_str=r"\s", mergeable_ranks=ranks, special_tokens={})
    assert set(encoding.decode(encoding.encode_ordinary(characters))) == theirs
    assert theirs == set(re.findall(r"[^\S\x1c-\x1f]", characters))
    assert not theirs & set(re.findall(r"[\S\x1c-\x1f]", characters))


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
def test_only_a_known_tokenizer_is_cut(name):
    if name == "GPT-2":
        assert cuts_of(CUT[name]) is GPT2_CUTS
    else:
        words = ("GPT-NeoX", "SmolLM", "GPT-2's pattern")
        assert cuts_of((CUT | WHOLE)[name]) is (None if name in WHOLE else WORD_CUTS if name in words else LINE_CUTS)


@given(st.lists(TEXTS, min_size=1, max_size=8), st.sampled_from([GPT2_CUTS, WORD_CUTS, LINE_CUTS]))
def test_pieces_are_the_text_and_end_at_cuts(texts, cuts):
    parts = [Document("1", text, "s", continues=index + 1 < len(texts)) for index, text in enumerate(texts)]
    found = list(pieces([*parts, Document("2", "next", "s")], cuts))
    assert found.pop() == Document("2", "next", "s")
    whole = "".join(texts)
    assert "".join(piece.text for piece in found) == whole
    ends = set(itertools.accumulate(len(piece.text) for piece in found[:-1]))
    assert ends <= {match.start() for match in cuts.finditer(whole)}
    assert [piece.continues for piece in found] == [True] * (len(found) - 1) + [False] * bool(found)


@pytest.mark.parametrize(("text", "cuts"), [("a" * 120, GPT2_CUTS), (" " * 120, LINE_CUTS), ("a word " * 20, None)])
def test_a_document_that_cannot_be_cut_in_time_is_named(monkeypatch, text, cuts):
    monkeypatch.setattr(encode, "MAX_UNCUT", 100)
    parts = [Document("Chromosome 1", text[start : start + 30], "s", continues=True) for start in range(0, 120, 30)]
    with pytest.raises(DynarouteError, match=r"^document 'Chromosome 1' of 's': .* more than 100 characters of it"):
        list(pieces(parts, cuts))


def test_the_last_cut_is_found_however_far_it_is_from_the_end():
    for length in (3, 1000, 10_000):
        assert last_cut("one two" + "o" * length, GPT2_CUTS) == 3
    assert last_cut("one", GPT2_CUTS) == last_cut(" one", GPT2_CUTS) == 0


def test_gpt2_reads_a_million_spaces_before_a_word(gpt2):
    spaces = " " * 1_100_000
    whole, rest, word = gpt2.encode_batch([f"a{spaces} a a", f"a{spaces}", " a a"])
    assert whole.tolist() == [*rest.tolist(), *word.tolist()]
