"""Flows of other libraries, brought here with their weights and a report of how exactly they agree.

Each function takes a live object of its library and makes the flow of the same layers and weights. It computes both on
the same rows and keeps the comparison as `Flow.import_report`. Objects are known by the names of their classes and
attributes: nvpflow imports none of these libraries.
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
