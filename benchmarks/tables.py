"""All tables of a result, in order."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import SUITES
from benchmarks.gates import gate_table
from benchmarks.reading import Results, Table
from benchmarks.tables_grid import grid_summary, grid_table, slower_table
from benchmarks.tables_quality import accuracy_table, hvp_table, memory_table
from benchmarks.tables_speed import (
    cell_table,
    main_table,
    overhead_table,
    peer_table,
    scaling_table,
    variant_table,
)


def all_tables(found: Results) -> list[Table]:
    """Return the tables of every suite that was measured."""
    makers: dict[str, list[Callable[[Results], Table]]] = {
        "table": [main_table, peer_table],
        "grid": [grid_summary, slower_table, grid_table],
        "variants": [variant_table],
        "scaling": [scaling_table],
        "overhead": [overhead_table],
        "cell": [cell_table],
        "hvp": [hvp_table],
        "accuracy": [accuracy_table],
        "memory": [memory_table],
    }
    tables = [
        maker(found) for suite in SUITES if suite in found["suites"] for maker in makers[suite]
    ]
    return [table for table in [gate_table(found), *tables] if table.rows]
