"""Texts of the data, such as class names, in forms that figures, tables, Markdown and CSV show as they are."""

import re
from collections import Counter
from collections.abc import Sequence
from html import escape
from unicodedata import category


LONGEST_SHOWN = 120
LONGEST_SNIPPET = 240
# A spreadsheet evaluates a cell that begins with one of these, the full-width ones included, also after blanks.
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n']")
# What a model page may take for markup, mathematics or a mention; the beginning of an address.
_MARKUP = re.compile(r"[\\`*_{}\[\]#|~$@!]|:(?=/)|(?<=[wW])\.")
# Overrides, embeddings and isolates: they change the direction of what follows.
_BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def unique_names(names: Sequence[str]) -> list[str]:
    """
    Tells classes of the same name apart by their number. Other names stay as they are.

    Args:
        names (`Sequence[str]`): The name of each class.

    Returns:
        `list[str]`: Names that differ from each other.

    Example:

    ```python
    >>> unique_names(["neg", "pos", "neg"])
    ['neg (0)', 'pos', 'neg (2)']

    ```
    """
    counts = Counter(names)
    taken = {name for name in names if counts[name] == 1}
    result = []
    for label, name in enumerate(names):
        if counts[name] > 1:
            name = f"{name} ({label})"
            while name in taken:
                name = f"{name} ({label})"
            taken.add(name)
        result.append(name)
    return result


def one_line(text: str) -> str:
    r"""
    The text on one line, with a replacement character for what cannot be shown or would turn the line around.

    Example:

    ```python
    >>> one_line("two\nlines"), one_line("a\x00b")
    ('two lines', 'a�b')

    ```
    """
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if character in _BIDI_CONTROLS or category(character) in ("Cc", "Cs")
        else character
        for character in " ".join(text.split())
    )


def shown(text: str, longest: int = LONGEST_SHOWN) -> str:
    """
    A name as a person reads it: on one line, with an ellipsis in the middle where it is too long.

    Args:
        text (`str`): Any text, lone surrogates included.
        longest (`int`, *optional*, defaults to 120): Largest number of characters.

    Example:

    ```python
    >>> shown("0123456789", longest=7), shown("")
    ('012…789', '(no name)')

    ```
    """
    text, half = one_line(text), longest // 2
    return (text if len(text) <= longest else f"{text[:half]}…{text[-half:]}") or "(no name)"


def escape_markdown(text: str) -> str:
    r"""
    Plain text for a model card or one of its table cells: nothing in it is markup, a link or HTML.

    Example:

    ```python
    >>> print(escape_markdown("a|b <i> $5 www.x.org"))
    a\|b &lt;i&gt; \$5 www\.x.org

    ```
    """
    return _MARKUP.sub(r"\\\g<0>", escape(one_line(text), quote=False))


def code_span(text: str) -> str:
    """
    Text as code in Markdown, whatever backticks it has.

    Example:

    ```python
    >>> code_span("lpg(epsilon=0.3)"), code_span("a `b`")
    ('`lpg(epsilon=0.3)`', '`` a `b` ``')

    ```
    """
    text = one_line(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, blank = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{blank}{text}{blank}{fence}"


def spreadsheet_cell(value: object) -> object:
    """
    A cell of a CSV file. One apostrophe stands before a text that a spreadsheet would take for a formula.

    A text that begins with an apostrophe gets another one, so that taking one away restores every text.

    Args:
        value: The content; all but strings stays as it is.

    Example:

    ```python
    >>> spreadsheet_cell("=1+1"), spreadsheet_cell("ant"), spreadsheet_cell(-0.5)
    ("'=1+1", 'ant', -0.5)

    ```
    """
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def restored_cell(cell: str) -> str:
    """
    The text that [`spreadsheet_cell`] made a cell of.

    Args:
        cell (`str`): A cell of a CSV file. One that a person has typed, apostrophe and all, stays as it is.

    Example:

    ```python
    >>> restored_cell("'=1+1"), restored_cell("ant"), restored_cell("'tis")
    ('=1+1', 'ant', "'tis")

    ```
    """
    return cell[1:] if cell.startswith("'") and spreadsheet_cell(cell[1:]) == cell else cell


def encodable(text: str) -> str:
    r"""
    The text as a file in UTF-8 can hold it: lone surrogates become escapes.

    Example:

    ```python
    >>> print(encodable("a\ud800"), encodable("é"))
    a\ud800 é

    ```
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def snippet(text: str, longest: int = LONGEST_SNIPPET) -> str:
    """
    The beginning of a text, on one line.

    Args:
        text (`str`): Any text.
        longest (`int`, *optional*, defaults to 240): Largest number of characters.

    Example:

    ```python
    >>> snippet("two\\nlines of text", longest=9)
    'two line…'

    ```
    """
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"
