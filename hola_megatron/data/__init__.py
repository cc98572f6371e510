"""Data: text files to verified, packed samples.

`tokenizer` turns text to ids, `packing` ids to fixed-length samples, `prepare` writes them as MDS
shards; `shards` reads and verifies those, `order` defines the order of samples, `stream` gives
batches to the trainer.
"""
