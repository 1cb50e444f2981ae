"""The chart of a network with parts of its backward replaced."""

from sparsetrail.report.ablation_tables import KINDS, Ablation
from sparsetrail.report.charts.look import Spec, finite, plain


def ablation_spec(found: Ablation) -> Spec:
    """Zeros left in all operations, by kind, a bar per replacement; longer than the first where one adds zeros."""
    import altair as alt

    base = found.rows[0]
    names = [row.name for row in found.rows]
    values = [
        {"replaced": name, "kind": kind, "order": i, "zero": finite(100 * zero), "left": finite(100 * row.left)}
        for name, row in zip(names, found.rows, strict=True)
        for i, (kind, zero) in enumerate(zip(found.kinds, row.of_all, strict=True))
        if zero
    ]
    kinds = [k for k in found.kinds if any(v["kind"] == k for v in values)]
    known = [*KINDS, *(k for k in kinds if k not in KINDS)]  # the colour of a kind is that of its place here
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_bar(size=13)
        .encode(
            x=alt.X("zero:Q", title="zero entries, % of all", stack="zero"),
            y=alt.Y("replaced:N", scale=alt.Scale(domain=names), axis=alt.Axis(title=None, labelLimit=420)),
            color=alt.Color(
                "kind:N",
                scale=alt.Scale(domain=known),
                legend=alt.Legend(title=None, orient="top", columns=3, values=kinds),
            ),
            order=alt.Order("order:Q"),
            tooltip=[
                alt.Tooltip("replaced:N"),
                alt.Tooltip("kind:N"),
                alt.Tooltip("zero:Q", title="zero, % of all entries", format=".3f"),
                alt.Tooltip("left:Q", title="of the zeros, %", format=".1f"),
            ],
        )
        .properties(width=520, height=alt.Step(20))
    )
    rule = alt.Chart(alt.Data(values=[{"zero": 100 * base.zero}])).mark_rule(style="stage", strokeDash=[2, 2])
    return plain(alt.layer(rule.encode(x="zero:Q"), chart))
