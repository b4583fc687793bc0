"""WeakProxy: knows an object without keeping it alive, and follows it into its copies."""

import weakref
from typing import Any


class WeakProxy:
    """
    Looks up every attribute in an object that it does not keep alive.

    `weakref.proxy` cannot be pickled, and its deep copy is a second object of its own. This one, pickled or copied
    deeply along with its object, belongs to the copy.

    Args:
        target: The object.

    Example:

    ```python
    >>> from copy import deepcopy
    >>> class Trainer:
    ...     def __init__(self, name):
    ...         self.name, self.part = name, WeakProxy(self)

    >>> trainer = Trainer("first")
    >>> other = deepcopy(trainer)
    >>> other.name = "second"
    >>> trainer.part.name, other.part.name
    ('first', 'second')

    ```
    """

    def __init__(self, target: object):
        self._target = weakref.ref(target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target(), name)

    def __reduce__(self) -> tuple:
        return type(self), (self._target(),)
