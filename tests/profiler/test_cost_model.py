from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.profiler.cost_model import (
    equal_rows,
    fit_cost_model,
    load_cost_model,
    padded_work,
)
from lobra.profiler.head import HeadProfile
from lobra.profiler.lookup import published_time_path
from lobra.profiler.profiles import TimeProfile, load_time_profile
from tests.profiler.support import error_of_seen
from tests.tiers import examples

WORK = padded_work(2, 512)


def profile_of(times: list[tuple[int, int, int, float]]) -> TimeProfile:
    table = np.array(times, dtype=float)
    whole = table[:, :3].astype(np.int64)
    return TimeProfile(whole[:, 0], whole[:, 1], whole[:, 2], table[:, 3])


@pytest.fixture
def published(project_root: Path) -> TimeProfile:
    return load_time_profile(project_root / published_time_path("7B"))


def test_the_six_coefficients_err_as_lobras_do(published: TimeProfile) -> None:
    model = fit_cost_model(published, 32, "lobra6")
    mean = {1: 0.039, 2: 0.023, 4: 0.014, 8: 0.048}
    worst = {1: 0.14, 2: 0.10, 4: 0.06, 8: 0.16}
    for tp, fit in model.layers.items():
        error = error_of_seen(fit, published, tp)
        assert error.mean() == pytest.approx(mean[tp], abs=1e-3)
        assert error.max() == pytest.approx(worst[tp], abs=6e-3)


def test_the_fitted_times_never_fall(published: TimeProfile) -> None:
    model = fit_cost_model(published, 32)
    b, s = np.arange(1, 65)[:, None], np.arange(16, 65536, 64)[None, :]
    for tp in model.layers:
        time_ms = model.micro_batch_time(Layout(tp, 1), *padded_work(b, s)).layers_ms
        assert time_ms.shape == (64, s.shape[1])
        assert (time_ms > 0).all()
        assert (np.diff(time_ms, axis=0) >= 0).all()
        assert (np.diff(time_ms, axis=1) >= 0).all()


@given(st.integers(10, 200), st.integers(100, 1000), st.integers(0, 100))
@examples(50, 500)
def test_a_few_rows_of_a_plain_law_are_followed_four_times_beyond(
    hundredths: int, per_token: int, quadratic: int
) -> None:
    constant, per_token, quadratic = hundredths / 100, per_token * 1e-5, quadratic * 1e-8

    def law(b: float, s: float) -> float:
        return constant + per_token * b * s + quadratic * b * s * s

    rows = [(1, s, b, law(b, s)) for s in (128, 512, 2048) for b in (1, 4)]
    model = fit_cost_model(profile_of(rows), 4)
    assert error_of_seen(model.layers[1], profile_of(rows), 1).max() < 1e-6
    far = model.micro_batch_time(Layout(1, 4), *padded_work(2, 8192))
    assert float(far.layers_ms) == pytest.approx(law(2, 8192), rel=1e-6)
    lengths = np.array([700, 130, 41])  # of unequal sequences the law asks for tokens and squares
    tokens, squares = lengths.sum(), (lengths**2).sum()
    packed = model.micro_batch_time(Layout(1, 4), tokens, squares)
    expected = constant + per_token * tokens + quadratic * squares
    assert float(packed.layers_ms) == pytest.approx(expected, rel=1e-6)


@given(st.integers(1, 2**14), st.integers(1, 2**18))
@examples(200, 5000)
def test_equal_rows_are_known_from_their_work_exactly(b: int, s: int) -> None:
    assert equal_rows(*padded_work(b, s)) == (b, s)


def test_a_micro_batch_takes_the_layers_of_the_largest_stage_and_the_head() -> None:
    rows = [(1, s, b, 1.0 + b * s / 1000) for s in (100, 200, 400) for b in (1, 2, 3)]
    head = [(1, s, b, b * s / 100) for s in (100, 200, 400) for b in (1, 2, 3)]
    model = fit_cost_model(profile_of(rows), 5, head_profile=HeadProfile(profile_of(head)))
    whole = model.micro_batch_time(Layout(1, 1), *padded_work(2, 300))
    time = model.micro_batch_time(Layout(1, 2), *padded_work(2, 300))
    assert float(time.layers_ms) == pytest.approx(3 / 5 * float(whole.layers_ms))
    assert float(time.head_ms) == pytest.approx(6.0, rel=1e-6)
    assert float(time.total_ms) == pytest.approx(float(time.layers_ms) + 6.0, rel=1e-6)


def test_too_few_rows_or_an_unknown_tp_are_refused() -> None:
    rows = [(1, s, 1, 1.0 + s) for s in (100, 200, 300, 400, 500, 600)]
    with pytest.raises(ConfigError, match="coefficients"):
        fit_cost_model(profile_of(rows), 4, "lobra6")
    with pytest.raises(ConfigError, match="no rows for tp 2"):
        fit_cost_model(profile_of(rows), 4).micro_batch_time(Layout(2, 1), 100, 100**2)
    with pytest.raises(ConfigError, match="known are"):
        fit_cost_model(profile_of(rows), 4, "best")  # type: ignore[arg-type]


def test_each_memory_policy_has_its_own_times(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = [(1, s, b, 1.0 + 0.01 * b * s) for s in (64, 256, 1024) for b in (1, 4)]
    lines = [f"{tp},{s},{b},{ms},keep" for tp, s, b, ms in rows]
    lines += [f"{tp},{s},{b},{1.4 * ms}," for tp, s, b, ms in [(2, *row[1:]) for row in rows]]
    lines += [f"{tp},{s},{b},{1.4 * ms},full" for tp, s, b, ms in rows]
    path.write_text("\n".join(["tp,seq_len,mbs,time,memory", *lines]) + "\n")
    model = load_cost_model("tiny", path)
    assert sorted(model.layers) == [1, 2]
    assert model.has(Layout(1, 4, memory="full"))
    assert not model.has(Layout(2, 4, memory="full"))
    plain, again = (
        float(model.micro_batch_time(Layout(1, 2, memory=memory), *WORK).total_ms)
        for memory in ("keep", "full")
    )
    assert again == pytest.approx(1.4 * plain, rel=0.01)
    with pytest.raises(ConfigError, match=r"tp 2 with memory full; it has tp 1, 2; tp 1 full"):
        model.micro_batch_time(Layout(2, 1, memory="full"), *WORK)
    assumed = model.taking_kept_times("full")
    for tp, memory in ((1, "full"), (2, "keep")):
        taken = assumed.micro_batch_time(Layout(tp, 1, memory="full"), *WORK)
        own = model.micro_batch_time(Layout(tp, 1, memory=memory), *WORK)
        assert float(taken.total_ms) == float(own.total_ms)
    with pytest.raises(ConfigError, match="no rows of memory full, only of keep"):
        path.write_text("tp,seq_len,mbs,time\n1,64,1,1.0\n")
        load_time_profile(path, "full")
