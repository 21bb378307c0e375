"""What may come out of a checkpoint's pickles: data, never behaviour.

Two kinds of pickle are in a `torch_dist` checkpoint: `.metadata`, the index of
torch.distributed.checkpoint, and objects such as the arguments of the run, which are
`torch.save` files. Neither is ever given to an unrestricted unpickler:

- the index may name only the record classes that torch's own writer uses;
- an object may name only plain containers. Megatron's enums and records become a
  `SavedValue`, an inert note of the class's name and its arguments, so that nothing of
  Megatron is imported and none of its code runs.

Anything else is refused by name.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

from megatron_ledom.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

_DCP = "torch.distributed.checkpoint"
INDEX_GLOBALS = frozenset(
    {
        *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
        *((f"{_DCP}.metadata", name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata")),
        *((f"{_DCP}.metadata", name) for name in ("BytesStorageMetadata", "_MEM_FORMAT_ENCODING")),
        *((f"{_DCP}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
        *((f"{_DCP}.planner", name) for name in ("BytesIOWriteData",)),
        (f"{_DCP}.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),  # a look-up in torch's table of layouts
        *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16", "bool", "uint8", "int8")),
        *(("torch", name) for name in ("int16", "int32", "int64", "float8_e4m3fn", "float8_e5m2")),
    }
)
"""Every class and constant that `.metadata` may name."""

INERT_MODULES = ("megatron.", "transformer_engine.", "signal.", "pathlib.")
"""Classes of these modules are noted as a `SavedValue` when an object names them."""


class SavedValue:
    """An instance of somebody else's class, as the checkpoint describes it, without that class.

    Attributes:
        type_name: e.g. `megatron.core.transformer.enums.AttnBackend`.
        arguments: what the class was called with, e.g. `(5,)`.
        state: the attributes, where the checkpoint stores them apart.
    """

    type_name: ClassVar[str] = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.arguments = getattr(self, "arguments", ())
        self.state = state

    def __repr__(self) -> str:
        return f"<saved {self.type_name}{self.arguments!r}>"


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler that finds the classes of `INDEX_GLOBALS` and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in INDEX_GLOBALS:
            raise CheckpointError(f"it names {module}.{name}, which has no place in an index; nothing was run")
        return super().find_class(module, name)


def load_index(path: Path) -> Metadata:
    """Read `.metadata`.

    Raises:
        CheckpointError: it is damaged, or names a class that an index does not need.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise CheckpointError(f"{path} is not an index of torch.distributed.checkpoint")
    return index


def load_object(file: io.RawIOBase | IO[bytes], *, where: str) -> Any:
    """Read one `torch.save` object of a checkpoint.

    Args:
        file: seekable, positioned at the object.
        where: names the object in messages.

    Returns:
        Plain containers, tensors, `argparse.Namespace`, and `SavedValue` for Megatron's own classes.

    Raises:
        CheckpointError: it is damaged, or names anything else.
    """
    import argparse
    import types

    import torch

    raw = file.read()
    registered = torch.serialization.get_safe_globals()  # Megatron, once imported, registers live classes of its own
    torch.serialization.clear_safe_globals()
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(raw))
        plain = {"argparse.Namespace": argparse.Namespace, "types.SimpleNamespace": types.SimpleNamespace}
        refused = [name for name in names if name not in plain and not name.startswith(INERT_MODULES)]
        if refused:
            raise CheckpointError(f"{where} is refused: it names {', '.join(sorted(refused))}; nothing was run")
        allowed: list[Any] = [(plain.get(name) or _inert_class(name), name) for name in names]
        with torch.serialization.safe_globals(allowed):
            return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        raise CheckpointError(f"{where} is damaged ({type(error).__name__}: {error})") from error
    finally:
        torch.serialization.add_safe_globals(registered)


def _inert_class(name: str) -> type[SavedValue]:
    return type("SavedValue", (SavedValue,), {"type_name": name})
