"""Tasks that are scored by log-likelihood: their forms, how they are read from JSONL, and one cut from
held-out text.

Every task is a list of items, and every item is a list of options, each a context and a continuation of it.
The model scores log p(continuation | context); an item is right when its gold option scores above all others.
What differs between kinds is which part varies::

    kind             contexts        continuations    gold   published as
    last_word        one             one              0      LAMBADA (1606.06031); right: greedy decoding
    multiple_choice  the same        the choices      given  ARC, PIQA, HellaSwag, BoolQ, ...
    winograd         the options     the same         given  partial scoring (1806.02847): WSC, WinoGrande
    minimal_pairs    empty           good, bad        0      BLiMP (1912.00582)

``docs/tasks.md`` is the user's page on the file form. Nothing here knows tokens or models.
"""

from moejax.tasks.continuation import continuation_task
from moejax.tasks.forms import Item, Kind, Task
from moejax.tasks.load import ROW_FIELDS, load_task

__all__ = ["ROW_FIELDS", "Item", "Kind", "Task", "continuation_task", "load_task"]
