"""The HTML page of the memory report: one file, readable without knowledge of the code."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from hola_megatron.study.memory import pictures
from hola_megatron.study.memory.kept_text import kept_texts
from hola_megatron.study.memory.make import Numbers
from hola_megatron.study.memory.places import NAMES, Mean

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222;
       background: #fff; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #ccc; padding: 0.2em 0.6em; text-align: right; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.about td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
img { max-width: 100%; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.7 ui-monospace, monospace; border: 1px solid #ccc;
        padding: 0.6em; max-height: 30em; overflow-y: auto; }
.note { color: #555; }
"""
Section = tuple[str, str]  # heading, HTML


def page(found: Numbers, tokenizer: Any, ids: list[int], about: dict[str, str]) -> str:
    """The whole page.

    ids: input tokens of the first window. about: lines on the model, the text, the command and the versions.
    """
    title = f"What the memory does: {escape(about['model'])}"
    sections = [*_sections(found, tokenizer, ids), ("How it was made", _facts_table(about))]
    body = "\n".join(f"<section><h2>{heading}</h2>\n{content}\n</section>" for heading, content in sections)
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width">\n<title>{title}</title>\n<style>{STYLE}</style>\n'
            f"</head>\n<body>\n<h1>{title}</h1>\n{_summary(found, about)}\n{body}\n</body>\n</html>\n")


def _sections(found: Numbers, tokenizer: Any, ids: list[int]) -> Iterator[Section]:
    missing: list[str] = []
    yield "How the layers read", _reading(found)
    yield _title(found, "by place"), _places(found)
    yield _title(found, "by where the coming pair of tokens occurred last"), _occurrences(found)
    has = {name: any(facts is not None and getattr(facts, name) is not None for facts in found.layers)
           for name in ("shares", "gates", "norms", "scores", "kept")}
    if found.swaps:
        yield "Another choice of tokens", _swaps(found)
    else:
        missing.append("Another choice of tokens: no layer keeps chosen tokens.")
    if has["kept"]:
        yield "What is kept", _kept(found, tokenizer, ids)
    else:
        missing.append("What is kept: no layer keeps chosen tokens.")
    if has["shares"]:
        yield "Where the exact part looks", _figure(
            pictures.shares(found), "Share of the softmax on kept tokens (slots), on the local part, and on the sink, "
            "which stands for nothing; means over tokens and heads.")
    else:
        missing.append("Shares of reads: no layer has kept tokens, a local part and a sink in one softmax.")
    if has["gates"]:
        yield "Weight of the exact part", _figure(
            pictures.gates(found), "Every dot is a head: its exact part is multiplied by this gate and added to what "
            "the state returns.")
    else:
        missing.append("Gates: no layer weighs an exact part by one number a head.")
    if has["norms"]:
        yield "Size of the state", _figure(
            pictures.curves(found, lambda facts: facts.norms, "norm of the state"),
            "Frobenius norm of the compressed state after so many tokens; means over windows and heads.")
    else:
        missing.append("Size of the state: no layer has a state of fixed size.")
    if has["scores"]:
        yield "Scores by position", _figure(
            pictures.curves(found, lambda facts: facts.scores, "mean score"),
            "The score ranks tokens for the slots; where a layer has none, it is the size of what a token writes to "
            "the state. A token is kept only if it beats all earlier ones, so falling curves favour early tokens.")
    else:
        missing.append("Scores by position: no layer scores tokens.")
    if unknown := sorted({kind for kind, facts in zip(found.kinds, found.layers, strict=True) if facts is None}):
        missing.append(f"Layers without an inspection: {', '.join(unknown)}.")
    if not found.kinds:
        missing.append("This model is not of this project, so only its losses are shown.")
    if missing:
        yield "What does not apply", "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in missing) + "</ul>"


def _summary(found: Numbers, about: dict[str, str]) -> str:
    lines = [f"{found.windows} windows of {found.length:,} tokens of <em>{escape(about['text'])}</em>, each read with "
             f"an empty memory. Loss {_shown(found.loss)} nats a token."]
    if found.baseline:
        lines.append(f"Compared with {escape(found.baseline)}: {_shown(found.second)}.")
    return "<p>" + " ".join(lines) + '</p><p class="note">± is the standard error over tokens; bars show two.</p>'


def _reading(found: Numbers) -> str:
    rows: dict[tuple[str, str], list[int]] = {}
    for number, (kind, facts) in enumerate(zip(found.kinds, found.layers, strict=True), 1):
        rows.setdefault((kind, facts.local if facts else "not known"), []).append(number)
    text = ("<p>A layer can remember in two ways. A <b>state</b> is a matrix of fixed size into which every token is "
            "written; what is old fades or is overwritten. The <b>exact part</b> is softmax attention to some tokens "
            "whose keys and values are unchanged: the <b>local part</b> (the nearest ones), and <b>slots</b> that hold "
            "chosen tokens of the past.</p>")
    return text + _table(["layers", "kind", "local part"],
                         [[_ranges(numbers), kind, local] for (kind, local), numbers in rows.items()])


def _title(found: Numbers, how: str) -> str:
    return f"{'Loss' if found.baseline is None else 'Gain'} {how}"


def _places(found: Numbers) -> str:
    unit = f"place in the block of {found.block:,} tokens" if found.block else "place in the window"
    text = (f"Mean {'loss' if found.baseline is None else 'gain over ' + escape(found.baseline)} by {unit}.")
    if found.block:
        text += (" A token late in a block sees more tokens of its block. A gain that rises within the block and falls "
                 "back at the next (a saw-tooth) comes from the local part.")
    return _figure(pictures.offsets(found), text)


def _occurrences(found: Numbers) -> str:
    text = ("Exact memory helps where text repeats. The prediction of a token is sorted by where the same pair (the "
            "token before it, and itself) occurred last in the window.")
    rows = [[name, f"{100 * found.share[name]:.1f} %", _shown(found.gain["by_category"][name])] for name in NAMES]
    head = ["the pair occurred last", "of all tokens", "loss" if found.baseline is None else "gain"]
    return (f"<p>{text}</p>" + _table(head, rows) + _figure(
        pictures.distances(found), "By distance in tokens to the last occurrence."))


def _swaps(found: Numbers) -> str:
    text = ("The model as it is, with another cache in all layers that have slots: other scores that choose the "
            "tokens, other numbers of slots, and an <b>oracle</b>, which has read the whole window and keeps tokens "
            "whose pair comes again outside the local part. The difference is that of the same tokens, in nats; above "
            "zero is worse than as trained. The model was not trained with these caches.")
    rows = [[name + (" (as trained)" if means["all"].error == 0 else ""),
             *(_shown(means[part]) for part in ("all", *NAMES))] for name, means in found.swaps.items()]
    return (f"<p>{text}</p>" + _table(["cache", "all tokens", *(f"pair occurred {name}" for name in NAMES)], rows)
            + _figure(pictures.swaps(found), "Over all tokens."))


def _kept(found: Numbers, tokenizer: Any, ids: list[int]) -> str:
    parts = ["<p>The first window, coloured by how many heads of a layer hold a token in their slots at its end; "
             "point at a token for heads and age. Tokens of the local part are not counted.</p>"]
    for number, text in kept_texts(found, tokenizer, ids):
        parts.append(f'<details{" open" if len(parts) == 1 else ""}><summary>Layer {number}</summary>'
                     f'<div class="text">{text}</div></details>')
    if any(facts is not None and facts.ages for facts in found.layers):
        parts.append(_figure(pictures.ages(found), "Age of kept tokens at the end of a window: quartiles, and 5 to "
                                                   "95 %."))
    return "".join(parts)


def _figure(url: str, caption: str) -> str:
    return (f'<figure><img src="{url}" alt="{escape(caption, quote=True)}"><figcaption>{caption}</figcaption>'
            "</figure>")


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _facts_table(about: dict[str, str]) -> str:
    return f'<div class="about">{_table(["what", "value"], [list(pair) for pair in about.items()])}</div>'


def _shown(mean: Mean | None) -> str:
    if mean is None or mean.mean is None:
        return "no such token"
    return f"{mean.mean:.4f}" + (f" ± {mean.error:.4f}" if mean.error is not None else "")


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 5 as 1-3, 5."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)
