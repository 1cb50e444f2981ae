"""The published figures, read from the files of `sparsetrail/claims`."""

from functools import cache
from importlib.resources import files
from typing import Any

from sparsetrail.core import Claim

PUBLISHED = ("table1", "table2", "table3", "fig1", "fig3")


def claims(figure: str | None = None) -> tuple[Claim, ...]:
    """Every figure of Tables 1-3 and Figures 1 and 3 of Luu 2025, arXiv:2509.23762, or those of one of them.

    Values are as printed; each states the threat of the paper's text and the one its published code runs.
    """
    if figure is not None and figure not in PUBLISHED:
        raise ValueError(f"figure: expected one of {', '.join(PUBLISHED)}, got {figure!r}")
    return tuple(claim for name in PUBLISHED if figure in (None, name) for claim in _read(name))


@cache
def _read(name: str) -> tuple[Claim, ...]:
    import msgspec

    class Threat(msgspec.Struct, forbid_unknown_fields=True):
        metric: str
        stated: str
        coded: str
        conditions: dict[str, Any]

    class Row(msgspec.Struct, forbid_unknown_fields=True):
        row: str
        dataset: str
        values: dict[str, float]
        conditions: dict[str, Any]
        printed_change: dict[str, float] = {}
        notes: dict[str, str] = {}

    class Figure(msgspec.Struct, forbid_unknown_fields=True):
        schema: int
        figure: str
        source: str
        unit: str
        conditions: dict[str, Any]
        threats: dict[str, Threat]
        rows: list[Row]

    data = files("sparsetrail").joinpath("claims", f"{name}.json").read_bytes()
    whole = msgspec.json.decode(data, type=Figure)
    found = []
    for row in whole.rows:
        for key, printed in row.values.items():
            threat = whole.threats[key]
            extra: dict[str, Any] = {}
            if key in row.printed_change:
                extra["printed_change"] = row.printed_change[key]
            if key in row.notes:
                extra["note"] = row.notes[key]
            conditions = {**whole.conditions, **threat.conditions, **row.conditions, **extra}
            found.append(
                Claim(
                    figure=whole.figure,
                    row=row.row,
                    dataset=row.dataset,
                    metric=threat.metric,
                    value=printed,
                    unit=whole.unit,
                    source=whole.source,
                    stated=threat.stated,
                    coded=threat.coded,
                    conditions={k: _number(v) for k, v in conditions.items()},
                )
            )
    return tuple(found)


def _number(value: Any) -> Any:
    """Radii and steps are written as fractions in the files: '8/255'."""
    if isinstance(value, str) and value.replace("/", "").isdigit() and value.count("/") == 1:
        above, below = value.split("/")
        return int(above) / int(below)
    return value
