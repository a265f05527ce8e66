"""Large-scale pre-training of image networks on labelled sets, and transfer of what they learned.

The names below are the documented Python API. Each is imported when it is first used, so `import
scaletransfer` is quick and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaletransfer.index import load_index as load_index
    from scaletransfer.index import load_index as open_shards
    from scaletransfer.models import create_model as create_model
    from scaletransfer.models.weights import load_pretrained as load_pretrained
    from scaletransfer.sources import open_source as open_source

_API = {
    "create_model": "scaletransfer.models:create_model",
    "load_index": "scaletransfer.index:load_index",
    "load_pretrained": "scaletransfer.models.weights:load_pretrained",
    "open_shards": "scaletransfer.index:load_index",
    "open_source": "scaletransfer.sources:open_source",
}

__all__ = ["__version__", "create_model", "load_index", "load_pretrained", "open_shards", "open_source"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("scaletransfer")
    elif name in _API:
        module, _, attribute = _API[name].partition(":")
        value = getattr(importlib.import_module(module), attribute)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
