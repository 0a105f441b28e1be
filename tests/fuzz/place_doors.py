"""Names that are no plain files: what is read, what is written, and where a bundle goes."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fuzz.contract import Arguments, Case, Door, Room, stop

Originals = Mapping[str, Path]
BEFORE = {"himap_export.exporter.export:Export.vision": stop}
# Where it is used, too: a module that is imported while a stand-in is there would keep it.
REFERENCE = {f"himap_export.validate.{module}:load_reference": stop for module in ("validation", "checkpoint")}
TUNE = {"himap_export.validate.tuning.tune:tune": stop}
ENGINES = {"himap_export.engines.session:Pipeline": stop}


def doors(originals: Originals) -> list[Door]:
    """Files that are read, files and folders that are written, targets of an export."""
    return [_inputs(), _outputs(), _reports(), _targets()]


# --- kinds of files ---


def _folder(path: Path) -> None:
    path.mkdir()


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(f"/proc/self/cwd/{os.path.relpath(path)}")


def _unreadable(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0)


KINDS: Mapping[str, Callable[[Path], None]] = {
    "a folder": _folder,
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to zeros": lambda path: path.symlink_to("/dev/zero"),
    "a link to a full disk": lambda path: path.symlink_to("/dev/full"),
    "a link to the terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to a process": lambda path: path.symlink_to("/proc/self/mem"),
    "empty": lambda path: path.write_bytes(b"") and None,
    "a megabyte of zeros": lambda path: path.write_bytes(bytes(10**6)) and None,
    **({"unreadable": _unreadable} if os.geteuid() else {}),
}
# Names that no good file has, in place of a path.
NAMES = {
    "300 letters": "x" * 300,
    "5000 letters": "/".join("x" * 100 for _ in range(50)),
    "not UTF-8": "a\udcff",
    "a line break": "a\nb",
    "a colour": "\x1b[31mred",
    "nothing": "",
    "zeros": "/dev/zero",
    "full": "/dev/full",
    "memory": "/proc/self/mem",
    "below a file": "in.npz/x",
}


def _asked(room: Room, command: str, **changed: object) -> Arguments:
    """A command with good inputs, but for those that are given here. Names: bundle, model, npz, image, data, plan."""
    paths = {k: room.folder / v for k, v in (("npz", "in.npz"), ("image", "image.png"), ("data", "data.jsonl"))}
    for original in ("bundle", "model", "in.npz", "image.png"):
        if not (room.folder / original).exists() and not (room.folder / original).is_symlink():
            room.copy(original)
    good = {**paths, "bundle": room.folder / "bundle", "model": room.folder / "model"} | changed
    if "data" not in changed:
        line = json.dumps({"image": "image.png", "question": "Which?", "answer": "a"})
        room.write(room.folder / "data.jsonl", line.encode())
    return {
        "export": (good["model"], "--k1", 1, "--k2", 3, "--text-budget", 24, "--out", room.folder / "out"),
        "plan": (good["model"], "--plan", good.get("plan", "qa"), "--dry-run"),
        "arrays": (good["bundle"], "--load-inputs", good["npz"], "--threads", 1),
        "weights": (good["bundle"], "--load-inputs", good["npz"], "--weights", good.get("weights", good["model"])),
        "image": (good["bundle"], "--image", good["image"], "--prompt", "what?"),
        "validate": (good["bundle"], "--model", good["model"], "--load-inputs", good["npz"], "--no-speed"),
        "score": (good["bundle"], "--model", good["model"], "--dataset", good["data"], "--report", room.folder / "out"),
        "analyze": (good["model"], "--dataset", good["data"], "--out", room.folder / "out"),
        "tune": (good["model"], "--dataset", good["data"], "--out", room.folder / "out", "--no-time"),
    }[command]


COMMAND = {
    "export": "himap-export", "plan": "himap-export", "arrays": "himap-run", "weights": "himap-run",
    "image": "himap-run", "validate": "himap-validate", "score": "himap-validate", "analyze": "himap-analyze",
    "tune": "himap-tune",
}  # fmt: skip
# What each command reads: by role, and the files inside folders.
READ = {
    "export": ("model", "model/config.json", "model/model.safetensors", "model/tokenizer.json",
               "model/tokenizer_config.json", "model/generation_config.json", "model/chat_template.jinja",
               "model/processor_config.json", "model/model.safetensors.index.json"),
    "plan": ("plan",),
    "arrays": ("bundle", "npz", "bundle/manifest.json", "bundle/k1.onnx", "bundle/weights/model.safetensors"),
    "image": ("image", "bundle/tokenizer.json"),
    "weights": ("weights",),
    "validate": ("bundle", "model", "npz"),
    "score": ("data",),
    "analyze": ("model", "data", "image.png"),
    "tune": ("data", "out/sweep.jsonl"),
}  # fmt: skip
PATCHES = {"export": BEFORE, "validate": REFERENCE, "score": ENGINES, "analyze": REFERENCE, "tune": TUNE}
# Files that a checkpoint may lack, or hold in another form.
SPARE = ("generation_config", "processor_config", "tokenizer", "chat_template", "index")


def _inputs() -> Door:
    def bad() -> Iterator[Case]:
        for command, roles in READ.items():
            for role in roles:
                inside = "/" in role or "." in role
                for kind, make in KINDS.items():
                    yield _input(command, role, kind, lambda r, role=role, make=make: _placed(r, role, make))
                for kind, name in {}.items() if inside else NAMES.items():
                    yield _input(
                        command, role, f"named {kind}", lambda r, n=name: n if n[:1] == "/" or not n else r.folder / n
                    )

    good = Case("inputs", "good", "himap-run", lambda room: _asked(room, "arrays"))
    return Door("inputs", good, lambda: list(bad()))


def _named(room: Room, name: str) -> object:
    return name if not name or name.startswith("/") else room.folder / name


def _placed(room: Room, role: str, make: Callable[[Path], None]) -> Path:
    """Something of another kind where the role's file or folder was."""
    if "/" not in role and "." not in role:
        path = room.folder / f"bad-{role}"
    else:
        path = room.folder / role
        if (first := path.relative_to(room.folder).parts[0]) in room.originals:
            room.copy(first)
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
    make(path)
    return path


def _input(command: str, role: str, kind: str, place: Callable[[Room], object]) -> Case:
    def prepare(room: Room) -> Arguments:
        path = place(room)
        plain = "/" not in role and "." not in role
        return _asked(room, command, **({role: path} if plain else {}))

    spare = any(word in role for word in SPARE) and kind in ("a link to nothing", "a link to itself", "a folder")
    log = role == "out/sweep.jsonl" and kind in ("empty", "a megabyte of zeros")
    why = "a checkpoint may lack it" if spare else "a log is read by what stands in here" if log else ""
    return Case(
        "inputs", f"{command}: {role} is {kind}", COMMAND[command], prepare, why,
        may_make=("out",), patches=PATCHES.get(command, {}),
    )  # fmt: skip


# --- outputs ---

WRITTEN = {
    "arrays": ("--save-outputs", ".npz"),
    "image": ("--show-kept", ".png"),
    "validate": ("--save-outputs", ".npz"),
}


def _in_bundle(room: Room) -> Path:
    return room.copy("bundle") / "more"


PLACES: Mapping[str, Callable[[Room, str], object]] = {
    "/dev/full": lambda room, suffix: "/dev/full",
    "/dev/null": lambda room, suffix: "/dev/null",
    "a folder that is not there": lambda room, suffix: room.folder / "no" / f"out{suffix}",
    "a folder that may not be written": lambda room, suffix: f"/proc/out{suffix}",
    "the manifest": lambda room, suffix: room.copy("bundle") / "manifest.json",
    "a graph": lambda room, suffix: room.copy("bundle") / "k1.onnx",
    "a new file in the bundle": lambda room, suffix: room.copy("bundle") / f"out{suffix}",
    "a new file in its weights": lambda room, suffix: room.copy("bundle") / "weights" / f"out{suffix}",
    "the arrays": lambda room, suffix: room.copy("in.npz"),
    "the image": lambda room, suffix: room.copy("image.png"),
    "a weight": lambda room, suffix: room.copy("model") / "model.safetensors",
    "300 letters": lambda room, suffix: room.folder / ("x" * 300 + suffix),
    "below a file": lambda room, suffix: room.copy("in.npz") / f"out{suffix}",
    "nothing": lambda room, suffix: "",
    "a zero byte's neighbour": lambda room, suffix: room.folder / f"a\udcff{suffix}",
    "a file of somebody's": lambda room, suffix: room.write(room.folder / f"mine{suffix}", b"my notes"),
    **{
        kind: lambda room, suffix, make=make: _made(room.folder / f"out{suffix}", make)
        for kind, make in KINDS.items()
        if kind not in ("empty", "unreadable", "a megabyte of zeros")
    },
}


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    make(path)
    return path


HERE = ("validate", "nothing")


def _outputs() -> Door:
    def case(command: str, name: str) -> Case:
        flag, suffix = WRITTEN[command]

        def prepare(room: Room) -> Arguments:
            path = PLACES[name](room, suffix)
            return (*_asked(room, command), flag, path)

        # Nothing is ever written: a command that would is stopped as it opens its engines.
        why = "a folder takes polygraphy's files: the one that you are in" if (command, name) == HERE else ""
        return Case("outputs", f"{command} {flag}: {name}", COMMAND[command], prepare, why, patches=ENGINES)

    def good(room: Room) -> Arguments:
        return (*_asked(room, "arrays"), "--save-outputs", room.folder / "out.npz")

    fine = Case("outputs", "good", "himap-run", good, may_make=("out.npz",))
    return Door("outputs", fine, lambda: [case(command, name) for command in WRITTEN for name in PLACES])


def _reports() -> Door:
    """Folders of reports: --report, and --out of himap-analyze and himap-tune."""
    makers: Mapping[str, Callable[[Room], object]] = {
        "a file": lambda room: room.copy("in.npz"),
        "the bundle": lambda room: room.copy("bundle"),
        "a folder in the bundle": lambda room: room.copy("bundle") / "report",
        "the checkpoint": lambda room: room.copy("model"),
        "/dev/null": lambda room: "/dev/null",
        "/proc/out": lambda room: "/proc/out",
        "a page that is a folder": lambda room: _page(room, KINDS["a folder"]),
        "a page that is a device": lambda room: _page(room, KINDS["a link to a full disk"]),
        "300 letters": lambda room: room.folder / ("x" * 300),
        "below a file": lambda room: room.copy("in.npz") / "out",
        "a link to itself": lambda room: _made(room.folder / "out", KINDS["a link to itself"]),
        "a link to nothing": lambda room: _made(room.folder / "out", KINDS["a link to nothing"]),
        "a pipe": lambda room: _made(room.folder / "out", KINDS["a pipe"]),
        "not UTF-8": lambda room: room.folder / "a\udcff",
    }

    def case(command: str, name: str) -> Case:
        def prepare(room: Room) -> Arguments:
            path = makers[name](room)
            asked = _asked(room, command)
            if command == "validate":
                return (*asked, "--report", path)
            at = [str(a) for a in asked].index("--report" if command == "score" else "--out") + 1
            return (*asked[:at], path, *asked[at + 1 :])

        # himap-validate adds a report to whatever folder the user names; nothing in it goes by a report's names.
        why = "the user's own folder" if (command, name) == ("validate", "the checkpoint") else ""
        return Case("reports", f"{command}: {name}", COMMAND[command], prepare, why, patches=PATCHES[command])

    good = Case("reports", "good", "himap-analyze", lambda room: _asked(room, "analyze"), patches=REFERENCE)
    commands = ("validate", "score", "analyze", "tune")
    return Door("reports", good, lambda: [case(command, name) for command in commands for name in makers])


def _page(room: Room, make: Callable[[Path], None]) -> Path:
    (room.folder / "out").mkdir()
    make(room.folder / "out" / "report.html")
    return room.folder / "out"


# --- targets of an export ---


def _web_app(room: Room) -> Path:
    """A folder whose manifest.json is a browser's."""
    (room.folder / "app").mkdir()
    room.write(room.folder / "app" / "manifest.json", b'{"name": "my app", "start_url": "/"}')
    room.write(room.folder / "app" / "index.html", b"<p>mine</p>")
    return room.folder / "app"


def _likeness(room: Room) -> Path:
    """A folder whose manifest.json is a bundle's, with nothing of a bundle beside it but somebody's thesis."""
    (room.folder / "thesis").mkdir()
    room.write(room.folder / "thesis" / "manifest.json", (room.originals["bundle"] / "manifest.json").read_bytes())
    room.write(room.folder / "thesis" / "thesis.tex", b"three years")
    return room.folder / "thesis"


def _lived_in(room: Room) -> Path:
    bundle = room.copy("bundle")
    room.write(bundle / "notes.txt", b"mine")
    return bundle


def _linked(room: Room, target: str) -> Path:
    (room.folder / "link").symlink_to(room.copy(target))
    return room.folder / "link"


def _empty_manifest(room: Room) -> Path:
    (room.folder / "made").mkdir()
    room.write(room.folder / "made" / "manifest.json", b"")
    room.write(room.folder / "made" / "k1.onnx", b"mine")
    return room.folder / "made"


def _checkpoint_with_manifest(room: Room) -> Path:
    model = room.copy("model")
    shutil.copy(room.originals["bundle"] / "manifest.json", model / "manifest.json")
    return model


TARGETS: Mapping[str, Callable[[Room], object]] = {
    "a web app": _web_app,
    "a folder with a bundle's manifest": _likeness,
    "an empty manifest": _empty_manifest,
    "a bundle with a file of the user's": _lived_in,
    "the checkpoint": lambda room: room.copy("model"),
    "the checkpoint, with a manifest": _checkpoint_with_manifest,
    "a folder in the checkpoint": lambda room: room.copy("model") / "out",
    "a folder in a bundle": lambda room: room.copy("bundle") / "out",
    "a bundle's weights": lambda room: room.copy("bundle") / "weights",
    "a link to a bundle": lambda room: _linked(room, "bundle"),
    "a link to a file": lambda room: _linked(room, "in.npz"),
    "a link to itself": lambda room: _made(room.folder / "out", KINDS["a link to itself"]),
    "a link to nothing": lambda room: _made(room.folder / "out", KINDS["a link to nothing"]),
    "a pipe": lambda room: _made(room.folder / "out", KINDS["a pipe"]),
    "new/..": lambda room: room.folder / "new" / "..",
    "new/../..": lambda room: f"{room.folder}/new/../..",
    "the root": lambda room: "/",
    "/proc/out": lambda room: "/proc/out",
    "/dev/null": lambda room: "/dev/null",
    "/dev/shm": lambda room: "/dev/shm",
    "a dot": lambda room: ".",
    "nothing": lambda room: "",
    "300 letters": lambda room: room.folder / ("x" * 300),
    "250 letters": lambda room: room.folder / ("x" * 250),
    "below a file": lambda room: room.copy("in.npz") / "out",
    "not UTF-8": lambda room: room.folder / "a\udcff",
}


def _targets() -> Door:
    def case(name: str, overwrite: bool) -> Case:
        def prepare(room: Room) -> Arguments:
            target = TARGETS[name](room)
            if not (room.folder / "model").exists():
                room.copy("model")
            asked = (room.folder / "model", "--k1", 1, "--k2", 3, "--text-budget", 24, "--out", target)
            return (*asked, "--overwrite") if overwrite else asked

        words = f"{name}{' with --overwrite' if overwrite else ''}"
        why = "a new folder of the user's own choice" if name in ("250 letters", "a folder in the checkpoint") else ""
        return Case("targets", words, "himap-export", prepare, why, patches=BEFORE)

    good = Case("targets", "good", "himap-export", lambda room: _asked(room, "export"), patches=BEFORE)
    return Door("targets", good, lambda: [case(name, overwrite) for name in TARGETS for overwrite in (False, True)])
