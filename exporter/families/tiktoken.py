"""tokenizer.json out of `qwen.tiktoken`, the ranks of a byte-level BPE: one "base64 rank" a line."""

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from himap_export.engines.documents import MEGABYTE, read_file
from himap_export.graphs.errors import Exit, HimapError

MOST_BYTES: Final = 64 * MEGABYTE  # of a file: the release's takes 2.5
MOST_TOKEN: Final = 1000  # bytes: all halves of a token are looked up
# From the release's tokenization_qwen.py.
PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS: Final = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)),
    "<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>",
)  # fmt: skip


def tokenizer_json(file: Path, expected: Mapping[str, int]) -> bytes | None:
    """Returns tokenizer.json, equal to `tiktoken.Encoding` over the ranks in `file` with the special tokens behind;
    None without such a file.

    `expected`: special tokens' ids by the model's configuration. HimapError if the file is damaged or has others.
    """
    from tokenizers import normalizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    if not os.path.lexists(file):
        return None
    ranks = read_ranks(file)
    for token, wanted in expected.items():
        found = len(ranks) + SPECIALS.index(token)
        if found != wanted:
            details = f"{token} is {found} behind its {len(ranks)} tokens, {wanted} in the model's config"
            raise HimapError(f"{file} is not the model's", details)

    converter = TikTokenConverter(str(file), PATTERN, extra_special_tokens=SPECIALS)
    converter.load_tiktoken_bpe = lambda url: ranks  # it would ask the package tiktoken
    made = converter.converted()
    made.normalizer = normalizers.NFC()
    return str(made.to_str()).encode()


def read_ranks(file: Path) -> dict[bytes, int]:
    """Returns the ids 0, 1, .. by their tokens' bytes, in order; HimapError for a file that holds anything else."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_file(file, "tokenizer", MOST_BYTES, Exit.FAILURE).splitlines(), 1):
        if not line:
            continue
        try:
            word, rank = line.split()
            token = base64.b64decode(word, validate=True)
            expected, found = len(ranks), int(rank)
        except ValueError as problem:
            raise HimapError(f"{file} is damaged", f"line {number} is no token and its rank: {problem}") from None
        if found != expected or token in ranks or not 0 < len(token) <= MOST_TOKEN:
            details = f"line {number}: {token[:80]!r} has rank {found}, expected a new token and {expected}"
            raise HimapError(f"{file} is damaged", details)
        ranks[token] = found
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise HimapError(f"{file} is damaged", f"{len(missing)} of the 256 bytes have no rank")
    return ranks
