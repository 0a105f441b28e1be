"""What himap-export reads: configurations, processors, tokenizers, weights and plan files that lie."""

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuzz import json_faults
from fuzz.contract import Arguments, Case, Door, Room, stop
from fuzz.json_faults import Fault

Originals = Mapping[str, Path]
Spoil = Callable[[bytes], bytes]
EXPORT = "himap_export.exporter.export:Export"
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json")


def doors(originals: Originals) -> list[Door]:
    """One door for each file of a checkpoint, and plan files."""
    found = [_config(name, originals[name]) for name in originals if name.startswith("config of ")]
    model = originals["model"]
    found += [_processor(model, name) for name in (*PROCESSOR, "generation_config.json") if (model / name).is_file()]
    return [*found, _templates(model), _weights(model), _plans(originals)]


# --- config.json ---

# What every family reads as a whole number above zero, under whichever name, and what it reads as a number.
SIZES = re.compile(
    r"(.*\.)?(hidden_size|intermediate_size|num_hidden_layers|num_attention_heads|num_key_value_heads|vocab_size|"
    r"patch_size|image_size|depth|num_heads|out_hidden_size|head_dim|kv_channels|width|heads|layers|output_dim)(\[\d\])?"
)
NUMBERS = re.compile(r"(.*\.)?(rms_norm_eps|layer_norm_epsilon|rope_theta|rotary_emb_base)")
IDS = re.compile(r"(image_token_index|image_token_id|.*\.image_start_id)")
DEFAULTS = ("null", "deleted")  # transformers fills in what a configuration leaves out


def _of_config(fault: Fault) -> tuple[bool, str]:
    """Whether the same plan is all right, and why another one is."""
    if fault.value == "twice":
        return False, ""
    if fault.value in DEFAULTS or (fault.kind == "dict" and fault.value == "object"):
        return True, "a key that is left out has its default"
    if SIZES.fullmatch(fault.place):
        large = "a large model" if fault.value == "1e9" and re.search("vocab|positions", fault.place) else ""
        return fault.value == "unknown key", large
    if NUMBERS.fullmatch(fault.place):
        return False, "a number" if fault.value in ("1.5", "1e9", "1e30") and "eps" not in fault.place else ""
    if IDS.fullmatch(fault.place):
        return False, "a token's id" if fault.value == "0" else ""
    return True, "one of the dtypes that it says it has" if fault.name == "fp16 = true" else ""


def _config(name: str, folder: Path) -> Door:
    text = (folder / "config.json").read_bytes()

    def case(fault: Fault | None) -> Case:
        def prepare(room: Room) -> Arguments:
            model = room.copy(name)
            if fault is not None:
                room.write(model / "config.json", fault.spoil(text))
            return (model, "--k1", 1, "--k2", 3, *_flags(folder), "--text-budget", 24, "--dry-run", "--json")

        same, why = _of_config(fault) if fault else (True, "")
        return Case(name, fault.name if fault else "good", "himap-export", prepare, why, same)

    return Door(name, case(None), lambda: [case(fault) for fault in json_faults.faults(text)])


def _flags(folder: Path) -> Sequence[str]:
    file = folder / "flags.json"
    return json.loads(file.read_text()) if file.is_file() else ()


# --- what is beside it ---


def _shown(export: Any) -> None:
    """Ends an export before its first phase and tells what it has read."""
    manifest = export.manifest()
    print(repr((manifest.model.eos_tokens, manifest.model.pad_token, manifest.images, manifest.prompt)))
    raise SystemExit(0)


BEFORE = {f"{EXPORT}.vision": _shown}
READ = re.compile(
    r"(image_processor\.)?(do_\w+|size.*|crop_size.*|image_mean.*|image_std.*|rescale_factor|resample|"
    r"image_processor_type)|eos_token_id.*|pad_token_id"
)


def _of_processor(file: str, fault: Fault) -> tuple[bool, str]:
    if fault.value == "twice" and not file.startswith("tokenizer"):
        return False, ""
    if file.startswith("tokenizer"):
        return True, "any tokenizer that transformers loads and that knows the image token is one"
    if fault.value in DEFAULTS:
        return True, "a key that is left out has its default"
    if READ.fullmatch(fault.place):
        number = fault.value in ("0", "-1", "1.5") and re.search("mean|rescale|std|resample", fault.place)
        token = fault.value in ("0", "list") and "token_id" in fault.place
        return True, "a number" if number else "a token" if token else ""
    return True, ""


def _processor(model: Path, file: str) -> Door:
    text = (model / file).read_bytes()

    def case(fault: Fault | None) -> Case:
        same, why = _of_processor(file, fault) if fault else (True, "")
        return _read(file, fault.name if fault else "good", fault.spoil if fault else lambda raw: raw, why, same)

    return Door(file, case(None), lambda: [case(fault) for fault in json_faults.faults(text)])


def _read(file: str, name: str, spoil: Spoil, why: str = "", same: bool = True) -> Case:
    """An export up to its first phase, of a model in which `file` is spoiled."""

    def prepare(room: Room) -> Arguments:
        model = room.copy("model")
        room.write(model / file, spoil((model / file).read_bytes()))
        return (model, "--k1", 1, "--k2", 3, "--text-budget", 24, "--out", room.folder / "out")

    return Case(file, name, "himap-export", prepare, why, same, patches=BEFORE)


LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
TEMPLATES = {
    "empty": "",
    "text": "no question",
    "cut off": "{% for",
    "endless": LOOP,
    "huge": "{{ 'x' * 10 ** 11 }}",
    "huge format": "{{ '%1000000000d' % 1 }}",
    "huge power": "{{ 10 ** 10 ** 8 }}",
    "a cycle": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "code": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a file": "{% include '/etc/passwd' %}",
    "an exception": "{{ raise_exception('Traceback (most recent call last):\\n error: two\\n error: three') }}",
    "many lines": "{{ raise_exception('x\\n' * 100000) }}",
    "deep": "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    "deep blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "two images": "<image><image>{{ messages[0]['content'][1]['text'] }}",
    "shouted": "<image>{{ messages[0]['content'][1]['text'] | upper }}",
    "undefined": "{{ nothing.at.all }}",
    "not text": "\udcff\udcfe",
}


def _templates(model: Path) -> Door:
    file = "chat_template.jinja"

    def case(name: str, template: str | None) -> Case:
        raw = None if template is None else template.encode("utf-8", "surrogateescape")
        return _read(file, name, lambda good: good if raw is None else raw, same=template is None)

    return Door(file, case("good", None), lambda: [case(name, text) for name, text in TEMPLATES.items()])


# --- weights ---


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _weight_faults(raw: bytes) -> Iterator[tuple[str, bytes]]:
    header, data = split(raw)
    text = json.dumps(header).encode()
    matrix = next(name for name in header if "embed_tokens" in name)
    yield from header_faults(header, data, matrix)
    for length in (0, 1, 7, 8, 9, 100, len(raw) // 2, len(raw) - 100, len(raw) - 1):
        yield f"cut at {length}", raw[:length]
    yield "longer by 100", raw + b"\0" * 100
    for length in (0, 1, len(text) - 1, len(text) + 1, 2**31, 2**60, 2**63, 2**64 - 1):
        yield f"a header of {length}", joined(text, data, length)
    for words in (b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"a": NaN}', b"\xff\xfe{}", b"{}"):
        yield f"the header {words[:9]!r}", joined(words, data)
    entry = json.dumps(header[matrix])
    yield "a tensor twice", joined(text[:-1] + f', "{matrix}": {entry}}}'.encode(), data)
    begin, end = header[matrix]["data_offsets"]
    for name, word in (("nan", b"\0\0\xc0\x7f"), ("inf", b"\0\0\x80\x7f"), ("-inf", b"\0\0\x80\xff")):
        middle = begin + (end - begin) // 8 * 4
        yield f"a weight is {name}", joined(text, data[:middle] + word + data[middle + 4 :])


def header_faults(header: dict[str, Any], data: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    entry = header[name]
    begin, end = entry["data_offsets"]
    changes: dict[str, Mapping[str, Any] | None] = {
        "a tensor missing": None,
        "overlapping": {"data_offsets": [begin - 4, end - 4]} if begin else {"data_offsets": [begin + 4, end + 4]},
        "turned round": {"data_offsets": [end, begin]},
        "below zero": {"data_offsets": [-4, end - begin - 4]},
        "beyond the end": {"data_offsets": [len(data), len(data) + end - begin]},
        "nothing": {"shape": [0, 4], "data_offsets": [begin, begin]},
        "transposed": {"shape": entry["shape"][::-1]},
        "a number": {"shape": []},
        "integers": {"dtype": "I32"},
        "half": {"dtype": "F16", "data_offsets": [begin, begin + (end - begin) // 2]},
        "eight bytes": {"dtype": "F64"},
        "float8": {"dtype": "F8_E4M3"},
        "two huge sides": {"shape": [2**40, 2**40]},
        "two negative sides": {"shape": [-size for size in entry["shape"]]},
    }
    for what, change in changes.items():
        spoiled = {k: v for k, v in header.items() if k != name} | (
            {} if change is None else {name: {**entry, **change}}
        )
        yield what, joined(json.dumps(spoiled).encode(), data)
    narrow = json.dumps({name: entry}).encode()
    for fault in json_faults.faults(narrow):
        one = fault.spoil(narrow).strip()
        rest = json.dumps({k: v for k, v in header.items() if k != name})
        if one.startswith(b"{") and one.endswith(b"}"):
            yield f"header: {fault.name}", joined(rest[:-1].encode() + b", " + one[1:-1].strip() + b"}", data)


def _weights(model: Path) -> Door:
    file = "model.safetensors"
    raw = (model / file).read_bytes()

    def case(name: str, content: bytes) -> Case:
        def prepare(room: Room) -> Arguments:
            folder = room.copy("model")
            room.write(folder / file, content)
            return (folder, "--k1", 1, "--k2", 3, "--text-budget", 24, "--out", room.folder / "out")

        # Vision takes seconds and reads no weights; compiling reads what `weights` wrote.
        patches = {f"{EXPORT}.vision": lambda export: "", f"{EXPORT}.compile": stop}
        why = "half precision holds numbers too" if name == "half" else ""
        return Case(file, name, "himap-export", prepare, why, name == "good" or "unknown key" in name, patches=patches)

    return Door(file, case("good", raw), lambda: [case(*fault) for fault in _weight_faults(raw)])


# --- plan files ---

PLAN = """[tight]
k1 = 1
k2 = 3
r1 = 0.5
r2 = 0.75

[single]
policy = "fastv"
k1 = 2
keep = 7

[listed]
cuts = [{layer = 1, criterion = "last", remove = 0.5}, {layer = 3, criterion = "image", keep = 2}]
"""
TOML = {
    "-1": "-1", "0": "0", "1.5": "1.5", "1e9": "1000000000", "1e30": str(10**30), "nan": "nan", "inf": "inf",
    "true": "true", "word": '"many"', "empty": '""', "long": '"' + "x" * 100_000 + '"', "list": "[]", "table": "{}",
    "date": "1979-05-27", "deep": "[" * 50_000 + "]" * 50_000, "digits": "9" * 5000, "-0.0": "-0.0", "1e-320": "1e-320",
}  # fmt: skip
KEYS = (
    "k1 = 1", "k2 = 3", "r1 = 0.5", "r2 = 0.75", "k1 = 2", "keep = 7", 'policy = "fastv"',
    "layer = 1", "remove = 0.5", "keep = 2", 'criterion = "last"',
)  # fmt: skip
TEXTS = (
    "",
    "\ufeff",
    "=",
    "[a]",
    "a = 1",
    "[a]\ncuts = 3",
    "[[tight]]\nk1 = 1",
    "[a.b]\nk1 = 1",
    "x = " + "[" * 90_000,
)


def _plan_faults() -> Iterator[tuple[str, bytes]]:
    for key in KEYS:
        name = key.partition(" ")[0]
        for value, literal in TOML.items():
            yield f"{key} is {value}", PLAN.replace(key, f"{name} = {literal}", 1).encode()
        yield f"{key} deleted", PLAN.replace(key + ("," if "layer" in key else ""), "", 1).encode()
        yield (
            f"{key} twice",
            PLAN.replace(key, f"{key}{',' if key in PLAN.split('listed')[1] else chr(10)}{key}", 1).encode(),
        )
    for what in TEXTS:
        yield f"the text {what[:20]!r}", what.encode()
    yield "not UTF-8", b"[a]\nk1 = \xff"
    yield "an unknown key", PLAN.replace("k1 = 1", "k1 = 1\nk9 = 1", 1).encode()
    yield "a name that climbs", PLAN.replace("[tight]", '["../tight"]').encode()
    yield "a name of 300 letters", PLAN.replace("[tight]", f"[{'x' * 300}]").encode()
    yield "500 plans", "".join(f"[p{n}]\nk1 = 1\nk2 = 3\nr1 = 0.5\nr2 = 0.{n:03}\n" for n in range(500)).encode()
    cuts = ", ".join('{layer = 1, criterion = "last", remove = 0.5}' for _ in range(100_000))
    yield "100000 cuts", f"[a]\ncuts = [{cuts}]\n".encode()


def _plans(originals: Originals) -> Door:
    def case(name: str, content: bytes) -> Case:
        def prepare(room: Room) -> Arguments:
            file = room.write(room.folder / "plans.toml", content)
            return (room.copy("model"), "--plan", file, "--dry-run", "--json")

        return Case("plans", name, "himap-export", prepare, HARMLESS_PLANS.get(name, ""), name == "good")

    return Door("plans", case("good", PLAN.encode()), lambda: [case(*fault) for fault in _plan_faults()])


HARMLESS_PLANS = {
    **{f"r{n} = {r} is {v}": "nothing is removed" for n, r in ((1, 0.5), (2, 0.75)) for v in ("0", "-0.0", "1e-320")},
    **{f"remove = 0.5 is {v}": "nothing is removed" for v in ("0", "-0.0", "1e-320")},
    **{f"keep = {n} is 0": "no image token stays" for n in (2, 7)},
}
