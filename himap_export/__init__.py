"""Staged, visually pruned, compiled engines of Hugging Face multimodal LLMs (HiMAP, arXiv 2503.13108).

    import himap_export as hx

    bundle = hx.export("llava-7b", out="engines/", r1=0.5, r2=0.75)
    with bundle.session() as session:
        print(session.ask("photo.jpg", "What is this?").text)
    assert hx.validate(bundle).passed

These names follow semantic versioning; what they do is said where they are defined. All are loaded when first used:
importing the package costs nothing, and running a bundle needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from himap_export.engines.answer import Answer as Answer
    from himap_export.engines.answer import AnswerStream as AnswerStream
    from himap_export.engines.arrays import Inputs as Inputs
    from himap_export.engines.bundle import Bundle as Bundle
    from himap_export.engines.conversation import Conversation as Conversation
    from himap_export.engines.session import Session as Session
    from himap_export.exporter.api import export as export
    from himap_export.exporter.api import plan as plan
    from himap_export.exporter.planning import Planned as Planned
    from himap_export.exporter.registry import register_family as register_family
    from himap_export.graphs.errors import HimapError as HimapError
    from himap_export.graphs.errors import HimapWarning as HimapWarning
    from himap_export.graphs.plan import Cut as Cut
    from himap_export.graphs.plan import PruningPlan as PruningPlan
    from himap_export.graphs.selectors import Selector as Selector
    from himap_export.validate.registration import register_criterion as register_criterion
    from himap_export.validate.validation import Report as Report
    from himap_export.validate.validation import validate as validate

_HOME = {
    "Answer": "engines.answer",
    "AnswerStream": "engines.answer",
    "Bundle": "engines.bundle",
    "Conversation": "engines.conversation",
    "Cut": "graphs.plan",
    "HimapError": "graphs.errors",
    "HimapWarning": "graphs.errors",
    "Inputs": "engines.arrays",
    "Planned": "exporter.planning",
    "PruningPlan": "graphs.plan",
    "Report": "validate.validation",
    "Selector": "graphs.selectors",
    "Session": "engines.session",
    "export": "exporter.api",
    "plan": "exporter.api",
    "register_criterion": "validate.registration",
    "register_family": "exporter.registry",
}
__all__ = [*_HOME, "__version__", "validate"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("himap-export")
    if name == "validate":
        return import_module(f"{__name__}.validate")  # the room itself, which can be called
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
