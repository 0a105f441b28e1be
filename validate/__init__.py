"""What proves a bundle: parity, speed, accuracy, and where to cut. `himap_export.validate(bundle)` is the first two."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from himap_export.engines.bundle import Bundle
    from himap_export.validate.validation import Report


class _Room(ModuleType):
    """The function and the room have one name in `himap_export`; whichever comes first, both are there."""

    def __call__(self, bundle: "Bundle", **options: Any) -> "Report":
        from himap_export.validate.validation import validate

        return validate(bundle, **options)


sys.modules[__name__].__class__ = _Room
