"""What a model's memories do with a text: the parts of tools/memory_report.py.

    losses.py     a text as windows, and the loss of every token
    places.py     gains by place in the block and by distance to the last occurrence of the coming bigram
    layers.py     what each layer did (layers/*/inspection.py), and other caches in its place
    make.py       all numbers of a report
    pictures.py, kept_text.py, page.py      the HTML page
"""
