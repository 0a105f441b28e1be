"""What the soak asks: drawn pictures in several formats, questions, what single runs answer, and requests that are
wrong."""

import base64
import io
import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples" / "shapes"))
PICTURES, NEW_TOKENS, BUDGETS, SEEDS, SOFT = 48, 24, (32, 64), 4, 0.2
PLANS = ("dart", "none", "random")
OTHERS = """
[none]
policy = "none"

[random]
policy = "random"
k1 = 2
k2 = 5
r1 = 0.5
r2 = 0.75
"""
Picture = tuple[str, bytes]  # media type, content


def export_shapes(out: Path, soft: bool, backend: str | None) -> None:
    """Exports the shipped model with the plan of its demo, one without cuts and one of random cuts, 8 slots each.

    The shipped one is sure of itself: two or three tokens, whatever the temperature. A `soft` one has its last norm
    scaled down: at higher temperatures it says anything, at any length. It is exported in fp32 for onnxruntime, as in
    16 bits it would not say the same beside others: which word is drawn then hangs on a product's last bits.
    """
    import himap_export as hx

    demo = (ROOT / "examples" / "shapes" / "demo.toml").read_text().partition("[unpruned]")[0]
    plans = out.with_name(f"{out.name}.toml")
    plans.write_text(demo.replace("[demo]", "[dart]") + OTHERS)
    given: dict[str, Any] = {"backend": "onnxruntime", "dtype": "fp32"} if soft else {}
    given |= {"backend": backend} if backend else {}
    model = _softened(out.with_name(f"{out.name}-model")) if soft else "shapes"
    hx.export(
        model, out=out, overwrite=True, plan=plans, text_budget=BUDGETS, slots=8, max_new_tokens=NEW_TOKENS, **given
    )


def _softened(out: Path) -> Path:
    from safetensors.torch import load_file, save_file

    from himap_export.exporter.aliases import ALIASES

    shutil.copytree(ALIASES["shapes"].source, out, dirs_exist_ok=True)
    weights = load_file(out / "model.safetensors")
    weights["language_model.model.norm.weight"] *= SOFT
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def drawn() -> tuple[list[Picture], list[str]]:
    """Returns pictures of drawn scenes as PNG, JPEG and WebP of several sizes, and a question about each."""
    from draw import held_out  # of the shapes example

    pictures, questions = [], []
    for n, (image, question, _, _) in enumerate(held_out(PICTURES, seed=16)):
        kind = ("png", "jpeg", "webp")[n % 3]
        shown = image.resize((480, 400)) if n % 4 == 3 else image
        held = io.BytesIO()
        shown.save(held, kind)
        pictures.append((f"image/{kind}", held.getvalue()))
        questions.append(question)
    return pictures, questions


@dataclass(frozen=True)
class Ask:
    """One distinct question: to a plan, about a picture by its number."""

    plan: str
    picture: int
    prompt: str
    max_tokens: int
    temperature: float
    seed: int

    def body(self, pictures: Sequence[Picture], model: str, stream: bool) -> bytes:
        """Returns it as JSON."""
        kind, content = pictures[self.picture]
        url = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        parts = [{"type": "text", "text": self.prompt}, {"type": "image_url", "image_url": {"url": url}}]
        document = {
            "model": f"{model}:{self.plan}", "messages": [{"role": "user", "content": parts}], "stream": stream,
            "max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed,
        }  # fmt: skip
        if stream:
            document["stream_options"] = {"include_usage": True}
        return json.dumps(document).encode()


@dataclass(frozen=True)
class Truth:
    """What a single run answers."""

    text: str
    tokens: int
    reason: str


def asks(questions: Sequence[str], count: int, seed: int) -> list[Ask]:
    """Returns distinct questions; some are said several times over, and need the larger text budget."""
    draw, found = random.Random(seed), dict[Ask, None]()
    while len(found) < count:
        picture, temperature = draw.randrange(len(questions)), draw.choice((0.0, 0.7, 1.5, 1.5))
        prompt = " ".join([questions[picture]] * draw.choice((1, 1, 3)))
        new = draw.choice((1, 3, 8, NEW_TOKENS, NEW_TOKENS))
        found[Ask(draw.choice(PLANS), picture, prompt, new, temperature, seed=draw.randrange(SEEDS))] = None
    return list(found)


def truths(bundle: Path, backend: str | None, pictures: Sequence[Picture], asked: Sequence[Ask]) -> list[Truth]:
    """Returns what sessions answer to each, one after the other, in a process of their own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_truths, (bundle, backend, pictures, asked))


def _truths(bundle: Path, backend: str | None, pictures: Sequence[Picture], asked: Sequence[Ask]) -> list[Truth]:
    import himap_export as hx
    from himap_export.engines.image import decode_image

    opened, found = hx.Bundle.open(bundle), list[Truth]()
    sessions = {plan: opened.session(plan=plan, backend=backend) for plan in PLANS}
    images = [decode_image(content, "a drawn picture") for _, content in pictures]
    for ask in asked:
        answer = sessions[ask.plan].ask(
            images[ask.picture], ask.prompt, max_new_tokens=ask.max_tokens, temperature=ask.temperature, seed=ask.seed
        )
        tokens = answer.tokens[0]
        reason = "stop" if tokens[-1] in opened.manifest.model.eos_tokens else "length"
        found.append(Truth(answer.text, len(tokens), reason))
    return found


@dataclass(frozen=True)
class Malformed:
    """A request that is wrong, whole as it is sent, and the status that it must have."""

    name: str
    content: bytes
    status: int


def malformed(body: bytes, path: str = "/v1/chat/completions") -> list[Malformed]:
    """Returns requests each made wrong in one way, from the `body` of one that is right."""
    document = json.loads(body)

    def changed(**fields: Any) -> bytes:
        return request(path, json.dumps({n: v for n, v in (document | fields).items() if v is not ...}).encode())

    def pictured(url: str) -> bytes:
        parts = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}]
        return changed(messages=[{"role": "user", "content": parts}])

    return [
        Malformed("not JSON", request(path, b'{"model": '), 400),
        Malformed("not an object", request(path, b"[]"), 400),
        Malformed("invalid UTF-8", request(path, b'{"model": "\xff"}'), 400),
        Malformed("deep JSON", request(path, b"[" * 100_000), 400),
        Malformed("no messages", changed(messages=...), 400),
        Malformed("no picture", changed(messages=[{"role": "user", "content": "what is it?"}]), 400),
        Malformed("two answers", changed(n=2), 400),
        Malformed("unknown field", changed(colour="red"), 400),
        Malformed("wrong type", changed(max_tokens="many"), 400),
        Malformed("too hot", changed(temperature=9), 400),
        Malformed("too many tokens", changed(max_tokens=10**6), 400),
        Malformed("unknown model", changed(model="no-such-model"), 404),
        Malformed("no picture in it", pictured("data:image/png;base64,AAAA"), 400),
        Malformed("a local file", pictured("file:///etc/passwd"), 400),
        Malformed("a private address", pictured("http://127.0.0.1/cat.png"), 400),
        Malformed("not application/json", request(path, body, kind="text/plain"), 415),
        Malformed("no such path", request("/v1/completions", body), 404),
        Malformed("too large", request(path, b"", size=10**10), 413),
        Malformed("a flood of headers", request(path, body, more=b"x-a: b\r\n" * 2000), 431),
        Malformed("not HTTP", b"\x16\x03\x01 hello\r\n\r\n", 400),
    ]


def request(
    path: str, body: bytes, *, kind: str = "application/json", size: int | None = None, more: bytes = b""
) -> bytes:
    """Returns a whole HTTP request; `size` is what it says its body has."""
    lines = (
        f"POST {path} HTTP/1.1", "host: 127.0.0.1", "connection: close", f"content-type: {kind}",
        f"content-length: {len(body) if size is None else size}", "",
    )  # fmt: skip
    return "\r\n".join(lines).encode() + more + b"\r\n" + body
