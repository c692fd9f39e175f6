"""Flows of other libraries, brought here with their weights and a report of how exactly they agree.

Each function takes a live object of its library, which it knows by the names of classes and attributes, makes the flow
of the same layers and weights, computes both on the same rows and keeps what it found as `Flow.import_report`.
nvpflow imports none of these libraries.
"""

from nvpflow._import_report import Differences, Imported, ImportReport
from nvpflow.importers._distrax import from_distrax
from nvpflow.importers._flowjax import from_flowjax
from nvpflow.importers._freia import from_freia
from nvpflow.importers._nflows import from_nflows
from nvpflow.importers._normflows import from_normflows
from nvpflow.importers._parity import ParityError
from nvpflow.importers._sbi import from_sbi
from nvpflow.importers._state_dict import from_state_dict
from nvpflow.importers._zuko import from_zuko

__all__ = [
    "Differences",
    "ImportReport",
    "Imported",
    "ParityError",
    "from_distrax",
    "from_flowjax",
    "from_freia",
    "from_nflows",
    "from_normflows",
    "from_sbi",
    "from_state_dict",
    "from_zuko",
]
