"""python -m himap_export.serve.triton.probe MODEL [URL]: asks a model one question, for liveness and readiness probes.

Triton calls a model ready whose Python stub was killed, and does not start it again: only an answer proves that there
will be one. Leaves with 0 if it came, 1 and one line if not. Needs nothing but Python.
"""

import base64
import http.client
import json
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 30.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# A grey pixel, as PNG.
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==")


def ask(model: str, url: str) -> str:
    """Returns what is wrong with the model's answer; "" if nothing is."""
    body = json.dumps({"PROMPT": "?", "IMAGE": list(PIXEL), "MAX_NEW_TOKENS": 1}).encode()
    try:
        with DIRECT.open(f"{url}/v2/models/{model}/generate_stream", body, TIMEOUT_S) as answer:
            events = [json.loads(line[5:]) for line in answer if line.startswith(b"data:")]
    except urllib.error.HTTPError as problem:
        return problem.read().decode(errors="replace")
    except (OSError, http.client.HTTPException, ValueError) as problem:
        return str(problem) or type(problem).__name__
    if any("FINISH_REASON" in event for event in events):
        return ""
    return next((event["error"] for event in events if "error" in event), "the answer has no end")


if __name__ == "__main__":
    said = ask(sys.argv[1], *sys.argv[2:] or ["http://127.0.0.1:8000"])
    if said:
        print(" ".join(said.split()), file=sys.stderr)
    sys.exit(1 if said else 0)
