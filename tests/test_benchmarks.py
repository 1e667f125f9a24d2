"""The benchmarks run, check what they time, and report it; no time is asserted here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def record(method: str, k: int, ratio: float, model: str = "fc8", **more: object) -> dict:
    key = {"table": "gradient", "model": model, "method": method, "part": "gradient", "k": k, "n": 100}
    return {**key, "time": ratio * 1e-3, "ratio": ratio, "measured": "2000-01-02 03:04", "load": 2.0, **more}


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("name", ["fc16", "tiny-lenet5", "tiny-resnet18", "tiny-vit", "tiny-mixer", "tiny-gpt"])
def test_every_way_of_getting_a_gradient_is_right(name: str) -> None:
    import alternatives
    import cases
    from problems import Problem

    p = Problem(name)
    for method in cases.REFERENCES:
        assert method(p).check() < 1e-3, method.name
    for method in (*cases.OURS, *cases.MORE, *alternatives.ALTERNATIVES):
        try:
            case = method(p, 3)
        except cases.Unsuitable:
            assert "JAX" in method.name or "groups" in method.name
            continue
        assert case.check() <= max(method.bound, 1e-2), method.name
        assert abs(cases.cosine(case.gradients(), p.true_gradients())) < 1
        p.restore()


def test_jax_computes_the_gradient_of_the_same_net() -> None:
    pytest.importorskip("jax")
    import alternatives
    from problems import Problem

    assert alternatives.JaxGrad(Problem("fc16")).check() < 1e-5


@pytest.mark.parametrize("name", ["backprop", "weight, normal", "weight, low rank", "activity", "MeZO", "vmap(jvp)",
                                  "loop of forward_ad"])  # fmt: skip
def test_a_wrong_gradient_is_noticed(name: str) -> None:
    import alternatives
    import cases
    from problems import Problem

    class Wrong(alternatives.by_name(name)):
        def __call__(self) -> None:
            super().__call__()
            self.problem.model.first.weight.grad.mul_(0.5)

    with pytest.raises(cases.WrongResult, match=r"relative error .* bound"):
        Wrong(Problem("fc16"), 2).check()


def test_wrong_differences_of_mezo_are_noticed() -> None:
    import alternatives
    import cases
    from problems import Problem

    class Wrong(alternatives.MeZO):
        def _add(self, seed: int, alpha: float) -> None:
            super()._add(seed if alpha > 0 else seed + 1, alpha)

    with pytest.raises(cases.WrongResult, match="MeZO"):
        Wrong(Problem("tiny-vit"), 2).check()


def test_mezo_leaves_the_parameters_where_they_were() -> None:
    import alternatives
    from problems import Problem

    p = Problem("fc16")
    alternatives.MeZO(p, 3)()
    for name, q in p.parameters.items():
        torch.testing.assert_close(q, p.start[name], rtol=0, atol=1e-6)
    p.restore()
    assert all(torch.equal(q, p.start[name]) for name, q in p.parameters.items())


def test_checkpointing_leaves_the_model_as_it_was() -> None:
    import cases
    from problems import Problem

    p = Problem("tiny-vit")
    cases.CheckpointedBackprop(p)()
    assert len(p.blocks()) == 2 and not any("forward" in vars(block) for block in p.blocks())


def test_a_missing_gradient_is_noticed() -> None:
    import cases

    assert cases.distance({}, {"w": torch.ones(1)}) != cases.distance({}, {"w": torch.ones(1)})  # NaN


def test_a_cosine_is_that_of_whole_gradients() -> None:
    import cases

    a, b = ({"v": torch.tensor([x]), "w": torch.tensor([y])} for x, y in ((1.0, 1.0), (2.0, 0.0)))
    assert cases.cosine(a, b) == pytest.approx(0.5**0.5)


def test_an_unknown_model_is_named() -> None:
    from problems import Problem

    with pytest.raises(ValueError, match="model is 'vgg'; accepted are fc and a width, lenet5"):
        Problem("vgg")


def test_report_holds_figures_against_targets() -> None:
    import report

    cases = [record("weight, normal", 16, 2.0, "fc1024"), record("vmap(jvp)", 16, 9.0, "fc1024")]
    lines = {f.text: f.line(cases)["measured"] for f in report.FIGURES}
    assert lines["fc1024, weight, normal, k = 16: times faster than vmap(jvp)"] == 4.5
    assert lines["fc1024, weight, normal, k = 16: times faster than JAX"] is None
    speed = report.Figure("speed", 5, True, lambda r: 4.5)
    cost = report.Figure("cost", 5, False, lambda r: 4.5)
    unknown = report.Figure("unknown", 5, False, lambda r: None)
    assert [f.line([])["met"] for f in (speed, cost, unknown)] == [False, True, None]
    lines = report.figure_table([f.line([]) for f in (speed, cost, unknown)]).splitlines()
    assert ["missed" in lines[2], "| met" in lines[3], "not measured" in lines[4]] == [True] * 3


def test_peak_memory_is_held_against_backprop() -> None:
    import report

    peaks = [("backprop", 0, 100), ("checkpointed backprop", 0, 20), ("weight, normal, update_", 1, 30)]
    cases = [{"table": "memory", "model": "gpt256", "method": m, "k": k, "bytes": b} for m, k, b in peaks]
    found = {f["figure"]: (f["measured"], f["met"]) for f in (figure.line(cases) for figure in report.FIGURES)}
    assert found["gpt256, weight, normal, update_, k = 1: x backprop's peak memory"] == (0.3, True)
    assert found["gpt256, weight, normal, update_, k = 1: x checkpointed backprop's peak memory"] == (1.5, False)


def test_one_more_tangent_is_counted_in_forward_passes() -> None:
    import report_models

    ratios = [("forward only", 0, 0.25), ("activity", 1, 0.5), ("activity", 4, 1.0), ("activity", 16, 4.0)]
    cases = [record(*case) for case in ratios]
    assert report_models.marginal_cost(cases, "fc8", "activity", "gradient") == pytest.approx(1.0)
    assert report_models.marginal_cost(cases[:3], "fc8", "activity", "gradient") is None


def test_the_page_says_where_backprop_wins() -> None:
    import report_docs

    sure = {"cosine": 1.0, "cosine_error": 0.0, "cosine_samples": 1, "flops": 30.0, "flops_from": "torch.utils.flop_counter"}
    ours = {"cosine": 0.1, "cosine_error": 0.02, "cosine_samples": 32, "flops": 15.0, "flops_from": "closed form"}
    lucky = {**ours, "cosine": 0.9}
    cases = [
        record("backprop", 0, 1.0, **sure),
        record("activity", 1, 0.5, **ours),
        record("activity", 4, 2.0, **ours),
        record("activity", 16, 4.0, **lucky | {"cosine_samples": 2}),
        record("weight, normal", 1, 1.5, **lucky | {"cosine_error": 0.3}),
        {**record("vmap(jvp)", 4, 0.0), "reason": "too large"},
    ]
    del cases[-1]["ratio"]
    peaks = [("backprop", 0, 4 << 20), ("activity", 1, 1 << 20)]
    cases += [
        {"table": "memory", "model": "fc8", "method": m, "k": k, "bytes": b, "measured": "2001", "load": 2.0}
        for m, k, b in peaks
    ]
    text = report_docs.page("some.json", {"cpu": "C"}, cases, [])
    assert "5 to 5 times" in text and "3 of the 4 cases" in text and "from 2000-01-02 03:04 to 2001" in text
    wins = rows_of(report_docs.backprop_wins(cases, ["fc8"]).split("\n\n")[1])
    assert wins == [["fc8", "activity, k = 1", "0.1 ± 0.02", "5", "0.50 (activity, k = 1)", "0.25 (activity, k = 1)"]]
    assert rows_of(report_docs.gradient_table(cases, "fc8")) == [
        ["backprop", "", "1", "1.00", "1.00", "4.0", "1", "1e+03"],
        ["activity", "1", "0.5", "0.50", "0.50 c", "1.0", "0.1 ± 0.02", "200"],
        ["activity", "4", "2", "2.00", "0.50 c", "", "0.1 ± 0.02", "50"],
        ["activity", "16", "4", "4.00", "0.50 c", "", "0.9 ± 0.02", "225"],
        ["weight, normal", "1", "1.5", "1.50", "0.50 c", "", "0.9 ± 0.3", "600"],
    ]
    jax = record("JAX jit, grad", 0, 2.0, in_turns=False, against=3e-3)
    assert report_docs.APART not in text and "as it took turns" not in text
    assert report_docs.APART in report_docs.page("some.json", {}, [*cases, jax], [])
    del jax["in_turns"]
    assert "up to 3.0 times slower beside it" in report_docs.page("some.json", {}, [*cases, jax], [])
    unsure = report_docs.backprop_wins([c for c in cases if c["k"] not in (1, 4)], ["fc8"])
    assert "none known well enough" in unsure and "Per second" not in unsure
    assert rows_of(report_docs.left_out(cases)) == [["fc8", "vmap(jvp)", "4", "too large"]]


def test_attention_is_held_against_the_formula() -> None:
    import report_models

    def bytes_of(name: str, length: int, grown: int) -> dict:
        return {"table": "attention memory", "name": name, "length": length, "k": 4, "bytes": grown}

    records = [
        {"table": "attention", "length": length, "k": 4, "time": time, "against": 1.0, "ratio": time}
        for length, time in ((512, 0.02), (2048, 0.2))
    ]
    records += [bytes_of("attention_jvp", 512, 10 << 20), bytes_of("attention_jvp", 2048, 50 << 20)]
    records.append(bytes_of("unfused formula", 2048, 600 << 20))
    lines = {f["figure"]: f for f in (figure.line(records) for figure in report_models.FIGURES)}
    found = [line for name, line in lines.items() if name.startswith(("attention", "the same"))]
    assert [(round(f["measured"], 6), f["met"]) for f in found] == [(5, True), (12, True), (10, True), (5, False)]
    assert report_models.attention_table(records).splitlines()[-1].split("|")[5].strip() == "5.0"


def test_shares_add_up() -> None:
    import report

    def part(name: str, ratio: float, against: float) -> dict:
        key = {"table": "share", "method": "weight, normal", "model": "fc8", "k": 16, "part": name}
        return {**key, "ratio": ratio, "time": ratio * against, "against": against}

    # a pass of 80 ms is 5 % shorter without its Gram matrix, a step takes 100 ms
    (share,) = report.shares([part("gram", 1.05, 0.08), part("projection", 0.01, 0.1), part("combination", 0.2, 0.1)])
    assert share["gram"] == pytest.approx(0.04) and share["total"] == pytest.approx(0.25)


def test_floors_are_those_of_the_matrix_products() -> None:
    import floors
    from cases import Backprop
    from problems import Problem

    p = Problem("fc256")
    products = floors.products(p)
    first, n = 784 * 256, 784 * 256 + 256 * 256 + 256 * 10
    assert (products.linear, products.first, products.attention) == (2 * 64 * n, 2 * 64 * first, 0)
    assert floors.relative("backprop", products, 0) == 1
    assert floors.relative("forward only", products, 0) == pytest.approx(n / (3 * n - first))
    assert floors.relative("weight, normal", products, 4) == pytest.approx((n + 4 * (2 * n - first)) / (3 * n - first))
    assert floors.relative("activity, bf16 tangents", products, 64) == floors.relative("activity", products, 64)
    assert floors.floor("weight, low rank", products, 1).flops < floors.floor("weight, normal", products, 1).flops
    assert floors.floor("vmap(jvp)", products, 4).stored == 5 * 4 * p.n
    assert floors.counted(Backprop(p)) == floors.floor("backprop", products, 0).flops
    heads, length, width = 2, 8, 8  # of tiny-gpt: two products of T x T x width for each of 3 texts and 2 layers
    assert floors.products(Problem("tiny-gpt")).attention == 2 * 3 * 2 * 2 * length * length * width and heads == 2


def test_slopes_are_those_of_a_line_and_of_a_power() -> None:
    import scaling

    assert scaling.slope([(1, 5), (2, 7), (4, 11)]) == pytest.approx(2)
    assert scaling.slope([(1, 5), (2, 7), (4, 11)], relative=True) == pytest.approx(2)
    plain = {"table": "scaling", "axis": "k", "value": 1, "method": "forward only", "k": 0, "ratio": 0.5, "flops": 10.0}
    cases = [plain] + [
        {"table": "scaling", "axis": "k", "value": k, "method": "activity", "k": k, "ratio": 1 + k, "flops": 10.0 + 5 * k}
        for k in (1, 4, 16)
    ]
    cases += [
        {"table": "scaling", "axis": "width", "value": w, "method": "backprop", "k": 4, "time": 3.0 * w, "flops": w**2}
        for w in (16, 32, 64)
    ]
    first, second = scaling.fits(cases)
    assert (first["slope"], first["floor"]) == (pytest.approx(2), pytest.approx(0.5))  # a backprop is two forward passes
    assert (second["slope"], second["floor"]) == (pytest.approx(1), pytest.approx(2))


@pytest.mark.parametrize("axis, value", [("k", 8), ("batch", 16), ("width", 32), ("depth", 3), ("length", 16)])
def test_the_scaling_study_changes_one_size_at_a_time(axis: str, value: int) -> None:
    import scaling

    p, k = scaling.problem(axis, value)
    assert k == (value if axis == "k" else scaling.K)
    layers = [m for m in p.model.modules() if isinstance(m, torch.nn.Linear)]
    expected = {"k": (64, 512, 3), "batch": (16, 512, 3), "width": (64, 32, 3), "depth": (64, 512, 4)}
    if axis == "length":
        assert p.x.shape == (1, 16)
    else:
        assert (p.x.shape[0], layers[0].out_features, len(layers)) == expected[axis]
