"""What a recipe costs on N GPUs, from arithmetic alone: no GPU, no torch.

    parameters.py    weights by part, and those of one rank
    activations.py   what one layer keeps for its backward pass, term by term, read off the code that saves it
    memory.py        a rank's peak by part, for every pipeline stage
    layouts.py       other layouts, when the recipe's own does not fit
    estimate.py      all estimates of one recipe; report.py prints them
"""
