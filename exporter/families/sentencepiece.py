"""tokenizer.json of a release that ships only a SentencePiece `tokenizer.model`, as LLaMA's first releases do.

It gives the ids of LLaVA's `tokenizer_image_token` (llava/mm_utils.py) with the slow `LlamaTokenizer`: the texts before
and behind the image are tokenised each for itself, so SentencePiece's leading space stands before both.
"""

import os
from pathlib import Path
from typing import Any

from himap_export.engines.documents import MEGABYTE, Id, read_file, read_json
from himap_export.exporter.checks import require_supported
from himap_export.graphs.errors import Exit, HimapError

SPACE = "\u2581"  # SentencePiece's
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # ModelProto.SentencePiece.Type
BPE = 2  # TrainerSpec.ModelType
MOST_BYTES = 64 * MEGABYTE  # of a tokenizer.model: the largest published ones take 4
MOST_LETTERS = 1000  # of a piece: all its halves are looked up


def tokenizer_json(folder: Path, image_text: str) -> bytes | None:
    """Returns tokenizer.json's content, `image_text` the token behind all others; None without a tokenizer.model.

    Special tokens that a prompt spells (`</s>`) are those tokens, and the text behind one gets a leading space, as in
    the slow tokenizer with `legacy`. HimapError for a damaged file, or a SentencePiece model unlike LLaMA's.
    """
    if not os.path.lexists(folder / "tokenizer.model"):
        return None
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers.tokenization_utils_base import generate_merges

    proto = _read(folder / "tokenizer.model")
    trained = proto.trainer_spec
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces}
    try:
        merges = generate_merges(vocab, scores)
        model = models.BPE(
            vocab, merges, unk_token=trained.unk_piece, fuse_unk=True, byte_fallback=trained.byte_fallback
        )
    except Exception as problem:  # tokenizers raises bare Exception
        details = f"{folder / 'tokenizer.model'}: {' '.join(str(problem).split())}"
        raise HimapError("the checkpoint's tokenizer cannot be loaded", details) from None
    made = Tokenizer(model)
    # On each stretch of text between special tokens, the image among them.
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL)]
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    known = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED] + _added(folder, len(vocab))
    made.add_tokens([AddedToken(token, normalized=False) for token in known])
    made.add_special_tokens([AddedToken(image_text, normalized=False)])
    bos = proto.pieces[trained.bos_id].piece
    made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, trained.bos_id)])
    return made.to_str().encode()


def _read(path: Path) -> Any:
    """Returns the ModelProto in `path`, if it is a model like LLaMA's."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(read_file(path, "tokenizer", MOST_BYTES, Exit.FAILURE))
    except DecodeError as problem:
        raise HimapError("the checkpoint's tokenizer cannot be loaded", f"{path}: {problem}") from None
    text, trained, pieces = proto.normalizer_spec, proto.trainer_spec, [piece.piece for piece in proto.pieces]
    if not 0 <= trained.bos_id < len(pieces):
        raise HimapError("the checkpoint's tokenizer cannot be loaded", f"{path} holds no SentencePiece model with BOS")
    if len({*pieces}) < len(pieces) or not all(0 < len(piece) <= MOST_LETTERS for piece in pieces):
        details = f"{path} holds pieces twice, empty ones, or some of more than {MOST_LETTERS} letters"
        raise HimapError("the checkpoint's tokenizer cannot be loaded", details)
    require_supported("SentencePiece model type", trained.model_type, BPE)
    changed = bool(text.precompiled_charsmap or text.remove_extra_whitespaces)
    require_supported("SentencePiece normalisation", changed, False)
    require_supported("SentencePiece without a leading space", not text.add_dummy_prefix, False)
    return proto


def _added(folder: Path, first: int) -> list[str]:
    """Returns the tokens of added_tokens.json, whose ids follow the vocabulary's, from `first` on."""
    path = folder / "added_tokens.json"
    if not os.path.lexists(path):
        return []
    ids = read_json(path, dict[str, Id], "tokens", code=Exit.FAILURE)
    ordered = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in ordered] != list(range(first, first + len(ids))):
        details = f"its ids do not follow the vocabulary's {first}: {str(ids)[:300]}"
        raise HimapError(f"unsupported {path.name}", details)
    return ordered
