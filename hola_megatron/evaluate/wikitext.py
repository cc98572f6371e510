"""WikiText as lm-evaluation-harness's task `wikitext` reads it, so that numbers can be compared with published ones.

The raw file (wiki.test.raw) is cut into pages at first-level titles. A page is read with its marks undone
(` @-@ ` -> `-`, blanks before punctuation), while its words and bytes are those of the page as stored in the file. A
word's perplexity of the raw file, read as one document, is another number: about five times this one for a small model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from hola_megatron.errors import DataError
from hola_megatron.evaluate.perplexity import Counted, count_words

# What is done to a page, in this order. The second does nothing to ordinary text; it is there to be the task's.
_SUBSTITUTIONS = (
    (re.escape("s '"), "s'"), (r"/' [0-9]/", r"/'[0-9]/"),
    (" @-@ ", "-"), (" @,@ ", ","), (r" @\.@ ", "."),
    (" : ", ": "), (" ; ", "; "), (r" \. ", ". "), (" ! ", "! "), (r" \? ", "? "), (" , ", ", "),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0"),
    (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)


def wikitext(documents: Iterable[str]) -> Iterator[Counted]:
    """The pages of WikiText files, detokenised, with the words and bytes of the originals.

    documents: whole raw files, or pages. Raises DataError where text comes before the first title.
    """
    for document in documents:
        for page in pages(document):
            yield Counted(detokenized(page), count_words(page), len(page.encode("utf-8")))


def detokenized(page: str) -> str:
    """The page as running text."""
    for pattern, replacement in _SUBSTITUTIONS:
        page = re.sub(pattern, replacement, page)
    return page


def pages(text: str) -> Iterator[str]:
    """The pages of a raw file, as they are there. Raises DataError where text comes before the first title."""
    lines: list[str] = []
    for line in text.split("\n"):
        if _is_title(line):
            if any(map(str.strip, lines)):
                yield _titled("\n".join(lines))
            lines = []
        lines.append(line)
    if any(map(str.strip, lines)):
        yield _titled("\n".join(lines))


def _is_title(line: str) -> bool:
    """` = Title = `, and not ` = = Section = = `."""
    plain = line.replace("= = =", "===").replace("= =", "==").strip()
    return plain.startswith("= ") and plain.endswith(" =")


def _titled(page: str) -> str:
    if not _is_title(page.partition("\n")[0]):
        raise DataError("--wikitext: a document has text before its first title (a line ' = Title = '); give the raw "
                        "file (wiki.test.raw, named .txt) or records that hold whole pages, not lines")
    return page
