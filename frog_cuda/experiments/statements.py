"""What the paper says of its experiments (Flügel et al., arXiv 2410.17764, section 4), in our words, and how it is checked.

Each check compares pairs of results, such as those of 2 and of 4 tangents, and counts in how many pairs the statement is true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from .descent import FUNCTIONS
from .findings import Findings, Model
from .functions import best_by_case
from .results import Row

__all__ = ["QUESTIONS", "STATEMENTS", "Check", "Statement", "reached"]

#: research questions of the paper, in our words
QUESTIONS = {
    1: "Are several tangents better than one?",
    2: "How should the derivatives along several tangents be combined?",
    3: "Does it work for larger networks?",
    4: "What is the price?",
}

#: numbers that are the same but for rounding in float32
ROUNDING = 1e-5


@dataclass(frozen=True)
class Check:
    """What came of a check.

    Arguments:
        held, cases: pairs in which the statement is true, and all pairs.
        figures: the figures behind it, in a sentence.
        but: the pairs in which it is not true.
        caveat: in what else the results differ that are compared, in sentences.
    """

    held: int
    cases: int
    figures: str
    but: tuple[str, ...] = ()
    caveat: str = ""

    @property
    def verdict(self) -> str:
        told = "holds" if self.held == self.cases else f"holds in {self.held} of {self.cases}" if self.held else "does not hold"
        return f"{told}, not like for like" if self.caveat else told


@dataclass(frozen=True)
class Statement:
    """A statement and its check.

    Arguments:
        name: by which the page refers to it.
        section: of the paper.
        question: number of the research question.
        source: ``"paper"``; or ``"ours"``, for what this project set out to reach.
        check: None: there are no results to check it by.
    """

    name: str
    section: str
    question: int
    source: str
    text: str
    check: Callable[[Findings], Check | None]


def _count(pairs: Sequence[tuple[str, bool]], figures: str) -> Check | None:
    """Arguments:
    pairs: (what is compared, whether the statement is true of it).
    """
    if not pairs:
        return None
    return Check(sum(true for _, true in pairs), len(pairs), figures, tuple(what for what, true in pairs if not true))


# ---- section 4.1


def _quality(findings: Findings) -> dict[tuple[str, int, int], Row]:
    """Rows by approach, k and n."""
    table = findings.approximation
    return {} if table is None else {(row["approach"], row["k"], row["n"]): row for row in table.rows}


def _closer_with_k(findings: Findings) -> Check | None:
    rows = _quality(findings)
    pairs = []
    for (name, k, n), row in rows.items():
        more = rows.get((name, 2 * k, n))
        # The projection is done when k reaches n; in one dimension every tangent is parallel to the gradient
        if name.startswith("sum") or more is None or n == 1 or (name == "orthogonal" and k >= n):
            continue
        pairs.append((f"{name}, n = {n}, k = {k} and {2 * k}", more["cosine"] > row["cosine"]))
    n = 64 if any(n == 64 for _, _, n in rows) else max((n for _, _, n in rows), default=0)
    ks = [k for k in (1, 4, 16, 64) if ("mean", k, n) in rows]
    pair = [(k, rows["mean", k, n]["cosine"], rows["orthogonal", k, n]["cosine"]) for k in ks]
    figures = ", ".join(f"{mean:.3f} and {projection:.3f} at k = {k}" for k, mean, projection in pair)
    return _count(pairs, f"Cosine of mean and projection, n = {n}: {figures}.")


def _projection_is_closest(findings: Findings) -> Check | None:
    rows = _quality(findings)
    pairs = [
        (f"n = {n}, k = {k}", rows["orthogonal", k, n]["cosine"] >= rows[name, k, n]["cosine"] - ROUNDING)
        for name, k, n in rows
        if name in ("mean", "mean, normalised") and ("orthogonal", k, n) in rows
    ]
    gains = [
        (rows["orthogonal", k, n]["cosine"] - row["cosine"], k, n)
        for (name, k, n), row in rows.items()
        if name == "mean" and ("orthogonal", k, n) in rows and n > 1
    ]
    if not gains:
        return None
    gain, k, n = max(gains)
    return _count(pairs, f"Its cosine is above that of the mean by at most {gain:.3f}, at n = {n}, k = {k}.")


def _projection_is_exact(findings: Findings) -> Check | None:
    found = [(k, n, row["cosine"]) for (name, k, n), row in _quality(findings).items() if name == "orthogonal" and k >= n]
    pairs = [(f"n = {n}, k = {k}", abs(cosine - 1) <= ROUNDING) for k, n, cosine in found]
    return _count(pairs, f"The lowest mean cosine is {min((c for _, _, c in found), default=0):.7f}.")


def _lengths(findings: Findings) -> Check | None:
    rows = _quality(findings)
    pairs, examples = [], []
    for (name, k, n), row in rows.items():
        mean = rows.get(("mean", k, n))
        if name != "orthogonal" or mean is None or n <= 2 * k:
            continue
        pairs.append((f"n = {n}, k = {k}", row["norm_ratio"] <= 1 < mean["norm_ratio"]))
        if k in (1, 16) and n in (64, 1024, 16384):
            examples.append(f"{row['norm_ratio']:.3f} and {mean['norm_ratio']:.2f} at n = {n}, k = {k}")
    return _count(pairs, f"Length of projection and mean, in units of the gradient's: {', '.join(examples)}.")


def _closed_forms(findings: Findings) -> Check | None:
    """Four standard errors: of a thousand comparisons, chance lets one in fifteen runs of this fail."""
    pairs, worst = [], 0.0
    for (name, k, n), row in _quality(findings).items():
        if name != "orthogonal":
            continue
        error = 4 * row["cosine_std"] / row["samples"] ** 0.5 + ROUNDING
        pairs.append((f"n = {n}, k = {k}", abs(row["cosine"] - row["cosine_closed_form"]) <= error))
        worst = max(worst, abs(row["cosine"] / row["cosine_closed_form"] - 1))
    return _count(pairs, f"The largest difference is {worst:.1%}, at few tangents, where single cosines vary most.")


def _slower_than_the_price(findings: Findings) -> Check | None:
    rows = _quality(findings)
    pairs = [
        (f"n = {n}, k = {k} and {2 * k}", rows["orthogonal", 2 * k, n]["cosine"] < 2 * row["cosine"])
        for (name, k, n), row in rows.items()
        if name == "orthogonal" and ("orthogonal", 2 * k, n) in rows
    ]
    top = max((n for _, _, n in rows), default=0)
    cells = [rows.get(("orthogonal", k, top)) for k in (1, 16)]
    if None in cells:
        return _count(pairs, "")
    one, many = (cell["cosine"] for cell in cells if cell is not None)
    return _count(pairs, f"At n = {top}, 16 times the tangents bring {many / one:.1f} times the cosine.")


# ---- section 4.2


def reached(function: str, n: int, best: float) -> bool:
    """Whether a value is at the minimum but for rounding in float32."""
    minimum = n * FUNCTIONS[function].minimum
    return best - minimum <= 1e-8 + ROUNDING * abs(minimum)


def _values(findings: Findings) -> dict[tuple[str, int, str], float]:
    """Mean best value by function, n and approach; left out is where a run diverged."""
    return {} if findings.functions is None else best_by_case(findings.functions.rows)


def _descent_pairs(findings: Findings, first: str, second: str) -> Iterator[tuple[str, bool]]:
    """Whether the second approach comes lower than the first, where that is not at the minimum yet."""
    values = _values(findings)
    for (function, n, approach), value in values.items():
        other = values.get((function, n, second))
        if approach == first and other is not None and not (reached(function, n, value) and reached(function, n, other)):
            what = f"{FUNCTIONS[function].title}, n = {n}, {first} ({value:.3g}) and {second} ({other:.3g})"
            yield what, other <= value + ROUNDING * abs(value)


def _lower_with_k(findings: Findings) -> Check | None:
    steps = (("k=1", "{} k=2"), ("{} k=2", "{} k=4"), ("{} k=4", "{} k=16"))
    pairs = [
        pair
        for aggregate in ("mean", "orthogonal")
        for first, second in steps
        for pair in _descent_pairs(findings, first.format(aggregate), second.format(aggregate))
    ]
    return _count(pairs, _example(_values(findings), ["k=1", "orthogonal k=2", "orthogonal k=4", "orthogonal k=16"]))


def _projection_is_lower(findings: Findings) -> Check | None:
    pairs = [pair for k in (2, 4, 16) for pair in _descent_pairs(findings, f"mean k={k}", f"orthogonal k={k}")]
    return _count(pairs, _example(_values(findings), ["mean k=4", "orthogonal k=4", "mean k=16", "orthogonal k=16"]))


def _example(values: dict[tuple[str, int, str], float], approaches: Sequence[str]) -> str:
    """Some values on Sphere in the highest dimension."""
    n = max((n for function, n, _ in values if function == "sphere"), default=0)
    found = [f"{values['sphere', n, a]:.2e} with {a}" for a in approaches if ("sphere", n, a) in values]
    return f"Sphere, n = {n}: {', '.join(found)}." if found else ""


def _exact_descent(findings: Findings) -> Check | None:
    values = _values(findings)
    pairs = []
    for (function, n, approach), value in values.items():
        if not approach.startswith("orthogonal") or int(approach.split("=")[1]) < n or (function, n, "true") not in values:
            continue
        true = values[function, n, "true"]
        same = abs(value - true) <= ROUNDING * abs(true)
        pairs.append((f"{FUNCTIONS[function].title}, n = {n}, {approach}", same or reached(function, n, value)))
    return _count(pairs, "Compared are all functions and dimensions with n at most k.")


def _falls_behind(findings: Findings) -> Check | None:
    values = _values(findings)
    pairs = []
    for (function, n, approach), value in values.items():
        more = values.get((function, 2 * n, approach))
        if approach != "k=1" or more is None or reached(function, 2 * n, more):
            continue
        minimum = FUNCTIONS[function].minimum
        pairs.append((f"{FUNCTIONS[function].title}, n = {n} and {2 * n}", more / (2 * n) - minimum > value / n - minimum))
    return _count(pairs, "Compared is how far above the minimum the best value stays, per dimension.")


# ---- section 4.3


def _by_angle(rows: Sequence[Row], value: str) -> dict[tuple[int, str], dict[int, float]]:
    """Means over the seeds by (k, aggregation) and angle, without normal tangents."""
    found: dict[tuple[int, str], dict[int, list[float]]] = {}
    for row in rows:
        kind = row["approach"].split(" k=")[0]
        if kind in ("mean", "orthogonal") and row["angle"] is not None and row[value] is not None:
            found.setdefault((row["k"], kind), {}).setdefault(row["angle"], []).append(row[value])
    return {case: {a: sum(v) / len(v) for a, v in sorted(angles.items())} for case, angles in found.items()}


def _angle_tables(findings: Findings) -> list[tuple[str, float, dict[tuple[int, str], dict[int, float]]]]:
    """(what, sign that makes more better, means by angle)."""
    tables = []
    if findings.angles is not None:
        tables.append(("cosine", 1.0, _by_angle(findings.angles.rows, "cosine")))
    if findings.descent is not None:
        tables.append(("best value", -1.0, _by_angle(findings.descent.rows, "best")))
    return tables


def _angle_is_no_matter(findings: Findings) -> Check | None:
    pairs, spreads = [], []
    for what, _, table in _angle_tables(findings):
        for (k, kind), angles in table.items():
            if kind == "orthogonal":
                spread = (max(angles.values()) - min(angles.values())) / max(map(abs, angles.values()))
                pairs.append((f"{what}, k = {k}", spread <= 100 * ROUNDING))
                spreads.append(spread)
    return _count(pairs, f"Relative differences between angles are at most {max(spreads, default=0):.1e}.")


def _narrow_is_worse(findings: Findings) -> Check | None:
    pairs, examples = [], []
    for what, sign, table in _angle_tables(findings):
        for (k, kind), angles in table.items():
            if kind == "mean":
                order = list(angles)
                for narrow, wide in zip(order, order[1:]):
                    # Where both are at the best value there is, they are equal but for rounding
                    better = sign * (angles[wide] - angles[narrow]) >= -ROUNDING * abs(angles[wide])
                    pairs.append((f"{what}, k = {k}, {narrow} and {wide} degrees", better))
                if what == "cosine":
                    examples.append(f"{angles[order[0]]:.3f} to {angles[order[-1]]:.3f} at k = {k}")
    return _count(pairs, f"Cosine from the narrowest to the widest cone: {', '.join(examples)}." if examples else "")


# ---- sections 4.4 and 4.5

SMALL, LARGE = ("fc width=",), ("lenet5", "resnet18", "vit", "mixer")


def _models(findings: Findings, names: Sequence[str]) -> list[Model]:
    return [model for name in names for model in findings.named(name)]


def _errors_fall(names: Sequence[str]) -> Callable[[Findings], Check | None]:
    def check(findings: Findings) -> Check | None:
        pairs, examples = [], []
        for model in _models(findings, names):
            for aggregate in ("mean", "orthogonal"):
                errors = {k: e for k in model.ks if (e := model.error(aggregate, k)) is not None}
                order = list(errors)
                pairs += [
                    (f"{model.name}, {aggregate}, k = {k} and {more}", errors[more] < errors[k])
                    for k, more in zip(order, order[1:])
                ]
                if len(order) > 1:
                    examples.append(f"{model.name}, {aggregate}: {', '.join(f'{e:.1f}' for e in errors.values())}")
        return _count(pairs, f"Test error in percent with rising k. {'; '.join(examples)}.")

    return check


def _projection_trains(names: Sequence[str]) -> Callable[[Findings], Check | None]:
    def check(findings: Findings) -> Check | None:
        pairs, gains = [], []
        for model in _models(findings, names):
            for k in model.ks:
                mean, orthogonal = (model.error(a, k) for a in ("mean", "orthogonal"))
                if k > 1 and mean is not None and orthogonal is not None:
                    pairs.append((f"{model.name}, k = {k}", orthogonal <= mean))
                    gains.append(mean - orthogonal)
        if not gains:
            return None
        return _count(pairs, f"The projection's test error is lower by {min(gains):.1f} to {max(gains):.1f} points.")

    return check


def _gaps(findings: Findings, names: Sequence[str], k: int = 16) -> dict[str, float]:
    """Test error with k tangents projected, less that of backprop, in points, by network."""
    gaps = {}
    for model in _models(findings, names):
        error, bp = model.error("orthogonal", k), model.backprop
        if error is not None and bp is not None:
            gaps[model.name] = error - bp
    return gaps


def _near_backprop(findings: Findings) -> Check | None:
    gaps = _gaps(findings, SMALL)
    figures = ", ".join(f"{gap:.1f} points at {name}" for name, gap in gaps.items())
    return _count([(name, gap <= 3) for name, gap in gaps.items()], f"Above the test error of backprop by {figures}.")


def _wider_is_harder(findings: Findings) -> Check | None:
    pairs, examples = [], []
    for k in (1, 2, 4, 16):
        gaps = list(_gaps(findings, SMALL, k).items())
        pairs += [(f"k = {k}, {a} and {b}", high > low) for (a, low), (b, high) in zip(gaps, gaps[1:])]
        if len(gaps) > 1:
            examples.append(f"{', '.join(f'{gap:.1f}' for _, gap in gaps)} at k = {k}")
    check = _count(pairs, f"Points above backprop with rising width: {'; '.join(examples)}.")
    return None if check is None else replace(check, caveat=_not_alike(_models(findings, SMALL)))


def _not_alike(models: Sequence[Model]) -> str:
    """What else than the width differs between networks whose gaps to backprop are compared; empty: nothing that is known."""
    told, limits, shares = [], set(), set()
    for model in models:
        estimates = [cell for k in (1, 2, 4, 16) if (cell := model.cell("orthogonal", k)) is not None]
        cells = [*estimates, *([model.cells["bp"]] if "bp" in model.cells else [])]
        if not cells:
            continue
        most = sorted({run["settings"]["epochs"] for cell in cells for run in cell.runs})
        by_hand, runs = sum(cell.by_hand for cell in cells), sum(len(cell.runs) for cell in estimates)
        limits.add(tuple(most))
        shares.add(by_hand > 0)
        told.append(
            f"{model.name}, at most {' or '.join(map(str, most))} epochs, which cut off {sum(c.cut_off for c in estimates)} of "
            f"{runs} runs without backprop, and {by_hand} of {len(cells)} learning rates set by hand"
        )
    if len(limits) < 2 and len(shares) < 2:
        return ""
    return f"The networks were not trained alike: {'; '.join(told)}. A part of the differences may come from that."


def _gap_remains(findings: Findings) -> Check | None:
    gaps = _gaps(findings, LARGE)
    figures = ", ".join(f"{gap:.1f} points at {name}" for name, gap in gaps.items())
    return _count([(name, gap > 0) for name, gap in gaps.items()], f"Above the test error of backprop by {figures}.")


#: name, section, research question, whose, text, check
STATEMENTS = tuple(
    Statement(*fields)
    for fields in (
        ("A1", "4.1", 1, "paper", "The more tangents, the closer is the estimate to the gradient.", _closer_with_k),
        ("A2", "4.1", 2, "paper", "No combination comes closer than the projection.", _projection_is_closest),
        ("A3", "4.1", 2, "paper", "With k >= n tangents the projection is the gradient.", _projection_is_exact),
        ("A4", "4.1", 2, "paper", "The projection is never longer than the gradient; the mean is, for k < n / 2.", _lengths),
        ("A5", "4.1", 2, "ours", "The projection's cosine is E[chi_k] / E[chi_n], to 4 standard errors.", _closed_forms),
        ("A6", "4.1", 4, "ours", "Twice the tangents bring less than twice the cosine.", _slower_than_the_price),
        ("F1", "4.2", 1, "paper", "The more tangents, the lower is the value that descent reaches.", _lower_with_k),
        ("F2", "4.2", 2, "paper", "The projection comes at least as low as the mean.", _projection_is_lower),
        ("F3", "4.2", 2, "paper", "With k >= n tangents the projection descends as the gradient does.", _exact_descent),
        ("F4", "4.2", 3, "paper", "A single tangent falls behind as dimensions grow.", _falls_behind),
        ("C1", "4.3", 2, "paper", "The projection does not depend on the angle between tangents.", _angle_is_no_matter),
        ("C2", "4.3", 2, "paper", "The mean gets worse as the cone narrows.", _narrow_is_worse),
        ("N1", "4.4", 1, "paper", "FC: the more tangents, the lower is the test error.", _errors_fall(SMALL)),
        ("N2", "4.4", 2, "paper", "FC: the projection trains at least as well as the mean.", _projection_trains(SMALL)),
        ("N3", "4.4", 3, "ours", "FC: 16 tangents, projected, come within 3 points of backprop.", _near_backprop),
        ("N4", "4.4", 3, "paper", "FC: the wider the layers, the larger is the gap to backprop.", _wider_is_harder),
        ("L1", "4.5", 1, "paper", "Larger: the more tangents, the lower is the test error.", _errors_fall(LARGE)),
        (
            "L2",
            "4.5",
            2,
            "paper",
            "Larger: the projection trains at least as well as the mean.",
            _projection_trains(LARGE),
        ),
        ("L3", "4.5", 3, "paper", "Larger: with 16 tangents, a gap to backprop remains.", _gap_remains),
    )
)
