"""Time of every provider over ours, over M: a row of pictures for every way, a column for every K and N.

usage: python benches/python/plot.py benches/results/RUN-ffn.json PICTURE.svg
"""

from __future__ import annotations

import json
import sys


def plot(rows: list[dict], path: str) -> None:
    """Draws the rows of a ``--out`` file; the file's name says the format."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("a picture needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not rows:
        sys.exit("no rows, nothing to draw")
    # The same file of the same rows, and a small one.
    matplotlib.rcParams |= {"svg.hashsalt": "swiglu", "svg.fonttype": "none"}
    ways, sizes = (list(dict.fromkeys(of)) for of in zip(*((row["way"], (row["k"], row["n"])) for row in rows)))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    tokens = sorted({row["m"] for row in rows})
    figure, all_axes = pyplot.subplots(
        len(ways),
        len(sizes),
        squeeze=False,
        sharey="row",
        figsize=(4 * len(sizes), 3.2 * len(ways)),
        layout="constrained",
    )
    for way, of_way in zip(ways, all_axes):
        for (k, n), axes in zip(sizes, of_way):
            here = [row for row in rows if (row["way"], row["k"], row["n"]) == (way, k, n)]
            for name in names:
                of = sorted((row for row in here if row["provider"] == name), key=lambda row: row["m"])
                axes.plot([row["m"] for row in of], [row.get("ratio", 1.0) for row in of], marker="o", label=name)
            axes.set(xscale="log", title=f"{way}, K = {k}, N = {n}")
            if len(tokens) <= 6:
                axes.set_xticks(tokens, [str(m) for m in tokens])
                axes.minorticks_off()
            axes.grid(alpha=0.3)
        of_way[0].set_ylabel("time over ours")
    for axes in all_axes[-1]:
        axes.set_xlabel("tokens (M)")
    all_axes[0, -1].legend()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.endswith(".svg") else None)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        sys.exit(__doc__)
    with open(argv[0]) as file:
        plot(json.load(file)["rows"], argv[1])


if __name__ == "__main__":
    main(sys.argv[1:])
