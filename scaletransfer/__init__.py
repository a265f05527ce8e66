"""Large-scale pre-training of image networks on labelled sets, and transfer of what they learned.

The names below are the documented Python API. Each is imported when it is first used, so `import
scaletransfer` is quick and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaletransfer.config import FinetuneConfig as FinetuneConfig
    from scaletransfer.evaluate import evaluate as evaluate
    from scaletransfer.finetune import finetune as finetune
    from scaletransfer.index import load_index as load_index
    from scaletransfer.index import load_index as open_shards
    from scaletransfer.models import create_model as create_model
    from scaletransfer.models.weights import load_pretrained as load_pretrained
    from scaletransfer.sources import open_source as open_source

_API = {
    "FinetuneConfig": "scaletransfer.config:FinetuneConfig",
    "evaluate": "scaletransfer.evaluate",  # modules that can be called: see cli.callable_module
    "finetune": "scaletransfer.finetune",
    "create_model": "scaletransfer.models:create_model",
    "load_index": "scaletransfer.index:load_index",
    "load_pretrained": "scaletransfer.models.weights:load_pretrained",
    "open_shards": "scaletransfer.index:load_index",
    "open_source": "scaletransfer.sources:open_source",
}

__all__ = ["__version__", "FinetuneConfig", "create_model", "evaluate", "finetune", "load_index", "load_pretrained"]
__all__ += ["open_shards", "open_source"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("scaletransfer")
    elif name in _API:
        module, _, attribute = _API[name].partition(":")
        value = importlib.import_module(module)
        value = getattr(value, attribute) if attribute else value
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
