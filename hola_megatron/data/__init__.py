"""The data room: text in, verified packed samples out.

`tokenizer` turns text to ids, `packing` ids to fixed-length samples, `prepare` writes them as MDS
shards; `shards` reads and verifies those, `order` decides which sample comes when, `stream` hands
batches to the trainer.
"""
