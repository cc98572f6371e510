"""Text files to a folder of packed MDS shards (tools/prepare_data.py).

    run.py            from the options to the dataset
    options.py        what to prepare, what was made
    making.py         one dataset: read, tokenize, pack, write, rename
    tokenizing.py     documents to ids, by one process or many
    shard_writer.py   samples to shards, each flushed to disk
    splitting.py      the input cut into parts
    parts.py          parts, by this process or several
    joining.py        parts to one dataset
    uploading.py      parts at a URL
    journal.py        what is finished, so that the same command goes on after a kill
    children.py       worker processes that end with their parent
    progress.py       a bar, or a line every 30 seconds
"""

from hola_megatron.data.prepare.joining import merge
from hola_megatron.data.prepare.options import DEFAULT_SHARD_SIZE, PACKINGS, PrepareOptions, Summary
from hola_megatron.data.prepare.run import prepare

__all__ = ["DEFAULT_SHARD_SIZE", "PACKINGS", "PrepareOptions", "Summary", "merge", "prepare"]
