"""How a class stands in a cell of a spreadsheet, and which class a cell means after a spreadsheet has changed it."""

import difflib
import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from decimal import Decimal

from ..safe_text import encodable


DROP = "drop"
SHOWN_NAMES = 8
# Of "12.000" nobody knows whether it is twelve or twelve thousand.
_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.(?!000$)[0-9]+)?")
_TRUTH_VALUES = ("true", "false")


class ClassCells:
    """
    Writes classes to cells and reads them again.

    A cell is the name of a class, or `#3` for the class with number 3 (`##3` with a class that is called `#` and a
    number). A plain number is a name where a class has it
    as its name, and else the number of a class, but only where no class is called by a number. Capital letters, blanks
    around a name and the way in which a number is written (`3.0`, `007`) do not count as long as one class alone is
    meant: spreadsheets change them.

    Args:
        names (`Sequence[str]`): Names that differ from each other.
        numbers (`Sequence[int | None]`, *optional*): The number of each class. Defaults to its position in `names`.

    Attributes:
        drop (`str`): The word that removes a row: `drop`; with a class of this name `#drop`, and so on.

    Example:

    ```python
    >>> cells = ClassCells(["cat", "=dog", "Drop"])
    >>> cells.read(" CAT "), cells.read("1.0"), cells.read("=dog")
    (0, 1, 1)
    >>> [cells.write(position) for position in range(3)], cells.drop
    (['cat', '=dog', '#2'], '#drop')

    ```
    """

    def __init__(self, names: Sequence[str], numbers: Sequence[int | None] | None = None) -> None:
        self.names = [encodable(name) for name in names]
        numbers = range(len(names)) if numbers is None else numbers
        self._position_of = {number: position for position, number in enumerate(numbers) if number is not None}
        self._number_of = {position: number for number, position in self._position_of.items()}

        self._alike: dict[Hashable, list[int]] = defaultdict(list)
        self._same: dict[str, list[int]] = defaultdict(list)
        for position, name in enumerate(self.names):
            self._alike[_key(name)].append(position)
            self._same[name].append(position)
        self._has_numeric_names = any(isinstance(key, Decimal) for key in self._alike)
        self.drop, self._taken_words = DROP, set()
        while self.drop in self._alike:
            self._taken_words.add(self.drop)
            self.drop = f"#{self.drop}"
        self._sign = "#"
        while any(self._number_in(name) is not None for name in self.names):
            self._sign += "#"
        self._exact = {
            name: positions[0] for name, positions in self._same.items() if self._is_plain(name, len(positions))
        }

    def _is_plain(self, name: str, num_classes: int) -> bool:
        """Whether a cell with this name means this class alone, whatever a spreadsheet does to it."""
        key = _key(name)
        # Excel writes 1 for 01, and TRUE for true.
        is_changed = isinstance(key, Decimal) or key in _TRUTH_VALUES
        is_one = num_classes == 1 and (len(self._alike[key]) == 1 or not is_changed)
        return is_one and key != "" and key not in self._taken_words

    def _number_in(self, text: str) -> int | None:
        """The number in `#3`."""
        match = re.fullmatch(f"{self._sign}([0-9]+)", text.strip())
        return None if match is None else int(match[1])

    def write(self, position: int) -> str:
        """
        The cell for a class: its name, or its number where the name might mean something else.

        Args:
            position (`int`): The position of the class in `names`.
        """
        name = self.names[position]
        return name if name in self._exact else f"{self._sign}{self._number_of[position]}"

    def is_drop(self, cell: str) -> bool:
        """Whether a cell says that its row shall be removed."""
        return cell.strip().casefold() == self.drop

    def at_number(self, number: int) -> int | None:
        """The position of the class with this number; `None` if there is none."""
        return self._position_of.get(number)

    def number_of(self, position: int) -> int | None:
        """The number of the class at a position; `None` if it is not known."""
        return self._number_of.get(position)

    def read(self, cell: str) -> int:
        """
        The position in `names` of the class that a cell means.

        Args:
            cell (`str`): Text that is neither blank nor the word `drop`.

        Raises:
            ValueError: If it means none, or more than one.
        """
        if cell in self._exact:
            return self._exact[cell]
        text, key = cell.strip(), _key(cell)
        number = self._number_in(text)
        if number is not None:
            position = self.at_number(number)
            if position is None:
                numbers = _shortened(list(self._position_of))
                raise ValueError(f"{cell!r} means a class by its number, and the numbers are {numbers}.")
            return position
        if key in self._taken_words:
            hint = self._hint(self._alike[key][0])
            raise ValueError(
                f"{cell!r} may mean the class (write {hint!r}) or that the row is to be removed (write {self.drop!r})."
            )
        found = self._alike.get(key, [])
        if len(found) > 1:
            names = ", ".join(f"{self.names[position]!r} (write {self._hint(position)!r})" for position in found)
            raise ValueError(f"{cell!r} may mean one of the classes {names}.")
        if found:
            return found[0]
        if isinstance(key, Decimal) and not self._has_numeric_names and key == int(key):
            position = self.at_number(int(key))
            if position is not None:
                return position
        close = difflib.get_close_matches(text, self.names, n=1)
        guess = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{cell!r} is no class.{guess} {self.what_there_is()}")

    def _hint(self, position: int) -> str:
        return f"{self._sign}{self._number_of[position]}" if position in self._number_of else self.names[position]

    def what_there_is(self) -> str:
        """The names of the classes as a sentence, for messages."""
        return f"The classes are {_shortened(self.names)}."


def _key(text: str) -> Hashable:
    """What a spreadsheet leaves as it is: the value of a number, and else the words without their capitals."""
    text = " ".join(text.split())
    return Decimal(text) if _NUMBER.fullmatch(text) else text.casefold()


def _shortened(values: Sequence[object]) -> str:
    shown = ", ".join(map(repr, values[:SHOWN_NAMES]))
    return shown if len(values) <= SHOWN_NAMES else f"{shown}, ... ({len(values)} in all)"
