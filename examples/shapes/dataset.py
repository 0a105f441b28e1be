"""Held-out questions about drawn scenes as a data set for `himap-validate --dataset`, `himap-analyze` and `himap-tune`.

    python examples/shapes/dataset.py OUT --questions 6000

writes OUT/questions.jsonl, lines of image, question, answer, type, and OUT/images/*.png.
"""

import argparse
import json
from pathlib import Path

from draw import held_out

SEED = 3  # of the held-out stream; training evaluates itself on stream 1


def write(out: Path, questions: int, seed: int = SEED) -> Path:
    """So many questions, their types in turn, and their images, one each."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for n, (image, question, answer, kind) in enumerate(held_out(questions, seed)):
        name = f"images/{n:05d}.png"
        image.save(out / name, compress_level=1)
        lines.append({"id": f"{n:05d}", "image": name, "question": question, "answer": answer, "type": kind})
    file = out / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--questions", type=int, default=6000, help="in all, each type in turn (default: 6000)")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    print(write(args.out, args.questions, args.seed))


if __name__ == "__main__":
    main()
