"""`himap-serve`: answers questions about images over HTTP, as OpenAI's API does, many at a time."""

import argparse
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from himap_export.engines.cli import add_bundle_options, check_bundle_options, open_bundle
from himap_export.engines.command import ALL_DEVICES, DEVICE_HELP, MOST_THREADS, Parser, number, run_command, whole
from himap_export.graphs.errors import Exit, HimapError
from himap_export.serve import MODEL_NAME

if TYPE_CHECKING:
    from himap_export.engines.bundle import Bundle
    from himap_export.serve.app import Options
    from himap_export.serve.logs import RequestLog
    from himap_export.serve.service import Service

DAY = 86400
AService = TypeVar("AService", bound="Service")


def _parser() -> argparse.ArgumentParser:
    p = Parser(prog="himap-serve", description=__doc__)
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that himap-export wrote")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    p.add_argument("--port", type=whole(0, 65535), default=8000, help="0: any that is free (default: 8000)")
    p.add_argument("--model-name", metavar="NAME", help="the model's id (default: the bundle folder's name)")
    p.add_argument(
        "--plan", action="append", default=[], metavar="NAME",
        help="one of the bundle's plans, served as NAME:PLAN; repeatable, the first is NAME's (default: all)",
    )  # fmt: skip
    p.add_argument("--backend", help="default: the first one in the bundle that opens here")
    p.add_argument("--device", choices=ALL_DEVICES, help=DEVICE_HELP)
    p.add_argument("--threads", type=whole(1, MOST_THREADS), help="CPU threads (default: all that gain anything)")
    p.add_argument("--max-batch", type=whole(1, 2**20), metavar="B", help="answers at a time (default: the bundle's)")
    p.add_argument("--max-queue", type=whole(1, 2**20), default=64, metavar="N", help="that may wait (default: 64)")
    p.add_argument(
        "--prefills", type=whole(1, 2**20), default=1, metavar="N",
        help="questions that may begin between two tokens of the others, the oldest first (default: 1)",
    )  # fmt: skip
    p.add_argument(
        "--request-timeout", type=number(0.001, DAY), default=300, metavar="S", help="of one answer (default: 300)"
    )
    p.add_argument(
        "--drain-timeout", type=number(0, DAY), default=60, metavar="S",
        help="how long running answers may take to end after SIGTERM (default: 60)",
    )  # fmt: skip
    p.add_argument("--api-key-file", type=Path, metavar="F", help="keys, one a line; each request to /v1 must bear one")
    p.add_argument("--max-image-bytes", type=whole(1, 2**30), metavar="N", help="of a picture's file (default: 20 MB)")
    p.add_argument("--max-image-pixels", type=whole(1, 2**30), metavar="N", help="of a picture (default: 2^25)")
    p.add_argument(
        "--allow-image-host", action="append", default=[], metavar="HOST",
        help="host, or host:port, that http(s) picture URLs may name; repeatable (default: none)",
    )  # fmt: skip
    p.add_argument("--log-prompts", action="store_true", help="write the questions' text into the log")
    p.add_argument("--triton", type=Path, metavar="DIR", help="write a model repository for Triton, and serve nothing")
    add_bundle_options(p)
    return p


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    check_bundle_options(parser, args)
    if args.model_name is not None and re.fullmatch(MODEL_NAME, args.model_name) is None:
        parser.error("--model-name takes letters, digits and . _ -")
    run_command("himap-serve", lambda: _run(args), "it no longer serves")


def _run(args: argparse.Namespace) -> None:
    bundle = open_bundle("himap-serve", args)
    if args.triton is not None:
        _write_for_triton(args, bundle)
        return
    import logging

    from himap_export.serve.app import make_app
    from himap_export.serve.http import LoggedWarnings, Serving, listen
    from himap_export.serve.logs import RequestLog
    from himap_export.serve.service import Service

    log = RequestLog(sys.stderr, log_prompts=args.log_prompts)
    logging.getLogger().addHandler(LoggedWarnings(log))
    logging.captureWarnings(True)
    service, options = watched_service_of(args, bundle, log, Service)
    place = listen(args.host, args.port)
    host, port = place.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    if not options.keys and host not in ("127.0.0.1", "::1"):
        hint = "himap-serve: whoever reaches this port may ask: there is no --api-key-file"
        print(hint, file=sys.stderr)

    def ready() -> None:
        log.write("ready", url=url, models=list(service.models))
        print(f"{url} serves {', '.join(service.models)}", flush=True)

    log.write("start", bundle=str(bundle.folder), sha256=bundle.manifest.digest, url=url)
    try:
        Serving(service, make_app(service, options), log, drain_s=args.drain_timeout, ready=ready).run(place)
    finally:
        log.write("stop")


def service_of(args: argparse.Namespace, bundle: "Bundle", make: Callable[..., AService], **more: object) -> AService:
    """Returns the service that options ask for; `make` is Service, or takes what that takes."""
    return make(bundle, _name(args, bundle), **_running(args), **more)


def _running(args: argparse.Namespace) -> dict[str, Any]:
    """What options say of which engines run, and how."""
    from himap_export.engines.backends import Opening
    from himap_export.serve.service import Settings

    return {
        "plans": tuple(args.plan), "backend": args.backend, "opening": Opening(args.threads, args.device),
        "settings": Settings(args.max_batch, args.max_queue, args.prefills),
    }  # fmt: skip


def watched_service_of(
    args: argparse.Namespace, bundle: "Bundle", log: "RequestLog", make: Callable[..., AService]
) -> tuple[AService, "Options"]:
    """Returns the service that options ask for, which its metrics watch, and how its door is kept."""
    from himap_export.serve.app import Options
    from himap_export.serve.messages import Event, Question
    from himap_export.serve.metrics import Metrics
    from himap_export.serve.pictures import PictureLimits

    def watch(question: Question, event: Event) -> None:
        metrics.watch(question, event)

    asked = {"max_bytes": args.max_image_bytes, "max_pixels": args.max_image_pixels}
    limits = PictureLimits(
        hosts=tuple(args.allow_image_host), **{name: value for name, value in asked.items() if value is not None}
    )
    keys = _keys(args.api_key_file) if args.api_key_file is not None else ()
    service = service_of(args, bundle, make, watch=watch)
    metrics = Metrics(service)
    return service, Options(keys, limits, request_s=args.request_timeout, metrics=metrics, log=log)


def _write_for_triton(args: argparse.Namespace, bundle: "Bundle") -> None:
    """Writes a model repository of which the models answer as this service would."""
    from himap_export.serve.triton.repository import write_repository

    write_repository(bundle, args.triton, name=_name(args, bundle), verify=not args.no_verify, **_running(args))
    print(f"{args.triton} is a model repository; {args.triton / 'README.md'} says how to start Triton with it")


def _name(args: argparse.Namespace, bundle: "Bundle") -> str:
    folder = bundle.folder.resolve().name
    return args.model_name or re.sub("[^A-Za-z0-9._-]+", "-", folder).strip("-.") or "himap"


def _keys(file: Path) -> tuple[str, ...]:
    """The keys in `file`; HimapError (usage) if there is none, or one that no header can bear."""
    from himap_export.engines.documents import read_file

    content = read_file(file, "`api_key_file`", 2**20).decode("latin-1")
    keys = tuple(line.strip() for line in content.splitlines() if line.strip())
    if not keys or not all(re.fullmatch("[\x21-\x7e]+", key) for key in keys):
        expected = "expected one key a line, of ASCII characters without spaces"
        raise HimapError(f"no usable keys in `api_key_file` {file}", expected, code=Exit.USAGE)
    if file.stat().st_mode & stat.S_IROTH:
        print(f"himap-serve: everybody on this machine may read the keys in {file}", file=sys.stderr)
    return keys
