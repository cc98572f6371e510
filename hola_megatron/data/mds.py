"""mosaicml-streaming, as far as it is used here: its shard writer, its sample decoder, its downloaders."""

from __future__ import annotations

import contextlib
import sys
import types
from pathlib import Path
from typing import Any

from hola_megatron.errors import DataError, RecipeError

HASH = "xxh64"

_UNUSED_PARTS = ("multimodal", "text", "vision")


def import_streaming() -> None:
    """Import `streaming` without its vision and text datasets.

    Those need torchvision (broken or absent beside many torch builds) and scikit-learn, which costs
    seconds at every start. They stay importable afterwards.
    """
    if "streaming" in sys.modules:
        return
    names = [f"streaming.{part}" for part in _UNUSED_PARTS]
    sys.modules.update({name: types.ModuleType(name) for name in names})
    try:
        import streaming
    except ImportError as error:
        raise DataError(f"MDS shards need mosaicml-streaming ({error}): pip install mosaicml-streaming") from error
    finally:
        for name in names:
            del sys.modules[name]
    for part in _UNUSED_PARTS:
        with contextlib.suppress(AttributeError):
            delattr(streaming, part)


def mds_writer(folder: Path, columns: dict[str, str], shard_size: int) -> Any:
    """An MDSWriter into the empty `folder`, with xxh64 of every shard in the index.

    Raises:
        RecipeError: `shard_size` cannot hold one sample, whatever its document starts.
    """
    import_streaming()
    from streaming.base.format.mds.writer import MDSWriter

    writer = MDSWriter(columns=columns, out=str(folder), hashes=[HASH], size_limit=shard_size)
    fixed = sum(size or 4 for size in writer.column_sizes)
    tokens = int(columns["tokens"].rpartition(":")[2])
    least = writer.extra_bytes_per_shard + writer.extra_bytes_per_sample + fixed + 4 * tokens
    if shard_size < least:
        writer.cancel_future_jobs()
        raise RecipeError(f"--shard-size {shard_size}: one sample needs up to {least} bytes; give that or more")
    return writer
